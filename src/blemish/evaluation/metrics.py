"""AUROC, average precision, F1-max, AUPRO and saturated PRO from raw scores, where higher is more anomalous.

All metrics rest on one observation: as the threshold falls, a metric changes in steps, one for each distinct
anomalous score. All of them can therefore be computed from the sorted normal scores, the sorted anomalous
scores and, for PRO, one weight per anomalous pixel (1 / area of its region: the mean overlap is the sum of
the weights above the threshold, divided by the number of regions). Nearly all the time goes into sorting.

Tied scores share one point of a curve. An undefined metric, such as one of a single class, raises
MetricError instead of returning a number.
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
"""Smallest memory budget in bytes; with less, a histogram of ranks would miss its accuracy of 1e-4."""


def auroc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the area under the ROC curve of (N,) scores and (N,) labels, 1 defective and 0 good.

    >>> auroc([0.1, 0.4, 0.4, 3.0], [0, 0, 1, 1])
    0.875
    """
    return _auroc(_image_steps(scores, labels))


def average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the average precision of (N,) scores and (N,) labels: the sum of precision times gain in recall.

    The sum is step-wise, not trapezoidal: linear interpolation of a precision-recall curve is too optimistic.
    """
    return _average_precision(_image_steps(scores, labels))


def f1_max(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the largest F1 over all thresholds for (N,) scores and (N,) labels."""
    return _f1_max(_image_steps(scores, labels))


