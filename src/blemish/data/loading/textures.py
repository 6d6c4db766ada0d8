"""Draw images with the statistics of photographs, for EfficientAD's pretraining penalty without any.

What the student must not imitate the teacher on is all the world but the product, so breadth counts and not
meaning: every scale, colour, edge, corner and line. An image is one to three surfaces, each a pattern seen
through a palette, with shapes whose sizes follow r^-3 lying on them ("dead leaves": Lee, Mumford, Huang:
"Occlusion Models for Natural Images", IJCV 2001), then lit, focused and exposed. Baradad et al., "Learning to
See by Looking at Noise", NeurIPS 2021, compare such images as what a network learns to see from.

Lengths are in pixels, colours in [0, 1] but for what exposure clips in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import fft, ndimage
from torch import Tensor

from blemish import images, seeding
from blemish.errors import ConfigError
from blemish.types import AnyArray

Rng = np.random.Generator

Size = tuple[int, int]


@dataclass(frozen=True)
class Textures:
    """Images that are drawn as they are asked for, none of them twice."""

    size: Size
    """Height and width."""
    seed: int

    def __post_init__(self) -> None:
        """Refuse a size that is too small; raise ConfigError."""
        if min(self.size) < 32:
            height, width = self.size
            raise ConfigError(f"image size {height}x{width}: drawn images need at least 32 in both axes")

    @property
    def digest(self) -> str:
        """Tell a run with these from one with photographs."""
        return "drawn"

    def batch(self, step: int, count: int) -> Tensor:
        """Give a step's (count, 3, H, W) float32 images in [0, 1]."""
        keys = [seeding.generator(self.seed, "texture", step, place).initial_seed() for place in range(count)]
        return torch.from_numpy(np.stack([images.to_input(draw(self.size, key)) for key in keys]))


