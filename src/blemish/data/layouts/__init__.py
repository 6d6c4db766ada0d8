"""From a folder to samples: one module per layout of data sets on disk.

To add a layout, write its module and name it in `LAYOUTS`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Protocol

from blemish.data.layouts import csv_manifest, folder, ksdd2, loco, mvtec, sensum, visa
from blemish.errors import DataError
from blemish.types import Sample

__all__ = ["LAYOUTS", "Layout", "recognise", "scan"]


class Layout(Protocol):
    """What the module of a layout offers."""

    def matches(self, root: Path, /) -> bool:
        """Tell from names alone whether `root` looks like this layout."""
        ...

    def scan(self, root: Path, /) -> list[Sample]:
        """List the samples below `root`, sorted; raise DataError where it is not in this layout."""
        ...

    def mask_files(self, root: Path, /) -> list[Path]:
        """List the mask files below `root`, with or without an image, so that `check` finds stray ones."""
        ...


LAYOUTS: dict[str, Layout] = {
    "visa": visa,  # before csv: its categories hold tables of another kind with the columns of a manifest
    "csv": csv_manifest,
    "loco": loco,
    "mvtec": mvtec,
    "ksdd2": ksdd2,
    "sensum": sensum,
    "folder": folder,
}
"""Every layout, the more specific before the more general: the first that matches is taken."""


def scan(root: Path, layout: str = "auto") -> list[Sample]:
    """List the samples of the data set at `root`, a folder or a manifest, without opening an image.

    Masks are opened only where nothing else tells good from defective (ksdd2).
    Raises DataError where `root` is missing, its layout is unknown, or it holds no images.
    """
    samples = LAYOUTS[recognise(root, layout)].scan(root)
    if not samples:
        raise DataError(f"{root} holds no images; expected at least two of good parts")
    return samples


def recognise(root: Path, layout: str = "auto") -> str:
    """Name the layout of the data set at `root`: `layout` itself, or what `root` looks like where it is auto.

    Raises DataError for an unknown name, a missing folder, and a folder that is like no layout.
    """
    if layout not in LAYOUTS and layout != "auto":
        near = difflib.get_close_matches(layout, LAYOUTS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"there is no layout {layout!r}{hint}; expected auto, {', '.join(LAYOUTS)}")
    if not root.exists():
        raise DataError(f"found nothing at {root}; expected a folder with images or a manifest")
    if layout != "auto":
        return layout
    matching = _matching(root)
    if matching is None:
        raise DataError(
            f"found {_contents(root)}; expected good/, train/, images, or a manifest (image,label,...)"
        )
    return matching


def _matching(root: Path) -> str | None:
    return next((name for name, layout in LAYOUTS.items() if layout.matches(root)), None)


def _contents(root: Path) -> str:
    """Say what is in an unrecognised `root`, pointing at a data set one level down."""
    if root.is_file():
        return f"the file {root}"
    names = sorted(
        path.name + "/" * path.is_dir() for path in root.iterdir() if not path.name.startswith(".")
    )
    if not names:
        return f"the empty folder {root}"
    inner = next((path for path in sorted(root.iterdir()) if path.is_dir() and _matching(path)), None)
    hint = f" ({inner.name} in it is a data set)" if inner else ""
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} in {root}{hint}"
