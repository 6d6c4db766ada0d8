"""A colour means the same in every picture of a model, and larger map values never look smaller."""

import numpy as np
import pytest

from blemish.errors import ImageError
from blemish.images import overlays
from blemish.types import Calibration

GREY = np.full((24, 32, 3), 150, np.uint8)


def calibration(maxima: tuple[float, ...] = (1.0, 2.0, 4.0), threshold: float = 6.0) -> Calibration:
    return Calibration(
        statistics=("max",),
        centers=(0.0,),
        scales=(1.0,),
        scores=maxima,
        pixel_maxima=maxima,
        false_reject_rate=0.01,
        review_rate=0.05,
        confidence=0.95,
        promised_rate=0.6,
        images_needed=299,
        defect_threshold=5.0,
        review_threshold=3.0,
        pixel_threshold=threshold,
    )


def ramp(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 24 * 32, dtype=np.float32).reshape(24, 32)


def luminance(colours: np.ndarray) -> np.ndarray:
    """Relative luminance as WCAG defines it, of (..., 3) in 0 to 255."""
    shares = np.asarray(colours) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_levels_meet_their_three_marks() -> None:
    values = np.array([-5, 0, 2, 4, 6, 8, 10, 1e6], np.float32)
    np.testing.assert_allclose(
        overlays.levels(values, calibration()), [0, 0, 0, 0.25, 0.5, 0.75, 1, 1], atol=1e-7
    )


@pytest.mark.parametrize("maxima", [(6.0, 6.0, 6.0), (7.0, 8.0, 9.0)])
def test_without_a_spread_the_scale_is_a_step_at_the_threshold(maxima: tuple[float, ...]) -> None:
    values = np.array([0, 5.999, 6, 6.001, 99], np.float32)
    assert overlays.levels(values, calibration(maxima)).tolist() == [0, 0, 0, 1, 1]


def test_a_value_has_one_colour_in_every_image() -> None:
    calm, wild = ramp(0, 5), ramp(0, 5)
    wild[:2] = 50
    limits = calibration()
    np.testing.assert_array_equal(
        overlays.overlay(GREY, calm, limits)[3:], overlays.overlay(GREY, wild, limits)[3:]
    )
    np.testing.assert_array_equal(overlays.heatmap(calm, limits)[3:], overlays.heatmap(wild, limits)[3:])


def test_an_overlay_is_clear_at_the_low_point_and_strays_from_the_image_ever_more() -> None:
    values = ramp(0, 5.9)  # all below the threshold: no contour
    strays = np.abs(overlays.overlay(GREY, values, calibration()).astype(int) - 150).sum(2)
    assert not strays[values <= 2].any()
    assert (np.diff(strays.ravel()) >= -1).all()  # 1: rounding
    assert strays.ravel()[-1] > 60


def test_colours_darken_with_the_level() -> None:
    shown = overlays.heatmap(ramp(1, 11), calibration())
    assert (np.diff(luminance(shown).ravel()) <= 0.004).all()
    assert (np.diff(luminance(np.array(overlays.RAMP))) < -0.05).all()


@pytest.mark.parametrize("grey", [20, 90, 150, 200, 245])
def test_a_defect_stands_out_from_dark_and_bright_parts(grey: int) -> None:
    part = np.full((24, 32, 3), grey, np.uint8)
    shown = overlays.overlay(part, np.full((24, 32), 10, np.float32), calibration()).astype(int)
    assert np.ptp(shown[12, 16]) > 60  # saturated, where the part is grey


def test_the_contour_runs_inside_the_region_above_the_threshold() -> None:
    values = np.full((24, 32), 6, np.float32)
    values[5:10, 8:20] = 6.1
    contour = (overlays.overlay(GREY, values, calibration()) == overlays.CONTOUR).all(2)
    expected = np.zeros((24, 32), bool)
    expected[5:10, 8:20] = True
    expected[6:9, 9:19] = False
    np.testing.assert_array_equal(contour, expected)


def test_an_outline_runs_round_the_mask_and_leaves_it_clear() -> None:
    mask = np.zeros((24, 32), bool)
    mask[0:4, 6:9] = True
    drawn = overlays.outline(GREY, mask)
    line = (drawn == overlays.OUTLINE).all(2)
    assert not (drawn[mask] != 150).any()
    assert line[4, 6:9].all()
    assert line[0:4, (5, 9)].all()
    assert line.sum() == 3 + 2 * 4
    np.testing.assert_array_equal(overlays.outline(GREY, np.zeros_like(mask)), GREY)


def test_pictures_are_new_arrays() -> None:
    image, mask = GREY.copy(), np.ones((24, 32), bool)
    mask[4:] = False
    overlays.overlay(image, ramp(0, 20), calibration())
    overlays.outline(image, mask)
    overlays.to_display(image)[:] = 0
    np.testing.assert_array_equal(image, GREY)


def test_the_legend_is_the_ramp() -> None:
    marks = overlays.legend()
    assert [level for level, _ in marks] == [0, 0.25, 0.5, 0.75, 1]
    full = overlays.heatmap(np.full((1, 1), 99, np.float32), calibration())[0, 0]
    assert marks[-1][1] == "#" + bytes(full).hex()


def test_to_display_keeps_bytes_and_repeats_grey() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for image in (grey, grey[..., None]):
        np.testing.assert_array_equal(overlays.to_display(image), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(overlays.to_display(GREY), GREY)


@pytest.mark.parametrize(
    ("values", "white", "shown"),
    [
        ([0, 2048, 4095], None, [0, 128, 255]),
        ([0, 200, 255], None, [0, 200, 255]),
        ([0, 32896, 65535], None, [0, 128, 255]),
        ([0, 512, 2046], 1023.0, [0, 128, 255]),
    ],
)
def test_to_display_shows_deep_images_linearly(
    values: list[int], white: float | None, shown: list[int]
) -> None:
    for kind in (np.uint16, np.float32):
        picture = overlays.to_display(np.array([values], kind), white)
        assert picture.dtype == np.uint8
        assert picture[0, :, 0].tolist() == shown


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.int64), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)]
)
def test_to_display_refuses_what_is_no_image(image: np.ndarray) -> None:
    with pytest.raises(ImageError, match="cannot display an array of"):
        overlays.to_display(image)
