"""The commands in the order of a first day, and what each says of input that it cannot take."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_format1 import FILES
from PIL import Image

import blemish
import drawn
from blemish import images
from blemish.backbones import weights
from blemish.backbones.pdn import pdn_small
from blemish.cli import main
from blemish.inference import bundle
from blemish.inference.bundle import GRAPH, MANIFEST, WEIGHTS
from blemish.training import loop as room
from drawn import Tiny

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

MODEL = FILES / "format1.blemish"
Words = list[Any]


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's cache of weights out of the tests, and the tests out of it."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(weights, "cache_folder", lambda: folder)
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    return folder


def run(words: Words) -> int:
    """Run a command in this process; give its exit status."""
    try:
        return main.main([str(word) for word in words])
    except SystemExit as stopped:  # argparse leaves this way
        return int(stopped.code or 0)


def as_words(settings: dict[str, Any]) -> Words:
    return [
        f"--set={key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in settings.items()
    ]


def training(tiny: Tiny, out: Path, *more: Any, data: Path | None = None) -> Words:
    """Give the words that train as the tiny model was; later ones win."""
    words = ["train", data or tiny.data, "--model", "supersimplenet", "--out", out]
    return [
        *words,
        "--weights",
        tiny.weights,
        "--precision",
        "fp32",
        "--device",
        "cpu",
        *as_words(drawn.TINY),
        *more,
    ]


# --- a first day ---


def test_the_commands_in_their_order(
    tiny: Tiny, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = drawn.data_set(tmp_path / "parts", train=20), tmp_path / "runs" / "mine.blemish"

    assert run(["check", data]) in (0, 1)
    said = capsys.readouterr()
    assert said.err == ""
    for word in ("train", "test", "good", drawn.KIND, "64 x 64", "RGB"):
        assert word in said.out

    assert run(training(tiny, file, "--steps", drawn.STEPS, data=data)) == 0
    said = capsys.readouterr()
    assert said.out == f"{file}\n"
    assert "may be called defect" in said.err
    assert [path.name for path in file.parent.iterdir()] == ["mine.blemish"]
    manifest = bundle.read(file).manifest
    assert manifest["config"]["hidden_channels"] == 16
    assert manifest["training"]["good_images"] + manifest["training"]["held_out_images"] == 20

    written = {name: tmp_path / "out" / f"e.{name}" for name in ("json", "csv", "html")}
    options = ["--json", written["json"], "--csv", written["csv"], "--report", written["html"]]
    assert run(["evaluate", file, data, *options]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split()[:3] == ["kind", "good", "bad"]
    assert table.splitlines()[1].split()[:4] == ["all", "4", "4", "1.0000"]
    figures = json.loads(written["json"].read_text())
    assert figures["rows"][0]["image_auroc"] == 1.0
    assert figures["rows"][0]["aupro"] > 0.7
    with written["csv"].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == [image["path"] for image in figures["images"]]
    assert {row["label"] for row in rows if row["kind"] == drawn.KIND} == {"defect"}
    assert str(data) not in written["html"].read_text()

    lines, maps, overlays = tmp_path / "lines.jsonl", tmp_path / "maps", tmp_path / "overlays"
    words = ["predict", file, data / "test", "--jsonl", lines, "--maps", maps, "--overlays", overlays]
    assert run(words) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "4 defect, 0 unreadable" in said.err.splitlines()[-1]
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    by_name = {Path(record["path"]).relative_to(data).as_posix(): record for record in records}
    assert by_name.keys() == {row["path"] for row in rows}
    for row in rows:
        assert by_name[row["path"]]["score"] == float(row["score"])
        assert set(by_name[row["path"]]) == {"path", "score", "label", "p_value", "regions"}
    model = blemish.load(file)
    for record in records:
        name = Path(record["path"]).relative_to(data / "test")
        stored = np.array(Image.open((maps / name).with_suffix(".tiff")))
        assert np.array_equal(stored, model.predict(record["path"], full_size=True).map)
        assert images.read((overlays / name).with_suffix(".png")).shape == (64, 64, 3)

    again = tmp_path / "again.blemish"
    assert run(["calibrate", file, data / "train/good", "--false-reject-rate", 0.2, "--out", again]) == 0
    assert "At most 20 % of good parts may be called defect" in capsys.readouterr().out
    assert len(blemish.load(again).calibration.scores) == 20
    assert bundle.read(again).weights == bundle.read(file).weights

    assert run(["weights", "list"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(listed) == set(weights.SOURCES)
    assert listed["resnet50_v1"] == "not on this machine"
    assert re.search(r"pdn_small.safetensors \(from .+, explains \d\d%\)$", listed["pdn_small"])
    teacher = drawn.weights(tmp_path / "teacher.safetensors", pdn_small())
    assert run(["weights", "add", "pdn_small", teacher]) == 0
    kept = own_cache / "pdn_small.safetensors"
    assert capsys.readouterr().out == f"{kept}\n"
    assert run(["weights", "list"]) == 0
    assert f"{kept}\n" in capsys.readouterr().out


def test_predicting_without_a_file_for_the_lines_prints_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, path in enumerate(paths):
        images.write_png(path, drawn.part(number))
    assert run(["predict", MODEL, *paths, "--maps", tmp_path, "--map-format", "npy", "--threads", 1]) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["path"] for line in said.out.splitlines()] == [str(path) for path in paths]
    model = blemish.load(MODEL)
    assert np.array_equal(np.load(tmp_path / "a.npy"), model.predict(paths[0], full_size=True).map)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["weights", "add", "--help"]]
)
def test_help_goes_to_standard_output(words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith(("usage: blemish", "blemish 0."))
    assert said.err == ""


def test_the_program_runs_as_installed_and_as_a_module(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("blemish")
    for start in ([str(program)], [sys.executable, "-m", "blemish.cli"]):
        if not Path(start[0]).is_file():
            continue
        done = subprocess.run([*start, "--version"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"blemish {blemish.__version__}\n")
        words = ["predict", MODEL, tmp_path / "none.png"]
        done = subprocess.run([*start, *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        assert (
            done.stderr
            == f"blemish: found nothing at {tmp_path}/none.png; expected an image or a folder of images\n"
        )


def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path: Path) -> None:
    for number in range(30):
        images.write_png(tmp_path / f"{number}.png", drawn.part(number))
    words = [sys.executable, "-m", "blemish.cli", "predict", str(MODEL), str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in said
    assert "Exception" not in said


# --- what cannot be done ---


def refused(
    words: Words, folder: Path, capsys: pytest.CaptureFixture[str], *, after_words: bool = False
) -> str:
    """Check that a command ends with status 2 and one line, and leaves a folder as it was; give the line.

    after_words: what was said on the way may come before the line.
    """
    before = drawn.snapshot(folder)
    capsys.readouterr()
    assert run(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert [line.startswith("blemish") for line in lines] == [False] * (len(lines) - 1) + [True]
    assert after_words or len(lines) == 1
    assert "Traceback" not in said.err
    assert drawn.snapshot(folder) == before
    return lines[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: DATA, --out"),
        (["predict", "m.blemish"], "the following arguments are required: IMAGE_OR_DIR"),
        (["predict", "m.blemish", "i.png", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["predict", "m.blemish", "i.png", "--map-format", "png"], "invalid choice: 'png'"),
        (["evaluate", "m.blemish", "d", "--memory", "much"], "argument --memory: invalid"),
        (["weights"], "the following arguments are required: ACTION"),
        (["weights", "remove"], "invalid choice: 'remove'"),
        (["demo", "--seed", "one"], "argument --seed: invalid int value: 'one'"),
    ],
)
def test_wrong_words(words: Words, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(words, tmp_path, capsys)
    assert says in said
    assert said.endswith("--help)")


TRAINING: dict[str, tuple[Words, str]] = {
    "unknown model": (
        ["--model", "supersimplnet"],
        "unknown model 'supersimplnet'; did you mean 'supersimplenet'?",
    ),
    "no such model": (["--model", "?"], "there are efficientad-s, efficientad-m, supersimplenet"),
    "unknown setting": (
        ["--set", "noise_ration=1"],
        "'noise_ration'; did you mean 'noise_ratio'?",
    ),
    "no setting": (["--set", "noise_ratio"], "--set noise_ratio: expected KEY=VALUE"),
    "setting of a wrong type": (
        ["--set", "noise_ratio=much"],
        "=much does not fit; expected float",
    ),
    "setting that is no integer": (["--set", "batch_size=1.5"], "batch_size=1.5 does not fit; expected int"),
    "setting that is no truth": (["--set", "upscale=maybe"], "upscale=maybe does not fit; expected bool"),
    "unknown backbone": (["--set", "backbone=resnet19"], "unknown backbone 'resnet19'; there are "),
    "unknown layer": (
        ["--set", "layers=stage9"],
        "has no layer 'stage9'; it has stage1, ",
    ),
    "unknown statistic": (["--set", "statistics=max"], "unknown statistic 'max'; "),
    "head that is not built": (["--set", "statistics=head"], "needs --set classification_head=true"),
    "unknown schedule": (["--set", "schedule=onecycle"], "did you mean 'one-cycle'?"),
    "unknown preset": (["--preset", "papre"], "supersimplenet has no preset 'papre'; did you mean 'paper'?"),
    "image size in one number": (["--image-size", "64"], "expected height and width"),
    "image size in words": (["--image-size", "big"], "image_size=big does not fit"),
    "image size that is tiny": (["--image-size", "16x64"], "expected height and width of at least 32"),
    "no batch": (["--set", "batch_size=0"], "batch size 0: expected at least 1"),
    "two lengths": (["--steps", 5, "--epochs", 5], "argument --epochs: not allowed with argument --steps"),
    "no steps": (["--steps", 0], "steps 0: expected more than 0"),
    "negative epochs": (["--epochs", -3], "epochs -3: expected more than 0"),
    "settings without steps": (["--set", "steps=0", "--set", "epochs=0"], "expected one of them above 0"),
    "budget without a unit": (["--budget", "10"], "budget '10': expected a duration such as 90s, 10m or 2h"),
    "false-reject rate of 0": (
        ["--false-reject-rate", 0],
        "false reject rate is 0.0, expected above 0 and below 1",
    ),
    "false-reject rate of 2": (
        ["--false-reject-rate", 2],
        "false reject rate is 2.0, expected above 0 and below 1",
    ),
    "unknown device": (["--device", "tpu"], "unknown device 'tpu'; expected auto, cpu or cuda"),
    "device that is absent": (["--device", "cuda"], "this torch sees no CUDA device; use --device cpu"),
    "unknown precision": (["--precision", "fp8"], "unknown precision 'fp8'; expected auto, fp32 or bf16"),
    "unknown layout": (["--layout", "mvtce"], "there is no layout 'mvtce' (did you mean 'mvtec'?)"),
    "missing weights": (["--weights", "none.safetensors"], "no weights file none.safetensors"),
    "memory that is no number": (["--memory", "nan"], "memory nan: expected gigabytes, 0 or more"),
    "negative memory": (["--memory", "-1"], "memory -1: expected gigabytes, 0 or more"),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_that_cannot_be(
    case: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    words, says = TRAINING[case]
    assert says in refused(training(tiny, tmp_path / "m.blemish", *words), tmp_path, capsys)


DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda root: None, "found nothing at "),
    "empty": (lambda root: root.mkdir(), "the empty folder "),
    "a file": (lambda root: root.write_text("no manifest"), "found the file "),
    "without images": (lambda root: (root / "train/good").mkdir(parents=True), "holds no images"),
    "without good images": (
        lambda root: images.write_png(root / "train" / "scratch" / "1.png", drawn.part(1)),
        "expected the good parts in good/",
    ),
    "of one good image": (
        lambda root: images.write_png(root / "good" / "1.png", drawn.part(1)),
        "found 1 good images for training",
    ),
    "of three good images": (
        lambda root: drawn.data_set(root, train=3, good=0, bad=0),
        "expected at least 4, of which 2 are held out",
    ),
    "of mixed folders": (
        lambda root: [drawn.data_set(root), images.write_png(root / "vall" / "1.png", drawn.part(1))],
        "found vall/",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_trained_on(
    case: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says = DATA[case]
    make(tmp_path / "parts")
    assert says in refused(training(tiny, tmp_path / "m.blemish", data=tmp_path / "parts"), tmp_path, capsys)


def test_a_truncated_training_image(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = drawn.data_set(tmp_path / "parts")
    broken = data / "train/good/003.png"
    broken.write_bytes(broken.read_bytes()[:300])
    said = refused(training(tiny, tmp_path / "m.blemish", data=data), tmp_path, capsys, after_words=True)
    assert f"{broken} is damaged or truncated" in said


def test_weights_that_are_not_there(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "supersimplenet", "--set", "backbone=resnet50_v1", "--set", "layers=layer2"]
    said = refused(["train", tiny.data, *words, "--out", tmp_path / "m.blemish"], tmp_path, capsys)
    assert "the weights of resnet50_v1 are not on this machine" in said
    assert "`blemish weights add resnet50_v1 FILE`" in said


def test_weights_that_do_not_fit(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = drawn.weights(tmp_path / "w.safetensors", pdn_small())
    said = refused(training(tiny, tmp_path / "m.blemish", "--weights", file), tmp_path, capsys)
    assert f"{file} does not fit: it lacks the parameter _conv_stem.weight (32, 3, 3, 3)" in said
    file.write_bytes(b"no weights")
    said = refused(training(tiny, tmp_path / "m.blemish", "--weights", file), tmp_path, capsys)
    assert f"{file} holds no readable weights" in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--image-size", "128x256"], "image size 128x256: EfficientAD needs at least 256 in both axes"),
        (["--image-size", "256x258"], "image size 256x258: EfficientAD needs multiples of 4"),
        (["--set", "size=large"], "size=large does not fit; expected 'small' or 'medium'"),
        (["--set", "dropout=1"], "dropout=1.0 does not fit; expected at least 0 and less than 1"),
        (["--set", "high_quantile=0.8"], "low_quantile=0.9 does not fit; expected less than high_quantile"),
        (["--natural-images", "missing"], "no folder missing; expected photographs"),
        (["--natural-images", "empty"], "no images in empty, the folder of photographs"),
        (["--natural-images", "./drawn"], "no folder drawn; expected photographs"),
        (["--natural-images", "none", "--set", "penalty=false"], "natural images none are chosen for a run"),
    ],
)
def test_efficientad_that_cannot_be(
    more: Words,
    says: str,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    file = drawn.weights(tmp_path / "w.safetensors", pdn_small())
    words = ["train", tiny.data, "--model", "efficientad-s", "--out", "m.blemish", "--weights", file]
    assert says in refused([*words, *more], tmp_path, capsys)


def test_resuming_another_run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.blemish"
    one_step = room.one_step

    def stop(current: room.Run, step: int) -> dict[str, float]:
        if step == 2:
            current.save()
            raise InterruptedError
        return one_step(current, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "one_step", stop)
        with pytest.raises(InterruptedError):
            run(training(tiny, out, "--steps", 5))
    changed = training(tiny, out, "--steps", 5, "--set", "batch_size=4")
    said = refused([*changed, "--resume"], tmp_path, capsys, after_words=True)
    assert "m.blemish.checkpoint was made by another run: its config is {" in said
    said = refused([*training(tiny, out, "--steps", 6), "--resume"], tmp_path, capsys, after_words=True)
    assert "is of a run of 5 steps, not 6" in said
    said = refused(training(tiny, out, "--steps", 5), tmp_path, capsys, after_words=True)
    assert "go on with --resume, or delete it" in said
    assert run([*training(tiny, out, "--steps", 5), "--resume"]) == 0


def write_no_bundle(path: Path) -> None:
    path.write_bytes(b"not a zip")


def truncate(path: Path) -> None:
    path.write_bytes(MODEL.read_bytes()[:10_000])


def flip(path: Path) -> None:
    data = bytearray(MODEL.read_bytes())
    data[data.index(GRAPH.encode()) + 500] ^= 1  # in a weight, as after bad luck on a disk
    path.write_bytes(data)


def make_foreign(path: Path) -> None:
    opened = bundle.read(MODEL)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST, json.dumps(opened.manifest | {"format": 99}))
        archive.writestr(WEIGHTS, opened.weights)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "no model file "),
    "a folder": (Path.mkdir, "no model file "),
    "something else": (write_no_bundle, "is no model file, or a damaged one"),
    "truncated": (truncate, "is no model file, or a damaged one"),
    "damaged": (flip, "damaged"),
    "foreign": (make_foreign, "has format 99; this version of Blemish reads format 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_model_file_that_is_none(
    case: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says = BROKEN[case]
    file, out = tmp_path / "m.blemish", tmp_path / "out"
    make(file)
    for words in (
        ["predict", file, tiny.data / "test", "--jsonl", out / "l.jsonl", "--overlays", out / "overlays"],
        ["evaluate", file, tiny.data, "--json", out / "e.json"],
        ["calibrate", file, tiny.data / "test" / "good", "--out", out / "new.blemish"],
    ):
        said = refused(words, tmp_path, capsys)
        assert says in said
        assert str(file) in said


def test_images_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    images.write_png(tmp_path / "a" / "1.png", drawn.part(1))
    images.write_png(tmp_path / "b" / "1.png", drawn.part(2))
    for paths, says in (
        ([tmp_path / "none.png"], f"found nothing at {tmp_path}/none.png; expected an image or a folder"),
        ([tmp_path / "a", tmp_path / "none"], f"found nothing at {tmp_path}/none"),
        ([tmp_path / "empty"], f"no images in {tmp_path}/empty"),
        ([tmp_path / "a", tmp_path / "b"], "would share the name 1.png of their results"),
    ):
        assert says in refused(["predict", MODEL, *paths], tmp_path, capsys)


def test_one_broken_image_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        images.write_png(tmp_path / "in" / f"{name}.png", drawn.part(ord(name)))
    broken = tmp_path / "in" / "b.png"
    broken.write_bytes(broken.read_bytes()[:300])
    lines = tmp_path / "lines.jsonl"
    assert (
        run(["predict", MODEL, tmp_path / "in", "--jsonl", lines, "--overlays", tmp_path / "overlays"]) == 2
    )
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if line.startswith("blemish")]
    assert line.startswith(f"blemish: {broken} is damaged or truncated")
    assert said[-1].endswith("1 unreadable")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert ["error" in record for record in records] == [False, True, False]
    assert records[1]["path"] == str(broken)
    assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == ["a.png", "c.png"]


def test_evaluating_with_a_broken_image_counts_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = drawn.data_set(tmp_path / "parts", train=1, good=3, bad=3)
    broken = data / "test/good/001.png"
    broken.write_bytes(b"none")
    assert run(["evaluate", MODEL, data, "--json", tmp_path / "e.json"]) == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split()[:3] == ["all", "2", "3"]
    assert [line for line in said.err.splitlines() if str(broken) in line]
    assert said.err.splitlines()[-1].startswith("blemish: 1 images could not be read")
    assert len(json.loads((tmp_path / "e.json").read_text())["skipped"]) == 1


def test_nothing_to_evaluate_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = drawn.data_set(tmp_path / "parts", good=0, bad=0)
    words = ["evaluate", MODEL, data, "--json", tmp_path / "e.json", "--report", tmp_path / "e.html"]
    assert "holds no test images; expected good and defective ones" in refused(words, tmp_path, capsys)
    assert "found nothing at" in refused(["evaluate", MODEL, tmp_path / "none"], tmp_path, capsys)
    assert "there is no layout" in refused(["evaluate", MODEL, data, "--layout", "x"], tmp_path, capsys)


@pytest.mark.parametrize(
    ("count", "more", "says"),
    [
        (1, [], "there are 1 held-out good images, expected at least 2"),
        (0, [], "/good; expected one of good images"),
        (3, ["--false-reject-rate", 0], "false reject rate is 0.0, expected above 0 and below 1"),
        (3, ["--false-reject-rate", 2], "false reject rate is 2.0, expected above 0 and below 1"),
    ],
)
def test_calibrating_that_cannot_be(
    count: int, more: Words, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(count):
        images.write_png(tmp_path / "good" / f"{number}.png", drawn.part(number))
    words = ["calibrate", MODEL, tmp_path / "good", "--out", tmp_path / "new.blemish", *more]
    assert says in refused(words, tmp_path, capsys, after_words=count == 1)


def test_calibrating_on_a_broken_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        images.write_png(tmp_path / "good" / f"{number}.png", drawn.part(number))
    (tmp_path / "good/1.png").write_bytes(b"none")
    words = ["calibrate", MODEL, tmp_path / "good", "--out", tmp_path / "new.blemish"]
    assert "1.png begins with b'none'" in refused(words, tmp_path, capsys)


def test_places_that_take_no_file(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path below a file, where not even root can write, and the name of a folder."""
    file, folder, good = tmp_path / "file", tmp_path / "folder", tiny.data / "test" / "good"
    file.write_text("in the way")
    folder.mkdir()
    for out, says in (
        (file / "x", f"cannot write into {file}: {file} is a file, expected a folder"),
        (file / "x" / "y", f"cannot write into {file}/x: {file} is a file, expected a folder"),
        (folder, f"cannot write {folder}: it is a folder, expected the name of a file"),
    ):
        for words in (
            training(tiny, out),
            ["calibrate", MODEL, good, "--out", out],
            ["evaluate", MODEL, tiny.data, "--json", out],
            ["evaluate", MODEL, tiny.data, "--csv", out],
            ["evaluate", MODEL, tiny.data, "--report", out],
            ["predict", MODEL, good, "--jsonl", out],
        ):
            assert says in refused(words, tmp_path, capsys), words
    for option in ("--maps", "--overlays"):
        words = ["predict", MODEL, good, option, file]
        assert f"cannot write into {file}: {file} is a file" in refused(words, tmp_path, capsys)


