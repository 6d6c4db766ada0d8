"""Render images with the statistics of photographs, which EfficientAD's pretraining penalty can use instead.

The penalty keeps the student from imitating the teacher on anything but the product. For that, variety
matters and not meaning: all scales, colours, edges, corners and lines. An image has one to three surfaces,
each a pattern mapped through a palette, covered with shapes whose sizes follow r^-3 ("dead leaves": Lee,
Mumford, Huang: "Occlusion Models for Natural Images", IJCV 2001); then lighting, focus and exposure are
simulated. Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021, compare such images as
training data.

Lengths are in pixels; colours are in [0, 1], except for values that the exposure finally clips.
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
    """Images rendered on demand, none of them twice."""

    size: Size
    """Height and width."""
    seed: int

    def __post_init__(self) -> None:
        """Raise ConfigError if the size is too small."""
        if min(self.size) < 32:
            height, width = self.size
            raise ConfigError(
                f"image size {height}x{width}: rendered images need at least 32 pixels in each direction"
            )

    @property
    def digest(self) -> str:
        """Identifies rendered images, as opposed to photographs."""
        return "drawn"

    def batch(self, step: int, count: int) -> Tensor:
        """Return a step's (count, 3, H, W) float32 images in [0, 1]."""
        keys = [seeding.generator(self.seed, "texture", step, place).initial_seed() for place in range(count)]
        return torch.from_numpy(np.stack([images.to_input(draw(self.size, key)) for key in keys]))


def draw(size: Size, seed: int) -> AnyArray:
    """Render one (H, W, 3) uint8 image of at least 32 x 32 pixels, determined by the seed."""
    rng = np.random.default_rng(seed)
    saturation = 0.12 * rng.lognormal(0, 0.7)
    tint = saturation * rng.normal((0.6, 0), (1.1, 0.7))
    scene = [surface(rng, size, colours(rng, 6, saturation, tint)) for _ in range(rng.integers(1, 4))]
    image = scene[0] if rng.random() < 0.2 else arrange(rng, scene, saturation, tint)
    return exposed(rng, focused(rng, lit(rng, image)))


def colours(rng: Rng, count: int, saturation: float, tint: AnyArray) -> AnyArray:
    """Sample (count, 3) colours that vary most in lightness, less in blue-orange, least in purple-green.

    These are the principal axes of the colours in photographs (Ohta, Kanade, Sakai 1980).
    """
    light = 0.5 + 0.25 * rng.standard_normal((count, 1))
    warm, green = (tint + saturation * rng.standard_normal((count, 2)) * (1.0, 0.65)).T
    opponent = np.stack([warm / 2 - green / 6, green / 3, -warm / 2 - green / 6], axis=1)
    drawn: AnyArray = (light + opponent).astype(np.float32)
    return drawn


# --- patterns: (H, W) float32, roughly in [0, 1] ---


def spectral_noise(rng: Rng, size: Size, amplitude: AnyArray) -> AnyArray:
    """Return (H, W) noise of unit variance, given the (H, W // 2 + 1) amplitudes of its spectrum."""
    # Uniform, which is three times as fast as Gaussian: the sums at each pixel are Gaussian in any case.
    parts = rng.random((*amplitude.shape, 2), np.float32) - np.float32(0.5)
    noise: AnyArray = fft.irfft2(parts.view(np.complex64)[..., 0] * amplitude, size)
    noise /= noise.std() + np.float32(1e-6)
    return noise


def frequencies(rng: Rng, size: Size, stretch: float) -> tuple[AnyArray, AnyArray]:
    """Return (H, W // 2 + 1) frequencies, in cycles per pixel, along two random axes, the second scaled."""
    fy = np.fft.fftfreq(size[0])[:, None].astype(np.float32)
    fx = np.fft.rfftfreq(size[1])[None, :].astype(np.float32)
    cos, sin = direction(rng)
    across: AnyArray = (fy * cos - fx * sin) * np.float32(stretch)
    return fx * cos + fy * sin, across


def direction(rng: Rng) -> tuple[np.float32, np.float32]:
    """Sample a unit vector; vertical and horizontal ones are more frequent, as in the real world."""
    angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.7 else math.pi / 2 * rng.integers(4)
    return np.float32(math.cos(angle)), np.float32(math.sin(angle))


def cloud(rng: Rng, size: Size) -> AnyArray:
    """Render 1/f^a noise, isotropic or stretched to fibres: plain, folded into ridges, or like marble."""
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
    """Render noise of one scale: grains and pores or, if directional, ripples and stripes; soft or hard."""
    along, across = frequencies(rng, size, 1)
    center = math.exp(rng.uniform(math.log(4 / min(size)), math.log(0.2)))
    distance = (np.hypot(along, across) - np.float32(center)) / np.float32(center * rng.uniform(0.1, 0.5))
    amplitude = np.exp(-distance * distance)
    if rng.random() < 0.5:
        turned = across / np.float32(center * rng.uniform(0.1, 0.6))
        amplitude *= np.exp(-turned * turned)
    return hardened(rng, spectral_noise(rng, size, amplitude))


def hardened(rng: Rng, wave: AnyArray) -> AnyArray:
    """Map values around 0 to [0, 1], with anything from a gentle slope to a sharp edge between two levels."""
    level, hardness = np.float32(rng.normal(0, 0.3)), np.float32(rng.lognormal(0.5, 1))
    hard: AnyArray = 0.5 + np.tanh((wave - level) * hardness) / 2
    return hard


