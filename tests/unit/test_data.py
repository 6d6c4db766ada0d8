"""Layouts, split and check, on small data sets rendered into a temporary folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blemish.data.check import Report, check, format_report
from blemish.data.layouts import LAYOUTS, recognise, scan
from blemish.data.split import choose_test, relative_path, split
from blemish.errors import ConfigError, DataError
from blemish.types import Sample
from miniatures import MINIATURES


def draw(
    path: Path, *, size: tuple[int, int] = (6, 8), value: int | None = None, dtype: str = "uint8"
) -> Path:
    """Write a grey image: filled with `value`, or random by its path and so unlike any other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = list(str(path).encode())
    pixels = np.random.default_rng(seed).integers(1, 200, size, dtype)
    Image.fromarray(pixels if value is None else np.full(size, value, dtype)).save(path)
    return path


def draw_all(root: Path, names: Iterable[str]) -> None:
    for name in names:
        draw(root / name)


def good(count: int, folder: str) -> list[str]:
    return [f"{folder}/{index:03}.png" for index in range(count)]


def mvtec(root: Path) -> Path:
    draw_all(
        root,
        [*good(12, "train/good"), *good(3, "test/good"), *good(2, "test/scratch"), *good(2, "test/hole")],
    )
    draw_all(
        root,
        [f"ground_truth/{kind}/{index:03}_mask.png" for kind in ("scratch", "hole") for index in range(2)],
    )
    return root


def folder(root: Path) -> Path:
    draw_all(root, [*good(15, "good"), *good(2, "scratch"), "hole/000.png", "masks/scratch/000.png"])
    return root


def divided_folder(root: Path) -> Path:
    draw_all(root, [*good(12, "train/good"), "train/scratch/000.png", *good(3, "test/good")])
    draw_all(root, ["test/scratch/000.png", "train/masks/scratch/000.png", "test/masks/scratch/000_mask.png"])
    return root


def loose_images(root: Path) -> Path:
    draw_all(root, [f"{index:03}.png" for index in range(12)])
    return root


def manifest(root: Path) -> Path:
    draw_all(root, [*good(12, "a"), "b/1.png", "b/m1.png", "b/m2.png"])
    lines = [f"{name},good,,train," for name in good(12, "a")]
    text = "\n".join(
        ["image,label,mask,split,kind", *lines, "b/1.png,defect,b/m1.png;b/m2.png,test,hole", ""]
    )
    (root / "parts.csv").write_text(text)
    return root


RENDERED = {
    "mvtec": ("mvtec", mvtec),
    "folder": ("folder", folder),
    "divided folder": ("folder", divided_folder),
    "loose images": ("folder", loose_images),
    "manifest": ("csv", manifest),
    **{name: (miniature.layout, miniature.render) for name, miniature in MINIATURES.items()},
}


def counts(samples: Iterable[Sample]) -> dict[tuple[str, str, int, int], int]:
    """Count samples by split, kind, label and number of masks."""
    found: dict[tuple[str, str, int, int], int] = {}
    for sample in samples:
        key = (sample.split, sample.kind, sample.label, len(sample.masks))
        found[key] = found.get(key, 0) + 1
    return found


# The contract of every layout


def test_every_layout_is_tested_here() -> None:
    assert {layout for layout, _ in RENDERED.values()} == set(LAYOUTS)


@pytest.mark.parametrize("name", RENDERED)
def test_a_layout_is_recognised_scanned_split_and_passes_check(tmp_path: Path, name: str) -> None:
    layout, make = RENDERED[name]
    root = make(tmp_path / "set")
    assert recognise(root) == layout
    samples = scan(root)
    assert samples == scan(root, layout)
    assert all(path.is_file() for sample in samples for path in (sample.path, *sample.masks))
    assert all((sample.label == 0) == (sample.kind == "good") for sample in samples)
    assert not any(sample.masks for sample in samples if sample.label == 0)
    assert len({sample.path for sample in samples}) == len(samples)
    assert set(LAYOUTS[layout].mask_files(root)) == {mask for sample in samples for mask in sample.masks}
    assert split(samples, root).train
    assert check(root).passed


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto"])
def test_a_layout_refuses_a_missing_and_an_empty_folder(tmp_path: Path, layout: str) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=str(root)):
            scan(root, layout)


def test_an_unknown_layout_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown layout 'mvtek' \(did you mean 'mvtec'\?\)"):
        scan(tmp_path, "mvtek")