def test_a_refused_run_makes_no_folder(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = training(tiny, tmp_path / "runs" / "m.blemish", data=tmp_path / "none")
    assert "found nothing at" in refused(words, tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["add", "resnet19", "w.pth"], "unknown weights 'resnet19'; there are efficientnet_lite0, "),
        (["add", "pdn_small", "none.pth"], "no weights file none.pth"),
        (["add", "pdn_medium", "small.safetensors"], "small.safetensors does not fit: "),
        (["add", "pdn_small", "garbage.pth"], "garbage.pth holds no readable weights"),
        (["fetch", "resnet19"], "unknown weights 'resnet19'"),
        (["fetch", "pdn_small"], "pdn_small has no publisher's address"),
        (["fetch", "resnet18"], "could not download https://download.pytorch.org/models/resnet18-"),
    ],
)
def test_weights_that_cannot_be_kept(
    words: Words,
    says: str,
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn.weights(tmp_path / "small.safetensors", pdn_small())
    (tmp_path / "garbage.pth").write_bytes(b"\x80\x04garbage")
    assert says in refused(["weights", *words], tmp_path, capsys)
    assert list(own_cache.iterdir()) == []


def test_a_demo_that_would_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images.write_png(tmp_path / "d/parts/mine.png", drawn.part(1))
    said = refused(["demo", "--out", tmp_path / "d"], tmp_path, capsys, after_words=True)
    assert "holds files that are no demo" in said


def test_checking_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "found nothing at" in refused(["check", tmp_path / "none"], tmp_path, capsys)


def test_a_check_that_finds_problems_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = drawn.data_set(tmp_path / "parts")
    (data / "train/good/000.png").write_bytes(b"none")
    assert run(["check", data]) == 1
    assert "000.png" in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(bundle, "read", fail)
    with pytest.raises(ZeroDivisionError):
        run(["predict", MODEL, MODEL])


def test_an_interrupted_command_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "read", interrupt)
    assert run(["predict", MODEL, MODEL]) == 130
    assert capsys.readouterr().err == "blemish: stopped\n"


def test_a_strange_name_stays_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["predict", MODEL, tmp_path / "a\nb.png"], tmp_path, capsys)
    assert said.startswith(f"blemish: found nothing at {tmp_path}/a b.png")


def test_commands_run_in_a_locale_without_unicode(tmp_path: Path) -> None:
    path = tmp_path / "Fläche ✓.png"
    images.write_png(path, drawn.part(1))
    words = [sys.executable, "-m", "blemish.cli", "predict", str(MODEL), str(path)]
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(words, capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: str = json.loads(done.stdout)["path"]
    assert found.encode("utf-8", "surrogateescape") == os.fsencode(path)
