"""Good and defective images in two folders, masks of the defective in a third: what some layouts share."""

from __future__ import annotations

from pathlib import Path

from blemish.data.layouts.folder import GOOD
from blemish.errors import DataError
from blemish.images.reading import list_images
from blemish.types import Sample


def pair(good: Path, defective: Path, masks: Path, kind: str) -> list[Sample]:
    """List the images of two folders, the defective ones as `kind` with the mask of their name, if any.

    Raises DataError where there is no such folder of images, or one name fits two defective images or masks.
    """
    by_name = _by_name(masks) if masks.is_dir() else {}
    return [
        *(Sample(path, 0, GOOD) for path in list_images(good)),
        *(
            Sample(path, 1, kind, masks=(by_name[name],) if name in by_name else ())
            for name, path in _by_name(defective).items()
        ),
    ]


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in list_images(folder):
        if found.setdefault(path.stem, path) != path:
            raise DataError(f"{found[path.stem]} and {path} share a name; expected one image of each")
    return found
