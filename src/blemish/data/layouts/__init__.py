"""Layouts of data sets on disk: one module per layout, which lists the samples of a folder.

To add a layout, write a module with the functions of `Layout` and add it to `LAYOUTS`.
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
    """The functions that the module of a layout provides."""

    def matches(self, root: Path, /) -> bool:
        """Return whether `root` looks like this layout, judging by names alone."""
        ...

    def scan(self, root: Path, /) -> list[Sample]:
        """Return the samples below `root`, sorted; raise DataError if it is not in this layout."""
        ...

    def mask_files(self, root: Path, /) -> list[Path]:
        """Return the mask files below `root`, with or without an image, so that `check` finds stray ones."""
        ...


LAYOUTS: dict[str, Layout] = {
    "visa": visa,  # before csv: its categories hold other tables that have the columns of a manifest
    "csv": csv_manifest,
    "loco": loco,
    "mvtec": mvtec,
    "ksdd2": ksdd2,
    "sensum": sensum,
    "folder": folder,
}
"""All layouts, specific before general: the first that matches is used."""


def scan(root: Path, layout: str = "auto") -> list[Sample]:
    """Return the samples of the data set at `root`, a folder or a manifest, without opening any image.

    Masks are opened only if nothing else distinguishes good from defective (ksdd2).
    Raises DataError if `root` is missing, its layout is unknown, or it holds no images.
    """
    samples = LAYOUTS[recognise(root, layout)].scan(root)
    if not samples:
        raise DataError(f"{root} holds no images; expected at least two of good parts")
    return samples


def recognise(root: Path, layout: str = "auto") -> str:
    """Return the name of the layout of `root`: `layout` itself or, for "auto", the first that matches.

    Raises DataError for an unknown name, a missing folder, or a folder that matches no layout.
    """
    if layout not in LAYOUTS and layout != "auto":
        near = difflib.get_close_matches(layout, LAYOUTS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"unknown layout {layout!r}{hint}; expected auto, {', '.join(LAYOUTS)}")
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
    """Describe an unrecognised `root` for a message, with a hint at a data set one level below it."""
    if root.is_file():
        return f"the file {root}"
    names = sorted(
        path.name + "/" * path.is_dir() for path in root.iterdir() if not path.name.startswith(".")
    )
    if not names:
        return f"the empty folder {root}"
    inner = next((path for path in sorted(root.iterdir()) if path.is_dir() and _matching(path)), None)
    hint = f" ({inner.name} inside it is a data set)" if inner else ""
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} in {root}{hint}"
