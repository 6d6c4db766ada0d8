"""Render the demo's product: a machined cover flange on a conveyor.

A brushed plate with chamfered edges, a turned boss around a bore, four socket-head screws, a dowel hole and a
printed part number. The surface is a height field built from signed distances (negative inside) and lit from
one direction, so that a flaw in height, outline, colour or screws is lit like the rest.

The unit of length is 1/256 of the width of the image, whatever its resolution. The origin of the part's
coordinates is the centre of the bore; y points down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from blemish.types import AnyArray, BoolArray, FloatArray

Rng = np.random.Generator

Points = list[tuple[float, float]]

Colour = tuple[float, float, float]

FRAME = 256.0

HALF, CORNER, CHAMFER = 97.0, 24.0, 5.0

BOSS, GROOVE, BORE = 57.0, 44.0, 31.0

SCREW_AT, SEAT, HEAD, SOCKET, THREAD = 69.0, 16.0, 12.5, 6.4, 7.5

DOWEL_X, DOWEL_Y, DOWEL = 0.0, -77.0, 5.0

MARK_X, MARK_Y, MARK_STEP, MARK_SCALE = -25.5, 70.0, 11.0, 2.1

# Characters of the part number as strokes on a grid 4 wide and 6 high.
GLYPHS: dict[str, list[Points]] = {
    "F": [[(4, 0), (0, 0), (0, 6)], [(0, 3), (3, 3)]],
    "L": [[(0, 0), (0, 6), (4, 6)]],
    "-": [[(0.6, 3.2), (3.4, 3.2)]],
    "4": [[(3, 6), (3, 0), (0, 4.2), (4, 4.2)]],
    "2": [[(0.1, 1.2), (0.7, 0.3), (2, 0), (3.3, 0.3), (3.9, 1.5), (3.3, 2.8), (0, 6), (4, 6)]],
}

PART_NUMBER = "FL-42"


@dataclass(frozen=True)
class Screw:
    """A socket-head screw on the part."""

    x: float
    y: float
    turn: float
    """Rotation of the socket in radians."""
    seated: bool = True
    """Whether it has a counterbore; an extra screw has none."""
    present: bool = True


@dataclass(frozen=True)
class Scene:
    """The variation between good parts: pose, light, material, camera."""

    angle: float
    shift: tuple[float, float]
    zoom: float
    azimuth: float
    elevation: float
    gain: float
    falloff: tuple[float, float]
    """Relative change of the light from the centre of the image to its right and lower edges."""
    tint: Colour
    brushing: float
    """Relative strength of the brush marks."""
    blur: float
    """Standard deviation of the lens blur in pixels."""
    noise: float
    screws: tuple[Screw, ...]


@dataclass(frozen=True)
class Part:
    """A part in its pose: its coordinates and distances at each pixel of the image, (H, W) each."""

    scene: Scene
    pixel: float
    """Width of a pixel."""
    x: FloatArray
    y: FloatArray
    outline: FloatArray
    """Signed distance to the plate's outline."""
    radius: FloatArray
    """Distance to the centre of the bore."""


@dataclass(frozen=True)
class Flaw:
    """The changes that a defect makes to a part; arrays are (H, W) and neutral where there is no defect."""

    mask: BoolArray
    outline: FloatArray
    """Like `Part.outline`, but without the material that the defect removed."""
    screws: tuple[Screw, ...]
    relief: FloatArray
    """Height added to the surface."""
    opacity: FloatArray
    """Opacity of a layer over the surface, 0 to 1."""
    colour: Colour = (0.0, 0.0, 0.0)
    """Linear RGB colour of that layer."""


@dataclass(frozen=True)
class Surface:
    """The properties of the surface, (H, W) each; features are added by changing the arrays in place."""

    height: FloatArray
    albedo: FloatArray
    gloss: FloatArray
    """Strength of the specular reflection."""

    def __getitem__(self, at: tuple[slice, slice]) -> Surface:
        """Return a view of a window of the surface."""
        return Surface(self.height[at], self.albedo[at], self.gloss[at])


