"""The layout `folder`: one folder per kind of part.

    good/ KIND/ ...                     every folder except good/ is a kind of defect
    masks/KIND/NAME.png                 optional, or NAME_mask.png
    train/ test/ [validation/]          each with folders as above; train/ may hold its good images directly
    *.png                               images alone: all are good

Masks are searched for beside the folders of kinds and at the root; their folder may also be called
ground_truth. Images and masks of a kind may lie in subfolders, the same for both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from blemish.errors import DataError
from blemish.images.reading import list_images
from blemish.types import Sample, SplitName

GOOD = "good"

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")

MASK_FOLDERS = ("masks", "ground_truth")

NOT_DEFECTS = (GOOD, "ok", "normal")
"""Names, in any letter case, that cannot denote a kind of defect."""


def matches(root: Path) -> bool:
    """Return whether `root` has a folder good/, train/, validation/ or test/, or images."""
    return root.is_dir() and (
        any((root / name).is_dir() for name in (GOOD, *SPLITS)) or bool(list_images(root))
    )


def scan(root: Path) -> list[Sample]:
    """Return the samples below `root`; raise DataError for contradictory or unknown folders."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; the layout folder expects one")
    given = [name for name in SPLITS if (root / name).is_dir()]
    if given:
        _refuse_unknown_folders(root)
    samples = [sample for name in given for sample in _part(root / name, name, root)]
    return _each_mask_once(samples if given else _part(root, "", root))


def mask_files(root: Path) -> list[Path]:
    """Return the files in all mask folders, except those of good parts."""
    return [
        path
        for place in (root, *(root / name for name in SPLITS))
        for masks in MASK_FOLDERS
        for kind in _folders(place / masks)
        if kind.name != GOOD
        for path in list_images(kind, recursive=True)
    ]


def _part(folder: Path, split: SplitName, root: Path) -> list[Sample]:
    """Return the samples of a folder that holds one folder per kind, or good images alone."""
    kinds = [
        kind
        for kind in _folders(folder)
        if kind.name not in MASK_FOLDERS and list_images(kind, recursive=True)
    ]
    loose = list_images(folder)
    if kinds and loose:
        raise DataError(
            f"{folder} holds images next to {_names(kinds)}; expected either images or folders of them"
        )
    misnamed = [kind for kind in kinds if kind.name != GOOD and kind.name.lower() in NOT_DEFECTS]
    if misnamed or (kinds and split != "test" and not (folder / GOOD).is_dir()):
        raise DataError(f"{folder} holds {_names(misnamed or kinds)}; expected the good parts in good/")
    if loose and split == "test":
        raise DataError(
            f"{folder} holds images; expected folders inside it: good/ and one for each kind of defect"
        )
    found = [Sample(path, 0, GOOD, split) for path in loose]
    for kind in kinds:
        beside = [
            place / masks / kind.name for place in dict.fromkeys((folder, root)) for masks in MASK_FOLDERS
        ]
        found += _kind(kind, split, beside)
    return found


def _kind(folder: Path, split: SplitName, mask_folders: list[Path]) -> Iterator[Sample]:
    """Yield the samples of one kind, each with the masks of the same name."""
    good = folder.name == GOOD
    masks: dict[str, list[Path]] = {}
    for mask_folder in mask_folders:
        for mask in list_images(mask_folder, recursive=True) if mask_folder.is_dir() and not good else ():
            masks.setdefault(_name(mask, mask_folder).removesuffix("_mask"), []).append(mask)
    for path in list_images(folder, recursive=True):
        yield Sample(path, int(not good), folder.name, split, tuple(masks.get(_name(path, folder), ())))


def _each_mask_once(samples: list[Sample]) -> list[Sample]:
    """Refuse a mask whose name matches several images: all but one would get the wrong mask."""
    owners: dict[Path, Path] = {}
    for sample in samples:
        for mask in sample.masks:
            owner = owners.setdefault(mask, sample.path)
            if owner != sample.path:
                raise DataError(
                    f"the name of the mask {mask} matches {owner} and {sample.path}; expected one of them"
                )
    return samples


def _refuse_unknown_folders(root: Path) -> None:
    """Refuse an unknown folder of images beside train/ and test/, such as val/, instead of ignoring it."""
    known = (*SPLITS, *MASK_FOLDERS)
    for folder in _folders(root):
        if folder.name not in known and list_images(folder, recursive=True):
            near = difflib.get_close_matches(folder.name, known, n=1, cutoff=0.4)
            hint = f" (did you mean {near[0]}/?)" if near else ""
            raise DataError(f"found {folder.name}/{hint} in {root}; expected only {', '.join(known)}")


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _names(folders: list[Path]) -> str:
    return ", ".join(f"{folder.name}/" for folder in folders)
