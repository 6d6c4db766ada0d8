"""The layouts of published data sets, each on a miniature that is drawn with the data set's exact files.

What holds for every layout, these and the others, is in `test_data`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from blemish import images
from blemish.cli import main
from blemish.data.check import check
from blemish.data.layouts import recognise, scan
from blemish.data.layouts.saturation import read_config, regions
from blemish.data.split import choose_test
from blemish.errors import DataError, ImageError
from blemish.types import Sample, Saturation

SIZE = (12, 20)


def image(path: Path, size: tuple[int, int] = SIZE) -> None:
    """Draw a grey image unlike any other."""
    pixels = np.random.default_rng(list(str(path).encode())).integers(1, 200, size, np.uint8)
    images.write_png(path, pixels)
    if path.suffix == ".JPG":
        path.write_bytes(images.jpeg_bytes(pixels, 90))


def mask(path: Path, value: int = 255, size: tuple[int, int] = SIZE) -> None:
    """Draw a mask with a block of one value, from row 2 and column 3 on: 4 x 5 pixels in two pieces."""
    pixels = np.zeros(size, np.uint8)
    pixels[2:6, [3, 4, 9, 10, 11]] = value
    images.write_png(path, pixels)


CONFIG = [
    {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 6, "relative_saturation": False},
    {"defect_name": "broken", "pixel_value": 254, "saturation_threshold": 0.33, "relative_saturation": True},
]


def draw_loco(root: Path) -> Path:
    for part, count in (("train", 12), ("validation", 3), ("test", 2)):
        for number in range(count):
            image(root / f"{part}/good/{number:03}.png")
    for kind in ("logical_anomalies", "structural_anomalies"):
        for number in range(2):
            image(root / f"test/{kind}/{number:03}.png")
            mask(root / f"ground_truth/{kind}/{number:03}/000.png", 255)
    mask(root / "ground_truth/structural_anomalies/001/001.png", 254)
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


def draw_visa(root: Path) -> Path:
    """Draw a category, its folder inside a root with another one and the table of both."""
    lines = ["object,split,label,image,mask"]
    for category in (root, root.parent / "other"):
        notes = ["image,label,mask"]
        for number in range(15):
            name = f"Data/Images/Normal/{number:04}.JPG"
            image(category / name)
            part = "test" if number % 5 == 4 else "train"
            lines.append(f"{category.name},{part},normal,{category.name}/{name},")
            notes.append(f"{category.name}/{name},normal,")
        for number in range(3):
            name, marks = f"Data/Images/Anomaly/{number:03}.JPG", f"Data/Masks/Anomaly/{number:03}.png"
            image(category / name)
            mask(category / marks, number + 1)
            lines.append(f"{category.name},test,anomaly,{category.name}/{name},{category.name}/{marks}")
            notes.append(f'{category.name}/{name},"stuck together,melt",{category.name}/{marks}')
        (category / "image_anno.csv").write_text("\n".join(notes) + "\n")
    table = root.parent / "split_csv/1cls.csv"
    table.parent.mkdir()
    table.write_text("\n".join(lines) + "\n")
    return root


def draw_visa_alone(root: Path) -> Path:
    draw_visa(root)
    (root.parent / "split_csv/1cls.csv").unlink()
    return root


def draw_ksdd2(root: Path) -> Path:
    for part, start, good in (("train", 10000, 11), ("test", 20000, 3)):
        for number in range(start, start + good + 2):
            image(root / f"{part}/{number}.png")
            mask(root / f"{part}/{number}_GT.png", 0 if number < start + good else 255)
    # The published archive has these.
    image(root / "train/10001 (copy).png")
    mask(root / "train/10001_GT (copy).png", 0)
    return root


def draw_sensum(root: Path) -> Path:
    for number in range(15):
        image(root / f"negative/data/{number:03}.png")
    for number in range(3):
        image(root / f"positive/data/{number:03}.png")
        mask(root / f"positive/annotation/{number:03}.png")
    return root


@dataclass(frozen=True)
class Miniature:
    """How to draw a data set, what is in it, and where a test plants its problems."""

    layout: str
    draw: Callable[[Path], Path]
    counts: dict[tuple[str, str, int], int]
    """Samples by split, kind and number of masks."""
    mask: str
    stray: str
    """A mask that no image has."""


MINIATURES = {
    "loco": Miniature(
        "loco",
        draw_loco,
        {
            ("train", "good", 0): 12,
            ("validation", "good", 0): 3,
            ("test", "good", 0): 2,
            ("test", "logical_anomalies", 1): 2,
            ("test", "structural_anomalies", 1): 1,
            ("test", "structural_anomalies", 2): 1,
        },
        "ground_truth/logical_anomalies/001/000.png",
        "ground_truth/logical_anomalies/009/000.png",
    ),
    "visa": Miniature(
        "visa",
        draw_visa,
        {("train", "good", 0): 12, ("test", "good", 0): 3, ("test", "anomaly", 1): 3},
        "Data/Masks/Anomaly/001.png",
        "Data/Masks/Anomaly/009.png",
    ),
    "visa without its table": Miniature(
        "visa",
        draw_visa_alone,
        {("", "good", 0): 15, ("", "anomaly", 1): 3},
        "Data/Masks/Anomaly/001.png",
        "Data/Masks/Anomaly/009.png",
    ),
    "ksdd2": Miniature(
        "ksdd2",
        draw_ksdd2,
        {
            ("train", "good", 0): 11,
            ("train", "defect", 1): 2,
            ("test", "good", 0): 3,
            ("test", "defect", 1): 2,
        },
        "test/20003_GT.png",
        "test/20099_GT.png",
    ),
    "sensum": Miniature(
        "sensum",
        draw_sensum,
        {("", "good", 0): 15, ("", "positive", 1): 3},
        "positive/annotation/001.png",
        "positive/annotation/009.png",
    ),
}
REFUSE_A_MISSING_MASK = ("visa", "ksdd2")
"""Where a mask that is not there contradicts something else."""


@pytest.fixture(params=MINIATURES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def root(tmp_path: Path, name: str) -> Path:
    return MINIATURES[name].draw(tmp_path / "root/part")


def problems(root: Path) -> list[str]:
    return [problem.sentence for problem in check(root).problems if problem.severity == "problem"]


def sample_of(root: Path, name: str) -> Sample:
    (found,) = [sample for sample in scan(root) if sample.path == root / name]
    return found


# Every one of them


def test_it_is_recognised_and_listed_whole(root: Path, name: str) -> None:
    expected = MINIATURES[name]
    assert recognise(root) == expected.layout
    samples = scan(root)
    assert Counter((one.split, one.kind, len(one.masks)) for one in samples) == expected.counts
    assert {one.label for one in choose_test(samples, root)} == {0, 1}


def test_masks_belong_to_their_images(root: Path, name: str) -> None:
    for one in scan(root):
        for path in one.masks:
            assert one.path.stem in (path.stem.removesuffix("_GT"), path.parent.name)
            assert images.read_mask((path,), SIZE).sum() == 20


def test_check_finds_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(root)]) == 0
    assert "no problems found" in capsys.readouterr().out


def test_check_tells_a_missing_mask(root: Path, name: str) -> None:
    (root / MINIATURES[name].mask).unlink()
    if name in REFUSE_A_MISSING_MASK:
        with pytest.raises(DataError, match="expected"):
            check(root)
    else:
        (note,) = check(root).problems
        assert "1 of " in note.sentence
        assert "have no mask" in note.sentence


def test_check_finds_a_stray_mask(root: Path, name: str) -> None:
    stray = root / MINIATURES[name].stray
    mask(stray, 0 if name == "ksdd2" else 255)  # an empty one without an image is stray, too
    assert problems(root) == [f"the mask {stray} fits no image by its name; expected one of that kind"]


def test_check_finds_a_mask_of_another_size(root: Path, name: str) -> None:
    mask(root / MINIATURES[name].mask, size=(20, 12))
    (sentence,) = problems(root)
    assert "is 20 x 12 pixels (height x width); expected its image's 12 x 20" in sentence


def test_check_finds_an_empty_mask(root: Path, name: str) -> None:
    mask(root / MINIATURES[name].mask, value=0)
    if name == "ksdd2":  # an empty mask is how it says good
        assert problems(root) == []
        assert sample_of(root, "test/20003.png").label == 0
    else:
        (sentence,) = problems(root)
        assert "marks no pixel" in sentence


def test_another_layout_is_refused(tmp_path: Path, name: str) -> None:
    layout = MINIATURES[name].layout
    other = draw_visa(tmp_path / "other") if layout == "sensum" else draw_sensum(tmp_path / "other")
    for place in (other, tmp_path):
        with pytest.raises(DataError, match=rf"{place} is not in the layout {layout}; expected \w+"):
            scan(place, layout)


def test_a_folder_of_several_is_refused_with_a_hint(root: Path) -> None:
    with pytest.raises(DataError, match=r"\((part|other) in it is a data set\)"):
        scan(root.parent)


def test_images_of_several_sizes_are_taken(root: Path, name: str) -> None:
    one = next(sample for sample in scan(root) if sample.masks)
    image(one.path, (24, 40))
    for path in one.masks:
        mask(path, size=(24, 40))
    assert check(root).passed


# LOCO


def test_loco_comes_before_mvtec_also_without_its_configuration(tmp_path: Path) -> None:
    draw_loco(tmp_path)
    (tmp_path / "defects_config.json").unlink()
    assert recognise(tmp_path) == "loco"
    assert not any(sample.saturations for sample in scan(tmp_path))
    assert check(tmp_path).passed


def test_other_kinds_with_a_configuration_are_loco_too(tmp_path: Path) -> None:
    draw_loco(tmp_path)
    for place in ("test", "ground_truth"):
        for kind in ("logical", "structural"):
            (tmp_path / place / f"{kind}_anomalies").rename(tmp_path / place / kind)
    assert recognise(tmp_path) == "loco"
    assert {sample.kind for sample in scan(tmp_path)} == {"good", "logical", "structural"}


def test_loco_says_from_which_area_a_defect_saturates(tmp_path: Path) -> None:
    one = sample_of(draw_loco(tmp_path), "test/structural_anomalies/001.png")
    assert one.saturations == (Saturation(255, 6, False), Saturation(254, 0.33, True))
    found = regions(one, SIZE)
    assert found.masks.shape == (2, *SIZE)
    assert found.areas == (6, 6)  # of 20 pixels a third is 6.6
    assert not any(sample.saturations for sample in scan(tmp_path) if sample.label == 0)


def test_a_relative_area_is_a_pixel_at_the_least(tmp_path: Path) -> None:
    draw_loco(tmp_path)
    little = [{"pixel_value": 255, "saturation_threshold": 0.01, "relative_saturation": True}]
    (tmp_path / "defects_config.json").write_text(json.dumps(little))
    assert regions(sample_of(tmp_path, "test/logical_anomalies/000.png"), SIZE).areas == (1,)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({3: 253}, "the value 253; expected one that defects_config.json names"),
        ({3: 255, 9: 254}, "the value 254, 255; expected one"),
        ({}, "marks no pixel"),
    ],
)
def test_a_mask_with_a_strange_value_is_found(tmp_path: Path, values: dict[int, int], found: str) -> None:
    pixels = np.zeros(SIZE, np.uint8)
    for column, value in values.items():
        pixels[3, column] = value
    images.write_png(draw_loco(tmp_path) / "ground_truth/structural_anomalies/001/001.png", pixels)
    (sentence,) = problems(tmp_path)
    assert "structural_anomalies/001/001.png" in sentence
    assert found in sentence


def entry(**changes: object) -> list[dict[str, object]]:
    return [*CONFIG, {**CONFIG[0], "pixel_value": 7} | changes]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "cannot be read"),
        ("{}", "holds no list"),
        ("[]", "holds no list"),
        ("[3]", "entry 1: found 3; expected names and values"),
        ("[{}]", "entry 1: found the pixel_value None"),
        (entry(pixel_value=0), "entry 3: found the pixel_value 0"),
        (entry(pixel_value=256), "found the pixel_value 256"),
        (entry(pixel_value=True), "found the pixel_value True"),
        (entry(pixel_value=254), "entry 3: found the pixel_value 254 again"),
        (entry(relative_saturation=1), "found the relative_saturation 1; expected true or false"),
        (entry(saturation_threshold="6"), "found the saturation_threshold '6'"),
        (entry(saturation_threshold=0), "expected a number of pixels from 1 on"),
        (entry(saturation_threshold=float("inf")), "found the saturation_threshold inf"),
        (entry(saturation_threshold=float("nan")), "found the saturation_threshold nan"),
        (entry(relative_saturation=True), "found the saturation_threshold 6; expected a share"),
        (entry(relative_saturation=True, saturation_threshold=0), "expected a share above 0 and at most 1"),
    ],
)
def test_a_malformed_configuration_is_refused(tmp_path: Path, content: object, found: str) -> None:
    draw_loco(tmp_path)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "defects_config.json").write_text(text)
    with pytest.raises(DataError, match=found) as refusal:
        scan(tmp_path)
    assert "defects_config.json" in str(refusal.value)


def test_a_whole_share_may_be_a_whole_number(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entry(saturation_threshold=1, relative_saturation=True)))
    assert read_config(tmp_path / "config.json")[2] == Saturation(7, 1, True)


# VisA


def test_a_category_is_told_by_its_folders_not_by_its_notes(tmp_path: Path) -> None:
    draw_visa(tmp_path / "root/part")
    assert recognise(tmp_path / "root/part/image_anno.csv") == "csv"
    assert recognise(tmp_path / "root/part") == "visa"


def test_a_category_is_the_same_from_inside_and_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = scan(draw_visa(tmp_path / "root/part"))
    (tmp_path / "link").symlink_to(tmp_path / "root/part")
    assert [sample.split for sample in scan(tmp_path / "link")] == [sample.split for sample in samples]
    monkeypatch.chdir(tmp_path / "root/part")
    assert [sample.split for sample in scan(Path())] == [sample.split for sample in samples]


NORMAL = "part/Data/Images/Normal/0003.JPG"
ANOMALY = "part/Data/Images/Anomaly/001.JPG"
MASK = "part/Data/Masks/Anomaly/001.png"


@pytest.mark.parametrize(
    ("line", "changed", "found"),
    [
        (f"part,train,normal,{NORMAL},", "", "leaves out 1 of the 18 images of part, first " + NORMAL),
        (f"part,train,normal,{NORMAL},", f"part,val,normal,{NORMAL},", "line 5: found the split 'val'"),
        (f"part,train,normal,{NORMAL},", f"part,train,good,{NORMAL},", "line 5: found the label 'good'"),
        (f"part,train,normal,{NORMAL},", f"part,train,anomaly,{NORMAL},", "the image's folder says normal"),
        (f"part,train,normal,{NORMAL},", f"part,train,normal,{NORMAL},{MASK}", "expected none"),
        (f"part,train,normal,{NORMAL},", f"part,train,normal,{NORMAL}x,", "line 5: found the image"),
        (f"part,train,normal,{NORMAL},", f"part,train,normal,{NORMAL[5:]},", "line 5: found the image"),
        (f"part,train,normal,{NORMAL},", "part,train", "line 5: found the image ''"),
        (
            f"part,train,normal,{NORMAL},",
            f"part,train,normal,{NORMAL.replace('3', '2')},",
            "in line 4 already",
        ),
        (f"{ANOMALY},{MASK}", f"{ANOMALY},", f"line 18: found the mask ''; expected {MASK}"),
        (f"{ANOMALY},{MASK}", f"{ANOMALY},{MASK.replace('1.', '2.')}", f"expected {MASK}"),
        ("object,split", "object,part", "begins with object, part, label, image, mask; expected"),
        ("object,split", '"object,split', "cannot be read"),
    ],
)
def test_a_table_that_contradicts_the_folder_is_refused(
    tmp_path: Path, line: str, changed: str, found: str
) -> None:
    root = draw_visa(tmp_path / "root/part")
    table = tmp_path / "root/split_csv/1cls.csv"
    text = table.read_text()
    assert text.count(line) == 1
    table.write_text(text.replace(line, changed))
    with pytest.raises(DataError, match=found) as refusal:
        scan(root)
    assert str(table) in str(refusal.value)


def test_a_category_that_the_table_does_not_know_is_refused(tmp_path: Path) -> None:
    renamed = draw_visa(tmp_path / "root/part").rename(tmp_path / "root/mine")
    with pytest.raises(DataError, match="leaves out 18 of the 18 images of mine"):
        scan(renamed)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    root = draw_visa(tmp_path / "root/part")
    (tmp_path / "root/split_csv/1cls.csv").write_text("")
    with pytest.raises(DataError, match="begins with nothing; expected the columns object, split, label"):
        scan(root)


# KolektorSDD2


def test_an_image_without_its_mask_is_refused(tmp_path: Path) -> None:
    (draw_ksdd2(tmp_path) / "train/10002_GT.png").unlink()
    with pytest.raises(
        DataError, match=r"10002\.png has no 10002_GT\.png beside it; expected one, all black"
    ):
        scan(tmp_path)


def test_a_damaged_mask_leaves_nothing_to_go_by(tmp_path: Path) -> None:
    (draw_ksdd2(tmp_path) / "train/10002_GT.png").write_bytes(b"none")
    with pytest.raises(ImageError, match=r"10002_GT\.png"):
        scan(tmp_path)


def test_the_copies_in_the_archive_are_passed_over(tmp_path: Path) -> None:
    assert not any("copy" in sample.path.name for sample in scan(draw_ksdd2(tmp_path)))


# Two images or masks of one name


def test_one_name_for_two_images_is_refused(tmp_path: Path) -> None:
    draw_sensum(tmp_path)
    image(tmp_path / "positive/data/001.jpg")
    with pytest.raises(DataError, match=r"001\.jpg and .*001\.png share a name"):
        scan(tmp_path)


def test_one_name_for_two_masks_is_refused(tmp_path: Path) -> None:
    draw_sensum(tmp_path)
    mask(tmp_path / "positive/annotation/001.bmp")
    with pytest.raises(DataError, match=r"annotation/001\.bmp and .*001\.png share a name"):
        scan(tmp_path)
