"""The layout `ksdd2`, of the KolektorSDD2 data set.

train/10000.png   train/10000_GT.png
test/20000.png    test/20000_GT.png

Every image has a mask beside it, which is all black for a good image. The published archive contains a second
copy of 10301, "10301 (copy).png" and "10301_GT (copy).png"; such copies are ignored.
"""

from __future__ import annotations

from pathlib import Path

from blemish.data.layouts.folder import GOOD
from blemish.errors import DataError
from blemish.images.reading import list_images, mask_is_empty
from blemish.types import Sample, SplitName

SPLITS: tuple[SplitName, ...] = ("train", "test")

MASK = "_GT"

COPY = " (copy)"

KIND = "defect"


def matches(root: Path) -> bool:
    """Return whether `root` has train and test, with masks beside the images."""
    return _has_folders(root) and any(_masks(root / split) for split in SPLITS)


def scan(root: Path) -> list[Sample]:
    """Return the samples below `root`, opening the masks, which alone distinguish good from defective.

    Raises DataError if train or test is missing or an image has no mask, ImageError for a damaged mask.
    """
    if not _has_folders(root):
        raise DataError(f"{root} is not in the layout ksdd2; expected train and test inside it")
    return [
        _sample(path, split)
        for split in SPLITS
        for path in _files(root / split)
        if not path.stem.endswith(MASK)
    ]


def mask_files(root: Path) -> list[Path]:
    """Return the masks that are not empty, and those without an image."""
    return [
        mask
        for split in SPLITS
        for mask in _masks(root / split)
        if not _image(mask).is_file() or not mask_is_empty(mask)
    ]


def _sample(path: Path, split: SplitName) -> Sample:
    mask = path.with_stem(path.stem + MASK)
    if not mask.is_file():
        raise DataError(f"{path} has no {mask.name} beside it; expected one, all black for a good image")
    return Sample(path, 0, GOOD, split) if mask_is_empty(mask) else Sample(path, 1, KIND, split, (mask,))


def _image(mask: Path) -> Path:
    return mask.with_stem(mask.stem.removesuffix(MASK))


def _masks(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if path.stem.endswith(MASK)]


def _files(folder: Path) -> list[Path]:
    return [path for path in list_images(folder) if not path.stem.endswith(COPY)]


def _has_folders(root: Path) -> bool:
    return all((root / split).is_dir() for split in SPLITS)