def draw(size: Size, seed: int) -> AnyArray:
    """Draw one (H, W, 3) uint8 image of at least 32 pixels in both axes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    saturation = 0.12 * rng.lognormal(0, 0.7)
    tint = saturation * rng.normal((0.6, 0), (1.1, 0.7))
    scene = [surface(rng, size, colours(rng, 6, saturation, tint)) for _ in range(rng.integers(1, 4))]
    image = scene[0] if rng.random() < 0.2 else arrange(rng, scene, saturation, tint)
    return exposed(rng, focused(rng, lit(rng, image)))


def colours(rng: Rng, count: int, saturation: float, tint: AnyArray) -> AnyArray:
    """Draw (count, 3) colours: far apart in lightness, less from blue to orange, least from purple to green.

    These are the principal axes of colours in photographs (Ohta, Kanade, Sakai 1980).
    """
    light = 0.5 + 0.25 * rng.standard_normal((count, 1))
    warm, green = (tint + saturation * rng.standard_normal((count, 2)) * (1.0, 0.65)).T
    opponent = np.stack([warm / 2 - green / 6, green / 3, -warm / 2 - green / 6], axis=1)
    drawn: AnyArray = (light + opponent).astype(np.float32)
    return drawn


# --- patterns: (H, W) float32 of about [0, 1] ---


def spectral_noise(rng: Rng, size: Size, amplitude: AnyArray) -> AnyArray:
    """Draw (H, W) noise of unit variance from the (H, W // 2 + 1) amplitudes of its spectrum."""
    # Evenly distributed, which is three times as fast: their sum at each pixel is Gaussian all the same.
    parts = rng.random((*amplitude.shape, 2), np.float32) - np.float32(0.5)
    noise: AnyArray = fft.irfft2(parts.view(np.complex64)[..., 0] * amplitude, size)
    noise /= noise.std() + np.float32(1e-6)
    return noise


def frequencies(rng: Rng, size: Size, stretch: float) -> tuple[AnyArray, AnyArray]:
    """Give frequencies in cycles per pixel along two drawn axes, the second stretched: (H, W // 2 + 1)."""
    fy = np.fft.fftfreq(size[0])[:, None].astype(np.float32)
    fx = np.fft.rfftfreq(size[1])[None, :].astype(np.float32)
    cos, sin = direction(rng)
    across: AnyArray = (fy * cos - fx * sin) * np.float32(stretch)
    return fx * cos + fy * sin, across


def direction(rng: Rng) -> tuple[np.float32, np.float32]:
    """Draw a unit vector; upright and level ones, as the world has them, come up more often."""
    angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.7 else math.pi / 2 * rng.integers(4)
    return np.float32(math.cos(angle)), np.float32(math.sin(angle))


def cloud(rng: Rng, size: Size) -> AnyArray:
    """Draw 1/f^a noise, isotropic or drawn out to fibres, as it is, folded into ridges, or like marble."""
    along, across = frequencies(rng, size, 1 if rng.random() < 0.6 else rng.uniform(2, 12))
    squared = along * along + across * across
    squared[0, 0] = np.inf
    noise = spectral_noise(rng, size, squared ** np.float32(-rng.uniform(0.35, 0.95)))
    kind = rng.choice(3, p=(0.7, 0.15, 0.15))
    if kind == 0:
        return 0.5 + noise / 4
    if kind == 1:
        return np.abs(noise) / 2
    return 0.5 + np.sin(noise * np.float32(rng.uniform(2, 8))) / 2


def spots(rng: Rng, size: Size) -> AnyArray:
    """Draw noise of one scale: grains and pores, or with one direction ripples and stripes, soft or hard."""
    along, across = frequencies(rng, size, 1)
    center = math.exp(rng.uniform(math.log(4 / min(size)), math.log(0.2)))
    distance = (np.hypot(along, across) - np.float32(center)) / np.float32(center * rng.uniform(0.1, 0.5))
    amplitude = np.exp(-distance * distance)
    if rng.random() < 0.5:
        turned = across / np.float32(center * rng.uniform(0.1, 0.6))
        amplitude *= np.exp(-turned * turned)
    return hardened(rng, spectral_noise(rng, size, amplitude))


def hardened(rng: Rng, wave: AnyArray) -> AnyArray:
    """Turn values around 0 to [0, 1], from a gentle swell to two levels with an edge between."""
    level, hardness = np.float32(rng.normal(0, 0.3)), np.float32(rng.lognormal(0.5, 1))
    hard: AnyArray = 0.5 + np.tanh((wave - level) * hardness) / 2
    return hard


def warped_axes(rng: Rng, size: Size) -> tuple[AnyArray, AnyArray]:
    """Give (H, W) coordinates along two drawn axes, bent by slow waves and seen in perspective."""
    x = np.arange(size[1], dtype=np.float32)[None, :] - size[1] / 2
    y = np.arange(size[0], dtype=np.float32)[:, None] - size[0] / 2
    cos, sin = direction(rng)
    u, v = x * cos + y * sin, y * cos - x * sin
    bend = np.float32(rng.choice([0, rng.uniform(0, 0.12 * min(size))]))
    slow_u, slow_v = (np.float32(rng.uniform(2, 9) / min(size)) for _ in range(2))
    u, v = u + bend * np.sin(slow_v * v), v + bend * np.sin(slow_u * u)
    tilt = 1 + v * np.float32(rng.choice([0, rng.uniform(-0.7, 0.7)]) / max(size))
    return u / tilt, v / tilt


def waves(rng: Rng, size: Size) -> AnyArray:
    """Draw stripes, grids, checks or a weave of them."""
    period = math.exp(rng.uniform(math.log(3), math.log(min(size) / 3)))
    per = np.float32(2 * math.pi / period)
    u, v = warped_axes(rng, size)
    one = np.sin(per * u)
    kind = rng.integers(4)
    if kind == 0:
        return hardened(rng, one)
    other = np.sin(per * np.float32(rng.choice([1, rng.uniform(0.3, 3)])) * v)
    return hardened(rng, (one * other, one + other, np.maximum(one, other))[kind - 1])


def tiles(rng: Rng, size: Size) -> AnyArray:
    """Draw bricks, tiles or planks, each of its own shade, with joints or without."""
    u, v = warped_axes(rng, size)
    height = math.exp(rng.uniform(math.log(4), math.log(min(size) / 2)))
    width = height * rng.choice([1, rng.uniform(1, 4)])
    row = np.floor(v / np.float32(height))
    u = u / np.float32(width) + row * np.float32(rng.choice([0, 0.5, 0.37]))
    column = np.floor(u)
    shades = rng.random((64, 64), np.float32)
    shade = shades[row.astype(np.int32) & 63, column.astype(np.int32) & 63]
    joint = np.float32(rng.uniform(0.5, 2) / width)
    joints = (u - column < joint) | (v / np.float32(height) - row < joint * np.float32(width / height))
    return np.where(joints, np.float32(rng.random()), shade) if rng.random() < 0.6 else shade


def ramp(rng: Rng, size: Size) -> AnyArray:
    """Draw a gradient: from side to side, or round a point."""
    u, v = warped_axes(rng, size)
    if rng.random() < 0.5:
        return 0.5 + u / max(size)
    return np.hypot(u - np.float32(rng.normal(0, size[1] / 3)), v) / max(size)


PATTERNS: tuple[tuple[Callable[[Rng, Size], AnyArray], float], ...] = (
    (cloud, 0.48),
    (spots, 0.18),
    (waves, 0.14),
    (tiles, 0.1),
    (ramp, 0.1),
)
"""What a surface bears, each with its share."""


def pattern(rng: Rng, size: Size) -> AnyArray:
    """Draw any pattern."""
    number = rng.choice(len(PATTERNS), p=[share for _, share in PATTERNS])
    return PATTERNS[number][0](rng, size)


# --- surfaces and shapes: (H, W, 3) float32 ---


def surface(rng: Rng, size: Size, palette: AnyArray) -> AnyArray:
    """Draw a pattern through some of the palette's colours, half of the time with a second one over it."""
    image = painted(rng, pattern(rng, size), palette)
    if rng.random() < 0.5:
        over = painted(rng, pattern(rng, size), palette) - palette.mean(0)
        image += over * np.float32(rng.uniform(0.1, 0.6))
    return image


def painted(rng: Rng, values: AnyArray, palette: AnyArray) -> AnyArray:
    """Give each of the (H, W) values in [0, 1] a colour: from 2 to all of the palette's, blended."""
    chosen = palette[: rng.integers(2, len(palette) + 1)]
    places = np.linspace(0, len(chosen) - 1, 1024)
    table = np.stack([np.interp(places, range(len(chosen)), channel) for channel in chosen.T], axis=1)
    index = np.clip(values * 1023, 0, 1023).astype(np.intp)
    image: AnyArray = table.astype(np.float32).take(index, 0)
    return image


Shape = Callable[[AnyArray, AnyArray], AnyArray]

SHAPES: tuple[Shape, ...] = (
    lambda u, v: u * u + v * v,  # an ellipse
    lambda u, v: np.maximum(np.abs(u), np.abs(v)),  # a square, drawn out a bar
    lambda u, v: np.maximum(np.abs(u) * np.float32(0.87) + v * np.float32(0.5), -v) * 2,  # a triangle
    lambda u, v: np.abs(v) + u * u,  # a leaf with two tips
    lambda u, v: np.abs(u) + np.abs(v),  # a diamond
    lambda u, v: 4 * np.abs(u * u + v * v - np.float32(0.7)),  # a ring
    lambda u, v: np.sqrt(np.abs(u)) + np.sqrt(np.abs(v)),  # a star with four tips
)
"""Functions of coordinates in [-1, 1] that are below 1 inside; 0 is the middle."""


@dataclass(frozen=True)
class Leaves:
    """Which shape each pixel sees, 0: none, and how near its edge, 1, that is."""

    numbers: AnyArray
    rim: AnyArray
    count: int


def scatter(rng: Rng, size: Size) -> Leaves:
    """Let shapes fall on each other at random, few and large or many of all sizes, round or drawn out."""
    count = int(math.exp(rng.uniform(0, math.log(90))))
    smallest = min(size) * rng.uniform(0.1, 0.4) / math.sqrt(count)
    largest = 0.5 * min(size)
    # The inverse of the distribution with density r^-3 between the two.
    radii = (smallest**-2 - rng.random(count) * (smallest**-2 - largest**-2)) ** -0.5
    spread = rng.choice([0.2, 1.0])
    numbers, rim = np.zeros(size, np.intp), np.zeros(size, np.float32)
    kinds = rng.choice(len(SHAPES), 2)
    for number, radius in enumerate(radii, 1):
        aspect = math.exp(spread * abs(rng.standard_normal()))
        window, level = placed(rng, size, radius, aspect, SHAPES[rng.choice(kinds)])
        inside = level < 1
        numbers[window][inside], rim[window][inside] = number, level[inside]
    return Leaves(numbers, rim, count)


def placed(
    rng: Rng, size: Size, radius: float, aspect: float, shape: Shape
) -> tuple[tuple[slice, slice], AnyArray]:
    """Bend, turn and place a shape; give the window of the image that holds it, and its function there."""
    length, width, bend = radius * aspect, radius / math.sqrt(aspect), rng.uniform(-0.7, 0.7)
    reach = math.hypot(length, (1 + abs(bend)) * width)
    middle = rng.random(2) * size
    rows, columns = (
        (max(0, int(place - reach)), min(side, math.ceil(place + reach)))
        for place, side in zip(middle, size, strict=True)
    )
    y = np.arange(*rows, dtype=np.float32)[:, None] - np.float32(middle[0])
    x = np.arange(*columns, dtype=np.float32)[None, :] - np.float32(middle[1])
    cos, sin = direction(rng)
    u = (x * cos + y * sin) / np.float32(length)
    v = (y * cos - x * sin) / np.float32(width) + np.float32(bend) * u * u
    return (slice(*rows), slice(*columns)), shape(u, v)


def arrange(rng: Rng, scene: list[AnyArray], saturation: float, tint: AnyArray) -> AnyArray:
    """Lay shapes of the other surfaces on the first, each with its own colour and shading; their shadows."""
    leaves = scatter(rng, scene[0].shape[:2])
    ground, *others = scene
    if rng.random() < 0.3:
        ground = blurred(ground, rng.uniform(1, 6))
    if rng.random() < 0.5:
        ground = ground * shadow(rng, leaves)[..., None]
    number = leaves.numbers
    own = colours(rng, leaves.count + 1, saturation, tint)
    texture = np.float32(rng.uniform(0.3, 1.5)) * (others[0] - others[0].mean((0, 1))) if others else 0
    if len(others) == 2:
        second = (np.arange(leaves.count + 1) % 2).astype(np.float32).take(number)[..., None]
        texture = texture + second * (others[1] - others[1].mean((0, 1)) - texture)
    laid = own.take(number, 0) + texture + shading(rng, leaves)[..., None]
    return np.where((number > 0)[..., None], laid, ground)


def shading(rng: Rng, leaves: Leaves) -> AnyArray:
    """Make the shapes round or flat, slanted to the light, some with an outline: (H, W) to add."""
    height, width = leaves.numbers.shape
    slant = rng.normal(0, 0.3, (2, leaves.count + 1)).astype(np.float32)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light: AnyArray = slant[0].take(leaves.numbers) * x + slant[1].take(leaves.numbers) * y
    light -= np.float32(rng.choice([0, rng.uniform(0, 0.5)])) * leaves.rim
    if rng.random() < 0.25:
        light += np.float32(rng.normal(0, 0.3)) * (leaves.rim > rng.uniform(0.6, 0.9))
    return light


def shadow(rng: Rng, leaves: Leaves) -> AnyArray:
    """Darken what lies beside the shapes: an (H, W) factor."""
    shift = rng.normal(0, 0.03 * min(leaves.rim.shape), 2).astype(int)
    mask = np.roll((leaves.numbers > 0).astype(np.float32), tuple(shift), (0, 1))
    return 1 - np.float32(rng.uniform(0.2, 0.8)) * blurred(mask, rng.uniform(1, 6))


def blurred(image: AnyArray, sigma: float) -> AnyArray:
    """Blur both axes by two boxes after each other, at a cost that does not grow with the width."""
    width = max(1, round(math.sqrt(6 * sigma * sigma + 1)))
    size = (width, width) + (1,) * (image.ndim - 2)
    result: AnyArray = ndimage.uniform_filter(ndimage.uniform_filter(image, size), size)
    return result


# --- light and camera ---


def lit(rng: Rng, image: AnyArray) -> AnyArray:
    """Let the light fall off to one side, and cast a soft shadow across some images."""
    height, width = image.shape[:2]
    cos, sin = direction(rng)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :] * cos
    across = x + np.linspace(-1, 1, height, dtype=np.float32)[:, None] * sin
    light = 1 + np.float32(rng.normal(0, 0.2)) * across
    if rng.random() < 0.25:
        edge = (across - np.float32(rng.normal(0, 0.5))) * np.float32(rng.lognormal(2, 1))
        light *= 1 - np.float32(rng.uniform(0.2, 0.7)) * (0.5 + np.tanh(edge) / 2)
    return image * light[..., None]