def draw_scene(rng: Rng) -> Scene:
    """Sample the pose, light, material and camera of a part at random."""
    corners = [(-SCREW_AT, -SCREW_AT), (SCREW_AT, -SCREW_AT), (-SCREW_AT, SCREW_AT), (SCREW_AT, SCREW_AT)]
    warmth = rng.normal(0, 0.012)
    return Scene(
        angle=math.radians(rng.uniform(-3, 3)),
        shift=(rng.uniform(-4, 4), rng.uniform(-4, 4)),
        zoom=rng.normal(1, 0.005),
        azimuth=math.radians(rng.normal(235, 5)),
        elevation=math.radians(rng.normal(52, 2)),
        gain=rng.normal(1, 0.035),
        falloff=(rng.normal(0, 0.04), rng.normal(0, 0.04)),
        tint=(1.0 + warmth, 1.0, 1.015 - warmth),
        brushing=rng.uniform(0.035, 0.06),
        blur=rng.uniform(0.45, 0.7),
        noise=rng.uniform(0.006, 0.010),
        screws=tuple(Screw(x, y, rng.uniform(0, np.pi / 3)) for x, y in corners),
    )


def pose(scene: Scene, size: int) -> Part:
    """Return the part in its pose, its coordinates evaluated at the centres of size x size pixels."""
    pixel = FRAME / size
    along = (np.arange(size, dtype=np.float32) + 0.5) * pixel - FRAME / 2
    u, v = (along[None, :] - scene.shift[0]) / scene.zoom, (along[:, None] - scene.shift[1]) / scene.zoom
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    x, y = u * cos + v * sin, v * cos - u * sin
    return Part(scene, pixel, x, y, _plate(x, y), np.hypot(x, y))


def sound(part: Part) -> Flaw:
    """Return the neutral flaw, which leaves the part good."""
    nothing = np.zeros(part.x.shape, np.float32)
    return Flaw(nothing > 0, part.outline, part.scene.screws, nothing, nothing)


def render(part: Part, flaw: Flaw, rng: Rng) -> FloatArray:
    """Render the part; return linear light (H, W, 3), with white at 1."""
    surface = _metal(part, flaw, rng)
    _drill_dowel(part, surface)
    _print_number(part, surface)
    for screw in flaw.screws:
        _fit(screw, part, surface)
    surface.height[...] += flaw.relief
    shade, glint = _shading(part, surface.height)
    metal = (surface.albedo * shade + surface.gloss * glint)[..., None] * _rgb(part.scene.tint)
    layer = shade[..., None] * _rgb(flaw.colour)
    metal += flaw.opacity[..., None] * (layer - metal)
    belt = _belt(part, rng)
    material = cover(part, flaw.outline) * cover(part, BORE - part.radius)
    light: FloatArray = (belt + material[..., None] * (metal - belt)) * _lamp(part)[..., None]
    return light


def expose(light: FloatArray, scene: Scene, rng: Rng) -> AnyArray:
    """Simulate the camera: lens blur, shot noise, display gamma, 8 bits."""
    light = _blurred(light, scene.blur)
    noise = rng.standard_normal(light.shape, np.float32) * np.sqrt(light + 0.02)
    seen = np.clip(light + scene.noise * noise, 0, 1)
    picture: AnyArray = (255 * seen ** (1 / 2.2) + 0.5).astype(np.uint8)
    return picture


def _blurred(light: FloatArray, sigma: float) -> FloatArray:
    """Blur along both axes by the middle three taps of a Gaussian, which suffice up to a sigma of 0.7."""
    tail = math.exp(-0.5 / sigma**2)
    middle, side = 1 / (1 + 2 * tail), tail / (1 + 2 * tail)
    for axis in (0, 1):
        n = light.shape[axis]
        padded = light.take([0, *range(n), n - 1], axis)
        sides = padded.take(range(n), axis) + padded.take(range(2, n + 2), axis)
        light = (middle * light + side * sides).astype(np.float32, copy=False)
    return light


# --- shapes ---


def disc(part: Part, x: float, y: float, radius: float) -> FloatArray:
    """Return the signed distance to a disc."""
    distance: FloatArray = np.hypot(part.x - x, part.y - y) - radius
    return distance


def stroke(part: Part, points: Points, widths: Sequence[float]) -> FloatArray:
    """Return the signed distance to a line through points, given its half width at each."""
    nearest = np.full(part.x.shape, np.inf, np.float32)
    for i, ((ax, ay), (bx, by)) in enumerate(pairwise(points)):
        ex, ey, px, py = bx - ax, by - ay, part.x - ax, part.y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        half = widths[i] + along * (widths[i + 1] - widths[i])
        np.minimum(nearest, np.hypot(px - along * ex, py - along * ey) - half, out=nearest)
    return nearest


def cover(part: Part, distance: FloatArray) -> FloatArray:
    """Return the share of each pixel that lies inside a shape: first-order antialiasing."""
    share: FloatArray = np.clip(0.5 - distance / part.pixel, 0, 1)
    return share


def rise(distance: FloatArray, width: float) -> FloatArray:
    """Return a smooth step from 0 at the edge to 1 at `width` inside it."""
    t: FloatArray = np.clip(-distance / width, 0, 1)
    return t * t * (3 - 2 * t)


