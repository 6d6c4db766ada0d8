"""Image and pixel scores grouped by kind of defect, from which the rows of an evaluation are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from blemish.data.layouts.saturation import Regions
from blemish.errors import MetricError
from blemish.evaluation import metrics
from blemish.evaluation.metric_table import METRICS, Metric
from blemish.types import BoolArray, MetricRow, Sample, Verdict

ALL = "all"
"""Name of the row of the whole test set."""


@dataclass(frozen=True)
class Truth:
    """The ground truth of a defective image, from its mask files."""

    mask: BoolArray
    """(H, W), the union of the files."""
    regions: Regions | None
    """The files as separate regions, if the data set defines the areas at which they saturate."""


@dataclass(frozen=True)
class Pixels:
    """Pixel scores of a set of images, collected for the plain metrics and for saturated PRO."""

    plain: metrics.PixelScores
    saturated: metrics.PixelScores | None
    """None if the data set defines no saturation."""

    def add(self, verdict: Verdict, truth: Truth | None) -> None:
        """Add one image; without a truth, all its pixels are normal."""
        self.plain.update(verdict.map, truth.mask if truth else None)
        if self.saturated is not None:
            found = truth.regions if truth else None
            masks, areas = (found.masks, found.areas) if found else (None, ())
            self.saturated.update(verdict.map, masks, saturation_areas=areas)


@dataclass
class Group:
    """The scores from which one row of the table is computed."""

    kind: str
    pixels: Pixels
    """Pixel scores of this kind of defect, together with those of the good images, which all rows share."""
    scores: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    masked: int = 0

    def add(self, sample: Sample, verdict: Verdict, truth: Truth | None) -> None:
        """Add the image-level score of one image."""
        self.scores.append(verdict.score)
        self.labels.append(sample.label)
        self.masked += sample.label == 1 and truth is not None

    def row(self) -> MetricRow:
        """Compute the metrics of the row."""
        defective = sum(self.labels)
        values = {field: self.value(metric) for field, metric in METRICS.items()}
        return MetricRow(self.kind, len(self.labels) - defective, defective, self.masked, **values)

    def value(self, metric: Metric) -> float | None:
        """Compute one metric; return None if it is undefined."""
        try:
            if metric.of_images is not None:
                return metric.of_images(self.scores, self.labels)
            if metric.of_pixels is not None:
                return metric.of_pixels(self.pixels.plain)
            if metric.of_saturating is not None and self.pixels.saturated is not None:
                return metric.of_saturating(self.pixels.saturated)
        except MetricError:
            return None
        return None


def empty_groups(test: Sequence[Sample], memory: int) -> tuple[Pixels, Group, dict[str, Group]]:
    """Return empty groups: the pixels of the good images, the whole test set, and each kind of defect.

    Each pixel is stored once: rows share the pixels of other groups. `memory`, in bytes, is divided evenly
    among the groups.
    """
    kinds = sorted({sample.kind for sample in test if sample.label == 1})
    saturating = any(sample.saturations for sample in test)
    share = max(memory // ((2 + len(kinds)) * (1 + saturating)), metrics.SMALLEST_BUDGET)

    def empty(*also: Pixels) -> Pixels:
        plain = [each.plain for each in also]
        saturated = [each.saturated for each in also if each.saturated]
        return Pixels(
            metrics.PixelScores(share, also=plain),
            metrics.PixelScores(share, also=saturated) if saturating else None,
        )

    good = empty()
    groups = {kind: Group(kind, empty(good)) for kind in kinds}
    return good, Group(ALL, empty(good, *(group.pixels for group in groups.values()))), groups
