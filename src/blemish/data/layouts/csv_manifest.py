"""The layout `csv`: a manifest with one line per image and the columns image,label[,mask][,split][,kind].

    image,label,mask,split,kind
    a/001.png,good,,train,
    a/002.png,defect,m/002.png;m/002b.png,test,scratch

Paths are relative to the manifest. label is good or defect, or 0 or 1; split is train, validation or test, or
empty in every line; the default kind is "defect". Masks are separated by semicolons.
Other columns are ignored.
"""

from __future__ import annotations

import csv
import difflib
from pathlib import Path

from blemish.errors import DataError
from blemish.types import Sample, SplitName

COLUMNS = ("image", "label", "mask", "split", "kind")

LABELS = {"good": 0, "0": 0, "defect": 1, "1": 1}

SPLITS: dict[str, SplitName] = {"": "", "train": "train", "validation": "validation", "test": "test"}


def matches(root: Path) -> bool:
    """Return whether `root` is a .csv file or a folder with a manifest."""
    return _is_csv(root) if root.is_file() else bool(_manifests(root))


def scan(root: Path) -> list[Sample]:
    """Return the samples of the manifest `root`, or of the only manifest in that folder, in their order.

    Raises DataError with the file and the line.
    """
    manifest = _only_manifest(root)
    lines = _read(manifest)
    _check_columns(lines[0][1], manifest)
    columns = [name.strip() for name in lines[0][1]]
    samples = []
    first: dict[Path, int] = {}
    for number, values in lines[1:]:
        where = f"{manifest}, line {number}"
        if len(values) != len(columns):
            raise DataError(
                f"{where}: found {len(values)} values; expected {len(columns)}, one for each column"
            )
        row = {name: value.strip() for name, value in zip(columns, values, strict=True)}
        sample = _sample(row, manifest.parent, where)
        if first.setdefault(sample.path.resolve(), number) != number:
            raise DataError(
                f"{where}: {row['image']} is already listed in line {first[sample.path.resolve()]}; "
                "expected it once"
            )
        samples.append(sample)
    return samples


def mask_files(root: Path) -> list[Path]:
    """Return the masks that the manifest lists: others cannot be found."""
    return [mask for sample in scan(root) for mask in sample.masks]


def _sample(row: dict[str, str], base: Path, where: str) -> Sample:
    """Convert one line to a sample; all files must exist and all values must be valid."""
    label = LABELS.get(row["label"])
    if label is None:
        raise DataError(f"{where}: found the label {row['label']!r}; expected one of {', '.join(LABELS)}")
    split = row.get("split", "")
    if split not in SPLITS:
        raise DataError(f"{where}: found the split {split!r}; expected train, validation, test or none")
    kind = row.get("kind") or ("defect" if label else "good")
    masks = tuple(base / name.strip() for name in row.get("mask", "").split(";") if name.strip())
    if (label == 0) != (kind == "good"):
        raise DataError(
            f"{where}: found the kind {kind!r} with the label {row['label']!r}; they contradict each other"
        )
    if label == 0 and masks:
        raise DataError(f"{where}: found a mask for a good image; expected none")
    path = base / row["image"]
    for file in (path, *masks):
        if not file.is_file():
            raise DataError(f"{where}: found no file at {file}; expected an image there")
    return Sample(path, label, kind, SPLITS[split], masks)


def _check_columns(columns: list[str], manifest: Path) -> None:
    """Refuse a header with a missing, duplicate or apparently misspelt column."""
    names = [name.strip() for name in columns]
    missing = [name for name in ("image", "label") if name not in names]
    if missing:
        raise DataError(
            f"{manifest} has the columns {', '.join(names)}; expected {' and '.join(missing)} as well"
        )
    for name in set(names) - set(COLUMNS):
        near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.8)
        if near:
            raise DataError(
                f"{manifest} has a column {name!r}; did you mean {near[0]!r}? "
                "Otherwise choose a less similar name"
            )
    if len(set(names)) < len(names):
        raise DataError(f"{manifest} has the columns {', '.join(names)}; expected each once")


def _read(manifest: Path) -> list[tuple[int, list[str]]]:
    """Return the non-blank rows, each with the number of its last line."""
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, values) for values in reader if any(values)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{manifest} cannot be read ({error}); expected comma-separated UTF-8 text"
        ) from error
    if not lines:
        raise DataError(f"{manifest} is empty; expected the columns {', '.join(COLUMNS)}")
    return lines


def _only_manifest(root: Path) -> Path:
    if root.is_file():
        return root
    manifests = _manifests(root)
    if len(manifests) != 1:
        names = ", ".join(path.name for path in manifests) or "no .csv file with the columns image and label"
        raise DataError(f"found {names} in {root}; expected one manifest, or the path of one")
    return manifests[0]


def _manifests(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if _is_csv(path) and _has_header(path)]


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv" and path.is_file() and not path.name.startswith(".")


def _has_header(path: Path) -> bool:
    """Return whether a file has the header of a manifest; a folder of images may hold other tables."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        names = {name.strip() for name in file.readline().split(",")}
    return {"image", "label"} <= names