def grain(part: Part, rng: Rng, along: float, across: float) -> FloatArray:
    """Return noise of unit variance, correlated over the given lengths along the part's x and y axes."""
    white = rng.standard_normal(part.x.shape, np.float32)
    rows, columns = white.shape
    fx = np.fft.rfftfreq(columns, part.pixel).astype(np.float32)[None, :]
    fy = np.fft.fftfreq(rows, part.pixel).astype(np.float32)[:, None]
    cos, sin = math.cos(part.scene.angle), math.sin(part.scene.angle)
    u, v = (fx * cos + fy * sin) * along, (fy * cos - fx * sin) * across
    blur = np.exp(-2 * math.pi**2 * (u * u + v * v))
    smooth = np.fft.irfft2(np.fft.rfft2(white) * blur, white.shape)
    noise: FloatArray = (smooth / smooth.std()).astype(np.float32, copy=False)
    return noise


def _plate(x: FloatArray, y: FloatArray) -> FloatArray:
    """Return the signed distance to a square with rounded corners."""
    qx, qy = np.abs(x) - (HALF - CORNER), np.abs(y) - (HALF - CORNER)
    outside: FloatArray = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)
    return outside - CORNER


def _hexagon(part: Part, x: float, y: float, radius: float, turn: float) -> FloatArray:
    """Return the signed distance to the nearest side, extended, of a hexagon with corners at `radius`."""
    sector = np.mod(np.arctan2(part.y - y, part.x - x) - turn, np.pi / 3) - np.pi / 6
    distance: FloatArray = disc(part, x, y, 0) * np.cos(sector) - radius * math.cos(math.pi / 6)
    return distance


def _window(part: Part, x0: float, y0: float, x1: float, y1: float) -> tuple[Part, tuple[slice, slice]]:
    """Return the part cropped to a box on it, and the crop, so that small features are cheap to render."""
    inside = (part.x > x0) & (part.x < x1) & (part.y > y0) & (part.y < y1)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    at = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    cut = replace(part, x=part.x[at], y=part.y[at], outline=part.outline[at], radius=part.radius[at])
    return cut, at


# --- features ---


def _metal(part: Part, flaw: Flaw, rng: Rng) -> Surface:
    """Build the bare plate: chamfer, boss, groove and bore; the plate is brushed and the boss turned."""
    boss, groove = cover(part, part.radius - BOSS), np.abs(part.radius - GROOVE)
    brushed = part.scene.brushing * (grain(part, rng, 26, 0.6) + 0.6 * grain(part, rng, 4, 0.5))
    turned = np.interp(part.radius, np.arange(0, 64, 0.8), rng.normal(0, 0.035, 80)).astype(np.float32)
    finish = 1 + 0.02 * grain(part, rng, 22, 22) + brushed + boss * (turned - brushed)
    height = 4 * rise(flaw.outline, CHAMFER) + 5 * rise(part.radius - BOSS, 4)
    height -= 2.2 * rise(groove - 3.2, 3) + 4 * rise(part.radius - BORE - 4, 4)
    albedo = 0.34 * finish * (1 - 0.2 * boss) * (1 - 0.35 * rise(groove - 2.6, 2))
    gloss = 0.32 * finish * (1 + 0.5 * boss)
    return Surface(height, albedo, gloss)


def _drill_dowel(part: Part, surface: Surface) -> None:
    near, at = _window(part, DOWEL_X - 12, DOWEL_Y - 12, DOWEL_X + 12, DOWEL_Y + 12)
    _bore(near, surface[at], DOWEL_X, DOWEL_Y, DOWEL)


def _bore(near: Part, spot: Surface, x: float, y: float, radius: float) -> None:
    """Add a dark hole with a small chamfer."""
    hole = cover(near, disc(near, x, y, radius))
    spot.height[...] -= 2.3 * rise(disc(near, x, y, radius + 2), 2)
    spot.albedo[...] *= 1 - 0.91 * hole
    spot.gloss[...] *= 1 - 0.95 * hole


def _print_number(part: Part, surface: Surface) -> None:
    right, bottom = MARK_X + MARK_STEP * len(PART_NUMBER), MARK_Y + 6 * MARK_SCALE
    near, at = _window(part, MARK_X - 4, MARK_Y - 4, right + 4, bottom + 4)
    distance = np.full(near.x.shape, np.inf, np.float32)
    for i, letter in enumerate(PART_NUMBER):
        for line in GLYPHS[letter]:
            points = [(MARK_X + i * MARK_STEP + MARK_SCALE * x, MARK_Y + MARK_SCALE * y) for x, y in line]
            np.minimum(distance, stroke(near, points, [1.1] * len(points)), out=distance)
    ink = cover(near, distance)
    surface[at].albedo[...] *= 1 - 0.8 * ink
    surface[at].gloss[...] *= 1 - 0.8 * ink


