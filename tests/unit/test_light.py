"""Light: what an image's brightness and contrast become, and how unusual they were."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import drawn
from blemish.errors import ConfigError
from blemish.images import Light, Preprocessing
from blemish.images.light import CONSTANT, FLOOR, levels, measure
from blemish.images.resizing import to_input
from blemish.inference.calibration import check_light_limit, fit_light, light_p_value
from blemish.types import AnyArray, FloatArray, LightCalibration

EVEN = Light((0.5,) * 3, (0.1,) * 3, (0.0,) * 6, tuple(map(tuple, np.eye(6).tolist())))
"""A light to which images are brought, whose light score is the length of the correction."""
SIZES = [(64, 64), (256, 256), (130, 200), (63, 40), (700, 65), (5, 9)]


def image(number: int, size: tuple[int, int] = (64, 64)) -> FloatArray:
    """Return an image with values from 0.2 to 0.8 in channels of different contrast."""
    rng = np.random.default_rng(number)
    spread = np.array([0.1, 0.2, 0.3])[:, None, None]
    return (0.5 + spread * rng.uniform(-1, 1, (3, *size))).astype(np.float32)


def parts(count: int, size: tuple[int, int] = (64, 64)) -> list[FloatArray]:
    return [to_input(drawn.part(number, size)) for number in range(count)]


def by_hand(inputs: FloatArray) -> tuple[list[float], list[float]]:
    """Return mean and deviation of each channel, block by block and value by value."""
    height, width = inputs.shape[1:]
    step = max(1, min(height, width) // 64)
    means, deviations = [], []
    for channel in inputs.astype(np.float64):
        blocks = sorted(
            float(channel[y : y + step, x : x + step].mean())
            for y in range(0, height - step + 1, step)
            for x in range(0, width - step + 1, step)
        )
        cut = len(blocks) // 100
        middle = blocks[cut : len(blocks) - cut]
        mean = sum(middle) / len(middle)
        means.append(mean)
        deviations.append((sum((value - mean) ** 2 for value in middle) / len(middle)) ** 0.5)
    return means, deviations


@pytest.mark.parametrize("size", SIZES)
def test_levels_are_those_of_a_thumbnail_counted_by_hand(size: tuple[int, int]) -> None:
    found = levels(image(1, size))
    for one, expected in zip(found, by_hand(image(1, size)), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5)


def test_how_bright_the_brightest_hundredth_is_has_no_say() -> None:
    bright, glaring = image(2), image(2)
    bright[:, 0, :40], glaring[:, 0, :40] = 1.0, 4.0  # of 4096 pixels
    assert np.array_equal(levels(bright), levels(glaring))
    glaring[:, 1, :40] = 4.0  # and now of too many
    assert not np.allclose(levels(bright), levels(glaring), atol=0.01)


@pytest.mark.parametrize(("gain", "offset"), [(0.7, 0.0), (0.8, 0.05), (1.0, -0.1), (1.2, -0.2), (1.4, 0.1)])
def test_gain_and_offset_of_the_lamp_are_undone(gain: float, offset: float) -> None:
    light = measure([image(3)])
    usual, other = image(3), (gain * image(3) + offset).astype(np.float32)
    light.standardise(usual)
    light.standardise(other)
    np.testing.assert_allclose(usual, image(3), atol=1e-6)
    np.testing.assert_allclose(other, image(3), atol=1e-5)


def test_each_channel_is_brought_to_the_training_images() -> None:
    light = measure(parts(7))
    tinted = parts(1)[0] * np.array([0.8, 1.0, 1.2], np.float32)[:, None, None]
    light.standardise(tinted)
    mean, deviation = levels(tinted)
    np.testing.assert_allclose(mean, light.mean, rtol=1e-5)
    np.testing.assert_allclose(deviation, light.deviation, rtol=1e-4)


@pytest.mark.parametrize(
    ("mean", "deviation", "gain", "offset"),
    [
        (0.5, 0.01, 1.6, -0.25),  # 10 and -4.5 without limits
        (0.5, 0.5, 0.6, 0.2),  # 0.2 without limits
        (0.0, 0.1, 1.0, 0.25),
        (1.0, 0.1, 1.0, -0.25),
        (0.4, 0.08, 1.25, 0.0),
    ],
)
def test_gain_and_offset_have_limits(mean: float, deviation: float, gain: float, offset: float) -> None:
    found = EVEN.correction(np.full(3, mean), np.full(3, deviation))
    np.testing.assert_allclose(found[0], gain)
    np.testing.assert_allclose(found[1], offset, atol=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_constant_image_stays_constant_and_finite(level: float) -> None:
    flat = np.full((3, 32, 40), level, np.float32)
    score = measure(parts(5)).standardise(flat)
    assert np.isfinite(flat).all()
    assert np.ptp(flat, axis=(1, 2)).max() <= 1e-6
    assert 0 < score < float("inf")
    constant = measure([np.full((3, 8, 8), 0.25, np.float32)])  # all that was trained on, too
    again = np.full((3, 8, 8), 0.25, np.float32)
    assert constant.standardise(again) == 0
    assert np.all(again == 0.25)


def test_what_is_brighter_than_white_becomes_white_and_darker_than_black_black() -> None:
    dark = (0.5 * image(5)).astype(np.float32)
    dark[:, 3, 3], dark[:, 4, 4] = 1.0, 0.0  # a mirrored lamp, brighter than all else, and a hole
    before = dark.copy()
    light = replace(measure([image(5)]), mean=(0.4,) * 3)
    gain, offset = light.correction(*levels(dark))
    light.standardise(dark)
    expected = gain[:, None, None] * before + offset[:, None, None]
    assert expected.min() < 0
    assert expected.max() > 1
    np.testing.assert_allclose(dark, np.clip(expected, 0, 1), rtol=1e-6)


def test_the_light_score_is_mahalanobis() -> None:
    """Measured over 40 images, against NumPy's own covariance and inverse."""
    rng = np.random.default_rng(6)
    lit = [
        (gain * image(number) + offset).astype(np.float32)
        for number, (gain, offset) in enumerate(
            zip(rng.uniform(0.9, 1.1, 40), rng.uniform(-0.1, 0.1, 40), strict=True)
        )
    ]
    light = measure(lit)
    means, deviations = (np.array(each) for each in zip(*map(by_hand, lit), strict=True))
    np.testing.assert_allclose(light.mean, np.median(means, 0), rtol=1e-5)
    np.testing.assert_allclose(light.deviation, np.median(deviations, 0), rtol=1e-5)
    gains = np.clip(np.median(deviations, 0) / deviations, 0.6, 1.6)
    offsets = np.clip(np.median(means, 0) - gains * means, -0.25, 0.25)
    taken = np.concatenate([np.log(gains), offsets], 1)
    covariance = np.cov(taken.T, bias=True)
    shrunk = 40 / 46 * covariance + 6 / 46 * np.diag(np.diag(covariance)) + FLOOR**2 * np.eye(6)
    np.testing.assert_allclose(light.center, taken.mean(0), atol=1e-5)
    np.testing.assert_allclose(light.covariance, shrunk, rtol=1e-3, atol=1e-7)
    for inputs, row in zip(lit, taken, strict=True):
        away = row - taken.mean(0)
        expected = np.sqrt(away @ np.linalg.inv(shrunk) @ away)
        assert light.standardise(inputs.copy()) == pytest.approx(expected, rel=1e-3)


