"""Altered copies of an image: what other light, another lens or another place would have made of a part.

A method that remembers good images has seen each part only once. Copies show it what no part is rejected for:
a lamp that ages, a stronger compression, a lens slightly out of focus, a part that lies slightly otherwise.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage

from blemish.images.writing import jpeg_bytes
from blemish.types import Alteration, AnyArray

GAIN = 0.2
"""Largest change of brightness, as a share."""
GAMMA = 0.1
"""Largest change of the exponent of all values, as shares of white."""
RAMP = 0.15
"""Largest share of the light that is lost from one side to the other, in any direction."""
QUALITY = (60, 96)
"""JPEG qualities, the second excluded; every other copy of an 8-bit image is compressed."""
BLUR = (0.3, 1.2)
"""Sigmas in pixels; half of the copies that are not compressed are blurred."""
ANGLE = 4.0
"""Largest rotation in degrees."""
ZOOM = 0.03
"""Largest change of size, as a share."""
SHIFT = 0.015
"""Largest shift along each axis, as a share of it."""


def altered(image: AnyArray, white: float, draw: np.random.Generator, how: Alteration) -> AnyArray:
    """Return an altered copy of an (h, w, 3) image, of the same type; white: of images beyond 8 bits."""
    if how.place:
        image = moved(image, draw, how.place)
    return relit(image, white, draw, how.light) if how.light else image


def moved(image: AnyArray, draw: np.random.Generator, strength: float) -> AnyArray:
    """Turn, enlarge and shift an image about its centre; what comes in from beyond its border is mirrored."""
    height, width = image.shape[:2]
    angle = math.radians(strength * draw.uniform(-ANGLE, ANGLE))
    zoom = 1 + strength * draw.uniform(-ZOOM, ZOOM)
    down, across = strength * draw.uniform(-SHIFT, SHIFT, 2) * (height, width)
    border = min(math.ceil(0.1 * strength * max(height, width)), min(height, width) - 1)
    wide = np.pad(image, ((border, border), (border, border), (0, 0)), mode="reflect")
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = width / 2, height / 2
    from_x = (cos, sin, x - cos * x - sin * y + across + border)
    from_y = (-sin, cos, y + sin * x - cos * y + down + border)

    def transformed(plane: AnyArray) -> AnyArray:
        made = Image.fromarray(plane).transform(
            (width, height), Image.Transform.AFFINE, from_x + from_y, Image.Resampling.BILINEAR
        )
        return np.asarray(made)

    if image.dtype == np.uint8:
        return transformed(wide)
    return np.stack([transformed(np.ascontiguousarray(wide[..., k])) for k in range(3)], axis=-1)


def relit(image: AnyArray, white: float, draw: np.random.Generator, strength: float) -> AnyArray:
    """Change the light of an image, then compress it, blur it, or neither."""
    eight = image.dtype == np.uint8
    level = np.float32(255 if eight else white)
    gain, gamma = 1 + strength * draw.uniform(-1, 1, 2) * (GAIN, GAMMA)
    loss, angle = strength * draw.uniform(0, RAMP), draw.uniform(0, 2 * math.pi)
    down, across = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in image.shape[:2])
    away = np.float32(math.sin(angle)) * down[:, None] + np.float32(math.cos(angle)) * across
    values = np.clip(image / level * np.float32(gain), 0, 1) ** np.float32(gamma)
    values *= (1 - np.float32(loss) * (away + 0.5))[..., None]
    kind, sigma, quality = draw.random(), draw.uniform(*BLUR), int(draw.integers(*QUALITY))
    if 0.5 <= kind < 0.75:
        values = ndimage.gaussian_filter(values, (strength * sigma, strength * sigma, 0), mode="nearest")
    found = level * np.clip(values, 0, 1)
    if not eight:
        return found.astype(image.dtype)
    made = np.rint(found).astype(np.uint8)
    if kind >= 0.5:
        return made
    with Image.open(io.BytesIO(jpeg_bytes(made, quality))) as opened:
        return np.asarray(opened.convert("RGB"))