def _fit(screw: Screw, part: Part, surface: Surface) -> None:
    """Add a screw's counterbore, and the screw itself or its threaded hole."""
    x, y, reach = screw.x, screw.y, SEAT + 8
    near, at = _window(part, x - reach, y - reach, x + reach, y + reach)
    spot = surface[at]
    if screw.seated:
        spot.height[...] -= 4 * rise(disc(near, x, y, SEAT), 1.6)
        spot.albedo[...] *= 1 - 0.35 * rise(disc(near, x, y, SEAT), 2)
    if screw.present:
        _put_head(screw, near, spot)
    else:
        _bore(near, spot, x, y, THREAD)


def _put_head(screw: Screw, near: Part, spot: Surface) -> None:
    """Add a black screw head with its hexagon socket and its shadow."""
    x, y = screw.x, screw.y
    spot.albedo[...] *= 1 - 0.5 * rise(disc(near, x + 1.5, y + 2, HEAD + 1), 4)
    head, socket = cover(near, disc(near, x, y, HEAD)), _hexagon(near, x, y, SOCKET, screw.turn)
    spot.albedo[...] += head * (0.085 - spot.albedo)
    spot.gloss[...] += head * (0.16 - spot.gloss)
    spot.height[...] += 3.2 * rise(disc(near, x, y, HEAD), 3) - 2 * rise(socket - 0.8, 1.6)
    spot.albedo[...] *= 1 - 0.85 * cover(near, socket)
    spot.gloss[...] *= 1 - 0.9 * cover(near, socket)


# --- light ---


def _towards_light(scene: Scene) -> tuple[float, float, float]:
    """Return the unit vector towards the lamp: right, down, towards the camera."""
    level = math.cos(scene.elevation)
    return level * math.cos(scene.azimuth), level * math.sin(scene.azimuth), math.sin(scene.elevation)


def _rgb(colour: Colour) -> FloatArray:
    return np.array(colour, np.float32)


def _shading(part: Part, height: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the diffuse light on a height field, 1 on a level face, and the specular light, 0 to 1."""
    down, right = np.gradient(height, part.pixel)
    length = np.sqrt(1 + right * right + down * down)
    lx, ly, lz = _towards_light(part.scene)
    matte = np.maximum(lz - lx * right - ly * down, 0) / (length * lz)
    half = math.hypot(lx, ly, lz + 1)  # halfway between lamp and camera
    hx, hy, hz = lx / half, ly / half, (lz + 1) / half
    facing = np.maximum(hz - hx * right - hy * down, 0) / length
    # The highlight on turning marks is anisotropic, after Kajiya and Kay.
    cos, sin = math.cos(part.scene.angle), math.sin(part.scene.angle)
    tangent = (hy * (part.x * cos - part.y * sin) - hx * (part.x * sin + part.y * cos)) / (part.radius + 1)
    turned = facing**6 * (1 - tangent * tangent) ** 18
    return 0.4 + 0.6 * matte, np.where(part.radius < BOSS, turned, facing**22)


def _belt(part: Part, rng: Rng) -> FloatArray:
    """Render the conveyor belt with the shadow of the part: (H, W, 3)."""
    lx, ly, lz = _towards_light(part.scene)
    x, y = part.x + 13 * lx / lz, part.y + 13 * ly / lz
    shadow = rise(np.maximum(_plate(x, y), BORE - np.hypot(x, y)) - 3, 9)
    right, down = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)
    weave = np.sin(part.x * 1.05 + right) * np.sin(part.y * 1.05 + down)
    texture = 1 + 0.10 * weave + 0.10 * grain(part, rng, 0.9, 0.9) + 0.06 * grain(part, rng, 14, 14)
    value = texture * (1 - 0.72 * shadow) * (1 - 0.35 * cover(part, part.radius - BORE))
    belt: FloatArray = value[..., None] * _rgb((0.040, 0.062, 0.058))
    return belt


def _lamp(part: Part) -> FloatArray:
    """Return the strength of the light across the image, (H, W)."""
    ramp = np.linspace(-1, 1, len(part.x), dtype=np.float32)
    right, down = part.scene.falloff
    strength = part.scene.gain * (1 + right * ramp[None, :] + down * ramp[:, None])
    return strength.astype(np.float32, copy=False)
