"""The layout `visa`, of one category of the VisA data set.

Data/Images/Normal/0000.JPG     Data/Images/Anomaly/000.JPG     Data/Masks/Anomaly/000.png
../split_csv/1cls.csv           object,split,label,image,mask of all categories, paths relative to VisA's root

The table beside the categories defines the split; without it there is none. In all other respects the table
must agree with the folders.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from blemish.data.layouts.pairs import pair
from blemish.errors import DataError
from blemish.images.reading import list_images
from blemish.types import Sample, SplitName

GOOD, DEFECTIVE, MASKS = "Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"

KIND = "anomaly"

TABLE = Path("split_csv/1cls.csv")

COLUMNS = ("object", "split", "label", "image", "mask")

LABELS = {"normal": 0, "anomaly": 1}

SPLITS: dict[str, SplitName] = {"train": "train", "test": "test"}


def matches(root: Path) -> bool:
    """Return whether `root` has Data/Images/Normal and Data/Images/Anomaly."""
    return (root / GOOD).is_dir() and (root / DEFECTIVE).is_dir()


def scan(root: Path) -> list[Sample]:
    """Return the samples below `root`, with their split if the table exists.

    Raises DataError if `root` is not a category of VisA, or with the line at which the table contradicts the
    folders.
    """
    if not matches(root):
        raise DataError(f"{root} is not in the layout visa; expected {GOOD} and {DEFECTIVE} inside it")
    samples = pair(root / GOOD, root / DEFECTIVE, root / MASKS, KIND)
    table = root.resolve().parent / TABLE
    return _with_split(samples, root, table) if table.is_file() else samples


def mask_files(root: Path) -> list[Path]:
    """Return the masks of anomalous images."""
    return list_images(root / MASKS) if (root / MASKS).is_dir() else []


def _with_split(samples: list[Sample], root: Path, table: Path) -> list[Sample]:
    """Return the samples with the split that the table assigns them."""
    category = root.resolve().name
    known = {_name(sample.path, root, category): sample for sample in samples}
    lines: dict[str, int] = {}
    splits: dict[str, SplitName] = {}
    for number, row in _rows(table):
        if row["object"] != category:
            continue
        where, image = f"{table}, line {number}", row["image"]
        if image not in known:
            raise DataError(f"{where}: found the image {image!r}; expected one of {category}/Data/Images")
        if lines.setdefault(image, number) != number:
            raise DataError(f"{where}: {image} is already listed in line {lines[image]}; expected it once")
        _check_row(row, known[image], [_name(mask, root, category) for mask in known[image].masks], where)
        splits[image] = SPLITS[row["split"]]
    unlisted = [name for name in known if name not in splits]
    if unlisted:
        raise DataError(
            f"{table} leaves out {len(unlisted)} of the {len(known)} images of {category}, "
            f"such as {unlisted[0]}; expected all of them"
        )
    return [replace(sample, split=splits[name]) for name, sample in known.items()]


def _check_row(row: dict[str, str], sample: Sample, masks: list[str], where: str) -> None:
    """Refuse a line that contradicts the folders."""
    if row["split"] not in SPLITS:
        raise DataError(f"{where}: found the split {row['split']!r}; expected {' or '.join(SPLITS)}")
    if LABELS.get(row["label"]) != sample.label:
        expected = next(name for name, label in LABELS.items() if label == sample.label)
        raise DataError(f"{where}: found the label {row['label']!r}; the image's folder says {expected}")
    if ([row["mask"]] if row["mask"] else []) != masks:
        raise DataError(
            f"{where}: found the mask {row['mask']!r}; expected {masks[0] if masks else 'none'}, "
            f"as {sample.path} has {'it' if masks else 'no mask of its name'}"
        )


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of the table, each with its line number."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, restval="")
            columns = reader.fieldnames or ()
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read ({error}); expected comma-separated UTF-8 text") from error
    if not set(COLUMNS) <= set(columns):
        found = ", ".join(columns) or "nothing"
        raise DataError(f"{table} begins with {found}; expected the columns {', '.join(COLUMNS)}")
    return rows


def _name(path: Path, root: Path, category: str) -> str:
    """Return the path by which the table refers to a file."""
    return f"{category}/{path.relative_to(root).as_posix()}"
