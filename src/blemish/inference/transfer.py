"""Carry thresholds over from a model to an export of it, by how good images' statistics changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from blemish.inference.calibration import Doubles
from blemish.types import AnyArray, Calibration

Measured = tuple[AnyArray, AnyArray]
"""The (m, K) statistics and the (m,) largest map values of m images."""


def transferred(calibration: Calibration, model: Measured, export: Measured) -> Calibration:
    """Carry thresholds over to an export whose statistics of the same good images differ slightly.

    A line is fitted to each statistic, and to the maps' maxima, by which the export's follow from the
    model's. Centres and scales, or with a single statistic the scores, then follow by the same lines.
    """
    (statistics, maxima), (others, other_maxima) = (
        (np.asarray(first, np.float64), np.asarray(second, np.float64)) for first, second in (model, export)
    )
    lines = [line(statistics[:, k], others[:, k]) for k in range(statistics.shape[1])]
    slope, level = lines[0]
    if len(lines) == 1:
        moved = replace(
            calibration,
            scores=tuple(level + slope * score for score in calibration.scores),
            defect_threshold=level + slope * calibration.defect_threshold,
            review_threshold=level + slope * calibration.review_threshold,
        )
    else:
        pairs = zip(lines, calibration.centers, strict=True)
        moved = replace(
            calibration,
            centers=tuple(level + slope * center for (slope, level), center in pairs),
            scales=tuple(slope * scale for (slope, _), scale in zip(lines, calibration.scales, strict=True)),
        )
    slope, level = line(maxima, other_maxima)
    return replace(
        moved,
        pixel_maxima=tuple(level + slope * value for value in calibration.pixel_maxima),
        pixel_threshold=level + slope * calibration.pixel_threshold,
    )


def line(before: Doubles, after: Doubles) -> tuple[float, float]:
    """Return the slope, above 0, and the level of the line by which values follow from others.

    The slope is 1 where the values do not vary, or where a fit would turn their order around.
    """
    spread = before - before.mean()
    total = float(spread @ spread)
    slope = float(spread @ (after - after.mean())) / total if total > 0 else 1.0
    slope = slope if slope > 0 else 1.0
    return slope, float(after.mean() - slope * before.mean())
