"""Metrics from raw scores, higher = worse: AUROC, average precision, F1-max, AUPRO, saturated PRO.

One observation carries the file. As the threshold falls, a metric moves in steps: one for each distinct
anomalous score. So the sorted normal scores, the sorted anomalous scores and, for PRO, one weight for each
anomalous pixel (1 / area of its region: the mean overlap is the sum of the weights above the threshold,
divided by the number of regions) give every metric at once. Sorting is nearly all of the work.

Tied scores share a point. What is not defined, such as one class only, is a MetricError, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
import numpy.typing as npt

from blemish.errors import ConfigError, MetricError
from blemish.evaluation.score_store import (
    Counts,
    Doubles,
    Histogram,
    Scores,
    first_of_each,
    joint_histogram,
    ranks,
    sorted_anomalous,
)
from blemish.types import AnyArray, BoolArray, FloatArray

SMALLEST_BUDGET = 2**25
"""Bytes. Below this a histogram of ranks would be too coarse to stay within 1e-4."""


def auroc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give the area under the ROC curve of (N,) scores and (N,) labels, 1 defective and 0 good.

    >>> auroc([0.1, 0.4, 0.4, 3.0], [0, 0, 1, 1])
    0.875
    """
    return _auroc(_image_steps(scores, labels))


def average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give the step-wise sum of precision times gain in recall over (N,) scores and (N,) labels.

    No trapezoids: joining points of a precision-recall curve by lines is too optimistic.
    """
    return _average_precision(_image_steps(scores, labels))


def f1_max(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give the largest F1 that any threshold reaches on (N,) scores and (N,) labels."""
    return _f1_max(_image_steps(scores, labels))


def roc_curve(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Doubles, Doubles, Doubles]:
    """Give false-positive rates, true-positive rates and thresholds, one of each per distinct score.

    Thresholds fall; a score is over one when it is at least as large. The first is infinity: nothing is over.
    """
    normals, anomalous = _sorted_by_class(scores, labels)
    thresholds = np.append(np.inf, np.unique(np.concatenate((normals, anomalous)))[::-1])
    false_positives = normals.size - np.searchsorted(normals, thresholds)
    true_positives = anomalous.size - np.searchsorted(anomalous, thresholds)
    return false_positives / normals.size, true_positives / anomalous.size, thresholds


