"""Compute the coordinates of the report's charts in SVG units; the template determines their style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from blemish.evaluation.metrics import roc_curve
from blemish.types import AnyArray, Calibration, ImageResult

ROC_WIDTH, ROC_HEIGHT = 390.0, 300.0

STRIP_WIDTH, STRIP_HEIGHT = 340.0, 26.0

BINS = 68

TICKS = 6

TICK_GAP = 44.0
"""Smallest distance between tick labels."""

ROLES = ("good", "defective")

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Roc:
    """The ROC curve in a box of ROC_WIDTH by ROC_HEIGHT, y downwards."""

    curve: str
    """Points of an SVG polyline."""
    points: tuple[tuple[float, float, str], ...]
    """For each threshold, the shares of good and of defective parts above it, and its role."""


@dataclass(frozen=True)
class Strip:
    """One row of the histogram, with the scores of one kind."""

    name: str
    role: str
    """held-out, good or defective."""
    count: int
    bars: tuple[tuple[float, float], ...]
    """Left edge and height of each non-empty bar."""


@dataclass(frozen=True)
class Histogram:
    """Scores by kind on a common axis, STRIP_WIDTH wide; each strip is STRIP_HEIGHT high."""

    strips: tuple[Strip, ...]
    ticks: tuple[tuple[float, str], ...]
    """Position and label."""
    review: float
    defect: float
    """Positions of the thresholds."""


def lay_out_roc(results: Sequence[ImageResult]) -> Roc | None:
    """Lay out the ROC curve; return None if there are no good or no defective images."""
    truths = np.array([result.truth for result in results])
    if len(set(truths)) < 2:
        return None
    rates = roc_curve([result.score for result in results], truths)[:2]
    curve = " ".join(f"{ROC_WIDTH * x:.1f},{ROC_HEIGHT * (1 - y):.1f}" for x, y in zip(*rates, strict=True))
    points = []
    for role, labels in (("review", ("review", "defect")), ("defect", ("defect",))):
        called = np.array([result.label in labels for result in results])
        x, y = called[truths == 0].mean(), called[truths == 1].mean()
        points.append((float(x), float(y), role))
    return Roc(curve, tuple(points))


def lay_out_histogram(results: Sequence[ImageResult], calibration: Calibration) -> Histogram:
    """Lay out the scores behind the thresholds and those of each kind in the test set, good images first.

    The axis is linear around the defect threshold and logarithmic far from it (an inverse hyperbolic sine),
    so that both long tails and the gap between the thresholds remain visible.
    """
    groups = _groups(results)
    scores = np.concatenate([calibration.scores, *groups.values()])
    place, score_at = _axis(scores, calibration)
    name = "training good" if calibration.left_out else "held-out good"
    strips = [_strip(name, "held-out", calibration.scores, place)]
    strips += [_strip(kind, ROLES[truth], values, place) for (truth, kind), values in groups.items()]
    return Histogram(
        tuple(strips),
        _ticks(place, score_at),
        place(calibration.review_threshold),
        place(calibration.defect_threshold),
    )


def _groups(results: Sequence[ImageResult]) -> dict[tuple[int, str], list[float]]:
    """Return the scores by truth and kind, good images first."""
    groups: dict[tuple[int, str], list[float]] = {}
    for result in sorted(results, key=lambda result: (result.truth, result.kind)):
        groups.setdefault((result.truth, result.kind), []).append(result.score)
    return groups


def _axis(scores: AnyArray, calibration: Calibration) -> tuple[Scale, Scale]:
    """Return the functions from a score to its position, 0 to STRIP_WIDTH, and back."""
    centre = calibration.defect_threshold
    ends = min(scores.min(), calibration.review_threshold), max(scores.max(), centre)
    unit = abs(centre - float(np.median(calibration.scores))) or (ends[1] - ends[0]) or 1.0
    low, high = (math.asinh((end - centre) / unit) for end in ends)
    margin = 0.03 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(score: float) -> float:
        return STRIP_WIDTH * (math.asinh((score - centre) / unit) - low) / (high - low)

    def score_at(x: float) -> float:
        return centre + unit * math.sinh(low + (high - low) * x / STRIP_WIDTH)

    return place, score_at


def _ticks(place: Scale, score_at: Scale) -> tuple[tuple[float, str], ...]:
    """Return roughly evenly spaced ticks, each rounded to the precision that the local scale calls for."""
    ticks: list[tuple[float, str]] = []
    for x in np.linspace(0, STRIP_WIDTH, TICKS + 2)[1:-1]:
        digits = -math.floor(math.log10(score_at(x + TICK_GAP / 2) - score_at(x - TICK_GAP / 2)))
        score = round(score_at(x), digits)
        if not ticks or place(score) - ticks[-1][0] >= TICK_GAP:
            ticks.append((place(score), f"{score:.{max(digits, 0)}f}"))
    return tuple(ticks)


def _strip(name: str, role: str, scores: Sequence[float], place: Scale) -> Strip:
    counts = np.histogram([place(score) for score in scores], BINS, (0, STRIP_WIDTH))[0]
    heights = (STRIP_HEIGHT - 4) * counts / counts.max()
    bars = [(i * STRIP_WIDTH / BINS, max(float(height), 1.5)) for i, height in enumerate(heights) if height]
    return Strip(name, role, len(scores), tuple(bars))
