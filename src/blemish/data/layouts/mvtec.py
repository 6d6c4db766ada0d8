"""The layout `mvtec`, of the MVTec AD data set.

train/good/000.png
test/good/000.png   test/KIND/000.png
ground_truth/KIND/000_mask.png
"""

from __future__ import annotations

from pathlib import Path

from blemish.data.layouts import folder
from blemish.errors import DataError
from blemish.types import Sample

NEEDED = ("train/good", "test", "ground_truth")


def matches(root: Path) -> bool:
    """Return whether `root` has train/good, test and ground_truth."""
    return all((root / name).is_dir() for name in NEEDED)


def scan(root: Path) -> list[Sample]:
    """Return the samples below `root`; raise DataError if one of the three folders is missing."""
    missing = [name for name in NEEDED if not (root / name).is_dir()]
    if missing:
        raise DataError(
            f"{root} has no {' and no '.join(missing)}; the layout mvtec expects {', '.join(NEEDED)}"
        )
    return folder.scan(root)


def mask_files(root: Path) -> list[Path]:
    """Return the files in ground_truth."""
    return folder.mask_files(root)
