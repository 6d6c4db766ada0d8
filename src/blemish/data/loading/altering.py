"""Altered copies of an image: what other light, another compression or another focus would have made of it.

A method that remembers good images has seen each part only once. Copies show it what no part should be
rejected for: a lamp that ages, a stronger compression, a lens slightly out of focus.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
from scipy import ndimage

from blemish import images
from blemish.types import AnyArray

GAIN = 0.1
"""Largest change of brightness, as a share."""
GAMMA = 0.05
"""Largest change of the exponent of all values, as shares of white."""
FALL = 0.075
"""Largest share of the light that is lost from one side to the other, in any direction."""
COMPRESSED = 0.5
"""Probability that a copy of an 8-bit image is compressed as JPEG."""
QUALITY = (60, 96)
"""JPEG qualities, the second excluded."""
BLURRED = 0.25
"""Probability that a copy is blurred."""
BLUR = (0.15, 0.6)
"""Sigmas of the blur in pixels."""

LIMITS = repr((GAIN, GAMMA, FALL, COMPRESSED, QUALITY, BLURRED, BLUR))
DIGEST = hashlib.sha256(LIMITS.encode()).hexdigest()[:8]
"""A digest of the limits, for the names of the copies' cached features."""


def altered(image: AnyArray, white: float, draw: np.random.Generator) -> AnyArray:
    """Return an altered copy of an (h, w, 3) image: uint8 as uint8, anything else as float32.

    white: the white level of images of more than 8 bits, whose copies keep their units.
    """
    eight = image.dtype == np.uint8
    level = np.float32(255 if eight else white)
    gain, gamma = 1 + draw.uniform(-1, 1, 2) * (GAIN, GAMMA)
    fall, angle = draw.uniform(0, FALL), draw.uniform(0, 2 * math.pi)
    down, across = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in image.shape[:2])
    away = np.float32(math.sin(angle)) * down[:, None] + np.float32(math.cos(angle)) * across
    away /= abs(math.sin(angle)) + abs(math.cos(angle))  # from -0.5 in one corner to 0.5 in another
    values = np.clip(image / level * np.float32(gain), 0, 1) ** np.float32(gamma)
    values *= (1 - np.float32(fall) * (away + 0.5))[..., None]
    chance, sigma, quality = draw.random(), draw.uniform(*BLUR), int(draw.integers(*QUALITY))
    if COMPRESSED <= chance < COMPRESSED + BLURRED:
        values = ndimage.gaussian_filter(values, (sigma, sigma, 0), mode="nearest")
    found = level * np.clip(values, 0, 1)
    if not eight:
        return found.astype(np.float32)
    made = np.rint(found).astype(np.uint8)
    if chance >= COMPRESSED:
        return made
    return images.read(Path("copy"), images.jpeg_bytes(made, quality))