def warped_axes(rng: Rng, size: Size) -> tuple[AnyArray, AnyArray]:
    """Return (H, W) coordinates along two random axes, bent by slow waves and seen in perspective."""
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
    """Render stripes, checks, a grid or a weave."""
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
    """Render bricks, tiles or planks in various shades, with or without joints."""
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
    """Render a linear or radial gradient."""
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
"""The patterns of surfaces, each with its probability."""


def pattern(rng: Rng, size: Size) -> AnyArray:
    """Render a pattern chosen at random."""
    number = rng.choice(len(PATTERNS), p=[share for _, share in PATTERNS])
    return PATTERNS[number][0](rng, size)


# --- surfaces and shapes: (H, W, 3) float32 ---


def surface(rng: Rng, size: Size, palette: AnyArray) -> AnyArray:
    """Render a pattern in some of the palette's colours, in half of the cases with a second one over it."""
    image = painted(rng, pattern(rng, size), palette)
    if rng.random() < 0.5:
        over = painted(rng, pattern(rng, size), palette) - palette.mean(0)
        image += over * np.float32(rng.uniform(0.1, 0.6))
    return image


def painted(rng: Rng, values: AnyArray, palette: AnyArray) -> AnyArray:
    """Map (H, W) values in [0, 1] to colours interpolated between 2 or more of the palette's."""
    chosen = palette[: rng.integers(2, len(palette) + 1)]
    places = np.linspace(0, len(chosen) - 1, 1024)
    table = np.stack([np.interp(places, range(len(chosen)), channel) for channel in chosen.T], axis=1)
    index = np.clip(values * 1023, 0, 1023).astype(np.intp)
    image: AnyArray = table.astype(np.float32).take(index, 0)
    return image


Shape = Callable[[AnyArray, AnyArray], AnyArray]

SHAPES: tuple[Shape, ...] = (
    lambda u, v: u * u + v * v,  # an ellipse
    lambda u, v: np.maximum(np.abs(u), np.abs(v)),  # a square, or a bar if stretched
    lambda u, v: np.maximum(np.abs(u) * np.float32(0.87) + v * np.float32(0.5), -v) * 2,  # a triangle
    lambda u, v: np.abs(v) + u * u,  # a leaf with two tips
    lambda u, v: np.abs(u) + np.abs(v),  # a diamond
    lambda u, v: 4 * np.abs(u * u + v * v - np.float32(0.7)),  # a ring
    lambda u, v: np.sqrt(np.abs(u)) + np.sqrt(np.abs(v)),  # a star with four tips
)
"""Functions of coordinates in [-1, 1] whose values are below 1 inside the shape and 0 at its centre."""


@dataclass(frozen=True)
class Leaves:
    """For each pixel the number of the visible shape, 0 for none, and the shape's function, 1 at the edge."""

    numbers: AnyArray
    rim: AnyArray
    count: int


def scatter(rng: Rng, size: Size) -> Leaves:
    """Scatter overlapping shapes at random: few large ones or many of all sizes, round or elongated."""
    count = int(math.exp(rng.uniform(0, math.log(90))))
    smallest = min(size) * rng.uniform(0.1, 0.4) / math.sqrt(count)
    largest = 0.5 * min(size)
    # Inverse transform sampling of the density r^-3 between the two.
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
    """Bend, rotate and place a shape at random; return its window in the image and its function there."""
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
    """Lay shapes cut from the other surfaces on the first, each with its own colour, shading and shadow."""
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
    """Return an (H, W) term to add that makes the shapes look rounded, tilted to the light or outlined."""
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
    """Return an (H, W) factor for the shadow that the shapes cast."""
    shift = rng.normal(0, 0.03 * min(leaves.rim.shape), 2).astype(int)
    mask = np.roll((leaves.numbers > 0).astype(np.float32), tuple(shift), (0, 1))
    return 1 - np.float32(rng.uniform(0.2, 0.8)) * blurred(mask, rng.uniform(1, 6))


def blurred(image: AnyArray, sigma: float) -> AnyArray:
    """Blur along both axes with two successive box filters, whose cost is independent of their width."""
    width = max(1, round(math.sqrt(6 * sigma * sigma + 1)))
    size = (width, width) + (1,) * (image.ndim - 2)
    result: AnyArray = ndimage.uniform_filter(ndimage.uniform_filter(image, size), size)
    return result


# --- light and camera ---


def lit(rng: Rng, image: AnyArray) -> AnyArray:
    """Make the light fall off to one side and, in some images, cast a soft-edged shadow."""
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
    """Simulate defocus of a random degree by repeated binomial blurs over three pixels, nearly a Gaussian."""
    times = min(12, 1 + int(rng.exponential(0.9)))  # the standard deviation is the square root of half of it
    image = np.pad(image, ((times, times), (times, times), (0, 0)), mode="edge")
    for _ in range(times):
        image = image[:-2] + 2 * image[1:-1] + image[2:]
        image = (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:]) / 16
    return image


def exposed(rng: Rng, image: AnyArray) -> AnyArray:
    """Apply a random mean, contrast, noise, gamma and colour cast; return (H, W, 3) uint8."""
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
