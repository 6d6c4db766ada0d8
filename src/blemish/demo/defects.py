"""Defects to plant into rendered parts. Each changes the part before rendering, so that its mask is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from blemish.demo.part import (
    BORE,
    BOSS,
    CHAMFER,
    DOWEL,
    DOWEL_X,
    DOWEL_Y,
    HEAD,
    SEAT,
    Flaw,
    Part,
    Points,
    Rng,
    Screw,
    cover,
    disc,
    grain,
    rise,
    sound,
    stroke,
)
from blemish.types import AnyArray, BoolArray, FloatArray

STAINS = ((0.16, 0.10, 0.05), (0.05, 0.05, 0.05), (0.20, 0.16, 0.09))
"""Rust, coolant, oil."""


# --- defects ---


def _chipped(part: Part, rng: Rng) -> Flaw:
    """Break a piece off the edge of the plate, leaving a rough slope."""
    x, y = _spot(rng, part, np.abs(part.outline) < part.pixel)
    radius = rng.uniform(8, 15)
    outwards = 1 + radius * rng.uniform(0.3, 0.6) / math.hypot(x, y)
    bite = -_blob(rng, part, x * outwards, y * outwards, radius, 0.3)
    outline = np.maximum(part.outline, bite)
    mask = (part.outline < 0) & (bite > part.outline) & (outline > -CHAMFER)
    rough = 0.6 * grain(part, rng, 1.2, 1.2) * mask
    layer = np.float32(0.35) * mask
    return replace(
        sound(part), mask=mask, outline=outline, relief=rough, opacity=layer, colour=(0.42, 0.42, 0.42)
    )


def _crack(part: Part, rng: Rng) -> Flaw:
    """Add a dark jagged line that forks once, outwards from the bore or inwards from the edge."""
    depth, span = _depth(part), np.minimum(np.abs(part.x), np.abs(part.y))
    x, y = start = _spot(rng, part, (depth > 0) & (depth < 4) & (span < 40))
    inwards = math.pi if max(abs(x), abs(y)) > 75 else 0
    heading, count = math.atan2(y, x) + inwards + rng.normal(0, 0.4), int(rng.integers(9, 19))
    turns = rng.normal(0, 0.55, count)
    turns[1:] -= 0.6 * turns[:-1]  # zigzag: each turn mostly undoes the one before
    points = _walk(start, heading, 3.5, turns)
    fork = points[int(rng.integers(2, count - 2))]
    branch = _walk(fork, heading + rng.choice([-0.9, 0.9]), 3.0, turns[: count // 3])
    distance = np.minimum(
        stroke(part, points, np.linspace(rng.uniform(1.1, 1.7), 0.6, len(points)).tolist()),
        stroke(part, branch, np.linspace(0.9, 0.5, len(branch)).tolist()),
    )
    opacity = rng.uniform(0.7, 0.92) * cover(part, distance) * (depth > 0)
    return replace(sound(part), mask=opacity > 0.2, opacity=opacity, colour=(0.03, 0.03, 0.03))


def _dent(part: Part, rng: Rng) -> Flaw:
    """Press a smooth hollow with a slight lip into a face; it is visible by its shading alone."""
    x, y = _spot(rng, part, np.minimum(_depth(part), np.abs(part.radius - BOSS)) > 7)
    length, turn, slim = rng.uniform(9, 16), rng.uniform(0, math.pi), rng.uniform(1, 1.5)
    cos, sin = math.cos(turn), math.sin(turn)
    u, v = (part.x - x) * cos + (part.y - y) * sin, ((part.y - y) * cos - (part.x - x) * sin) * slim
    r2 = (u * u + v * v) / length**2
    mask = (r2 < 1) & (_depth(part) > 0)
    hollow = mask * (1 - r2) ** 2 * (1 - 2.2 * r2)
    relief = (-rng.uniform(0.20, 0.32) * length * hollow).astype(np.float32, copy=False)
    return replace(sound(part), mask=mask, relief=relief)


def _doubled(part: Part, rng: Rng) -> Flaw:
    """Put an extra screw beside the boss, where the plate has no hole."""
    x = float(rng.choice([-1, 1])) * rng.uniform(74, 78)
    extra = Screw(x, rng.uniform(-24, 24), rng.uniform(0, math.pi / 3), seated=False)
    mask = disc(part, extra.x, extra.y, HEAD) < 0
    return replace(sound(part), mask=mask, screws=(*part.scene.screws, extra))


def _missing(part: Part, rng: Rng) -> Flaw:
    """Omit a screw, so that the threaded hole in its counterbore is visible."""
    screws = list(part.scene.screws)
    lost = int(rng.integers(len(screws)))
    screws[lost] = replace(screws[lost], present=False)
    mask = disc(part, screws[lost].x, screws[lost].y, SEAT) < 0
    return replace(sound(part), mask=mask, screws=tuple(screws))


def _scratch(part: Part, rng: Rng) -> Flaw:
    """Add a tool mark: a bright, slightly curved groove that tapers towards both ends."""
    depth = _depth(part)
    x, y = middle = _spot(rng, part, depth > 3)
    # Around the bore rather than across it, or little of the scratch would be on the part.
    heading, count = math.atan2(y, x) + rng.normal(math.pi / 2, 0.5), int(rng.integers(4, 11))
    bends = rng.normal(0, 0.04) + rng.normal(0, 0.05, (2, count))
    ahead, back = _walk(middle, heading, 4, bends[0]), _walk(middle, heading + math.pi, 4, -bends[1])
    half, taper = rng.uniform(1.4, 2.3), np.sqrt(np.linspace(0.2, 1, count + 1)).tolist()
    distance = stroke(part, back[:0:-1] + ahead, [half * share for share in taper + taper[-2::-1]])
    mask = (distance < 0) & (depth > 0)
    inside = np.clip(-distance / half, 0, 1) * mask
    relief, opacity = -rng.uniform(0.4, 0.8) * inside, rng.uniform(0.6, 0.95) * inside
    return replace(sound(part), mask=mask, relief=relief, opacity=opacity, colour=(0.86, 0.86, 0.88))


def _stain(part: Part, rng: Rng) -> Flaw:
    """Add a dried stain of rust, coolant or oil: a translucent blob, darker at its rim."""
    x, y = _spot(rng, part, _depth(part) > 2)
    radius = rng.uniform(7, 19)
    distance = _blob(rng, part, x, y, radius, 0.25)
    rim, middle = np.exp(-(((distance + 2) / 2) ** 2)), rise(distance, 2.5 * radius)
    opacity = rise(distance - 1.5, 3)
    opacity *= rng.uniform(0.30, 0.50) * (1 - 0.6 * middle) + 0.25 * rim
    opacity *= cover(part, part.outline) * cover(part, BORE - part.radius)
    colour = STAINS[rng.integers(len(STAINS))]
    return replace(sound(part), mask=opacity > 0.05, opacity=opacity, colour=colour)


DEFECTS: dict[str, Callable[[Part, Rng], Flaw]] = {
    "chipped": _chipped,
    "crack": _crack,
    "dent": _dent,
    "doubled": _doubled,
    "missing": _missing,
    "scratch": _scratch,
    "stain": _stain,
}


def _depth(part: Part) -> FloatArray:
    """Return the signed distance to the nearest edge, hole or screw, positive on the free faces."""
    edges = [part.outline + CHAMFER, BORE + 4 - part.radius]
    edges.append(-disc(part, DOWEL_X, DOWEL_Y, DOWEL + 2))
    edges += [-disc(part, screw.x, screw.y, SEAT) for screw in part.scene.screws]
    depth: FloatArray = -np.maximum.reduce(edges)
    return depth


def _spot(rng: Rng, part: Part, allowed: BoolArray) -> tuple[float, float]:
    """Sample the position of a pixel among those allowed, so that every defect lies on the part."""
    pixel = rng.choice(np.flatnonzero(allowed))
    return float(part.x.flat[pixel]), float(part.y.flat[pixel])


def _blob(rng: Rng, part: Part, x: float, y: float, radius: float, waviness: float) -> FloatArray:
    """Return the approximate signed distance to a disc with a wavy outline."""
    angle = np.arctan2(part.y - y, part.x - x)
    wave = np.ones(angle.shape, np.float32)
    for k in range(2, 7):
        wave += rng.normal(0, waviness / k) * np.cos(k * angle + rng.uniform(0, 2 * math.pi))
    blob: FloatArray = disc(part, x, y, 0) - (radius * wave).astype(np.float32, copy=False)
    return blob


def _walk(start: tuple[float, float], heading: float, step: float, turns: AnyArray) -> Points:
    """Return the points of a walk with steps of equal length and a turn before each."""
    points = [start]
    for angle in (heading + np.cumsum(turns)).tolist():
        x, y = points[-1]
        points.append((x + step * math.cos(angle), y + step * math.sin(angle)))
    return points