def test_another_colour_is_more_unusual_than_as_much_more_light() -> None:
    """Lamps vary in all channels together."""
    rng = np.random.default_rng(7)
    gains = rng.uniform(0.9, 1.1, 40)
    light = measure([(gain * part).astype(np.float32) for part, gain in zip(parts(40), gains, strict=True)])
    part = parts(41)[40]
    brighter, tinted = (1.1 * part).astype(np.float32), part
    tinted[0] *= 1.1
    assert light.standardise(tinted) > 1.5 * light.standardise(brighter)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_training_images_have_a_light_too(count: int) -> None:
    light = measure(parts(count))
    assert light.inconsistency() == ""
    usual, dark = parts(1)[0], (0.7 * parts(1)[0]).astype(np.float32)
    assert light.standardise(usual) < light.standardise(dark) < float("inf")


def test_grey_images_have_a_light_score_although_their_channels_are_equal() -> None:
    grey = [np.repeat(part[:1], 3, 0) for part in parts(20)]
    light = measure(grey)
    assert light.inconsistency() == ""
    scores = [light.standardise(part.copy()) for part in grey]
    dark = light.standardise((0.7 * grey[0]).astype(np.float32))
    assert dark > 2 * max(scores)


def test_measuring_repeats_bit_for_bit_and_no_image_is_changed() -> None:
    images = parts(5)
    before = [part.copy() for part in images]
    assert measure(images) == measure(iter(images))
    assert all(np.array_equal(one, other) for one, other in zip(images, before, strict=True))


def test_it_takes_about_a_millisecond_at_most() -> None:
    inputs, light = image(8, (512, 512)), measure([image(8)])
    taken = []
    for _ in range(20):
        begun = time.perf_counter()
        light.standardise(inputs)
        taken.append(time.perf_counter() - begun)
    assert min(taken) < 0.005  # 0.4 ms on a server's processor; others may take a few times that


