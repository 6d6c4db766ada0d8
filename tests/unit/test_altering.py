"""Altered copies of images: what may change, by how much, and that a copy is always the same."""

from pathlib import Path

import numpy as np
import pytest

from blemish import images
from blemish.data.loading.altering import FALL, GAIN, GAMMA, altered
from blemish.data.loading.cache import Memory
from blemish.data.loading.stores import ImageStore
from blemish.images import Preprocessing
from blemish.types import AnyArray


def ramp(size: tuple[int, int] = (48, 64)) -> AnyArray:
    """Draw an image whose red rises downwards, whose green rises to the right, and whose blue is constant."""
    down, across = np.meshgrid(*(np.linspace(40, 200, n) for n in size), indexing="ij")
    return np.stack([down, across, np.full(size, 120.0)], axis=2).astype(np.uint8)


def generators(count: int = 40) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(count)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_copy_keeps_the_units_of_its_image(dtype: type) -> None:
    white = 255.0 if dtype is np.uint8 else 4095.0
    image: AnyArray = (ramp() * (white / 255)).astype(dtype)
    found = np.stack([altered(image, white, draw) for draw in generators(100)])
    assert found.dtype == (np.uint8 if dtype is np.uint8 else np.float32)
    assert found.shape[1:] == image.shape
    assert found.min() >= 0
    assert found.max() <= white
    near = np.abs(found / white - image / white).mean((1, 2, 3))
    assert near.min() > 0
    assert near.max() < 0.1
    brightness = found.mean((1, 2, 3)) / image.mean()
    assert brightness.min() < 0.93  # some copies are darker, some brighter
    assert brightness.max() > 1.05


def test_light_changes_within_its_limits() -> None:
    flat = np.full((32, 32, 3), 100, np.float32)
    found = np.stack([altered(flat, 255.0, draw) for draw in generators(300)])
    lowest = 255 * (100 / 255 * (1 - GAIN)) ** (1 + GAMMA) * (1 - FALL)
    highest = 255 * (100 / 255 * (1 + GAIN)) ** (1 - GAMMA)
    assert lowest - 1e-3 <= found.min() < 1.1 * lowest
    assert 0.95 * highest < found.max() <= highest + 1e-3
    falls = 1 - found.min((1, 2, 3)) / found.max((1, 2, 3))
    assert 0.9 * FALL < falls.max() <= FALL + 1e-4


def test_half_of_the_copies_are_compressed_and_deep_images_never() -> None:
    """Compression halves the resolution of colour, so that alternating colours become one."""
    image = np.full((32, 32, 3), 100, np.uint8)
    image[::2, :, 0], image[1::2, :, 2] = 180, 180

    def smooth(image: AnyArray) -> int:
        made = [altered(image, 255.0, draw)[8:24, :, 0].mean(1) for draw in generators(200)]
        return sum(float(np.ptp(rows)) < 45 for rows in made)

    eight, deep = smooth(image), smooth(image.astype(np.float32))
    assert 80 <= eight - deep <= 120
    assert deep < 50  # those that are blurred


def test_a_quarter_of_the_copies_is_blurred() -> None:
    image = np.random.default_rng(0).uniform(50, 200, (64, 64, 3)).astype(np.float32)
    kept = [altered(image, 255.0, draw).std() / image.std() for draw in generators(200)]
    assert 30 <= sum(share < 0.85 for share in kept) <= 60  # of 50, those blurred least stay nearly as sharp


def test_a_copy_depends_on_its_image_and_its_number_alone(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for name in ("a.png", "b.png"):
        images.write_png(tmp_path / name, image)
    images.write_png(tmp_path / "c.png", 255 - image)
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    store = ImageStore(paths, Preprocessing((32, 32), 255.0), Memory(0))
    other = ImageStore(paths[::-1], Preprocessing((32, 32), 255.0), Memory(10**9))
    first = store.copy(0, 0)
    np.testing.assert_array_equal(first, store.copy(1, 0))  # the same bytes under another name
    np.testing.assert_array_equal(first, other.copy(2, 0))
    assert not np.array_equal(first, store.copy(0, 1))
    assert not np.array_equal(first, store.inputs(0))