def test_what_is_not_recognised_is_named_with_a_hint(tmp_path: Path) -> None:
    mvtec(tmp_path / "bottle")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        DataError, match=r"found bottle/, notes\.txt in .* \(bottle inside it is a data set\); expected"
    ):
        scan(tmp_path)
    with pytest.raises(DataError, match=r"found the file .*notes\.txt"):
        scan(tmp_path / "notes.txt")


def test_hidden_files_and_other_endings_are_left_out(tmp_path: Path) -> None:
    folder(tmp_path)
    before = scan(tmp_path)
    draw_all(tmp_path, ["good/._000.png", ".cache/000.png"])
    (tmp_path / "good" / "Thumbs.db").touch()
    assert scan(tmp_path) == before


# Each layout


def test_mvtec_pairs_masks_by_name(tmp_path: Path) -> None:
    samples = scan(mvtec(tmp_path))
    assert counts(samples) == {
        ("train", "good", 0, 0): 12,
        ("test", "good", 0, 0): 3,
        ("test", "scratch", 1, 1): 2,
        ("test", "hole", 1, 1): 2,
    }
    for sample in samples:
        assert sample.masks in ((), (tmp_path / f"ground_truth/{sample.kind}/{sample.path.stem}_mask.png",))


def test_mvtec_names_the_missing_folder(tmp_path: Path) -> None:
    draw_all(tmp_path, ["train/good/0.png"])
    with pytest.raises(DataError, match="has no test and no ground_truth"):
        scan(tmp_path, "mvtec")


def test_folder_without_splits(tmp_path: Path) -> None:
    found = counts(scan(folder(tmp_path)))
    assert found == {
        ("", "good", 0, 0): 15,
        ("", "scratch", 1, 0): 1,
        ("", "scratch", 1, 1): 1,
        ("", "hole", 1, 0): 1,
    }


def test_folder_with_splits_takes_masks_beside_the_kinds(tmp_path: Path) -> None:
    samples = scan(divided_folder(tmp_path))
    assert counts(samples) == {
        ("train", "good", 0, 0): 12,
        ("train", "scratch", 1, 1): 1,
        ("test", "good", 0, 0): 3,
        ("test", "scratch", 1, 1): 1,
    }
    assert [sample.masks[0].relative_to(tmp_path).parts[0] for sample in samples if sample.masks] == [
        "train",
        "test",
    ]


def test_folder_with_splits_takes_masks_at_the_root_and_flat_training_images(tmp_path: Path) -> None:
    draw_all(tmp_path, [*good(3, "train"), "validation/good/000.png", "test/hole/a.png", "masks/hole/a.png"])
    assert counts(scan(tmp_path)) == {
        ("train", "good", 0, 0): 3,
        ("validation", "good", 0, 0): 1,
        ("test", "hole", 1, 1): 1,
    }


def test_masks_of_good_parts_are_ignored(tmp_path: Path) -> None:
    draw_all(tmp_path, ["good/0.png", "masks/good/0.png"])
    assert counts(scan(tmp_path)) == {("", "good", 0, 0): 1}
    assert not LAYOUTS["folder"].mask_files(tmp_path)


def test_folder_takes_images_and_masks_in_further_folders(tmp_path: Path) -> None:
    draw_all(
        tmp_path, ["good/monday/1.png", "good/tuesday/1.png", "hole/monday/1.png", "masks/hole/monday/1.png"]
    )
    samples = scan(tmp_path)
    assert counts(samples) == {("", "good", 0, 0): 2, ("", "hole", 1, 1): 1}


def test_a_defect_takes_all_its_masks(tmp_path: Path) -> None:
    draw_all(tmp_path, ["good/1.png", "hole/1.png", "masks/hole/1.png", "masks/hole/1_mask.png"])
    assert len(scan(tmp_path)[1].masks) == 2


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["scratch/0.png", "hole/0.png"], r"found hole/, scratch/ in"),
        (["0.png", "defects/0.png"], "images next to defects/"),
        (["good/0.png", "0.png"], "images next to good/"),
        (["train/0.png", "test/0.png"], r"test holds images; expected folders"),
        (
            ["train/scratch/0.png", "test/good/0.png"],
            r"train holds scratch/; expected the good parts in good/",
        ),
        (["train/good/0.png", "test/Good/0.png"], r"test holds Good/"),
        (["good/0.png", "OK/0.png"], r"holds OK/"),
        (["train/good/0.png", "val/good/0.png"], r"val/ \(did you mean validation/\?\)"),
        (["train/good/0.png", "scratch/0.png"], r"found scratch/ in"),
        (
            ["good/0.png", "hole/0.png", "hole/0.bmp", "masks/hole/0.png"],
            r"masks/hole/0\.png matches .*0\.bmp and .*0\.png; expected",
        ),
        (
            ["train/good/0.png", "train/hole/0.png", "test/hole/0.png", "masks/hole/0.png"],
            r"masks/hole/0\.png matches .*train.*and .*test.*; expected",
        ),
    ],
)
def test_folders_that_could_be_misread_are_refused(tmp_path: Path, names: list[str], found: str) -> None:
    draw_all(tmp_path, names)
    with pytest.raises(DataError, match=found):
        scan(tmp_path)


