"""Thresholds, compared with a brute-force binomial, and the promise, tested on random samples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from blemish.errors import ConfigError, DataError
from blemish.inference.calibration import (
    describe,
    fit,
    image_scores,
    images_needed,
    order_statistic_index,
    p_value,
    promised_rate,
    recalibrated,
    verdict_label,
)
from blemish.inference.transfer import transferred
from blemish.types import Calibration


def binomial_cdf(r: int, count: int, rate: float) -> float:
    return math.fsum(math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(r + 1))


def held_out(count: int, kinds: int = 1, seed: int = 0) -> Calibration:
    draw = np.random.default_rng(seed)
    names = tuple(f"statistic {k}" for k in range(kinds))
    return fit(draw.standard_normal((count, kinds)), draw.standard_normal(count), names)


# --- The promise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.003, 0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_index_is_the_largest_that_the_binomial_allows(rate: float, confidence: float) -> None:
    for count in (1, 2, 7, 20, 58, 59, 60, 298, 299, 300):
        index = order_statistic_index(count, rate, confidence)
        assert index is None or binomial_cdf(index, count, rate) <= 1 - confidence
        assert binomial_cdf(0 if index is None else index + 1, count, rate) > 1 - confidence


@pytest.mark.parametrize(("count", "r"), [(1, 0), (20, 0), (20, 3), (300, 0), (300, 7), (5000, 31)])
def test_promised_rate_is_where_the_binomial_meets_the_confidence(count: int, r: int) -> None:
    rate = promised_rate(count, r, 0.95)
    assert binomial_cdf(r, count, rate) == pytest.approx(0.05, rel=1e-6)
    assert order_statistic_index(count, rate, 0.95) == r


def test_published_figures() -> None:
    assert [images_needed(rate, 0.95) for rate in (0.05, 0.02, 0.01)] == [59, 149, 299]
    assert promised_rate(20, 0, 0.95) == pytest.approx(0.1391, abs=5e-5)


@pytest.mark.parametrize(("rate", "confidence"), [(0.5, 0.75), (0.1, 0.19), (0.9, 0.5), (0.0001, 0.99)])
def test_images_needed_is_the_fewest(rate: float, confidence: float) -> None:
    count = images_needed(rate, confidence)
    assert order_statistic_index(count, rate, confidence) is not None
    assert count == 1 or order_statistic_index(count - 1, rate, confidence) is None


def test_a_bound_that_is_met_exactly_counts_as_met() -> None:
    assert images_needed(0.5, 0.75) == 2
    assert images_needed(0.1, 0.19) == 2


def test_a_hundred_thousand_images_neither_overflow_nor_underflow() -> None:
    r = order_statistic_index(100_000, 0.01, 0.95)
    assert r is not None
    assert r == pytest.approx(1000 - 1.645 * math.sqrt(990), abs=2)  # the binomial's Gaussian limit
    assert promised_rate(100_000, r, 0.95) <= 0.01


@pytest.mark.parametrize("kinds", [1, 3])
def test_the_promise_holds_in_as_many_samples_as_stated(kinds: int) -> None:
    draw = np.random.default_rng(5)
    parts = np.exp(draw.standard_normal((20_000, kinds)))
    broken = 0
    for _ in range(400):
        chosen = parts[draw.integers(0, len(parts), 93)]
        calibration = fit(
            chosen, chosen[:, 0], ("a", "b", "c")[:kinds], false_reject_rate=0.05, confidence=0.9
        )
        rejected = np.mean(image_scores(parts, calibration) > calibration.defect_threshold)
        broken += bool(rejected > 0.05)
    # With 93 images, r = 0 breaks the promise in 0.9 % of the samples, r = 1 in 5 %, r = 2 in 15 %.
    assert 0.02 * 400 <= broken <= 0.1 * 400


# --- Thresholds ---------------------------------------------------------------------------------------------


def test_thresholds_are_the_order_statistics_of_300_images() -> None:
    scores = np.random.default_rng(0).permutation(300).astype(float)
    calibration = fit(scores[:, None], 1000 + scores, ("maximum",), false_reject_rate=0.02, review_rate=0.05)
    assert order_statistic_index(300, 0.02, 0.95) == 1
    assert calibration.defect_threshold == 298
    assert calibration.pixel_threshold == 1298
    assert calibration.review_threshold == 285  # (14 + 1) / 301 <= 0.05 < (15 + 1) / 301
    assert calibration.promised_rate == promised_rate(300, 1, 0.95)
    assert calibration.images_needed == 149
    assert calibration.scores == tuple(range(300))
    assert calibration.pixel_maxima == tuple(range(1000, 1300))


def test_too_few_images_fall_back_on_the_maximum_and_say_what_it_promises() -> None:
    calibration = held_out(20)
    assert calibration.defect_threshold == max(calibration.scores)
    assert calibration.pixel_threshold == max(calibration.pixel_maxima)
    assert calibration.review_threshold == calibration.defect_threshold
    assert calibration.promised_rate == pytest.approx(0.1391, abs=5e-5)
    assert calibration.images_needed == 299


def test_the_review_share_is_met_exactly_where_it_can_be() -> None:
    scores = np.arange(99.0)
    calibration = fit(scores[:, None], scores, ("maximum",), review_rate=0.07)
    assert calibration.review_threshold == 92
    assert math.floor(100 * 0.29) == 28  # the rounding that must not cost an image
    assert recalibrated(calibration, false_reject_rate=0.05, review_rate=0.29).review_threshold == 70


def test_a_review_rate_of_nearly_one_stops_at_the_smallest_score() -> None:
    calibration = recalibrated(held_out(5), false_reject_rate=0.1, review_rate=1 - 1e-12)
    assert calibration.review_threshold == min(calibration.scores)


def test_the_review_threshold_is_never_above_the_defect_threshold() -> None:
    # Little confidence lets the defect threshold fall below the mean share that review stands for.
    calibration = recalibrated(held_out(100), false_reject_rate=0.1, review_rate=0.1, confidence=0.05)
    assert calibration.review_threshold == calibration.defect_threshold < sorted(calibration.scores)[-10]


def test_thresholds_fall_as_rates_rise() -> None:
    original = held_out(700)
    rates = (0.003, 0.01, 0.03, 0.1, 0.3, 0.9)
    steps = [recalibrated(original, false_reject_rate=rate, review_rate=0.95) for rate in rates]
    thresholds = [step.defect_threshold for step in steps]
    assert thresholds == sorted(thresholds, reverse=True)
    assert len(set(thresholds)) == len(rates)
    assert [step.pixel_threshold for step in steps] == sorted(
        (step.pixel_threshold for step in steps), reverse=True
    )


def test_more_confidence_never_lowers_the_threshold() -> None:
    thresholds = [
        recalibrated(held_out(700), false_reject_rate=0.05, confidence=confidence).defect_threshold
        for confidence in (0.5, 0.8, 0.95, 0.999)
    ]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < thresholds[-1]


def test_recalibrating_equals_calibrating_with_those_rates() -> None:
    draw = np.random.default_rng(3)
    statistics, maxima = draw.standard_normal((400, 2)), draw.standard_normal(400)
    first = fit(statistics, maxima, ("a", "b"), review_rate=0.2, confidence=0.9)
    wanted = fit(statistics, maxima, ("a", "b"), false_reject_rate=0.03, review_rate=0.2, confidence=0.9)
    assert recalibrated(first, false_reject_rate=0.03) == wanted


# --- Scores -------------------------------------------------------------------------------------------------


def test_one_statistic_is_the_score_as_it_is() -> None:
    draw = np.random.default_rng(1)
    statistics = draw.standard_normal((50, 1)) * 7 + 100
    calibration = fit(statistics, draw.standard_normal(50), ("maximum",))
    assert calibration.scores == tuple(np.sort(statistics[:, 0]))
    np.testing.assert_array_equal(image_scores(np.array([[2.5], [-3.0]]), calibration), [2.5, -3.0])


def test_several_statistics_join_as_the_largest_robust_z_score() -> None:
    statistics = np.array([[0.0, 10.0], [1.0, 30.0], [2.0, 20.0], [3.0, 50.0], [4.0, 40.0]])
    calibration = fit(statistics, np.zeros(5), ("a", "b"))
    assert calibration.centers == (2.0, 30.0)  # medians
    assert calibration.scales == pytest.approx((1.4826, 14.826))  # of deviations 0 1 1 2 2 and 0 10 10 20 20
    scores = image_scores(np.array([[2.0, 30.0], [5.0, 30.0], [2.0, 60.0], [5.0, 90.0]]), calibration)
    np.testing.assert_allclose(scores, np.array([0, 3, 3, 6]) / 1.4826)
    assert scores.dtype == np.float64


def test_the_scale_is_that_of_a_gaussian_and_no_outlier_moves_it() -> None:
    draw = np.random.default_rng(2)
    statistics = draw.normal(5, 3, (20_001, 2))
    statistics[:200] = 1e6
    calibration = fit(statistics, np.zeros(20_001), ("a", "b"))
    assert calibration.centers == pytest.approx((5, 5), abs=0.15)
    assert calibration.scales == pytest.approx((3, 3), rel=0.05)


def test_no_spread_gives_a_usable_scale() -> None:
    mostly_equal = np.array([4.0] * 20 + [9])
    statistics = np.stack((np.full(21, 0.1), mostly_equal, np.arange(21.0)), axis=1)
    calibration = fit(statistics, np.zeros(21), ("a", "b", "c"))
    assert calibration.scales[:2] == (1.0, mostly_equal.std())
    assert np.isfinite(calibration.scores).all()


def test_half_the_images_nearly_equal_do_not_make_the_others_infinitely_odd() -> None:
    # Seen with parts on a white background, whose score is the same up to rounding in every image.
    nearly_equal = np.concatenate((0.04 + 1e-9 * np.arange(11), np.linspace(0.05, 0.2, 10)))
    calibration = fit(np.stack((nearly_equal, nearly_equal), 1), np.zeros(21), ("a", "b"))
    assert calibration.scales[0] == pytest.approx(
        np.subtract(*np.quantile(nearly_equal, (0.9, 0.1))) / 2.5631
    )
    assert max(calibration.scores) < 10


def test_p_value_counts_held_out_scores_at_least_as_large() -> None:
    calibration = fit(np.array([[3.0], [1], [2], [2]]), np.zeros(4), ("maximum",))
    assert [p_value(score, calibration) for score in (0, 1, 1.5, 2, 2.5, 3, 4)] == [
        5 / 5,
        5 / 5,
        4 / 5,
        4 / 5,
        2 / 5,
        2 / 5,
        1 / 5,
    ]


def test_a_score_at_a_threshold_is_not_over_it() -> None:
    calibration = dataclasses.replace(held_out(30), review_threshold=1.0, defect_threshold=2.0)
    labels = [verdict_label(score, calibration) for score in (-5.0, 1.0, 1.01, 2.0, 2.01)]
    assert labels == ["ok", "ok", "review", "review", "defect"]


# --- Words --------------------------------------------------------------------------------------------------


def test_description_of_too_few_images() -> None:
    said = describe(held_out(20))
    for fact in (
        "At most 1 %",
        "95 % confidence",
        "20 held-out",
        "only 13.9 %",
        "279 more",
        "299 in all",
        "empty",
    ):
        assert fact in said


def test_description_of_enough_images() -> None:
    calibration = recalibrated(held_out(300), false_reject_rate=0.02, confidence=0.999)
    assert "only" in describe(calibration)
    calibration = recalibrated(held_out(300), false_reject_rate=0.02)
    said = describe(calibration)
    assert "At most 2 %" in said
    assert f"300 held-out good images promise {100 * promised_rate(300, 1, 0.95):.3g} %" in said
    assert "13 of them fall into the review band" in said
    assert "more" not in said


# --- Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"false_reject_rate": 0.0}, "false reject rate is 0.0"),
        ({"false_reject_rate": math.nan}, "false reject rate is nan"),
        ({"review_rate": 1.0}, "review rate is 1.0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"false_reject_rate": 0.1, "review_rate": 0.05}, "expected at least the false-reject rate, 0.1"),
    ],
)
def test_refuses_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        fit(np.arange(9.0)[:, None], np.arange(9.0), ("maximum",), **options)


@pytest.mark.parametrize(
    ("statistics", "maxima", "sentence"),
    [
        (np.zeros((1, 1)), np.zeros(1), "there are 1 held-out good images"),
        (np.zeros((4, 2)), np.zeros(4), r"\(4, 2\); expected \(images, 1\)"),
        (np.zeros(4), np.zeros(4), "expected"),
        (np.array([[0.0], [math.nan]]), np.zeros(2), "1 of 2 image statistics"),
        (np.zeros((2, 1)), np.array([0.0, math.inf]), "one finite number for each"),
        (np.zeros((2, 1)), np.zeros(3), r"map maxima of shape \(3,\) for 2 held-out"),
    ],
)
def test_refuses_data(statistics: np.ndarray, maxima: np.ndarray, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        fit(statistics, maxima, ("maximum",))


def test_refuses_to_judge_what_is_not_a_number() -> None:
    calibration = held_out(30)
    for judge in (p_value, verdict_label):
        with pytest.raises(DataError, match="score is nan"):
            judge(math.nan, calibration)
    with pytest.raises(DataError, match="NaN"):
        image_scores(np.array([[math.nan]]), calibration)
    with pytest.raises(DataError, match="shape"):
        image_scores(np.zeros((3, 2)), calibration)


def test_refuses_indices_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="r is 5; expected 0 to 4"):
        promised_rate(5, 5, 0.95)
    with pytest.raises(ConfigError, match="0 held-out images"):
        order_statistic_index(0, 0.1, 0.95)


@pytest.mark.parametrize("names", [("maximum",), ("maximum", "top_mean")])
def test_thresholds_are_carried_over_by_lines(names: tuple[str, ...]) -> None:
    rng = np.random.default_rng(5)
    statistics, maxima = rng.normal(3, 1, (40, len(names))), rng.normal(2, 0.5, 40)
    before = fit(statistics, maxima, names, left_out=True)
    slopes, levels = np.array([1.1, 0.8])[: len(names)], np.array([-0.2, 0.4])[: len(names)]
    after = transferred(before, (statistics, maxima), (levels + slopes * statistics, 0.1 + 1.5 * maxima))
    parts = rng.normal(3.5, 1.5, (300, len(names)))
    for part in parts:
        old, new = image_scores(part[None], before)[0], image_scores((levels + slopes * part)[None], after)[0]
        assert verdict_label(new, after) == verdict_label(old, before)
        assert p_value(new, after) == pytest.approx(p_value(old, before))
    assert after.pixel_threshold == pytest.approx(0.1 + 1.5 * before.pixel_threshold)
    assert (after.left_out, after.promised_rate) == (True, before.promised_rate)


def test_statistics_that_do_not_vary_are_shifted_only() -> None:
    statistics, maxima = np.full((5, 2), 3.0), np.full(5, 2.0)
    before = fit(np.random.default_rng(0).normal(3, 1, (9, 2)), np.arange(9.0), ("a", "b"), left_out=True)
    after = transferred(before, (statistics, maxima), (statistics + 0.5, maxima - 0.5))
    assert after.scales == before.scales
    assert after.centers == tuple(center + 0.5 for center in before.centers)
    turned = transferred(
        before, (np.arange(10.0).reshape(5, 2), maxima), (-np.arange(10.0).reshape(5, 2), maxima)
    )
    assert min(turned.scales) > 0
