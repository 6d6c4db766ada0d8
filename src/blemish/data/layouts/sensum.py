"""The layout `sensum`, of one category of the SensumSODF data set.

negative/data/000.png
positive/data/000.png   positive/annotation/000.png

There is no predefined split: the published protocol is cross-validation.
"""

from __future__ import annotations

from pathlib import Path

from blemish.data.layouts.pairs import pair
from blemish.errors import DataError
from blemish.images.reading import list_images
from blemish.types import Sample

GOOD, DEFECTIVE, MASKS = "negative/data", "positive/data", "positive/annotation"

KIND = "positive"


def matches(root: Path) -> bool:
    """Return whether `root` has negative/data and positive/data."""
    return (root / GOOD).is_dir() and (root / DEFECTIVE).is_dir()


def scan(root: Path) -> list[Sample]:
    """Return the samples below `root`; raise DataError if it is not a category of SensumSODF."""
    if not matches(root):
        raise DataError(f"{root} is not in the layout sensum; expected {GOOD} and {DEFECTIVE} inside it")
    return pair(root / GOOD, root / DEFECTIVE, root / MASKS, KIND)


def mask_files(root: Path) -> list[Path]:
    """Return the annotations of positive images."""
    return list_images(root / MASKS) if (root / MASKS).is_dir() else []