def test_a_manifest_in_a_folder_or_by_its_path(tmp_path: Path) -> None:
    samples = scan(manifest(tmp_path))
    assert counts(samples) == {("train", "good", 0, 0): 12, ("test", "hole", 1, 2): 1}
    assert scan(tmp_path / "parts.csv") == samples
    assert [relative_path(s.path, tmp_path) for s in samples] == [
        relative_path(s.path, tmp_path / "parts.csv") for s in samples
    ]


def test_a_manifest_with_the_least_columns_numbers_and_a_byte_order_mark(tmp_path: Path) -> None:
    draw_all(tmp_path, ["a, b.png", "c.png"])
    (tmp_path / "list.CSV").write_text(
        '\ufefflabel,camera, image \n0,left,"a, b.png"\n\n1,left,c.png\n', "utf-8"
    )
    assert scan(tmp_path) == [
        Sample(tmp_path / "a, b.png", 0, "good"),
        Sample(tmp_path / "c.png", 1, "defect"),
    ]


def test_another_table_beside_images_is_no_manifest(tmp_path: Path) -> None:
    loose_images(tmp_path)
    (tmp_path / "temperatures.csv").write_text("time,celsius\n0,20\n")
    assert recognise(tmp_path) == "folder"


def test_two_manifests_are_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("image,label\n")
    with pytest.raises(DataError, match=r"found a\.csv, b\.csv in"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "is empty"),
        ("image;label\nx.png;good\n", "expected image and label as well"),
        ("image,kind\nx.png,good\n", "expected label as well"),
        ("image,label,masks\nx.png,good,\n", r"a column 'masks'; did you mean 'mask'\?"),
        ("image,label,label\nx.png,good,good\n", "expected each once"),
        ("image,label\n", "no images"),
        ("image,label\nx.png\n", "line 2: found 1 values; expected 2"),
        ("image,label\nx.png,good\ny.png,good,,\n", "line 3: found 4 values"),
        ("image,label\n\nx.png,bad\n", "line 3: found the label 'bad'"),
        ("image,label,split\nx.png,good,val\n", "line 2: found the split 'val'"),
        ("image,label,kind\nx.png,good,hole\n", "line 2: found the kind 'hole'"),
        ("image,label,kind\nx.png,defect,good\n", "line 2: found the kind 'good'"),
        ("image,label,mask\nx.png,good,m.png\n", "line 2: found a mask for a good image"),
        ("image,label\nz.png,good\n", r"line 2: found no file at .*z\.png"),
        ("image,label\n,good\n", "line 2: found no file"),
        ("image,label,mask\nx.png,defect,m.png;n.png\n", r"line 2: found no file at .*n\.png"),
        (
            "image,label\nx.png,good\nsub/../x.png,good\n",
            "line 3: .* is already listed in line 2; expected it once",
        ),
        ('image,label\n"x.png,good\n', "cannot be read"),
        ("image,label\n\udcff.png,good\n", "cannot be read"),
    ],
)
def test_a_bad_manifest_is_refused_by_its_line(tmp_path: Path, text: str, found: str) -> None:
    draw_all(tmp_path, ["x.png", "y.png", "m.png", "sub/z.png"])
    (tmp_path / "list.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=found):
        scan(tmp_path / "list.csv")


# Split


def made(root: Path, count: int, label: int = 0, split_name: str = "", start: int = 0) -> list[Sample]:
    kind = "hole" if label else "good"
    return [
        Sample(root / f"{kind}/{index:04}.png", label, kind, split_name)  # type: ignore[arg-type]
        for index in range(start, start + count)
    ]


ROOT = Path("/data/set")


def test_by_default_all_defects_and_a_fifth_of_the_good_images_are_for_testing() -> None:
    samples = made(ROOT, 100) + made(ROOT, 7, 1)
    parts = split(samples, ROOT)
    assert [len(part) for part in (parts.train, parts.held_out, parts.test)] == [72, 8, 27]
    assert {s for s in parts.test if s.label == 1} == set(samples[100:])
    assert sorted(parts.train + parts.held_out + parts.test, key=str) == sorted(samples, key=str)
    assert not parts.train_defects


def test_only_good_images_leave_nothing_for_testing() -> None:
    parts = split(made(ROOT, 100), ROOT)
    assert (len(parts.train), len(parts.held_out), len(parts.test)) == (90, 10, 0)


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, 1), (3, 1), (9, 4), (10, 5), (49, 5), (60, 6), (209, 21)]
)
def test_a_tenth_is_held_out_but_at_least_five_and_at_most_half(count: int, held_out: int) -> None:
    parts = split(made(ROOT, count, split_name="train"), ROOT)
    assert (len(parts.train), len(parts.held_out)) == (count - held_out, held_out)