def bootstrap_interval(
    metric: Callable[[npt.ArrayLike, npt.ArrayLike], float],
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Give the percentile bootstrap interval of `metric` over (N,) scores and (N,) labels.

    Good and defective are drawn separately, as many as there are, so that every draw has both.
    """
    if draws < 1 or not 0 < level < 1:
        raise ConfigError(
            f"a bootstrap of {draws} draws at level {level} was asked for, "
            "expected at least 1 draw and a level between 0 and 1"
        )
    normals, anomalous = _sorted_by_class(scores, labels)
    truth = np.repeat((False, True), (normals.size, anomalous.size))
    generator = np.random.default_rng(seed)
    values = [
        metric(np.concatenate([generator.choice(group, group.size) for group in (normals, anomalous)]), truth)
        for _ in range(draws)
    ]
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def saturated_pro(
    maps: Sequence[AnyArray],
    masks: Sequence[BoolArray | None],
    saturation_areas: Sequence[Sequence[float]],
    *,
    limit: float = 0.05,
) -> float:
    """Give the area under the saturated PRO curve of MVTec LOCO up to a false-positive rate of `limit`.

    For each image: its (H, W) map, its (R, H, W) regions or None, and the R saturation areas in pixels.
    """
    if not len(maps) == len(masks) == len(saturation_areas):
        raise MetricError(
            f"there are {len(maps)} maps, {len(masks)} masks and {len(saturation_areas)} lists of "
            "saturation areas, expected as many of each"
        )
    pixels = PixelScores()
    for map, mask, areas in zip(maps, masks, saturation_areas, strict=True):
        pixels.update(map, mask, saturation_areas=areas)
    return pixels.aupro(limit)


class PixelScores:
    """Gather the maps and masks of a test set, image by image; then give any pixel-level metric.

    Exact by sorting while that fits `memory_budget` bytes, working space included. Beyond, it goes on by
    itself and with what it has as a histogram of ranks (`ranks`), within 1e-4 of the exact values on the
    scores of a working model. Scores are kept as float32, the type of a map.

    What those in `also` have gathered themselves, each within its own budget, counts as well, and is not
    copied: good images are gathered and sorted once, and serve for each kind of defect.
    """

    def __init__(self, memory_budget: int = 2**30, *, also: Sequence[PixelScores] = ()) -> None:
        if memory_budget < SMALLEST_BUDGET:
            raise ConfigError(
                f"a memory budget of {memory_budget} bytes was given, expected at least {SMALLEST_BUDGET}"
            )
        self._scores = Scores(memory_budget)
        self._parts = (self._scores, *(part._scores for part in also))
        self._steps: _Steps | None = None
        self._adds_in_steps: list[int] = []

    def update(
        self, map: AnyArray, mask: BoolArray | None, *, saturation_areas: Sequence[float] | None = None
    ) -> None:
        """Add one image: its (H, W) map and its (H, W) mask, True where anomalous; None is an all-good image.

        The regions of PRO are the 8-connected components of the mask. With `saturation_areas` the mask is
        (R, H, W) instead: each channel is one region, in one piece or not, overlapping others or not, and its
        overlap counts as whole from that many pixels on (or from its own area on, if that is less).
        """
        scores = _checked_map(map)
        anomalous, weights = _anomalous_pixels(scores, mask, saturation_areas)
        self._scores.add(scores[~anomalous], scores[anomalous], weights)

    def auroc(self) -> float:
        """Give the area under the ROC curve over all pixels of all images."""
        return _auroc(self._all_steps())

    def average_precision(self) -> float:
        """Give the step-wise sum of precision times gain in recall over all pixels of all images."""
        return _average_precision(self._all_steps())

    def f1_max(self) -> float:
        """Give the largest F1 that any threshold reaches over all pixels of all images."""
        return _f1_max(self._all_steps())

    def aupro(self, limit: float = 0.3) -> float:
        """Give the area under the per-region overlap up to a false-positive rate of `limit`, over `limit`.

        The overlap is the mean over regions of the share of the region at or above the threshold; the
        false-positive rate is that of all normal pixels of all images. With saturation areas: saturated PRO.
        """
        if not 0 < limit <= 1:
            raise ConfigError(f"a false-positive limit of {limit} was given, expected above 0 and at most 1")
        steps = self._all_steps()
        return _area(steps, steps.overlap, limit)

    def _all_steps(self) -> _Steps:
        adds = [part.adds for part in self._parts]
        if self._steps is None or self._adds_in_steps != adds:
            self._steps = None  # the old ones go before the new ones come
            if any(part.histogram for part in self._parts):
                self._steps = _histogram_steps(joint_histogram(self._parts))
            else:
                normals = [part.normals() for part in self._parts]
                self._steps = _exact_steps(normals, *sorted_anomalous(self._parts))
            self._adds_in_steps = adds
        return self._steps


# --- What a falling threshold passes ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Steps:
    """S scores, highest first, every distinct anomalous one among them: what lies above, what at or above."""

    normals_above: Counts
    """Normal scores above it."""
    normals_reached: Counts
    """Normal scores at or above it."""
    anomalous: Counts
    """Anomalous scores equal to it."""
    overlap: Doubles
    """What it adds to the mean over regions of the share of the region at or above it."""
    normals: int
    """All normal scores."""


def _exact_steps(normals: Sequence[AnyArray], anomalous: AnyArray, weights: Doubles) -> _Steps:
    """Take both classes ascending, the normal scores in any number of arrays, with the anomalous weights."""
    total = sum(part.size for part in normals)
    _require_both(total, anomalous.size)
    firsts = first_of_each(anomalous)
    reached, above = total - ranks(normals, anomalous[firsts])[:, ::-1]
    return _Steps(
        normals_above=above,
        normals_reached=reached,
        anomalous=np.diff(firsts, append=anomalous.size)[::-1],
        overlap=(np.add.reduceat(weights, firsts) / weights.sum())[::-1],
        normals=total,
    )


def _histogram_steps(histogram: Histogram) -> _Steps:
    """Take each bin for one score; a step without anomalous scores changes no metric."""
    normals = np.cumsum(histogram.normals[::-1])
    _require_both(int(normals[-1]), int(histogram.anomalous.sum()))
    return _Steps(
        normals_above=normals - histogram.normals[::-1],
        normals_reached=normals,
        anomalous=histogram.anomalous[::-1],
        overlap=histogram.weights[::-1] / histogram.weights.sum(),
        normals=int(normals[-1]),
    )


def _require_both(normal: int, anomalous: int) -> None:
    if not normal or not anomalous:
        raise MetricError(
            f"there are {normal} normal and {anomalous} anomalous scores, expected at least one of each"
        )


def _auroc(steps: _Steps) -> float:
    return _area(steps, steps.anomalous / steps.anomalous.sum(), 1.0)


def _average_precision(steps: _Steps) -> float:
    reached = np.cumsum(steps.anomalous)
    return float(reached / (reached + steps.normals_reached) @ steps.anomalous / reached[-1])


def _f1_max(steps: _Steps) -> float:
    reached = np.cumsum(steps.anomalous)
    return float(np.max(2 * reached / (reached + steps.normals_reached + reached[-1])))


def _area(steps: _Steps, gains: Doubles, limit: float) -> float:
    """Give the area under the sum of `gains` (S,) over the false-positive rate up to `limit`, over `limit`.

    The curve is flat between steps and a straight line over each, which is how tied scores share a point. So
    what a step gains counts in half over its own width, and in full from there to the limit.
    """
    end = np.searchsorted(steps.normals_above, math.ceil(limit * steps.normals))
    left, right = steps.normals_above[:end] / steps.normals, steps.normals_reached[:end] / steps.normals
    covered = limit - (left + right) / 2
    if end and right[-1] > limit:  # only the last of these steps can go beyond the limit
        covered[-1] = (limit - left[-1]) ** 2 / (right[-1] - left[-1]) / 2
    return float(gains[:end] @ covered / limit)


# --- Input --------------------------------------------------------------------------------------------------


def _image_steps(scores: npt.ArrayLike, labels: npt.ArrayLike) -> _Steps:
    normals, anomalous = _sorted_by_class(scores, labels)
    return _exact_steps([normals], anomalous, np.ones(anomalous.size))


def _sorted_by_class(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Doubles, Doubles]:
    """Give the scores of good and of defective images, both ascending, neither empty."""
    values, truth = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != truth.shape:
        raise MetricError(
            f"scores have the shape {values.shape} and labels {truth.shape}, expected (N,) for both"
        )
    _require_finite(values)
    if not np.isin(truth, (0, 1)).all():
        raise MetricError(
            f"labels hold {truth[~np.isin(truth, (0, 1))][0]}, expected 0 (good) or 1 (defective)"
        )
    defective = truth.astype(np.bool_)
    normals, anomalous = np.sort(values[~defective]), np.sort(values[defective])
    _require_both(normals.size, anomalous.size)
    return normals, anomalous


def _require_finite(scores: AnyArray) -> None:
    finite = np.isfinite(scores)
    if not finite.all():
        raise MetricError(
            f"{np.sum(~finite)} of {scores.size} scores are NaN or infinite, expected finite scores"
        )


def _checked_map(map: AnyArray) -> FloatArray:
    if map.ndim != 2 or map.dtype.kind != "f":
        raise MetricError(f"a map is {map.dtype} of shape {map.shape}, expected float of shape (H, W)")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        scores = map.astype(np.float32, copy=False)
    _require_finite(scores)
    return scores


# --- Regions ------------------------------------------------------------------------------------------------


def _anomalous_pixels(
    scores: FloatArray, mask: BoolArray | None, saturation_areas: Sequence[float] | None
) -> tuple[BoolArray, Doubles]:
    """Give the (H, W) union of an image's regions and, for each pixel of it in order, its weight in PRO."""
    regions = () if saturation_areas is None else (len(saturation_areas),)
    if mask is None and regions in {(), (0,)}:
        return np.zeros(scores.shape, np.bool_), np.empty(0)
    expected = (*regions, *scores.shape)
    if mask is None or mask.shape != expected or mask.dtype != np.bool_:
        found = "None" if mask is None else f"{mask.dtype} of shape {mask.shape}"
        raise MetricError(f"a mask is {found}, expected bool of shape {expected} to fit its map")
    if saturation_areas is None:
        return mask, _component_weights(mask)
    union: BoolArray = np.logical_or.reduce(mask, axis=0)
    return union, _saturated_weights(scores, mask, saturation_areas)


def _component_weights(mask: BoolArray) -> Doubles:
    """Give each anomalous pixel of an (H, W) mask, in order, 1 / area of its 8-connected component."""
    component = cc3d.connected_components(mask, connectivity=8)[mask]
    weights: Doubles = 1 / np.bincount(component)[component]
    return weights


def _saturated_weights(scores: FloatArray, regions: BoolArray, areas: Sequence[float]) -> Doubles:
    """Give each pixel of the union of (R, H, W) regions, in order, its weight in the saturated overlap.

    The s highest pixels of a region weigh 1 / s and the others nothing, so that the sum over the pixels above
    any threshold is min(pixels above, s) / s. Where regions overlap the weights add up.
    """
    weights = np.zeros(scores.size)
    for region, area in zip(regions, areas, strict=True):
        inside = np.flatnonzero(region)
        if not inside.size or not 0 < area < np.inf:
            raise MetricError(
                f"a region of {inside.size} pixels saturates at {area} pixels, expected more than 0 for both"
            )
        highest_first = inside[np.argsort(-scores.ravel()[inside])]
        covered = np.minimum(np.arange(inside.size + 1) / min(area, inside.size), 1.0)
        weights[highest_first] += np.diff(covered)
    return weights[regions.any(axis=0).ravel()]
