"""Resize images and maps, and scale images to a network's input."""

from __future__ import annotations

import numpy as np
from PIL import Image

from blemish.types import AnyArray, FloatArray

FULL_SCALE = 65535.0
"""White level of 16-bit data whose true bit depth is unknown."""

WHITE_BITS = (8, 10, 12, 14, 16)
"""Common bit depths of image sensors."""


def resize(image: AnyArray, size: tuple[int, int]) -> AnyArray:
    """Resize an (H, W, 3) image to `size` (height, width), bilinearly with antialiasing.

    uint8 stays uint8. uint16 and float32 become float32 in the same units, neither rounded nor clipped. An
    image that already has that size is returned unchanged.
    """
    if image.shape[:2] == tuple(size):
        return image
    box = (size[1], size[0])
    if image.dtype == np.uint8:
        return np.array(Image.fromarray(image).resize(box, Image.Resampling.BILINEAR))
    planes = [resize_map(image[..., channel].astype(np.float32), size) for channel in range(3)]
    return np.stack(planes, axis=-1)


def to_input(resized: AnyArray, white: float = FULL_SCALE) -> FloatArray:
    """Convert an (h, w, 3) image to the model's contiguous (3, h, w) float32 input, black 0 and white 1.

    uint8 is divided by 255; uint16 and float32 are in the units of 16-bit data and divided by `white`.
    """
    scale = 255.0 if resized.dtype == np.uint8 else white
    return np.divide(resized.transpose(2, 0, 1), np.float32(scale), dtype=np.float32, order="C")


def white_level(maximum: int) -> float:
    """Return the white level of 16-bit data whose largest value is `maximum`, the `white` of `to_input`.

    It is 2^b - 1 for the smallest depth b in WHITE_BITS that holds `maximum`. Raises ValueError for a number
    outside 0 to 65535.
    """
    for bits in WHITE_BITS:
        if 0 <= maximum < 2**bits:
            return 2.0**bits - 1
    raise ValueError(f"{maximum} is not a value of a 16-bit image")


def resize_map(anomaly_map: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Resize an (h, w) float32 map to `size` (height, width), bilinearly.

    Enlarging equals torch's interpolate(mode="bilinear", align_corners=False); reducing equals the same with
    antialias=True: every pixel of the map contributes, so that a small peak is lowered but never skipped.
    """
    return np.array(Image.fromarray(anomaly_map).resize((size[1], size[0]), Image.Resampling.BILINEAR))
