"""Small parts and data sets, computed from whole numbers: the same bytes on every machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blemish import images
from blemish.types import AnyArray, BoolArray

KIND = "spot"
"""The kind of defect."""


def part(number: int, size: tuple[int, int] = (64, 64)) -> AnyArray:
    """Return a good part, (H, W, 3) uint8: a ramp with a brushed grain that differs from part to part."""
    height, width = size
    rng = np.random.default_rng(number)
    ramp = (
        60 + 60 * np.arange(width)[None, :, None] // width + 40 * np.arange(height)[:, None, None] // height
    )
    grain = rng.integers(-8, 9, (height, 1, 1)) + rng.integers(-5, 6, (height, width, 1))
    image: AnyArray = (ramp + grain + np.array([0, 10, 25])).astype(np.uint8)
    return image


def spotted(number: int, size: tuple[int, int] = (64, 64)) -> tuple[AnyArray, BoolArray]:
    """Return a part with a checkered spot of a quarter of its sides, and the spot's (H, W) mask."""
    image, mask = part(number, size), np.zeros(size, np.bool_)
    rng = np.random.default_rng([number, 1])
    height, width = size[0] // 4, size[1] // 4
    top, left = rng.integers(size[0] - height), rng.integers(size[1] - width)
    mask[top : top + height, left : left + width] = True
    cells = np.indices(size).sum(0) // 4 % 2
    return np.where(mask[..., None], (255 * cells)[..., None], image).astype(np.uint8), mask


def data_set(
    root: Path,
    *,
    train: int = 12,
    good: int = 4,
    bad: int = 4,
    train_bad: int = 0,
    size: tuple[int, int] = (64, 64),
) -> Path:
    """Write a data set in the layout `mvtec`, with masks for all defects; no part occurs twice."""
    for number in range(train):
        images.write_png(root / f"train/good/{number:03}.png", part(number, size))
    for number in range(good):
        images.write_png(root / f"test/good/{number:03}.png", part(1000 + number, size))
    places = [("test", number) for number in range(bad)]
    places += [("train", 100 + number) for number in range(train_bad)]
    for part_of, number in places:
        image, mask = spotted(2000 + number, size)
        images.write_png(root / f"{part_of}/{KIND}/{number:03}.png", image)
        images.write_png(root / f"ground_truth/{KIND}/{number:03}_mask.png", (255 * mask).astype(np.uint8))
    return root
