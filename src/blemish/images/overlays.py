"""Render anomaly maps in colour. Pure functions, for display only: no score or metric depends on them.

Each model has one fixed colour scale, derived from its calibration alone, so that a colour means the same in
every image. The display level is a linear function of the map value with three reference points:

    level 0     the low point: the median over the held-out good images of the map's maximum
    level 0.5   the pixel threshold
    level 1     as far above the pixel threshold as the low point is below it

Values below the low point, which the maps of half of the good parts never exceed, stay transparent; values
above level 1 have the colour of level 1. If the low point is not below the threshold (all held-out maps are
alike, or the threshold was set by hand), the scale is a step: level 0 up to the threshold, level 1 above it.

The colours run from light yellow through orange and red to purple and darken steadily, so that their order
survives colour blindness and printing in greyscale. None is grey, and none is so light or dark that it would
be lost on metal, rubber or paper.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blemish.errors import ImageError
from blemish.images.resizing import white_level
from blemish.types import AnyArray, BoolArray, Calibration, FloatArray

Pixels = npt.NDArray[np.uint8]

RAMP = ((255, 236, 140), (254, 190, 72), (245, 124, 52), (217, 52, 88), (138, 14, 118))
"""Colours at levels 0, 0.25, 0.5, 0.75 and 1."""

OPAQUE = 0.65
"""Opacity of an overlay at level 1, rising linearly from 0 at level 0."""

CONTOUR = (38, 10, 46)

OUTLINE, OUTLINE_EDGE = (64, 200, 255), (8, 38, 66)

GROUND = 250
"""Grey value of a heatmap at level 0."""


def low_point(calibration: Calibration) -> float:
    """Return the map value at display level 0."""
    return float(np.median(calibration.pixel_maxima))


def levels(anomaly_map: FloatArray, calibration: Calibration) -> FloatArray:
    """Return the display levels, 0 to 1, of map values of any shape."""
    low, threshold = low_point(calibration), calibration.pixel_threshold
    if not low < threshold:
        return (anomaly_map > threshold).astype(np.float32)
    # The threshold is subtracted first, so that a value equal to it has level 0.5 exactly.
    level: FloatArray = np.clip(0.5 + (anomaly_map - threshold) / (2 * (threshold - low)), 0, 1)
    return level


def overlay(image: Pixels, anomaly_map: FloatArray, calibration: Calibration) -> Pixels:
    """Blend an (H, W) map in colour over its (H, W, 3) image, with a thin contour at the pixel threshold."""
    level = levels(anomaly_map, calibration)
    opacity = OPAQUE * level[..., None]
    mixed = _bytes(image + opacity * (_colours(level) - image))
    return _line(mixed, _rim(anomaly_map > calibration.pixel_threshold), CONTOUR)


def heatmap(anomaly_map: FloatArray, calibration: Calibration) -> Pixels:
    """Render an (H, W) map alone as (H, W, 3), in the overlay's colours on a light grey ground."""
    level = levels(anomaly_map, calibration)
    opacity = np.minimum(4 * level, 1)[..., None]
    return _bytes(GROUND + opacity * (_colours(level) - GROUND))


def outline(image: Pixels, mask: BoolArray) -> Pixels:
    """Outline the regions of an (H, W) mask on its (H, W, 3) image; the line lies just outside them."""
    width = max(1, round(min(mask.shape) / 256))
    line = _grown(mask, width) & ~mask
    edge = _grown(mask, 2 * width) & ~mask & ~line
    return _line(_line(image, edge, OUTLINE_EDGE), line, OUTLINE)


def legend() -> tuple[tuple[float, str], ...]:
    """Return the colour scale as (level, "#rrggbb") pairs, from level 0 to 1."""
    return tuple(
        (i / (len(RAMP) - 1), "#{:02x}{:02x}{:02x}".format(*colour)) for i, colour in enumerate(RAMP)
    )


def to_display(image: AnyArray, white: float | None = None) -> Pixels:
    """Convert an (H, W[, 1 or 3]) image to (H, W, 3) uint8 for display.

    uint8 values are kept. uint16, and float32 in the same units, is scaled linearly from 0 to `white`,
    normally the model's; by default, to full scale at the smallest depth (8, 10, 12, 14 or 16 bits) that
    holds the image's largest value. Contrast is never stretched. Raises ImageError for other shapes or types.
    """
    channels = image[..., None] if image.ndim == 2 else image
    if channels.ndim != 3 or channels.shape[2] not in (1, 3):
        raise ImageError(f"cannot display an array of shape {image.shape}; expected (H, W[, 1 or 3])")
    if image.dtype not in (np.uint8, np.uint16, np.float32):
        raise ImageError(f"cannot display an array of {image.dtype}; expected uint8, uint16 or float32")
    if image.dtype != np.uint8:
        full = white_level(int(np.ceil(image.max()))) if white is None else white
        channels = _bytes(np.clip(channels / np.float32(full), 0, 1) * 255)
    return np.broadcast_to(channels, (*channels.shape[:2], 3)).copy()


def _colours(level: FloatArray) -> FloatArray:
    """Return the RGB colours of levels of any shape, along an added last axis."""
    marks = np.linspace(0, 1, len(RAMP))
    channels = [np.interp(level, marks, channel) for channel in zip(*RAMP, strict=True)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _bytes(values: AnyArray) -> Pixels:
    return (values + 0.5).astype(np.uint8)


def _line(image: Pixels, where: BoolArray, colour: tuple[int, int, int]) -> Pixels:
    drawn = image.copy()
    drawn[where] = colour
    return drawn


def _rim(mask: BoolArray) -> BoolArray:
    """Return the pixels of the mask that adjoin a pixel outside it."""
    return mask & _grown(~mask, 1)


def _grown(mask: BoolArray, width: int) -> BoolArray:
    """Dilate by `width` steps to the 4 neighbours; pixels beyond the frame count as unset."""
    for _ in range(width):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask
