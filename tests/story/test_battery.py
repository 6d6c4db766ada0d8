"""The battery: what each condition trains on, that it resumes, and what its tables say."""

import argparse
import csv
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import blemish
import drawn
from blemish import data
from blemish.errors import StoppedError
from blemish.progress import Event

VARIANT = "patchcore image_size=64x64 layers=stage1,stage2 bank_size=100"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def battery(folder_of_benchmarks: None) -> ModuleType:
    import battery

    return battery


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn.data_set(tmp_path_factory.mktemp("battery") / "parts", train=20, good=4, bad=6)


def rows(
    battery: ModuleType, parts: Path, folder: Path, condition: str, seed: int = 0
) -> list[dict[str, str]]:
    path = battery.write_manifest(parts, battery.Cell(str(parts), condition, VARIANT, seed), folder / "m.csv")
    data.scan(path, "auto")  # raises if it is not a valid manifest
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def count(found: list[dict[str, str]], split: str, label: str) -> int:
    return sum(row["split"] == split and row["label"] == label for row in found)


def test_clean_is_the_data_set_without_copies(battery: ModuleType, parts: Path, tmp_path: Path) -> None:
    found = rows(battery, parts, tmp_path, "clean")
    assert [count(found, "train", "good"), count(found, "test", "good"), count(found, "test", "defect")] == [
        *(20, 4, 6)
    ]
    copied = parts / "test/good/copy.png"
    copied.write_bytes((parts / "train/good/003.png").read_bytes())
    try:
        assert count(rows(battery, parts, tmp_path, "clean"), "train", "good") == 19
    finally:
        copied.unlink()


def test_few_images_depend_on_the_seed(battery: ModuleType, parts: Path, tmp_path: Path) -> None:
    chosen = [
        {row["image"] for row in rows(battery, parts, tmp_path, "few4", seed) if row["split"] == "train"}
        for seed in (0, 1)
    ]
    assert [len(each) for each in chosen] == [4, 4]
    assert chosen[0] != chosen[1]


def test_dirty_moves_defects_from_the_test_to_the_good_images(
    battery: ModuleType, parts: Path, tmp_path: Path
) -> None:
    found = rows(battery, parts, tmp_path, "dirty10")
    assert [count(found, "train", "good"), count(found, "test", "good"), count(found, "test", "defect")] == [
        *(22, 4, 4)
    ]


def test_options_and_settings_of_a_variant(battery: ModuleType) -> None:
    found = battery.trained("patchcore place_weight=1 layers=stage3,stage5 light=standardise edges=rings")
    assert found == {
        "supervision": "none",
        "model": "patchcore",
        "settings": {"place_weight": "1", "layers": "stage3,stage5", "edges": "rings"},
        "light": "standardise",
    }