def test_share_and_minimum_are_options() -> None:
    assert len(split(made(ROOT, 100), ROOT, 0.25, 5).held_out) == 25
    assert len(split(made(ROOT, 100), ROOT, 0.1, 30).held_out) == 30
    for share, minimum in ((0.0, 5), (1.0, 5), (float("nan"), 5), (0.1, 0)):
        with pytest.raises(ConfigError, match="share"):
            split(made(ROOT, 100), ROOT, share, minimum)


def test_the_split_of_the_data_set_is_kept() -> None:
    train, bad = made(ROOT, 20, split_name="train"), made(ROOT, 3, 1, "train")
    test = made(ROOT, 5, split_name="test", start=100) + made(ROOT, 5, 1, "test", start=100)
    parts = split(train + bad + test, ROOT)
    assert set(parts.train + parts.held_out) == set(train)
    assert parts.train_defects == tuple(bad)
    assert set(parts.test) == set(test)


def test_the_good_images_of_a_validation_part_are_held_out() -> None:
    train, validation = made(ROOT, 20, split_name="train"), made(ROOT, 3, split_name="validation", start=50)
    bad = made(ROOT, 2, 1, "validation")
    parts = split(train + validation + bad, ROOT)
    assert (parts.train, parts.held_out) == (tuple(train), tuple(validation))
    assert not parts.train_defects
    assert not parts.test
    assert len(split(train + bad, ROOT).held_out) == 5


def test_the_split_depends_neither_on_the_order_nor_on_the_folder() -> None:
    samples = made(ROOT, 60) + made(ROOT, 7, 1)
    moved = [
        replace(sample, path=Path("/mnt/d") / sample.path.relative_to(ROOT)) for sample in reversed(samples)
    ]
    here, there = split(samples, ROOT), split(moved, Path("/mnt/d"))
    for part in ("train", "held_out", "test"):
        names = [relative_path(sample.path, ROOT) for sample in getattr(here, part)]
        assert names == [relative_path(sample.path, Path("/mnt/d")) for sample in getattr(there, part)]
        assert names == sorted(names)


def test_the_split_of_a_known_set_never_changes() -> None:
    """Recorded: a change would put images that trained a model into its test set."""
    parts = split(made(ROOT, 12) + made(ROOT, 1, 1), ROOT)
    assert [sample.path.stem for sample in parts.held_out] == ["0000", "0006", "0008", "0009", "0010"]
    assert [sample.path.stem for sample in parts.test if sample.label == 0] == ["0003", "0007"]


def test_new_images_leave_most_choices_as_they_were() -> None:
    before = set(split(made(ROOT, 100), ROOT).held_out)
    after = set(split(made(ROOT, 110), ROOT).held_out)
    assert len(before & after) >= len(before) - 3


@pytest.mark.parametrize(
    "samples",
    [
        [],
        made(ROOT, 1),
        made(ROOT, 1) + made(ROOT, 9, 1),
        made(ROOT, 9, 0, "test"),
        made(ROOT, 1, 0, "train") + made(ROOT, 9, 0, "validation", start=10),
    ],
)
def test_fewer_than_two_good_training_images_are_refused(samples: list[Sample]) -> None:
    with pytest.raises(DataError, match=r"found [01] good images for training in .*; expected at least 2"):
        split(samples, ROOT)


def test_a_data_set_of_test_images_alone_has_a_test_set() -> None:
    samples = made(ROOT, 9, 0, "test") + made(ROOT, 3, 1, "test")
    assert set(choose_test(samples, ROOT)) == set(samples)


