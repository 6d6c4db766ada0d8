"""The rendered data set: it repeats, its masks are exact, and nothing that matters is overwritten."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from blemish import images
from blemish.cli import main
from blemish.demo import dataset as demo
from blemish.demo.defects import DEFECTS
from blemish.demo.part import BORE, draw_scene, pose
from blemish.detectors.registry import FIRST
from blemish.errors import ConfigError
from blemish.inference import bundle
from blemish.training import run
from drawn import tiny_weights

SIZE = demo.SMALLEST
KINDS = sorted(DEFECTS)


def drawn(
    folder: Path, *, train: int = 2, test_good: int = 1, per_kind: int = 1, seed: int = 3
) -> dict[str, bytes]:
    demo.draw(folder, seed, train=train, test_good=test_good, per_kind=per_kind, size=SIZE)
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return drawn(tmp_path_factory.mktemp("demo") / "parts")


def grown(mask: np.ndarray, width: int) -> np.ndarray:
    side = 2 * width + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, width), (side, side))
    return np.asarray(windows.any((2, 3)))


def twins(kind: str, count: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw parts with and without a defect; yield the largest difference over the channels, and the mask."""
    for i in range(count):
        (bad, mask), (good, _) = demo.draw_part((7, i), kind, size), demo.draw_part((7, i), "good", size)
        yield np.abs(bad.astype(int) - good).max(2), mask


def test_layout_is_mvtec(small: dict[str, bytes]) -> None:
    expected = {demo.MARKER, "train/good/000.png", "train/good/001.png", "test/good/000.png"}
    for kind in KINDS:
        expected |= {f"test/{kind}/000.png", f"ground_truth/{kind}/000_mask.png"}
    assert set(small) == expected


def test_files_contain_the_rendered_parts(small: dict[str, bytes], tmp_path: Path) -> None:
    part, mask = tmp_path / "part.png", tmp_path / "mask.png"
    for number, kind in enumerate(KINDS):
        part.write_bytes(small[f"test/{kind}/000.png"])
        mask.write_bytes(small[f"ground_truth/{kind}/000_mask.png"])
        image, defect = demo.draw_part((3, 2 + number, 0), kind, SIZE)
        np.testing.assert_array_equal(images.read(part), image)
        np.testing.assert_array_equal(images.read_mask((mask,), (SIZE, SIZE)), defect)


def test_repeats_byte_for_byte(small: dict[str, bytes], tmp_path: Path) -> None:
    assert drawn(tmp_path / "again") == small


def test_an_image_does_not_depend_on_the_counts(small: dict[str, bytes], tmp_path: Path) -> None:
    more = drawn(tmp_path / "more", train=3, test_good=2, per_kind=2)
    assert len(more) > len(small)
    assert {name: more[name] for name in small} == small


def test_all_images_of_all_seeds_differ(small: dict[str, bytes], tmp_path: Path) -> None:
    other = drawn(tmp_path / "other", seed=4)
    pictures = [data for files in (small, other) for name, data in files.items() if name.startswith("t")]
    assert len(set(pictures)) == len(pictures) == 2 * (3 + len(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_covers_what_the_defect_changes(kind: str) -> None:
    for difference, mask in twins(kind, 3, 256):
        # Beyond the mask there is only the lens's blur and, of a screw, the shadow.
        assert difference[~grown(mask, 3)].max() <= 2
        assert (difference[mask] > 3).mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_lies_on_the_part(kind: str) -> None:
    for i in range(20):
        image, mask = demo.draw_part((1, i), kind, SIZE)
        part = pose(draw_scene(np.random.default_rng((1, i, 0))), SIZE)
        assert image.shape == (SIZE, SIZE, 3)
        assert image.dtype == np.uint8
        assert mask.any()
        assert (part.outline[mask] < part.pixel).all()
        assert (part.radius[mask] > BORE - part.pixel).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_is_visible_but_not_glaring(kind: str) -> None:
    contrast = [float(difference[mask].mean()) for difference, mask in twins(kind, 8, 128)]
    assert min(contrast) > 3
    assert np.median(contrast) < 110


def test_a_good_part_has_no_mask() -> None:
    assert not demo.draw_part((0,), "good", SIZE)[1].any()


def test_good_parts_vary_mildly() -> None:
    parts = np.stack([demo.draw_part((2, i), "good", SIZE)[0] for i in range(12)]).astype(float)
    deviation = parts.mean((1, 2, 3)).std()
    assert 0.5 < deviation < 12


def test_the_same_part_at_two_sizes_is_the_same() -> None:
    # Noise and texture are sampled for each pixel; the pose, the features and the light are not.
    large, small = (demo.draw_part((5,), "good", size)[0].astype(float) for size in (256, 128))
    halved = large.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 8


def test_an_earlier_demo_is_replaced_whole(tmp_path: Path) -> None:
    assert drawn(tmp_path / "parts", per_kind=2).keys() > drawn(tmp_path / "parts").keys()
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path / "parts")
    drawn(Path())
    assert (tmp_path / "parts" / demo.MARKER).is_file()


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="do not belong to a demo"):
        drawn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        drawn(tmp_path / "thesis.txt")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError("disk full")

    monkeypatch.setitem(DEFECTS, KINDS[-1], fail)
    with pytest.raises(OSError, match="disk full"):
        drawn(tmp_path / "parts")
    assert not list(tmp_path.iterdir())


def test_the_command_ends_with_a_model_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = partial(demo.draw, train=8, test_good=2, per_kind=1, size=SIZE)
    settings = {"image_size": (64, 64), "layers": ("stage1", "stage2"), "bank_size": 100}
    small = partial(run.train, weights=tiny_weights(tmp_path / "weights.safetensors"), settings=settings)
    monkeypatch.setattr("blemish.demo.draw", few)
    monkeypatch.setattr("blemish.training.run.train", small)
    out = tmp_path / "d"
    assert main.main(["demo", "--out", str(out), "--seed", "3"]) == 0
    said = capsys.readouterr()
    table, places = said.out.split("\n\n")[:2]
    assert [line.split()[0] for line in table.splitlines()] == ["kind", "all", *KINDS]
    assert table.splitlines()[1].split()[:3] == ["all", "2", str(len(KINDS))]
    files = {name: out / file for name, file in (line.split() for line in places.splitlines())}
    assert files == {"parts": out / "parts", "model": out / "demo.blemish", "report": out / "report.html"}
    assert "evaluating: 100%" in said.err
    training = bundle.read(out / "demo.blemish").manifest.training
    assert (training.run.seed, training.run.model) == (3, FIRST)
    assert (out / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed"),
        ({"train": 0}, "at least 1 image in each folder; found 0"),
        ({"per_kind": -2}, "at least 1 image in each folder; found -2"),
        ({"size": 32}, "at least 64 pixels a side; found 32"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        demo.draw(tmp_path / "parts", **({"seed": 0} | options))
    assert not list(tmp_path.iterdir())
