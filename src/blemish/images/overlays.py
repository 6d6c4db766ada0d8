"""Show maps in colour: pure functions at the very edge, after everything that is measured.

A model has one fixed colour scale, made from its calibration alone, so that a colour means the same in every
image. The display level of a map value is linear and has three marks:

    level 0     the low point: the median, over the held-out good images, of a map's largest value
    level 0.5   the pixel threshold
    level 1     as far above the pixel threshold as the low point is below

What half of the good parts reach somewhere stays clear; what is above level 1 has the colour of level 1.
Where the low point is not below the threshold (all held-out maps alike, or a threshold set by hand), the
scale is a step: level 0 up to the threshold, level 1 above it.

The colours run from light yellow over orange and red to purple and darken all the way, so that their order
survives colour blindness and a grey printer. None is grey, and none so light or dark that it would vanish on
metal, rubber or paper.
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
"""Opacity of an overlay at level 1; it rises linearly from 0 at level 0."""

CONTOUR = (38, 10, 46)

OUTLINE, OUTLINE_EDGE = (64, 200, 255), (8, 38, 66)

GROUND = 250
"""Grey of a heatmap below level 0."""


def low_point(calibration: Calibration) -> float:
    """Return the map value at display level 0."""
    return float(np.median(calibration.pixel_maxima))


def levels(anomaly_map: FloatArray, calibration: Calibration) -> FloatArray:
    """Turn map values of any shape into display levels, 0 to 1."""
    low, threshold = low_point(calibration), calibration.pixel_threshold
    if not low < threshold:
        return (anomaly_map > threshold).astype(np.float32)
    # The threshold is subtracted, so that a value just there has level 0.5 to the last bit.
    level: FloatArray = np.clip(0.5 + (anomaly_map - threshold) / (2 * (threshold - low)), 0, 1)
    return level


def overlay(image: Pixels, anomaly_map: FloatArray, calibration: Calibration) -> Pixels:
    """Lay an (H, W) map's colours over its (H, W, 3) image, with a thin contour at the pixel threshold."""
    level = levels(anomaly_map, calibration)
    opacity = OPAQUE * level[..., None]
    mixed = _bytes(image + opacity * (_colours(level) - image))
    return _line(mixed, _rim(anomaly_map > calibration.pixel_threshold), CONTOUR)


def heatmap(anomaly_map: FloatArray, calibration: Calibration) -> Pixels:
    """Show an (H, W) map alone as (H, W, 3): paper where an overlay is clear, its colours elsewhere."""
    level = levels(anomaly_map, calibration)
    opacity = np.minimum(4 * level, 1)[..., None]
    return _bytes(GROUND + opacity * (_colours(level) - GROUND))


def outline(image: Pixels, mask: BoolArray) -> Pixels:
    """Draw a line round the regions of an (H, W) mask on its (H, W, 3) image; the regions stay clear."""
    width = max(1, round(min(mask.shape) / 256))
    line = _grown(mask, width) & ~mask
    edge = _grown(mask, 2 * width) & ~mask & ~line
    return _line(_line(image, edge, OUTLINE_EDGE), line, OUTLINE)


def legend() -> tuple[tuple[float, str], ...]:
    """Return the scale's colours as (level, "#rrggbb"), from level 0 to 1."""
    return tuple(
        (i / (len(RAMP) - 1), "#{:02x}{:02x}{:02x}".format(*colour)) for i, colour in enumerate(RAMP)
    )


def to_display(image: AnyArray, white: float | None = None) -> Pixels:
    """Turn an (H, W[, 1 or 3]) image into (H, W, 3) uint8 for showing.

    uint8 stays as it is. uint16, and float in its units, is shown linearly from 0 to `white`, as a rule the
    model's; without one, to the full scale of the smallest depth (8, 10, 12, 14 or 16 bits) that holds the
    image's largest value. Nothing is stretched. Raises ImageError for another shape or type.
    """
    channels = image[..., None] if image.ndim == 2 else image
    if channels.ndim != 3 or channels.shape[2] not in (1, 3):
        raise ImageError(f"an array of shape {image.shape} was to be shown, expected (H, W[, 1 or 3])")
    if image.dtype not in (np.uint8, np.uint16, np.float32):
        raise ImageError(f"an array of {image.dtype} was to be shown, expected uint8, uint16 or float32")
    if image.dtype != np.uint8:
        full = white_level(int(np.ceil(image.max()))) if white is None else white
        channels = _bytes(np.clip(channels / np.float32(full), 0, 1) * 255)
    return np.broadcast_to(channels, (*channels.shape[:2], 3)).copy()


def _colours(level: FloatArray) -> FloatArray:
    """Look levels up in the ramp: one axis more, of 3."""
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
    """Return the mask's pixels that touch one outside it."""
    return mask & _grown(~mask, 1)


def _grown(mask: BoolArray, width: int) -> BoolArray:
    """Dilate by `width` pixels along rows and columns; beyond the frame there is nothing."""
    for _ in range(width):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask
