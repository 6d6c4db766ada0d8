"""Set thresholds from held-out good scores, with a finite-sample guarantee. Pure; higher scores are worse.

The guarantee: a part is rejected if its score is greater than the (r + 1)-th largest of m held-out good
scores. With probability `confidence` over the sampling of the held-out images, at most a share `rate` of all
good parts is then rejected, whatever the distribution of the scores, if BinomCDF(r; m, rate) <= 1 -
confidence (order statistics as tolerance limits: Wilks, 1941). It holds as long as good parts are distributed
like the held-out ones.

A method that remembers images need not hold any out: each is scored without itself. The same order statistic
then sets the thresholds, but the proof does not carry over: what is guaranteed in any case (Barber, Candès,
Ramdas, Tibshirani: "Predictive inference with the jackknife+", 2021) is twice the rate on average. As a score
without the image itself is on average higher than one of the model in use, rejects tend to stay below.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blemish.errors import ConfigError, DataError
from blemish.types import AnyArray, Calibration, Label, LightCalibration

Doubles = npt.NDArray[np.float64]

_ROUNDING = 1e-9
"""Relative tolerance, so that values such as 1 - 0.95 meet the bounds that they equal on paper."""

WIDTH = 2.5631
"""Distance between the 10 % and the 90 % quantile of a Gaussian, in standard deviations."""

REVIEW_RATE = 0.05
"""Share of good parts that may be labelled review or defect, unless the user sets another."""


def order_statistic_index(count: int, rate: float, confidence: float) -> int | None:
    """Return the largest r for which the (r + 1)-th largest of `count` held-out scores guarantees `rate`.

    None if not even the largest score (r = 0) does, because `count` is less than `images_needed`.
    """
    _check_count(count)
    check_shares(rate=rate, confidence=confidence)
    allowed = (1 - confidence) * (1 + _ROUNDING)
    r, below = 0, _binomial(0, count, rate)
    while below <= allowed and r < count:
        r += 1
        below += _binomial(r, count, rate)
    return r - 1 if r else None


def promised_rate(count: int, r: int, confidence: float) -> float:
    """Return the smallest rate that the (r + 1)-th largest of `count` held-out scores guarantees.

    >>> round(promised_rate(20, 0, 0.95), 3)
    0.139
    """
    _check_count(count)
    check_shares(confidence=confidence)
    if not 0 <= r < count:
        raise ConfigError(f"r is {r}; expected 0 to {count - 1} for {count} held-out images")
    broken, kept = 0.0, 1.0
    while kept - broken > _ROUNDING * kept:
        middle = (broken + kept) / 2
        if math.fsum(_binomial(k, count, middle) for k in range(r + 1)) <= 1 - confidence:
            kept = middle
        else:
            broken = middle
    return kept


def images_needed(rate: float, confidence: float) -> int:
    """Return the smallest number of held-out good images whose largest score guarantees `rate`.

    >>> images_needed(0.01, 0.95)
    299
    """
    check_shares(rate=rate, confidence=confidence)
    count = max(1, math.floor(math.log(1 - confidence) / math.log1p(-rate)))
    return count if order_statistic_index(count, rate, confidence) is not None else count + 1


def fit(
    statistics: AnyArray,
    pixel_maxima: AnyArray,
    names: tuple[str, ...],
    *,
    false_reject_rate: float = 0.01,
    review_rate: float | None = None,
    confidence: float = 0.95,
    left_out: bool = False,
) -> Calibration:
    """Set the thresholds from m >= 2 held-out good images, or m >= 1 that were each scored without itself.

    statistics: (m, K), the K statistics called `names` of each image; pixel_maxima: (m,), the largest value
    of each image's map; review_rate: None for 5 %, or for the false-reject rate if that is higher; left_out:
    whether the images were learned from, and each scored without itself.

    A single statistic is used as the score. Several are combined into the largest of their robust z-scores:
    value minus median, divided by the larger of two estimates of the standard deviation, both exact for a
    Gaussian: 1.4826 x the median absolute deviation, and the distance between the 10 % and 90 % quantiles
    over 2.5631. The first alone vanishes if half of the images have the same value, as in front of a white
    background, and would make all others infinitely anomalous. If both are 0, the standard deviation is used;
    if all values are equal, 1 is.

    With several statistics the guarantee is slightly optimistic, because the same images set the z-scores.
    """
    statistics, maxima = np.asarray(statistics, np.float64), np.asarray(pixel_maxima, np.float64)
    _check_statistics(statistics, len(names))
    if len(statistics) < 2 - left_out:
        raise DataError(f"there are {len(statistics)} held-out good images; expected at least {2 - left_out}")
    if maxima.shape != statistics.shape[:1] or not np.isfinite(maxima).all():
        raise DataError(
            f"found map maxima of shape {maxima.shape} for {len(statistics)} held-out images; "
            "expected one finite number for each"
        )
    centers, scales = _centers_and_scales(statistics)
    scores = _scores(statistics, centers, scales)
    return _with_thresholds(
        names,
        centers,
        scales,
        _ascending(scores),
        _ascending(maxima),
        false_reject_rate,
        max(REVIEW_RATE, false_reject_rate) if review_rate is None else review_rate,
        confidence,
        left_out,
    )


def extended(calibration: Calibration, statistics: AnyArray, pixel_maxima: AnyArray) -> Calibration:
    """Set new thresholds, at the same rates, from the same images and m more that were scored without
    themselves.

    statistics: (m, K); pixel_maxima: (m,). How the statistics are combined stays as it was.
    """
    scores = (*calibration.scores, *image_scores(statistics, calibration).tolist())
    maxima = (*calibration.pixel_maxima, *np.asarray(pixel_maxima, np.float64).tolist())
    return _with_thresholds(
        calibration.statistics,
        calibration.centers,
        calibration.scales,
        tuple(sorted(scores)),
        tuple(sorted(maxima)),
        calibration.false_reject_rate,
        calibration.review_rate,
        calibration.confidence,
        left_out=True,
    )


def recalibrated(
    calibration: Calibration,
    *,
    false_reject_rate: float,
    review_rate: float | None = None,
    confidence: float | None = None,
) -> Calibration:
    """Set new thresholds from the same held-out images; a rate that is not given stays as it was."""
    return _with_thresholds(
        calibration.statistics,
        calibration.centers,
        calibration.scales,
        calibration.scores,
        calibration.pixel_maxima,
        false_reject_rate,
        calibration.review_rate if review_rate is None else review_rate,
        calibration.confidence if confidence is None else confidence,
        calibration.left_out,
    )


def image_scores(statistics: AnyArray, calibration: Calibration) -> Doubles:
    """Combine the (N, K) statistics of N images into (N,) scores."""
    statistics = np.asarray(statistics, np.float64)
    _check_statistics(statistics, len(calibration.statistics))
    return _scores(statistics, calibration.centers, calibration.scales)


def p_value(score: float, calibration: Calibration) -> float:
    """Return (1 + number of held-out good scores at least as large) / (m + 1), in (0, 1].

    On average over samples of held-out images, at most a share p of good parts has a p-value of p or less.
    """
    return _rank(score, calibration.scores)


def fit_light(scores: Sequence[float], limit: float = 0.0) -> LightCalibration:
    """Return the light calibration from the light scores of held-out good images.

    limit: light p-value up to which a part is labelled at least review; 0: never. Raises ConfigError for a
    limit that no p-value can reach with so few images.
    """
    check_light_limit(limit, len(scores))
    return LightCalibration(tuple(sorted(scores)), limit)


def check_light_limit(limit: float, count: int) -> None:
    """Raise ConfigError for a limit outside [0, 1), or below any p-value that `count` images can give."""
    if not 0 <= limit < 1:
        raise ConfigError(f"the light limit is {limit:g}; expected 0 (off) to below 1")
    if 0 < limit < 1 / (count + 1):
        raise ConfigError(
            f"the light limit is {limit:g}, but {count} held-out images give no p-value below "
            f"{1 / (count + 1):.3g}; expected at least that, or {math.ceil(1 / limit) - 1} held-out images"
        )


def light_p_value(score: float, calibration: LightCalibration) -> float:
    """Return the p-value of a light score, a rank among those of the held-out images like `p_value`."""
    return _rank(score, calibration.scores)


def verdict_label(score: float, calibration: Calibration) -> Label:
    """Return the label of an image; a score exceeds a threshold only if it is strictly greater."""
    _check_score(score)
    if score > calibration.defect_threshold:
        return "defect"
    return "review" if score > calibration.review_threshold else "ok"


def scored_images(calibration: Calibration) -> str:
    """Return what images the thresholds were set from, for the user."""
    return "good images, each scored without itself" if calibration.left_out else "held-out good images"


def describe(calibration: Calibration) -> str:
    """Summarise in plain words the rate asked for and what the held-out images guarantee."""
    count = len(calibration.scores)
    rate = f"{100 * calibration.false_reject_rate:g} %"
    promised = f"{100 * calibration.promised_rate:.3g} %"
    missing = calibration.images_needed - count
    source = f"the {count} {scored_images(calibration)}{',' * calibration.left_out}"
    if missing > 0:
        promise = (
            f"{source} promise only {promised}, "
            f"and {rate} needs {missing} more ({calibration.images_needed} in all)"
        )
    else:
        promise = f"{source} promise {promised}"
    over, review = (
        bisect_right(calibration.scores, threshold)
        for threshold in (calibration.defect_threshold, calibration.review_threshold)
    )
    empty = calibration.review_threshold == calibration.defect_threshold
    band = "The review band is empty" if empty else f"{over - review} of them fall into the review band"
    return (
        f"At most {rate} of good parts may be labelled defect, with {100 * calibration.confidence:g} % "
        f"confidence: {promise}. {band}."
    )


def _with_thresholds(
    names: tuple[str, ...],
    centers: tuple[float, ...],
    scales: tuple[float, ...],
    scores: tuple[float, ...],
    pixel_maxima: tuple[float, ...],
    false_reject_rate: float,
    review_rate: float,
    confidence: float,
    left_out: bool,
) -> Calibration:
    """Set the thresholds from scores and map maxima in ascending order."""
    check_shares(false_reject_rate=false_reject_rate, review_rate=review_rate, confidence=confidence)
    if review_rate < false_reject_rate:
        raise ConfigError(
            f"the review rate is {review_rate}; expected at least the false-reject rate, {false_reject_rate}"
        )
    r = order_statistic_index(len(scores), false_reject_rate, confidence) or 0
    return Calibration(
        statistics=names,
        centers=centers,
        scales=scales,
        scores=scores,
        pixel_maxima=pixel_maxima,
        false_reject_rate=false_reject_rate,
        review_rate=review_rate,
        confidence=confidence,
        promised_rate=promised_rate(len(scores), r, confidence),
        images_needed=images_needed(false_reject_rate, confidence),
        defect_threshold=scores[-1 - r],
        review_threshold=scores[-1 - max(r, _review_index(len(scores), review_rate))],
        pixel_threshold=pixel_maxima[-1 - r],
        left_out=left_out,
    )


def _rank(score: float, scores: Sequence[float]) -> float:
    """Return (1 + number of ascending scores that are at least as large) / (m + 1)."""
    _check_score(score)
    return (1 + len(scores) - bisect_left(scores, score)) / (len(scores) + 1)


def _review_index(count: int, rate: float) -> int:
    """Return the largest r, at least 0, for which (r + 1) / (count + 1) <= rate.

    That is the expected share of good parts above the (r + 1)-th largest score: a mean over samples of
    held-out images, whereas the defect threshold's guarantee holds for nearly every sample.
    """
    return min(max(math.floor((count + 1) * rate * (1 + _ROUNDING)) - 1, 0), count - 1)


def _centers_and_scales(statistics: Doubles) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if statistics.shape[1] == 1:
        return (0.0,), (1.0,)
    centers = np.median(statistics, axis=0)
    scales = 1.4826 * np.median(np.abs(statistics - centers), axis=0)
    low, high = np.quantile(statistics, (0.1, 0.9), axis=0)
    scales = np.maximum(scales, (high - low) / WIDTH)
    scales = np.where(scales > 0, scales, statistics.std(axis=0))
    scales = np.where(np.ptp(statistics, axis=0) > 0, scales, 1.0)
    return tuple(centers.tolist()), tuple(scales.tolist())


def _scores(statistics: Doubles, centers: tuple[float, ...], scales: tuple[float, ...]) -> Doubles:
    scores: Doubles = np.max((statistics - np.array(centers)) / np.array(scales), axis=1)
    return scores


def _ascending(values: Doubles) -> tuple[float, ...]:
    return tuple(np.sort(values).tolist())


def _binomial(k: int, count: int, rate: float) -> float:
    """Return the probability of exactly k of `count`, by way of logarithms because factorials overflow."""
    ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
    return math.exp(ways + k * math.log(rate) + (count - k) * math.log1p(-rate))


def _check_count(count: int) -> None:
    if count < 1:
        raise ConfigError(f"there are {count} held-out images; expected at least 1")


def check_shares(**shares: float) -> None:
    """Raise ConfigError for a share that is not between 0 and 1."""
    for name, share in shares.items():
        if not 0 < share < 1:
            raise ConfigError(f"{name.replace('_', ' ')} is {share}; expected above 0 and below 1")


def _check_statistics(statistics: Doubles, names: int) -> None:
    if statistics.ndim != 2 or statistics.shape[1] != names or not names:
        raise DataError(f"statistics have the shape {statistics.shape}; expected (images, {names})")
    if not np.isfinite(statistics).all():
        raise DataError(
            f"{np.sum(~np.isfinite(statistics))} of {statistics.size} image statistics are NaN or infinite; "
            "expected finite numbers"
        )


def _check_score(score: float) -> None:
    if not math.isfinite(score):
        raise DataError(f"an image's score is {score}; expected a finite number")
