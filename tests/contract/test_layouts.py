"""The layouts of published data sets, each on a miniature with exactly the files of the data set.

What holds for every layout, these and the others, is in `unit/test_data.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from blemish import images
from blemish.cli.main import main
from blemish.data.check import check
from blemish.data.layouts import recognise, scan
from blemish.data.layouts.saturation import read_config, regions
from blemish.data.split import choose_test
from blemish.errors import DataError, ImageError
from blemish.types import Sample, Saturation
from miniatures import (
    CONFIG,
    MINIATURES,
    REFUSE_A_MISSING_MASK,
    SIZE,
    render_image,
    render_ksdd2,
    render_loco,
    render_mask,
    render_sensum,
    render_visa,
)


@pytest.fixture(params=MINIATURES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def root(tmp_path: Path, name: str) -> Path:
    return MINIATURES[name].render(tmp_path / "root/part")


def problems(root: Path) -> list[str]:
    return [problem.sentence for problem in check(root).problems if problem.severity == "problem"]


def sample_of(root: Path, name: str) -> Sample:
    (found,) = [sample for sample in scan(root) if sample.path == root / name]
    return found


# Every one of them


def test_a_layout_is_recognised_and_listed_completely(root: Path, name: str) -> None:
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


def test_check_notes_or_refuses_a_missing_mask(root: Path, name: str) -> None:
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
    render_mask(stray, 0 if name == "ksdd2" else 255)  # an empty mask without an image is stray, too
    assert problems(root) == [f"no image matches the name of the mask {stray}; expected one of the same kind"]


def test_check_finds_a_mask_of_another_size(root: Path, name: str) -> None:
    render_mask(root / MINIATURES[name].mask, size=(20, 12))
    (sentence,) = problems(root)
    assert "is 20 x 12 pixels (height x width); expected its image's 12 x 20" in sentence


def test_check_finds_an_empty_mask(root: Path, name: str) -> None:
    render_mask(root / MINIATURES[name].mask, value=0)
    if name == "ksdd2":  # an empty mask means that the part is good
        assert problems(root) == []
        assert sample_of(root, "test/20003.png").label == 0
    else:
        (sentence,) = problems(root)
        assert "marks no pixel" in sentence


def test_another_layout_is_refused(tmp_path: Path, name: str) -> None:
    layout = MINIATURES[name].layout
    other = render_visa(tmp_path / "other") if layout == "sensum" else render_sensum(tmp_path / "other")
    for place in (other, tmp_path):
        with pytest.raises(DataError, match=rf"{place} is not in the layout {layout}; expected \w+"):
            scan(place, layout)


def test_a_folder_of_several_is_refused_with_a_hint(root: Path) -> None:
    with pytest.raises(DataError, match=r"\((part|other) inside it is a data set\)"):
        scan(root.parent)


def test_images_of_several_sizes_are_taken(root: Path, name: str) -> None:
    one = next(sample for sample in scan(root) if sample.masks)
    render_image(one.path, (24, 40))
    for path in one.masks:
        render_mask(path, size=(24, 40))
    assert check(root).passed


# LOCO


def test_loco_comes_before_mvtec_also_without_its_configuration(tmp_path: Path) -> None:
    render_loco(tmp_path)
    (tmp_path / "defects_config.json").unlink()
    assert recognise(tmp_path) == "loco"
    assert not any(sample.saturations for sample in scan(tmp_path))
    assert check(tmp_path).passed


def test_a_configuration_makes_it_loco_whatever_the_kinds_are_called(tmp_path: Path) -> None:
    render_loco(tmp_path)
    for place in ("test", "ground_truth"):
        for kind in ("logical", "structural"):
            (tmp_path / place / f"{kind}_anomalies").rename(tmp_path / place / kind)
    assert recognise(tmp_path) == "loco"
    assert {sample.kind for sample in scan(tmp_path)} == {"good", "logical", "structural"}


def test_loco_names_the_area_at_which_a_defect_saturates(tmp_path: Path) -> None:
    one = sample_of(render_loco(tmp_path), "test/structural_anomalies/001.png")
    assert one.saturations == (Saturation(255, 6, False), Saturation(254, 0.33, True))
    found = regions(one, SIZE)
    assert found.masks.shape == (2, *SIZE)
    assert found.areas == (6, 6)  # of 20 pixels a third is 6.6
    assert not any(sample.saturations for sample in scan(tmp_path) if sample.label == 0)


def test_a_relative_area_is_at_least_one_pixel(tmp_path: Path) -> None:
    render_loco(tmp_path)
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
def test_check_finds_a_mask_with_an_unexpected_value(
    tmp_path: Path, values: dict[int, int], found: str
) -> None:
    pixels = np.zeros(SIZE, np.uint8)
    for column, value in values.items():
        pixels[3, column] = value
    images.write_png(render_loco(tmp_path) / "ground_truth/structural_anomalies/001/001.png", pixels)
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
    render_loco(tmp_path)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "defects_config.json").write_text(text)
    with pytest.raises(DataError, match=found) as refusal:
        scan(tmp_path)
    assert "defects_config.json" in str(refusal.value)


def test_a_relative_threshold_of_1_may_be_written_as_an_integer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entry(saturation_threshold=1, relative_saturation=True)))
    assert read_config(tmp_path / "config.json")[2] == Saturation(7, 1, True)


# VisA


def test_a_category_is_recognised_by_its_folders_not_by_its_table(tmp_path: Path) -> None:
    render_visa(tmp_path / "root/part")
    assert recognise(tmp_path / "root/part/image_anno.csv") == "csv"
    assert recognise(tmp_path / "root/part") == "visa"


def test_a_category_is_the_same_from_inside_it_and_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = scan(render_visa(tmp_path / "root/part"))
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
        (f"part,train,normal,{NORMAL},", "", "leaves out 1 of the 18 images of part, such as " + NORMAL),
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
            "already listed in line 4; expected it once",
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
    root = render_visa(tmp_path / "root/part")
    table = tmp_path / "root/split_csv/1cls.csv"
    text = table.read_text()
    assert text.count(line) == 1
    table.write_text(text.replace(line, changed))
    with pytest.raises(DataError, match=found) as refusal:
        scan(root)
    assert str(table) in str(refusal.value)


def test_a_category_that_the_table_lacks_is_refused(tmp_path: Path) -> None:
    renamed = render_visa(tmp_path / "root/part").rename(tmp_path / "root/mine")
    with pytest.raises(DataError, match="leaves out 18 of the 18 images of mine"):
        scan(renamed)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    root = render_visa(tmp_path / "root/part")
    (tmp_path / "root/split_csv/1cls.csv").write_text("")
    with pytest.raises(DataError, match="begins with nothing; expected the columns object, split, label"):
        scan(root)


# KolektorSDD2


def test_an_image_without_its_mask_is_refused(tmp_path: Path) -> None:
    (render_ksdd2(tmp_path) / "train/10002_GT.png").unlink()
    with pytest.raises(
        DataError, match=r"10002\.png has no 10002_GT\.png beside it; expected one, all black"
    ):
        scan(tmp_path)


def test_a_damaged_mask_is_refused_because_it_is_the_label(tmp_path: Path) -> None:
    (render_ksdd2(tmp_path) / "train/10002_GT.png").write_bytes(b"none")
    with pytest.raises(ImageError, match=r"10002_GT\.png"):
        scan(tmp_path)


def test_the_copies_in_the_archive_are_ignored(tmp_path: Path) -> None:
    assert not any("copy" in sample.path.name for sample in scan(render_ksdd2(tmp_path)))


# Two images or masks of one name


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    render_sensum(tmp_path)
    render_image(tmp_path / "positive/data/001.jpg")
    with pytest.raises(DataError, match=r"001\.jpg and .*001\.png share a name"):
        scan(tmp_path)


def test_two_masks_of_one_name_are_refused(tmp_path: Path) -> None:
    render_sensum(tmp_path)
    render_mask(tmp_path / "positive/annotation/001.bmp")
    with pytest.raises(DataError, match=r"annotation/001\.bmp and .*001\.png share a name"):
        scan(tmp_path)
