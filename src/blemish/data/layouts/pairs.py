"""The part common to some layouts: folders of good images, of defective images and of their masks."""

from __future__ import annotations

from pathlib import Path

from blemish.data.layouts.folder import GOOD
from blemish.errors import DataError
from blemish.images.reading import list_images
from blemish.types import Sample


def pair(good: Path, defective: Path, masks: Path, kind: str) -> list[Sample]:
    """Return the images of two folders as samples; defective ones get `kind` and the mask of the same name.

    Raises DataError if a folder is missing, or two defective images or two masks share a name.
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
