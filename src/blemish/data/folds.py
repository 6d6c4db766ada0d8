"""Cross-validation: each image is tested once, by a model that was not trained on it."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from blemish.data.split import relative_path
from blemish.errors import ConfigError, DataError
from blemish.types import Sample

COLUMNS = ("image", "fold")


@dataclass(frozen=True)
class Fold:
    """One fold of a data set: its images are tested by a model that was trained on the others."""

    index: int
    """From 0 to count - 1; shown to users from 1."""
    count: int
    seed: int = 0
    """Random seed of the assignment; unused if `file` assigns the images."""
    file: Path | None = None
    """CSV file with the columns image and fold."""


def assign_fold(samples: Sequence[Sample], root: Path, fold: Fold) -> list[Sample]:
    """Return the samples with the split "test" if they are in the fold, otherwise "train".

    Their own split is overridden. root: folder or manifest of the data set. Folds are assigned at random from
    the seed, or read from the file; the order of the samples is kept and has no influence. Raises ConfigError
    for an impossible fold, DataError for a file that does not match the data set, or if any fold would have
    no good images, or no defective ones although the data set has some.
    """
    if fold.count < 2:
        raise ConfigError(f"found {fold.count} folds; expected at least 2")
    if not 0 <= fold.index < fold.count:
        raise ConfigError(f"found fold {fold.index + 1} of {fold.count}; expected 1 to {fold.count}")
    if fold.seed < 0:
        raise ConfigError(f"found {fold.seed} as the seed of the folds; expected 0 or more")
    numbers = _draw(samples, root, fold) if fold.file is None else _read(samples, root, fold.file, fold.count)
    _refuse_one_sided(samples, numbers, root, fold)
    return [
        replace(sample, split="test" if number == fold.index else "train")
        for sample, number in zip(samples, numbers, strict=True)
    ]


@dataclass(frozen=True)
class FoldRecord:
    """A fold as recorded in a model file, with digests of the data it was made from."""

    index: int
    count: int
    seed: int
    images: str
    """SHA-256 of the paths and kinds of the samples."""
    file: dict[str, str] | None
    """Path and SHA-256 of the fold file, if any."""


def record(fold: Fold, samples: Sequence[Sample], root: Path) -> FoldRecord:
    """Return the record of a fold, with digests of the samples and of the fold file."""
    file = None if fold.file is None else {"path": str(fold.file), "sha256": _digest(fold.file)}
    dealt = sorted((relative_path(sample.path, root), sample.kind) for sample in samples)
    images = hashlib.sha256(repr(dealt).encode()).hexdigest()
    return FoldRecord(fold.index, fold.count, fold.seed, images, file)


def fold_from_record(recorded: FoldRecord, samples: Sequence[Sample], root: Path) -> Fold:
    """Return the recorded fold.

    Raises DataError if the samples differ from the recorded ones, or if the fold file is missing or has
    changed: the fold could then contain images that the model was trained on.
    """
    path = Path(recorded.file["path"]) if recorded.file else None
    fold = Fold(recorded.index, recorded.count, recorded.seed, path)
    name = f"fold {fold.index + 1} of {fold.count}"
    now = record(fold, samples, root)
    if now.images != recorded.images:
        raise DataError(
            f"{name} was made from images or kinds that differ from those in {root}; expected the same"
        )
    if now.file != recorded.file:
        raise DataError(f"{path} has changed since {name} was recorded; expected the same file")
    return fold


def _draw(samples: Sequence[Sample], root: Path, fold: Fold) -> list[int]:
    """Return each sample's fold, dealt out in turn kind by kind, in random order within a kind.

    Each kind continues at the fold where the previous one ended, so that the sizes of the folds, too, differ
    by at most one.
    """
    names = [relative_path(sample.path, root) for sample in samples]
    order = np.array(sorted(range(len(samples)), key=names.__getitem__), np.intp)
    shuffled: list[int] = np.random.default_rng(fold.seed).permutation(order).tolist()
    shuffled.sort(key=lambda place: (samples[place].label, samples[place].kind))  # a stable sort
    numbers = [0] * len(samples)
    for turn, place in enumerate(shuffled):
        numbers[place] = turn % fold.count
    return numbers


def _read(samples: Sequence[Sample], root: Path, file: Path, count: int) -> list[int]:
    """Return each sample's fold as assigned by a file, counted from 0."""
    names = [relative_path(sample.path, root) for sample in samples]
    known = set(names)
    folds: dict[str, int] = {}
    lines: dict[str, int] = {}
    for line, image, number in _lines(file):
        where = f"{file}, line {line}"
        if image not in known:
            raise DataError(f"{where}: {image} is not in {root}; expected only images of that data set")
        if image in lines:
            raise DataError(f"{where}: {image} is already listed in line {lines[image]}; expected it once")
        if not number.isdecimal():
            raise DataError(f"{where}: found the fold {number!r}; expected a whole number")
        folds[image], lines[image] = int(number), line
    if missing := sorted(known - folds.keys()):
        raise DataError(
            f"{file} lacks {len(missing)} of {len(known)} images of {root}, such as {missing[0]}; "
            "expected a line for each"
        )
    first = _first(sorted(set(folds.values())), file, count)
    return [folds[name] - first for name in names]


def _first(numbers: Sequence[int], file: Path, count: int) -> int:
    """Return the number of a file's first fold, 0 or 1; raise DataError for any other numbering."""
    for first in (0, 1):
        if numbers == list(range(first, first + count)):
            return first
    found = ", ".join(map(str, numbers)) or "none"
    raise DataError(f"{file} has the folds {found}; expected 0 to {count - 1}, or 1 to {count}")


def _lines(file: Path) -> list[tuple[int, str, str]]:
    """Read a fold file; return line number, image and fold of each non-blank line."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True, skipinitialspace=True)
            found = reader.fieldnames or ["none"]
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read ({error}); expected comma-separated UTF-8 text") from error
    if missing := [name for name in COLUMNS if name not in found]:
        raise DataError(
            f"{file} has the columns {', '.join(found)}; expected {' and '.join(missing)} as well"
        )
    return [(line, (row["image"] or "").strip(), (row["fold"] or "").strip()) for line, row in rows]


def _refuse_one_sided(samples: Sequence[Sample], numbers: Sequence[int], root: Path, fold: Fold) -> None:
    """Refuse folds without good images or, if the data set has defective ones, without those."""
    counts = Counter((sample.label, number) for sample, number in zip(samples, numbers, strict=True))
    for label, word in enumerate(("good", "defective")):
        total = sum(sample.label == label for sample in samples)
        empty = next((number for number in range(fold.count) if not counts[label, number]), None)
        if empty is not None and (total or label == 0):
            raise DataError(
                f"fold {empty + 1} of {fold.count} would have no {word} images ({root} has {total}); "
                "expected at least one in every fold"
            )


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); expected a file of folds") from error