def roc_curve(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Doubles, Doubles, Doubles]:
    """Return false-positive rates, true-positive rates and thresholds, one each per distinct score.

    Thresholds are descending and inclusive. An infinite one, which no score reaches, is put first.
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
    """Return the percentile bootstrap interval of `metric` for (N,) scores and (N,) labels.

    Good and defective images are resampled separately, so that each resample has as many of both.
    """
    if draws < 1 or not 0 < level < 1:
        raise ConfigError(
            f"bootstrap with {draws} resamples at level {level}; "
            "expected at least 1 resample and a level between 0 and 1"
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
    """Return the area, divided by `limit`, under MVTec LOCO's saturated PRO curve.

    The curve is integrated up to a false-positive rate of `limit`. Each image has an (H, W) map, (R, H, W)
    regions or None, and R saturation areas in pixels.
    """
    if not len(maps) == len(masks) == len(saturation_areas):
        raise MetricError(
            f"there are {len(maps)} maps, {len(masks)} masks and {len(saturation_areas)} lists of "
            "saturation areas; expected as many of each"
        )
    pixels = PixelScores()
    for map, mask, areas in zip(maps, masks, saturation_areas, strict=True):
        pixels.update(map, mask, saturation_areas=areas)
    return pixels.aupro(limit)


class PixelScores:
    """Collects maps and masks of a test set, image by image, and computes pixel-level metrics.

    The metrics are exact, by sorting, while the scores fit into `memory_budget` bytes, including working
    memory. Beyond that, the scores are converted automatically to a histogram of ranks (`score_store`), with
    metrics within 1e-4 of the exact values for a working model. Scores are stored as float32.

    The scores of the collectors in `also`, each with its own budget, are included without being copied:
    those of the good images are stored and sorted once and used for every kind of defect.
    """

    def __init__(self, memory_budget: int = 2**30, *, also: Sequence[PixelScores] = ()) -> None:
        if memory_budget < SMALLEST_BUDGET:
            raise ConfigError(
                f"a memory budget of {memory_budget} bytes; expected at least {SMALLEST_BUDGET}"
            )
        self._scores = Scores(memory_budget)
        self._parts = (self._scores, *(part._scores for part in also))
        self._steps: _Steps | None = None
        self._adds_in_steps: list[int] = []

    def update(
        self, map: AnyArray, mask: BoolArray | None, *, saturation_areas: Sequence[float] | None = None
    ) -> None:
        """Add one image: its (H, W) map and its (H, W) mask, True where anomalous, or None for a good image.

        The regions of PRO are the 8-connected components of the mask. With `saturation_areas`, the mask is
        (R, H, W): each channel is one region, which may be disconnected and overlap others, and which counts
        as fully covered once that many of its pixels are (or all of them, if it has fewer).
        """
        scores = _checked_map(map)
        anomalous, weights = _anomalous_pixels(scores, mask, saturation_areas)
        self._scores.add(scores[~anomalous], scores[anomalous], weights)

    def auroc(self) -> float:
        """Return the area under the ROC curve over all pixels of all images."""
        return _auroc(self._all_steps())

    def average_precision(self) -> float:
        """Return the average precision over all pixels of all images."""
        return _average_precision(self._all_steps())

    def f1_max(self) -> float:
        """Return the largest F1 over all thresholds, for all pixels of all images."""
        return _f1_max(self._all_steps())

    def aupro(self, limit: float = 0.3) -> float:
        """Return the area, divided by `limit`, under the per-region overlap curve.

        The curve is integrated up to a false-positive rate of `limit`, taken over all normal pixels of all
        images. The overlap is the mean over regions of the share of the region at or above the threshold.
        With saturation areas, this is saturated PRO.
        """
        if not 0 < limit <= 1:
            raise ConfigError(f"a false-positive limit of {limit}; expected above 0 and at most 1")
        steps = self._all_steps()
        return _area(steps, steps.overlap, limit)

    def _all_steps(self) -> _Steps:
        adds = [part.adds for part in self._parts]
        if self._steps is None or self._adds_in_steps != adds:
            self._steps = None  # free the old ones before computing the new ones
            if any(part.histogram for part in self._parts):
                self._steps = _histogram_steps(joint_histogram(self._parts))
            else:
                normals = [part.normals() for part in self._parts]
                self._steps = _exact_steps(normals, *sorted_anomalous(self._parts))
            self._adds_in_steps = adds
        return self._steps


# --- Steps of a falling threshold ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Steps:
    """S descending scores, including every distinct anomalous one, with the counts above each."""

    normals_above: Counts
    """(S,) number of normal scores above each."""
    normals_reached: Counts
    """(S,) number of normal scores at or above each."""
    anomalous: Counts
    """(S,) number of anomalous scores equal to each."""
    overlap: Doubles
    """(S,) increase of the mean per-region overlap at each."""
    normals: int
    """Number of normal scores."""


def _exact_steps(normals: Sequence[AnyArray], anomalous: AnyArray, weights: Doubles) -> _Steps:
    """Compute the steps from ascending normal scores, in one or more arrays, and ascending anomalous ones."""
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
    """Compute the steps with one score per bin; steps without anomalous scores affect no metric."""
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
            f"there are {normal} normal and {anomalous} anomalous scores; expected at least one of each"
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
    """Return the area under the sum of (S,) `gains` up to a false-positive rate of `limit`, over `limit`.

    The curve is flat between steps and linear across each step, so that tied scores share one point. The gain
    of a step therefore counts half across its own width, and in full from there to the limit.
    """
    end = np.searchsorted(steps.normals_above, math.ceil(limit * steps.normals))
    left, right = steps.normals_above[:end] / steps.normals, steps.normals_reached[:end] / steps.normals
    covered = limit - (left + right) / 2
    if end and right[-1] > limit:  # only the last of these steps can extend beyond the limit
        covered[-1] = (limit - left[-1]) ** 2 / (right[-1] - left[-1]) / 2
    return float(gains[:end] @ covered / limit)


# --- Input --------------------------------------------------------------------------------------------------


def _image_steps(scores: npt.ArrayLike, labels: npt.ArrayLike) -> _Steps:
    normals, anomalous = _sorted_by_class(scores, labels)
    return _exact_steps([normals], anomalous, np.ones(anomalous.size))


def _sorted_by_class(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Doubles, Doubles]:
    """Return the ascending scores of the good and of the defective images; neither is empty."""
    values, truth = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != truth.shape:
        raise MetricError(
            f"scores have the shape {values.shape} and labels {truth.shape}; expected (N,) for both"
        )
    _require_finite(values)
    if not np.isin(truth, (0, 1)).all():
        raise MetricError(
            f"labels hold {truth[~np.isin(truth, (0, 1))][0]}; expected 0 (good) or 1 (defective)"
        )
    defective = truth.astype(np.bool_)
    normals, anomalous = np.sort(values[~defective]), np.sort(values[defective])
    _require_both(normals.size, anomalous.size)
    return normals, anomalous


def _require_finite(scores: AnyArray) -> None:
    finite = np.isfinite(scores)
    if not finite.all():
        raise MetricError(
            f"{np.sum(~finite)} of {scores.size} scores are NaN or infinite; expected finite scores"
        )


def _checked_map(map: AnyArray) -> FloatArray:
    if map.ndim != 2 or map.dtype.kind != "f":
        raise MetricError(f"a map is {map.dtype} of shape {map.shape}; expected float of shape (H, W)")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused
        scores = map.astype(np.float32, copy=False)
    _require_finite(scores)
    return scores


# --- Regions ------------------------------------------------------------------------------------------------


def _anomalous_pixels(
    scores: FloatArray, mask: BoolArray | None, saturation_areas: Sequence[float] | None
) -> tuple[BoolArray, Doubles]:
    """Return the (H, W) union of an image's regions and the PRO weights of its pixels, in order."""
    regions = () if saturation_areas is None else (len(saturation_areas),)
    if mask is None and regions in {(), (0,)}:
        return np.zeros(scores.shape, np.bool_), np.empty(0)
    expected = (*regions, *scores.shape)
    if mask is None or mask.shape != expected or mask.dtype != np.bool_:
        found = "None" if mask is None else f"{mask.dtype} of shape {mask.shape}"
        raise MetricError(f"a mask is {found}; expected bool of shape {expected} to fit its map")
    if saturation_areas is None:
        return mask, _component_weights(mask)
    union: BoolArray = np.logical_or.reduce(mask, axis=0)
    return union, _saturated_weights(scores, mask, saturation_areas)


def _component_weights(mask: BoolArray) -> Doubles:
    """Return 1 / area of the 8-connected component for each anomalous pixel of an (H, W) mask, in order."""
    component = cc3d.connected_components(mask, connectivity=8)[mask]
    weights: Doubles = 1 / np.bincount(component)[component]
    return weights


def _saturated_weights(scores: FloatArray, regions: BoolArray, areas: Sequence[float]) -> Doubles:
    """Return the weight in the saturated overlap of each pixel of the union of (R, H, W) regions, in order.

    The s highest-scoring pixels of a region have weight 1 / s and the others 0, so that the sum over the
    pixels above any threshold is min(pixels above, s) / s. Where regions overlap, their weights are added.
    """
    weights = np.zeros(scores.size)
    for region, area in zip(regions, areas, strict=True):
        inside = np.flatnonzero(region)
        if not inside.size or not 0 < area < np.inf:
            raise MetricError(
                f"found a region of {inside.size} pixels with saturation area {area}; expected both above 0"
            )
        highest_first = inside[np.argsort(-scores.ravel()[inside])]
        covered = np.minimum(np.arange(inside.size + 1) / min(area, inside.size), 1.0)
        weights[highest_first] += np.diff(covered)
    return weights[regions.any(axis=0).ravel()]
