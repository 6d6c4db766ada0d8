"""Altered copies of good images: what may change, by how much, and that a copy is always the same."""

from pathlib import Path

import numpy as np
import pytest

from blemish import images
from blemish.data.loading.altering import altered, moved, relit
from blemish.data.loading.cache import Memory
from blemish.data.loading.stores import ImageStore
from blemish.images import Preprocessing
from blemish.types import Alteration, AnyArray


def ramp(size: tuple[int, int] = (48, 64)) -> AnyArray:
    """Draw an image whose red rises downwards, whose green rises to the right, and whose blue is constant."""
    down, across = np.meshgrid(*(np.linspace(40, 200, n) for n in size), indexing="ij")
    return np.stack([down, across, np.full(size, 120.0)], axis=2).astype(np.uint8)


def generators(count: int = 40) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(count)]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_copy_has_the_type_and_the_units_of_its_image(dtype: type) -> None:
    white = 255.0 if dtype is np.uint8 else 4095.0
    image = (ramp() * (white / 255)).astype(dtype)
    found = np.stack([altered(image, white, draw, Alteration(1, 1)) for draw in generators()])
    assert found.dtype == dtype
    assert found.shape[1:] == image.shape
    assert found.min() >= 0
    assert found.max() <= white
    brightness = found.mean((1, 2, 3)) / image.mean()
    assert brightness.min() < 0.9  # some copies are darker, some brighter
    assert brightness.max() > 1.05


def test_nothing_changes_without_strength() -> None:
    image = ramp()
    assert altered(image, 255, np.random.default_rng(0), Alteration(0, 0)) is image
    # A strength near 0 leaves light and place nearly as they are; compression changes little.
    draws = generators()
    for draw in draws:
        near = altered(image, 255, draw, Alteration(1e-6, 1e-6))
        assert np.abs(near.astype(float) - image).mean() < 3


def test_light_changes_within_its_limits() -> None:
    flat = np.full((32, 32, 3), 100, np.float32)
    found = np.stack([relit(flat, 255.0, draw, 1.0) for draw in generators(200)])
    lowest = 255 * (100 / 255 * 0.8) ** 1.1 * (1 - 0.15)
    highest = 255 * (100 / 255 * 1.2) ** 0.9
    assert lowest <= found.min() < 1.15 * lowest
    assert 0.9 * highest < found.max() <= highest + 1e-3
    falls = (found.max((1, 2, 3)) - found.min((1, 2, 3))) / found.max((1, 2, 3))
    assert 0.1 < falls.max() <= 0.15 * np.sqrt(2)


def test_half_of_the_copies_are_compressed_and_deep_images_never() -> None:
    """Compression halves the resolution of colour, so that alternating colours become one."""
    image = np.full((32, 32, 3), 100, np.uint8)
    image[::2, :, 0], image[1::2, :, 2] = 180, 180
    draws = generators(200)
    contrasts = [np.ptp(relit(image, 255.0, draw, 1e-9)[..., 0].mean(1)[8:24]) for draw in draws]
    assert 80 <= sum(contrast < 40 for contrast in contrasts) <= 120
    deep = [relit(image.astype(np.float32), 255.0, draw, 1e-9) for draw in generators(20)]
    assert all(np.allclose(one, image, rtol=0, atol=1e-3) for one in deep)


def test_a_part_moves_within_its_limits() -> None:
    image = np.zeros((100, 200, 3), np.float32)
    image[50, 100] = 1.0  # the centre
    image[50, 190] = 1.0
    for draw in generators(60):
        found = moved(image, draw, 1.0)[..., 0]
        y, x = np.unravel_index(found[:, 60:140].argmax(), (100, 80))
        assert abs(y - 50) <= 0.015 * 100 + 1.5
        assert abs(x + 60 - 100) <= 0.015 * 200 + 1.5
        if found[:, 160:].max() > 0.1:
            y, x = np.unravel_index(found[:, 160:].argmax(), (100, 40))
            assert abs(y - 50) <= 90 * 1.03 * np.sin(np.radians(4)) + 0.015 * 100 + 1.5


def test_the_smallest_images_can_be_moved() -> None:
    assert moved(ramp((2, 3)), np.random.default_rng(0), 1.0).shape == (2, 3, 3)


def test_a_copy_depends_on_its_image_and_its_number_alone(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for name in ("a.png", "b.png"):
        images.write_png(tmp_path / name, image)
    images.write_png(tmp_path / "c.png", 255 - image)
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    store = ImageStore(paths, Preprocessing((32, 32), 255.0), Memory(0))
    other = ImageStore(paths[::-1], Preprocessing((32, 32), 255.0), Memory(10**9))
    both = Alteration(1, 1)
    first = store.copy(0, 0, both)
    np.testing.assert_array_equal(first, store.copy(1, 0, both))  # the same bytes under another name
    np.testing.assert_array_equal(first, other.copy(2, 0, both))
    assert not np.array_equal(first, store.copy(0, 1, both))
    assert not np.array_equal(first, store.inputs(0))
