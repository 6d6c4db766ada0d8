"""The metrics of an evaluation: how each is computed, and its names in tables and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy.typing as npt

from blemish.evaluation import metrics
from blemish.evaluation.metrics import PixelScores
from blemish.types import MetricRow

SATURATED_LIMIT = 0.05
"""False-positive rate up to which saturated PRO is integrated, as in the published results."""

OfImages = Callable[[npt.ArrayLike, npt.ArrayLike], float]
OfPixels = Callable[[PixelScores], float]


@dataclass(frozen=True)
class Metric:
    """One metric; exactly one of the functions is set."""

    title: str
    """Name in reports."""
    column: str
    """Column header in tables."""
    of_images: OfImages | None = None
    """Computes it from image scores and 0/1 labels."""
    of_pixels: OfPixels | None = None
    """Computes it from pixel scores."""
    of_saturating: OfPixels | None = None
    """Computes it from pixel scores with saturating regions, which only some data sets define."""


def saturated_pro(scores: PixelScores) -> float:
    """Return saturated PRO up to a false-positive rate of SATURATED_LIMIT."""
    return scores.aupro(SATURATED_LIMIT)


METRICS: dict[str, Metric] = {
    "image_auroc": Metric("Image AUROC", "AUROC", of_images=metrics.auroc),
    "image_ap": Metric("Image AP", "AP", of_images=metrics.average_precision),
    "image_f1_max": Metric("Image F1-max", "F1", of_images=metrics.f1_max),
    "pixel_auroc": Metric("Pixel AUROC", "pix AUROC", of_pixels=PixelScores.auroc),
    "pixel_ap": Metric("Pixel AP", "pix AP", of_pixels=PixelScores.average_precision),
    "pixel_f1_max": Metric("Pixel F1-max", "pix F1", of_pixels=PixelScores.f1_max),
    "aupro": Metric("AUPRO", "AUPRO", of_pixels=PixelScores.aupro),
    "saturated_pro": Metric("Saturated PRO", "saturated PRO", of_saturating=saturated_pro),
}
"""All metrics by field of MetricRow, in display order."""


def shown(rows: Iterable[MetricRow]) -> dict[str, Metric]:
    """Return the metrics to show: all, except that saturated PRO needs at least one row with a value."""
    rows = tuple(rows)
    return {
        field: metric
        for field, metric in METRICS.items()
        if metric.of_saturating is None or any(getattr(row, field) is not None for row in rows)
    }