def test_a_battery_that_was_stopped_goes_on_and_is_shown(
    battery: ModuleType,
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn.tiny_weights(tmp_path / "efficientnet_lite0.safetensors")
    monkeypatch.setenv("BLEMISH_WEIGHTS", str(tmp_path))
    out = tmp_path / "battery.jsonl"
    words = ["run", str(parts), "--variants", VARIANT, "--out", str(out), "--threads", "1"]
    assert battery.main([*words, "--seeds", "1"]) == 0
    assert battery.main([*words, "--seeds", "2"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["cell"]["seed"] for line in lines] == [0, 1]
    for line in lines:
        assert line["image_auroc"] == pytest.approx(1.0)
        assert line["seconds"] > 0
        assert line["memory"] > 50
    capsys.readouterr()
    assert battery.main(["show", str(out), "--values", "image_auroc,promised"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["image", "AUROC", "parts", "mean"]
    assert shown[1].split()[-3:] == ["100.00", "(0.00)", "100.00"]
    assert shown[4].startswith(VARIANT)
    assert battery.main(["show", str(out), "--kinds"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["image", "AUROC", "parts:", "spot", "mean"]
    assert shown[1].split()[-3:] == ["100.00", "(0.00)", "100.00"]
    assert shown[3].startswith("AUPRO")


@pytest.mark.parametrize(
    "variant",
    [
        "simplenet image_size=64x64 layers=stage1,stage2 steps=6",
        "patchcore+simplenet image_size=64x64 layers=stage1,stage2 bank_size=50 simplenet.steps=6",
    ],
)
def test_a_training_that_was_killed_goes_on_from_its_checkpoint(
    battery: ModuleType, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    drawn.tiny_weights(tmp_path / "efficientnet_lite0.safetensors")
    monkeypatch.setenv("BLEMISH_WEIGHTS", str(tmp_path))
    cell, unfinished = battery.Cell(str(parts), "clean", variant, 0), tmp_path / "unfinished"
    whole = battery.measured(cell, "off", unfinished)
    seen: list[Event] = []

    def enough(events: list[Event]) -> bool:
        return any(event.phase == "training" and event.step >= 4 for event in events)

    def killed(*words: Any, **options: Any) -> Any:
        with pytest.raises(StoppedError):
            train(*words, **options, report=seen.append, stop=lambda: enough(seen[-1:]))
        raise KeyboardInterrupt

    def watched(*words: Any, **options: Any) -> Any:
        return train(*words, **options, report=seen.append)

    train = blemish.train
    monkeypatch.setattr(blemish, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        battery.measured(cell, "off", unfinished)
    monkeypatch.setattr(blemish, "train", watched)
    seen.clear()
    found = battery.measured(cell, "off", unfinished)
    assert found["image_auroc"] == whole["image_auroc"]
    assert min(event.step for event in seen if event.phase == "training" and event.losses) == 5
    assert not list(unfinished.iterdir())


def test_a_variant_that_lacks_a_column_has_no_mean(battery: ModuleType) -> None:
    found = {"a": {"x": [{"aupro": 0.9}], "y light": [{"aupro": 0.7}]}, "b": {}}
    found["b"]["x"] = [{"aupro": 0.95}, {"aupro": 0.93}]
    lines = battery.table("aupro", ["x", "y light"], found).splitlines()
    assert lines[0].split() == ["AUPRO", "x", "y", "light", "mean"]
    assert lines[1].split() == ["a", "90.00", "70.00", "80.00"]
    assert lines[2].split() == ["b", "94.00", "(1.41)", "-", "-"]


def test_curves_join_the_lengths_of_a_method(folder_of_benchmarks: None, tmp_path: Path) -> None:
    import curves

    runs = (("padim", 5), ("simplenet a=1 steps=10", 1), ("simplenet a=1 steps=20", 2), ("simplenet", 4))
    cell = {"category": "parts", "condition": "clean"}
    lines = [
        {"cell": cell | {"variant": name}, "seconds": s, "image_auroc": 0.9, "aupro": 0.8} for name, s in runs
    ]
    found = curves.lengths(lines)
    assert {name: len(each) for name, each in found.items()} == {
        "padim": 1,
        "simplenet a=1": 2,
        "simplenet": 1,
    }
    results, out = tmp_path / "curves.jsonl", tmp_path / "curves.svg"
    results.write_text("\n".join(map(json.dumps, lines)))
    curves.main([str(results), str(out)])
    drawn_once = out.read_bytes()
    curves.main([str(results), str(out)])
    assert out.read_bytes() == drawn_once
    assert all(f"<!-- {words} -->" in out.read_text() for words in ("padim", "simplenet a=1", "AUPRO, %"))
    with pytest.raises(SystemExit, match="on 2 categories"):
        curves.lengths([*lines, lines[0] | {"cell": cell | {"condition": "light", "variant": "padim"}}])


def test_an_unknown_condition_is_refused(battery: ModuleType, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown condition foggy3"):
        rows(battery, parts, tmp_path, "foggy3")


def test_seeds_are_a_number_or_a_list(battery: ModuleType) -> None:
    options = argparse.Namespace(conditions="clean", variants=["a"], categories=["demo"], seeds="2")
    assert [cell.seed for cell in battery.cells(options)] == [0, 1]
    options.seeds = "3,5,"
    assert [cell.seed for cell in battery.cells(options)] == [3, 5]
