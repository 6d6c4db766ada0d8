"""The size of a network's input, derived from the size of the images. Imports no torch.

Sizes are (height, width) in pixels. Derived lengths are multiples of 32, the coarsest step of the backbones.
"""

from __future__ import annotations

import math

from blemish.detectors.settings import Config
from blemish.errors import ConfigError

Size = tuple[int, int]

STEP = 32
SQUARE = 1.1
"""Longer divided by shorter side up to which images are resized to a square."""
KEPT = 0.06
"""Change of height / width up to which a size is said to keep the shape: what multiples of 32 allow for."""
SHAPE_WEIGHT = 4
"""How much more an error in the shape counts than the same error in the number of pixels."""


def for_shape(config: Config, image: Size) -> Size:
    """Return the default size for images of this size: their shape, with about side x side pixels.

    Only the shape counts, so small images are enlarged and large ones are reduced. Images up to 1.1 : 1 get
    a square. The lengths are those of `nearest`, at least LEAST, for which the input of a long image may have
    to have more pixels.
    """
    ratio = image[0] / image[1]
    root = 1.0 if 1 / SQUARE <= ratio <= SQUARE else math.sqrt(ratio)
    return nearest(config.side * root, config.side / root, (config.LEAST, config.LEAST))


def square(config: Config) -> Size:
    """Return the default size where there are no images to derive it from."""
    return for_shape(config, (1, 1))


def at_scale(image: Size, scale: tuple[float, float]) -> Size:
    """Return the size at which a pixel of the image becomes `scale` (vertical, horizontal) network pixels.

    Each length is rounded to a multiple of 32, but at least 32.
    """
    height, width = (
        STEP * max(1, math.floor(length * factor / STEP + 0.5))
        for length, factor in zip(image, scale, strict=True)
    )
    return height, width


def for_defect(config: Config, image: Size, defect: float) -> Size:
    """Return the size at which a defect covers NEED network pixels.

    defect: its shorter side in image pixels. The scale is NEED / defect, but at most 1, since enlarging shows
    no more of a defect; lengths are rounded up, as `nearest` does. The result is never smaller than the
    default size.
    """
    usual, scale = for_shape(config, image), min(1.0, config.NEED / defect)
    height, width = (math.ceil(round(length * scale, 6)) for length in image)
    wanted = nearest(height, width, (height, width))
    larger = wanted[0] * wanted[1] > usual[0] * usual[1] and min(wanted) >= config.LEAST
    return wanted if larger else usual


def nearest(height: float, width: float, least: Size = (STEP, STEP)) -> Size:
    """Return the multiples of 32, at least `least`, that are nearest to a height and a width.

    Nearest is the pair with the smallest SHAPE_WEIGHT |log a| + |log b|, where a is the ratio of its
    height / width to the wanted one and b that of the numbers of pixels. With 256 x 256 pixels or more, no
    shape up to 4 : 1 changes by more than 6 %.
    """
    lowest, leftmost = (STEP * math.ceil(length / STEP) for length in least)
    tallest = max(height, lowest, leftmost * height / width) + 2 * STEP
    pairs = {
        (h, max(leftmost, STEP * rounded(h * width / height / STEP)))
        for h in range(lowest, 2 * math.ceil(tallest), STEP)
        for rounded in (math.floor, math.ceil)
    }

    def distance(pair: Size) -> float:
        shape, area = pair[0] / pair[1] / (height / width), pair[0] * pair[1] / (height * width)
        return round(SHAPE_WEIGHT * abs(math.log(shape)) + abs(math.log(area)), 9)

    return min(sorted(pairs), key=distance)


def coverage(image: Size, size: Size, defect: float) -> float:
    """Return how many network pixels, to a tenth, the shorter side of a defect covers where it covers least.

    defect: its shorter side in image pixels.
    """
    return round(defect * min(size[0] / image[0], size[1] / image[1]), 1)


def comparison(image: Size, size: Size) -> str:
    """Return for users how the network's input compares with the image: in its shape, and in its lengths."""
    vertical, horizontal = size[0] / image[0], size[1] / image[1]
    changed = abs(math.log(vertical / horizontal))
    kept = "shape kept" if changed <= KEPT else f"shape kept within {100 * changed:.0f} %"
    return f"{kept}; {math.sqrt(vertical * horizontal):.2g} of the size"


def read_scale(given: str | float | tuple[float, float]) -> tuple[float, float]:
    """Return a scale (vertical, horizontal), given also as one number or as text such as 0.5 or 0.5x0.25.

    Raises ConfigError if it does not fit.
    """
    parts = given.split("x") if isinstance(given, str) else given if isinstance(given, tuple) else (given,)
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < math.inf for number in numbers):
        raise ConfigError(f"scale {given}: expected a number above 0, or two as in 0.5x0.25")
    return numbers[0], numbers[-1]


def read_defect_size(given: str | float) -> float:
    """Return the shorter side of a defect in image pixels, given also as text such as 12 or 12px.

    Raises ConfigError if it does not fit.
    """
    try:
        pixels = float(given.strip().removesuffix("px") if isinstance(given, str) else given)
    except ValueError:
        pixels = math.nan
    if not 0 < pixels < math.inf:
        raise ConfigError(f"defect size {given}: expected pixels of the image above 0, such as 12px")
    return pixels


def written(size: Size) -> str:
    """Return a size as text for users."""
    return f"{size[0]} x {size[1]}"
