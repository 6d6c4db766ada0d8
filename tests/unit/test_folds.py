"""Cross-validation folds: what must hold for any data set, any number of folds, any order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from blemish.data import folds
from blemish.data.folds import Fold, FoldRecord, assign_fold
from blemish.data.split import split
from blemish.errors import ConfigError, DataError
from blemish.files import to_json_types
from blemish.types import Sample, SplitName

ROOT = Path("parts")
GIVEN: tuple[SplitName, ...] = ("", "train", "validation", "test")


def samples(kinds: dict[str, int]) -> list[Sample]:
    """Return made-up samples, that many of each kind, whose splits are all possible ones in turn."""
    return [
        Sample(ROOT / kind / f"{number:03}.png", int(kind != "good"), kind, GIVEN[number % 4])
        for kind, count in kinds.items()
        for number in range(count)
    ]


def in_fold(listed: Sequence[Sample], fold: Fold) -> set[str]:
    """Return the images that a fold tests."""
    assigned = assign_fold(listed, ROOT, fold)
    return {sample.path.relative_to(ROOT).as_posix() for sample in assigned if sample.split == "test"}


def every_fold(
    listed: Sequence[Sample], count: int, seed: int = 0, file: Path | None = None
) -> list[set[str]]:
    return [in_fold(listed, Fold(index, count, seed, file)) for index in range(count)]


DATA_SETS = [
    {"good": 10},
    {"good": 7, "scratch": 5},
    {"good": 23, "dent": 4, "hole": 1, "scratch": 1, "stain": 2, "zip": 3},
    {"good": 40, "dent": 9, "hole": 11},
]


@pytest.mark.parametrize("kinds", DATA_SETS)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_folds_are_a_fair_partition(kinds: dict[str, int], count: int) -> None:
    listed = samples(kinds)
    for seed in range(4):
        parts = every_fold(listed, count, seed)
        assert Counter(name for part in parts for name in part) == Counter(
            sample.path.relative_to(ROOT).as_posix() for sample in listed
        )
        for kind, total in kinds.items():
            sizes = sorted(sum(name.startswith(f"{kind}/") for name in part) for part in parts)
            assert sizes[-1] - sizes[0] <= 1
            assert sum(sizes) == total
        defects = [sum(not name.startswith("good/") for name in part) for part in parts]
        assert max(defects) - min(defects) <= 1  # small kinds do not all go to the first folds
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_fold_sets_the_split_of_every_sample_and_changes_nothing_else() -> None:
    listed = samples({"good": 9, "dent": 3})
    assigned = assign_fold(listed, ROOT, Fold(1, 3))
    assert {sample.split for sample in assigned} == {"train", "test"}
    assert [replace(sample, split="") for sample in assigned] == [
        replace(sample, split="") for sample in listed
    ]


def test_folds_depend_neither_on_the_order_nor_on_given_splits() -> None:
    listed = samples({"good": 30, "dent": 8, "hole": 5})
    expected = every_fold(listed, 3)
    rng = np.random.default_rng(0)
    for _ in range(5):
        shuffled = [listed[place] for place in rng.permutation(len(listed))]
        assert every_fold([replace(sample, split="test") for sample in shuffled], 3) == expected


def test_folds_depend_on_the_seed_but_not_on_where_the_data_set_lies() -> None:
    listed = samples({"good": 30, "dent": 9})
    parts = [every_fold(listed, 3, seed) for seed in range(6)]
    assert all(parts.count(each) == 1 for each in parts)
    elsewhere = [replace(sample, path=Path("else/where") / sample.path) for sample in listed]
    for index in range(3):
        here = assign_fold(listed, ROOT, Fold(index, 3, 4))
        there = assign_fold(elsewhere, Path("else/where") / ROOT, Fold(index, 3, 4))
        assert [sample.split for sample in here] == [sample.split for sample in there]


def test_folds_are_the_same_on_every_machine() -> None:
    in_first = {"dent/000.png", "dent/002.png", "good/000.png", "good/004.png"}  # written down once
    assert in_fold(samples({"good": 6, "dent": 4}), Fold(0, 3, 7)) == in_first


def test_the_split_follows_the_fold() -> None:
    listed = samples({"good": 12, "dent": 6})
    parts = split(assign_fold(listed, ROOT, Fold(2, 3)), ROOT)
    assert {sample.path.relative_to(ROOT).as_posix() for sample in parts.test} == in_fold(listed, Fold(2, 3))
    assert len(parts.train) + len(parts.held_out) == 8
    assert len(parts.train_defects) == 4


@pytest.mark.parametrize("fold", [Fold(0, 1), Fold(0, 0), Fold(3, 3), Fold(-1, 3), Fold(0, 3, -1)])
def test_an_impossible_fold_is_refused(fold: Fold) -> None:
    with pytest.raises(ConfigError, match="expected"):
        assign_fold(samples({"good": 9}), ROOT, fold)


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ({"good": 2}, r"fold 3 of 3 would have no good images \(parts has 2\)"),
        ({"good": 9, "dent": 1, "hole": 1}, r"would have no defective images \(parts has 2\)"),
        ({"dent": 9}, r"fold 1 of 3 would have no good images \(parts has 0\)"),
    ],
)
def test_folds_that_lack_good_or_defective_images_are_refused(kinds: dict[str, int], text: str) -> None:
    for index in range(3):
        with pytest.raises(DataError, match=text):
            assign_fold(samples(kinds), ROOT, Fold(index, 3))


# --- a file of folds ---


def write(path: Path, rows: Sequence[tuple[str, object]], head: str = "image,fold") -> Path:
    path.write_text("\n".join([head, *(f"{image},{fold}" for image, fold in rows)]) + "\n", encoding="utf-8")
    return path


FEW = {"good": 4, "dent": 2}
ROWS = [
    *(("good/000.png", 0), ("good/001.png", 1), ("good/002.png", 0), ("good/003.png", 0)),
    *(("dent/000.png", 1), ("dent/001.png", 0)),
]


@pytest.mark.parametrize("first", [0, 1])
def test_a_file_says_which_image_is_in_which_fold(tmp_path: Path, first: int) -> None:
    file = write(tmp_path / "folds.csv", [(image, fold + first) for image, fold in ROWS])
    expected = [{image for image, fold in ROWS if fold == index} for index in range(2)]
    for seed in (0, 1):
        assert every_fold(samples(FEW), 2, seed, file) == expected


def test_a_file_may_have_a_byte_order_mark_blank_lines_and_other_columns(tmp_path: Path) -> None:
    text = "\ufefffold,image,remark\n\n" + "".join(f"{fold}, {image},x\n" for image, fold in ROWS)
    (tmp_path / "folds.csv").write_text(text, encoding="utf-8")
    assert every_fold(samples(FEW), 2, file=tmp_path / "folds.csv")[1] == {"good/001.png", "dent/000.png"}


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([*ROWS, ("good/004.png", 1)], r"line 8: good/004.png is not in parts; expected only images of"),
        ([*ROWS, ("good/001.png", 1)], r"line 8: good/001.png is already listed in line 3; expected it once"),
        ([*ROWS[:2], ("good/002.png", "one"), *ROWS[3:]], r"line 4: found the fold 'one'; expected a whole"),
        ([*ROWS[:2], ("good/002.png", "-1"), *ROWS[3:]], r"line 4: found the fold '-1'; expected a whole"),
        ([*ROWS[:2], ("good/002.png", ""), *ROWS[3:]], r"line 4: found the fold ''; expected a whole"),
        (ROWS[1:-1], r"lacks 2 of 6 images of parts, such as dent/001.png"),
        ([*ROWS[:-1], ("dent/001.png", 2)], r"has the folds 0, 1, 2; expected 0 to 1, or 1 to 2"),
        ([(image, 0) for image, _ in ROWS], r"has the folds 0; expected 0 to 1, or 1 to 2"),
        ([(image, fold + 2) for image, fold in ROWS], r"has the folds 2, 3; expected 0 to 1, or 1 to 2"),
        (
            [(image, int(image == "good/000.png")) for image, _ in ROWS],
            r"fold 2 of 2 would have no defective images \(parts has 2\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, rows: list[tuple[str, object]], text: str
) -> None:
    file = write(tmp_path / "folds.csv", rows)
    with pytest.raises(DataError, match=text):
        assign_fold(samples(FEW), ROOT, Fold(0, 2, file=file))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "has the columns none; expected image and fold as well"),
        (b"picture,fold\na,1\n", "has the columns picture, fold; expected image as well"),
        (b'image,fold\n"a"b,1\n', "cannot be read"),
        (b"image,fold\n\xff\xfe,1\n", "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    file = tmp_path / "folds.csv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=text):
        assign_fold(samples(FEW), ROOT, Fold(0, 2, file=file))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv cannot be read"):
        assign_fold(samples(FEW), ROOT, Fold(0, 2, file=tmp_path / "none.csv"))


# --- what a model file remembers ---


def test_a_fold_comes_back_from_its_record(tmp_path: Path) -> None:
    listed, file = samples(FEW), write(tmp_path / "folds.csv", ROWS)
    for fold in (Fold(1, 2), Fold(0, 2, 5), Fold(1, 2, 0, file)):
        recorded = folds.record(fold, listed, ROOT)
        text = json.dumps(to_json_types(recorded))  # as a model file has it
        assert msgspec.json.decode(text, type=FoldRecord) == recorded
        assert folds.fold_from_record(recorded, listed[::-1], ROOT) == fold


def test_a_recorded_fold_of_other_images_is_refused(tmp_path: Path) -> None:
    listed = samples(FEW)
    recorded = folds.record(Fold(0, 2), listed, ROOT)
    renamed = [replace(listed[0], path=ROOT / "good/zzz.png"), *listed[1:]]
    another_kind = [*listed[:-1], replace(listed[-1], kind="hole")]
    for other in (listed[1:], renamed, another_kind):
        with pytest.raises(DataError, match="fold 1 of 2 was made from images or kinds that differ"):
            folds.fold_from_record(recorded, other, ROOT)


def test_a_file_of_folds_must_not_change(tmp_path: Path) -> None:
    file = write(tmp_path / "folds.csv", ROWS)
    recorded = folds.record(Fold(0, 2, file=file), samples(FEW), ROOT)
    write(file, [(image, 1 - fold) for image, fold in ROWS])
    with pytest.raises(DataError, match=r"folds\.csv has changed since fold 1 of 2 was recorded"):
        folds.fold_from_record(recorded, samples(FEW), ROOT)
    file.unlink()
    with pytest.raises(DataError, match=r"folds\.csv cannot be read"):
        folds.fold_from_record(recorded, samples(FEW), ROOT)