def test_splits_given_for_some_images_only_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 of 8 images in .* have a split"):
        split(made(ROOT, 3, split_name="train") + made(ROOT, 5, start=10), ROOT)


def test_one_file_in_two_parts_is_refused(tmp_path: Path) -> None:
    draw_all(tmp_path, [*good(3, "train/good"), "test/good/0.png"])
    (tmp_path / "test" / "good" / "link.png").symlink_to(tmp_path / "train" / "good" / "000.png")
    with pytest.raises(DataError, match=r"000\.png and .*link\.png are the same file"):
        split(scan(tmp_path), tmp_path)
    with pytest.raises(DataError, match="same file"):
        split(made(ROOT, 3) + made(ROOT, 1), ROOT)


# Check


def sentences(report: Report, severity: str) -> list[str]:
    return [problem.sentence for problem in report.problems if problem.severity == severity]


def only_problem(root: Path) -> str:
    report = check(root)
    assert not report.passed
    (sentence,) = sentences(report, "problem")
    return sentence


def only_note(root: Path) -> str:
    report = check(root)
    assert report.passed
    (sentence,) = sentences(report, "note")
    return sentence


def test_check_counts_what_is_there(tmp_path: Path) -> None:
    report = check(mvtec(tmp_path))
    assert [(row.split, row.kind, row.count, row.masks) for row in report.rows] == [
        ("train", "good", 12, 0),
        ("test", "good", 3, 0),
        ("test", "hole", 2, 2),
        ("test", "scratch", 2, 2),
    ]
    assert {(row.sizes, row.modes, row.bits) for row in report.rows} == {(((6, 8),), ("L",), (8,))}
    assert report.problems == ()


def test_check_finds_every_unreadable_file(tmp_path: Path) -> None:
    mvtec(tmp_path)
    cut = tmp_path / "train/good/003.png"
    cut.write_bytes(cut.read_bytes()[:70])
    (tmp_path / "train/good/004.png").write_bytes(b"")
    (tmp_path / "test/good/000.png").write_text("hello")
    report = check(tmp_path)
    found = sentences(report, "problem")
    assert len(found) == 3
    assert all(
        any(word in sentence for sentence in found) for word in ("truncated", "is empty", "begins with")
    )
    assert report.rows[0].count == 12


def test_check_finds_a_mask_of_another_size(tmp_path: Path) -> None:
    draw(mvtec(tmp_path) / "ground_truth/hole/000_mask.png", size=(8, 6))
    assert "000_mask.png is 8 x 6 pixels" in only_problem(tmp_path)


def test_check_finds_an_unreadable_mask(tmp_path: Path) -> None:
    (mvtec(tmp_path) / "ground_truth/hole/000_mask.png").write_bytes(b"")
    assert "000_mask.png is empty;" in only_problem(tmp_path)


def test_check_finds_an_empty_mask(tmp_path: Path) -> None:
    draw(mvtec(tmp_path) / "ground_truth/hole/000_mask.png", value=0)
    assert "marks no pixel" in only_problem(tmp_path)


def test_check_finds_a_mask_without_an_image(tmp_path: Path) -> None:
    stray = draw(mvtec(tmp_path) / "ground_truth/hole/009_mask.png")
    assert f"no image matches the name of the mask {stray};" in only_problem(tmp_path)


def test_check_finds_a_test_image_among_the_training_images(tmp_path: Path) -> None:
    mvtec(tmp_path)
    Image.open(tmp_path / "test/good/001.png").convert("RGB").save(tmp_path / "train/good/001.bmp")
    assert "001.bmp" in only_problem(tmp_path)
    assert "expected only one of them, or all in the same split" in only_problem(tmp_path)


