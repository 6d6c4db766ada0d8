"""Preprocessing: from an image to the network's inputs, and from its maps back to the image."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from typing_extensions import override

import drawn
from blemish.images import Preprocessing
from blemish.images.preprocessing import Box, Size, stacked
from blemish.inference.measure import measure, run
from blemish.types import AnyArray, FloatArray


@pytest.mark.parametrize("size", [(40, 56), (33, 7)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_inputs_have_the_networks_shape_and_lie_between_0_and_1(size: Size, dtype: str) -> None:
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (50, 31, 3)).astype(dtype)
    inputs = Preprocessing(size, white=255.0).inputs(image)
    assert inputs.shape == (1, 3, *size)
    assert inputs.dtype == np.float32
    assert 0 <= inputs.min() < inputs.max() <= 1


def test_an_image_of_the_networks_size_is_only_scaled() -> None:
    image = drawn.spotted(1, (40, 56))[0]
    inputs = Preprocessing((40, 56), 65535.0).inputs(image)
    np.testing.assert_allclose(inputs[0], image.transpose(2, 0, 1) / 255, rtol=1e-6)


@pytest.mark.parametrize("white", [1023.0, 4095.0, 65535.0])
def test_white_is_the_value_of_deep_images_that_becomes_1(white: float) -> None:
    preprocessing = Preprocessing((8, 8), white)
    deep = np.full((8, 8, 3), white, np.uint16)
    deep[0] = 0
    inputs = preprocessing.inputs(deep)
    assert np.all(inputs[0, :, 1:] == 1)
    assert np.all(inputs[0, :, 0] == 0)
    assert np.all(preprocessing.inputs(np.full((8, 8, 3), 255, np.uint8)) == 1)


def test_inputs_are_resizing_and_scaling_one_after_the_other() -> None:
    """Training keeps resized images, so the two steps must make the same inputs as both at once."""
    for white, image in (
        (65535.0, drawn.part(2, (90, 70))),
        (4095.0, 16 * drawn.part(2, (90, 70)).astype("uint16")),
    ):
        preprocessing = Preprocessing((40, 56), white)
        resized = preprocessing.resized(image)
        assert resized.shape == (40, 56, 3)
        assert np.array_equal(preprocessing.scaled(resized), preprocessing.inputs(image))


def covered(box: Box, map_size: Size, size: Size) -> AnyArray:
    """Return which pixels of an image, (H, W), overlap a box on its map, in integers."""
    (h, w), (height, width), (x0, y0, x1, y1) = map_size, size, box
    rows = [(row + 1) * h > y0 * height and row * h < y1 * height for row in range(height)]
    columns = [(column + 1) * w > x0 * width and column * w < x1 * width for column in range(width)]
    return np.outer(rows, columns)


@pytest.mark.parametrize("size", [(16, 12), (1, 1), (37, 100), (8, 6), (5, 13), (160, 119)])
def test_a_box_covers_every_pixel_that_it_touches_and_no_other(size: Size) -> None:
    rng = np.random.default_rng(5)
    preprocessing, map_size = Preprocessing((16, 12), 65535.0), (16, 12)
    for _ in range(40):
        (y0, y1), (x0, x1) = (
            sorted(rng.choice(length + 1, 2, replace=False).tolist()) for length in map_size
        )
        left, top, right, bottom = preprocessing.to_image((x0, y0, x1, y1), map_size, size)
        found = np.zeros(size, np.bool_)
        found[top:bottom, left:right] = True
        assert np.array_equal(found, covered((x0, y0, x1, y1), map_size, size))


def test_boxes_stay_where_they_are_on_a_map_of_the_images_size() -> None:
    preprocessing = Preprocessing((16, 12), 65535.0)
    assert preprocessing.to_image((3, 2, 7, 11), (16, 12), (16, 12)) == (3, 2, 7, 11)
    assert preprocessing.to_image((0, 0, 12, 16), (16, 12), (77, 31)) == (0, 0, 31, 77)


def test_a_map_is_enlarged_to_its_image() -> None:
    rng = np.random.default_rng(5)
    preprocessing = Preprocessing((16, 12), 65535.0)
    small = rng.standard_normal((16, 12)).astype(np.float32)
    assert np.array_equal(preprocessing.map_to_image(small, (16, 12)), small)
    large = preprocessing.map_to_image(small, (160, 119))
    assert large.shape == (160, 119)
    assert small.min() <= large.min() < large.max() <= small.max()


def test_it_is_a_value() -> None:
    one = Preprocessing((16, 12), 4095.0)
    assert one == Preprocessing((16, 12), 4095.0) != replace(one, white=1023.0)
    with pytest.raises(FrozenInstanceError):
        one.white = 1.0  # type: ignore[misc]


# --- several inputs for one image ---


class Mean:
    """An engine whose map is the mean over an image's colours, and whose statistics follow from the map."""

    outputs = ("map", "statistics", "half")

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        self.batches.append(len(inputs))
        maps = inputs.mean(1)
        statistics = np.stack([maps.max((1, 2)), -maps.min((1, 2))], 1)
        return {"map": maps, "statistics": statistics, "half": maps / 2}


class Halves(Preprocessing):
    """Two inputs for an image, its upper and its lower half."""

    @override
    def inputs(self, image: AnyArray) -> FloatArray:
        upper, lower = np.split(image, 2)
        return np.concatenate([super(Halves, self).inputs(half) for half in (upper, lower)])

    @override
    def merge(self, maps: FloatArray) -> FloatArray:
        return np.concatenate(list(maps))


def test_the_inputs_of_an_image_are_merged_into_one_map() -> None:
    halves, images = Halves((8, 16), 65535.0), [drawn.part(n, (16, 16)) for n in range(3)]
    engine = Mean()
    found = run(engine, halves, [halves.inputs(image) for image in images])
    assert engine.batches == [6]
    for measured, image in zip(found, images, strict=True):
        expected = image.mean(2) / 255
        np.testing.assert_allclose(measured.map, expected, rtol=1e-5)
        np.testing.assert_allclose(measured.parts["half"], expected / 2, rtol=1e-5)
        np.testing.assert_allclose(measured.statistics, [expected.max(), -expected.min()], rtol=1e-5)


def test_measuring_is_running_one_image_after_the_other() -> None:
    halves, images = Halves((8, 16), 65535.0), [drawn.part(n, (16, 16)) for n in range(3)]
    engine = Mean()
    statistics, maxima = measure(engine, halves, map(halves.inputs, images))
    assert engine.batches == [2, 2, 2]
    together = run(engine, halves, [halves.inputs(image) for image in images])
    assert np.array_equal(statistics, [measured.statistics for measured in together])
    assert np.array_equal(maxima, [measured.map.max() for measured in together])


def test_inputs_of_several_images_are_stacked() -> None:
    rng = np.random.default_rng(5)
    inputs = [rng.random((count, 3, 4, 4)).astype(np.float32) for count in (1, 2, 1)]
    assert np.array_equal(stacked(inputs), np.concatenate(inputs))
    assert stacked(inputs[:1]) is inputs[0]