# --- preprocessing ---


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_preprocessing_standardises_what_it_has_resized(dtype: str) -> None:
    image = (drawn.part(9, (90, 120)) * (16 if dtype == "uint16" else 1)).astype(dtype)
    plain = Preprocessing((40, 56), 4095.0)
    light = measure(parts(6, (40, 56)))
    lit = replace(plain, light=light)
    expected = plain.inputs(image)
    score = light.standardise(expected[0])
    assert np.array_equal(lit.inputs(image), expected)
    assert np.array_equal(lit.scaled(lit.resized(image)), expected)
    inputs, found = lit.with_light_score(lit.resized(image))
    assert (found, inputs.shape) == (score, (1, 3, 40, 56))
    assert np.array_equal(inputs, expected)
    assert plain.with_light_score(plain.resized(image))[1] is None
    assert np.array_equal(plain.resized(image), lit.resized(image))


def test_a_bit_depth_does_not_matter() -> None:
    lit = Preprocessing((64, 64), 4095.0, light=measure(parts(6)))
    eight = drawn.part(10)
    twelve: AnyArray = np.round(eight * (4095 / 255)).astype(np.uint16)
    np.testing.assert_allclose(lit.inputs(twelve), lit.inputs(eight), atol=3e-4)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean": (0.5,)}, "expected 3"),
        ({"deviation": (0.1,) * 4}, "expected 3"),
        ({"center": (0.0,) * 5}, "expected 3"),
        ({"covariance": ()}, "no positive definite matrix"),
        ({"covariance": ((1.0,) * 6,) * 6}, "no positive definite matrix"),
        ({"covariance": ((1.0,) * 5,) * 6}, "no positive definite matrix"),
        ({"gain_limits": (1.1, 1.6)}, "limits of gain and offset"),
        ({"gain_limits": (0.0, 1.6)}, "limits of gain and offset"),
        ({"gain_limits": (0.6, 0.9)}, "limits of gain and offset"),
        ({"offset_limit": -0.1}, "limits of gain and offset"),
    ],
)
def test_a_light_that_cannot_be_is_described(changes: dict[str, Any], says: str) -> None:
    assert EVEN.inconsistency() == ""
    assert says in replace(EVEN, **changes).inconsistency()


# --- light p-values ---


def test_a_light_p_value_is_a_rank_among_held_out_images() -> None:
    scores = (3.0, 1.0, 2.0, 2.0)
    known = fit_light(scores)
    assert known == LightCalibration((1.0, 2.0, 2.0, 3.0), 0.0)
    for score in (0.5, 1.0, 1.5, 2.0, 3.0, 9.0):
        assert light_p_value(score, known) == (1 + sum(other >= score for other in scores)) / 5


def test_light_p_values_of_good_parts_are_valid() -> None:
    """At most a share p of good parts has p or less, on average: training images alone fix the score."""
    rng = np.random.default_rng(11)
    lit = [
        (gain * part).astype(np.float32)
        for part, gain in zip(parts(400), rng.lognormal(0, 0.05, 400), strict=True)
    ]
    shares = []
    for draw in range(20):
        order = np.random.default_rng(draw).permutation(400)
        light = measure([lit[index] for index in order[:20]])
        scores = [light.standardise(lit[index].copy()) for index in order]
        known = fit_light(scores[20:39])
        shares.append(np.mean([light_p_value(score, known) <= 0.1 for score in scores[39:]]))
    assert 0.05 < np.mean(shares) < 0.15  # 0.1 with a standard error of about 0.015


@pytest.mark.parametrize(
    ("limit", "count", "says"),
    [
        (-0.1, 20, r"the light limit is -0\.1; expected 0 \(off\) to below 1"),
        (1.0, 20, "the light limit is 1; expected 0"),
        (0.04, 20, r"20 held-out images give no p-value below 0\.0476; .* or 24 held-out images"),
        (0.01, 98, "or 99 held-out images"),
    ],
)
def test_a_light_limit_that_cannot_be_reached_is_refused(limit: float, count: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_light_limit(limit, count)
    with pytest.raises(ConfigError, match=says):
        fit_light([1.0] * count, limit)


@pytest.mark.parametrize(("limit", "count"), [(0.0, 2), (0.05, 19), (0.01, 99), (0.5, 1)])
def test_a_light_limit_that_can_be_reached_is_taken(limit: float, count: int) -> None:
    known = fit_light([1.0] * count, limit)
    assert known.limit == limit
    assert limit == 0 or light_p_value(2.0, known) <= limit


def test_a_channel_counts_as_constant_below_a_fraction_of_a_grey_level() -> None:
    assert CONSTANT < 1 / 255 / 10