def test_check_does_not_take_images_of_other_sizes_for_copies(tmp_path: Path) -> None:
    for height in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48):
        draw(tmp_path / f"{height}.png", size=(height, 48 // height), value=7)
    assert "different shape" in only_problem(tmp_path)


def test_check_finds_an_image_that_is_good_and_defective(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "hole/000.png").write_bytes((tmp_path / "good/000.png").read_bytes())
    report = check(tmp_path)
    (sentence,) = sentences(report, "problem")
    assert "labelled both good and defective; expected one label" in sentence


def test_check_finds_copies_that_a_split_could_tear_apart(tmp_path: Path) -> None:
    loose_images(tmp_path)
    (tmp_path / "copy.png").write_bytes((tmp_path / "000.png").read_bytes())
    assert "copy.png are the same image" in only_problem(tmp_path)


def test_check_notes_copies_within_a_part(tmp_path: Path) -> None:
    mvtec(tmp_path)
    (tmp_path / "train/good/copy.png").write_bytes((tmp_path / "train/good/000.png").read_bytes())
    assert "copy.png are the same image" in only_note(tmp_path)


def test_check_finds_too_few_good_images(tmp_path: Path) -> None:
    draw_all(tmp_path, good(9, "good"))
    sentence = "found 9 good images to train on; expected at least 10"
    assert only_problem(tmp_path) == sentence
    draw_all(tmp_path, good(5, "hole"))
    assert only_problem(tmp_path) == sentence


def test_check_does_not_count_the_test_images_as_training_images(tmp_path: Path) -> None:
    draw_all(tmp_path, [*good(9, "train/good"), *good(9, "test/good")])
    assert "found 9 good images" in only_problem(tmp_path)


def test_check_finds_a_colour_image_among_grey_ones_by_its_pixels(tmp_path: Path) -> None:
    mvtec(tmp_path)
    grey = Image.open(tmp_path / "train/good/000.png").convert("RGB")
    grey.save(tmp_path / "train/good/000.png")
    assert check(tmp_path).passed
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "train/good/002.png")
    assert "1 of 19 images is in colour, unlike the others; the first is" in only_problem(tmp_path)
    assert check(tmp_path).rows[0].modes == ("L", "RGB")


def test_check_finds_a_grey_image_among_colour_ones(tmp_path: Path) -> None:
    for index in range(12):
        Image.new("RGB", (8, 6), (index, 2, 3)).save(tmp_path / f"{index}.png")
    draw(tmp_path / "odd.png")
    assert "1 of 13 images is grey" in only_problem(tmp_path)


def test_check_distinguishes_sizes_from_shapes(tmp_path: Path) -> None:
    draw(loose_images(tmp_path) / "000.png", size=(60, 80))
    assert f"2 sizes: 6 x 8 (11, the first is {tmp_path / '001.png'})" in only_note(tmp_path)
    draw(tmp_path / "001.png", size=(8, 6))
    assert "3 sizes of different shape" in only_problem(tmp_path)


def test_check_notes_16_bit_data_with_the_depth_in_use(tmp_path: Path) -> None:
    for index in range(12):
        draw(tmp_path / f"{index}.png", value=4000 + index, dtype="uint16")
    assert "largest value is 4011, so 12 bits are in use and white is 4095" in only_note(tmp_path)
    assert check(tmp_path).rows[0].bits == (16,)


def test_check_notes_missing_masks_where_others_have_them(tmp_path: Path) -> None:
    (mvtec(tmp_path) / "ground_truth/hole/000_mask.png").unlink()
    assert "1 of 4 defective images have no mask" in only_note(tmp_path)
    for path in tmp_path.glob("ground_truth/*/*"):
        path.unlink()
    assert check(tmp_path).problems == ()


def test_check_notes_lossy_masks(tmp_path: Path) -> None:
    (mvtec(tmp_path) / "ground_truth/hole/000_mask.png").unlink()
    draw(tmp_path / "ground_truth/hole/000_mask.jpg", value=255)
    assert "1 masks are JPEG or WebP" in only_note(tmp_path)


def test_format_aligns_and_wraps(tmp_path: Path) -> None:
    mvtec(tmp_path)
    (tmp_path / "train/good/000.png").write_text("hello")
    (tmp_path / "ground_truth/hole/000_mask.png").unlink()
    draw(tmp_path / "train/good/001.png", size=(12, 16))
    lines = format_report(check(tmp_path)).splitlines()
    assert lines[0] == f"{tmp_path}: 19 images, layout mvtec"
    assert lines[2:7] == [
        "split  kind     images  height x width    mode  bits  masks",
        "train  good         12  6 x 8 and 1 more  L     8         -",
        "test   good          3  6 x 8             L     8         -",
        "test   hole          2  6 x 8             L     8         1",
        "test   scratch       2  6 x 8             L     8         2",
    ]
    assert "1 problem" in lines
    assert "2 notes" in lines
    assert "no problems found" not in lines
    assert all(len(line) <= 100 for line in lines if str(tmp_path) not in line)


def test_format_states_that_no_problems_were_found(tmp_path: Path) -> None:
    assert format_report(check(loose_images(tmp_path))).endswith("\n\nno problems found")


def test_reading_and_checking_data_import_no_torch() -> None:
    code = "import sys, blemish.data.check, blemish.data.split; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