def focused(rng: Rng, image: AnyArray) -> AnyArray:
    """Blur by a lens, from hardly to far out of focus: as often over three pixels as gives a Gaussian."""
    times = min(12, 1 + int(rng.exponential(0.9)))  # the deviation is the root of half of it
    image = np.pad(image, ((times, times), (times, times), (0, 0)), mode="edge")
    for _ in range(times):
        image = image[:-2] + 2 * image[1:-1] + image[2:]
        image = (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:]) / 16
    return image


def exposed(rng: Rng, image: AnyArray) -> AnyArray:
    """Give an image a drawn mean, contrast, gamma, cast and noise: (H, W, 3) uint8."""
    contrast = np.clip(rng.normal(0.24, 0.08), 0.06, 0.45) / (float(image.std()) + 1e-3)
    image = (image - image.mean()) * np.float32(min(contrast, 4.0)) + np.float32(rng.normal(0.48, 0.13))
    if rng.random() < 0.3:
        grain = rng.standard_normal((*image.shape[:2], 1), np.float32)
        image += np.float32(0.02 * abs(rng.standard_normal())) * grain
    np.clip(image, 0, 1, out=image)
    if rng.random() < 0.5:
        image **= np.float32(rng.lognormal(0, 0.3))
    image *= np.exp(rng.normal(0, 0.05, 3)).astype(np.float32) * 255
    result: AnyArray = np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)
    return result
