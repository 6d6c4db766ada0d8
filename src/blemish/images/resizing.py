"""Resize images and turn them into a network's input."""

from __future__ import annotations

import numpy as np
from PIL import Image

from blemish.types import AnyArray, FloatArray

FULL_SCALE = 65535.0
"""White of 16-bit files whose true depth nobody has stated."""

WHITE_BITS = (8, 10, 12, 14, 16)
"""Depths that sensors have."""


def resize(image: AnyArray, size: tuple[int, int]) -> AnyArray:
    """Resize (H, W, 3) to `size`, height and width, bilinearly with antialias.

    uint8 stays uint8. uint16 and float32 become float32 in the same units, neither rounded nor clipped. An
    image that has the size already is returned as it is.
    """
    if image.shape[:2] == tuple(size):
        return image
    box = (size[1], size[0])
    if image.dtype == np.uint8:
        return np.array(Image.fromarray(image).resize(box, Image.Resampling.BILINEAR))
    planes = [resize_map(image[..., channel].astype(np.float32), size) for channel in range(3)]
    return np.stack(planes, axis=-1)


def to_input(resized: AnyArray, white: float = FULL_SCALE) -> FloatArray:
    """Turn (h, w, 3) into the (3, h, w) float32 array that a model takes, black 0 and white 1, contiguous.

    uint8 is divided by 255; all else is in the units of 16-bit data and divided by `white`.
    """
    scale = 255.0 if resized.dtype == np.uint8 else white
    return np.divide(resized.transpose(2, 0, 1), np.float32(scale), dtype=np.float32, order="C")


def white_level(maximum: int) -> float:
    """Return 2^b - 1 for the smallest depth b of WHITE_BITS that holds `maximum`, the largest training value.

    It is the `white` of `to_input` for 16-bit data; 8-bit images are always divided by 255.
    """
    for bits in WHITE_BITS:
        if 0 <= maximum < 2**bits:
            return 2.0**bits - 1
    raise ValueError(f"{maximum} is no value of a 16-bit image")


def resize_map(anomaly_map: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Resize an (h, w) float32 map to `size`, height and width, bilinearly.

    Upwards it is torch's interpolate(mode="bilinear", align_corners=False). Downwards it is that with
    antialias=True: every pixel of the map has its weight, so that a small peak is lowered but never skipped.
    """
    return np.array(Image.fromarray(anomaly_map).resize((size[1], size[0]), Image.Resampling.BILINEAR))
