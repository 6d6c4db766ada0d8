"""The commands, in the order in which a user first needs them, and how each of them refuses bad input.

Also what the command line adds to the library: exit statuses, progress, warnings and signals.
"""

import csv
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_format1 import FILES
from PIL import Image
from typing_extensions import override

import blemish
import drawn
from blemish import devices, images
from blemish.backbones import weights
from blemish.backbones.pdn import pdn_small
from blemish.cli import main, terminal
from blemish.cli.options import Command
from blemish.cli.terminal import Terminal, shown_warnings, stop_requests
from blemish.cli.training import request_of
from blemish.data.check import format_report as format_check
from blemish.errors import BlemishError, StoppedError
from blemish.evaluation import report
from blemish.evaluation.run import table
from blemish.files import short_digest
from blemish.inference import bundle
from blemish.inference.bundle import GRAPH, MANIFEST, WEIGHTS
from blemish.inference.calibration import describe
from blemish.progress import Event, Report
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
    """Run a command in this process; return its exit status."""
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
    """Return the words that train as the tiny model was trained; later ones win."""
    words = ["train", data or tiny.data, "--model", "supersimplenet", "--out", out]
    words += ["--weights", tiny.weights, "--precision", "fp32", "--device", "cpu"]
    return [*words, *as_words(drawn.TINY), *more]


# --- a first day ---


def test_the_commands_of_a_first_day(
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
    assert "may be labelled defect" in said.err
    assert [path.name for path in file.parent.iterdir()] == ["mine.blemish"]
    manifest = bundle.read(file).manifest
    assert manifest.config["hidden_channels"] == 16
    assert manifest.training.good_images + manifest.training.held_out_images == 20

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
    assert "At most 20 % of good parts may be labelled defect" in capsys.readouterr().out
    assert len(blemish.load(again).calibration.scores) == 20
    assert bundle.read(again).weights == bundle.read(file).weights
    before, after = (bundle.read(path).manifest.training.files for path in (file, again))
    assert before is not None
    assert after is not None
    assert set(after.held_out) == {short_digest(path) for path in (data / "train/good").iterdir()}
    assert (after.train, set(after.before)) == (before.train, set(before.held_out))

    assert run(["weights", "list"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(listed) == set(weights.SOURCES)
    assert listed["resnet50_v1"] == "not on this machine"
    assert re.search(r"pdn_small.safetensors \(from .+, \d\d% of variance explained\)$", listed["pdn_small"])
    teacher = drawn.weights(tmp_path / "teacher.safetensors", pdn_small())
    assert run(["weights", "add", "pdn_small", teacher]) == 0
    kept = own_cache / "pdn_small.safetensors"
    assert capsys.readouterr().out == f"{kept}\n"
    assert run(["weights", "list"]) == 0
    assert f"{kept}\n" in capsys.readouterr().out


def test_predict_prints_json_lines_without_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
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


# --- refusals ---


def refused(
    words: Words, folder: Path, capsys: pytest.CaptureFixture[str], *, after_words: bool = False
) -> str:
    """Assert that a command ends with status 2 and one line and leaves a folder as it was; return the line.

    after_words: whether other lines may come before it.
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
def test_wrong_arguments_are_refused(
    words: Words, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(words, tmp_path, capsys)
    assert says in said
    assert said.endswith("--help)")


TRAINING: dict[str, tuple[Words, str]] = {
    "unknown model": (
        ["--model", "supersimplnet"],
        "unknown model 'supersimplnet'; did you mean 'supersimplenet'?",
    ),
    "no such model": (["--model", "?"], "expected one of efficientad-s, efficientad-m, supersimplenet"),
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
    "unknown backbone": (["--set", "backbone=resnet19"], "unknown backbone 'resnet19'; expected one of "),
    "unknown layer": (
        ["--set", "layers=stage9"],
        "has no layer 'stage9'; expected one of stage1, ",
    ),
    "unknown statistic": (["--set", "statistics=max"], "unknown statistic 'max'; "),
    "head that is not built": (["--set", "statistics=head"], "needs --set classification_head=true"),
    "unknown schedule": (["--set", "schedule=onecycle"], "did you mean 'one-cycle'?"),
    "unknown preset": (["--preset", "papre"], "supersimplenet has no preset 'papre'; did you mean 'paper'?"),
    "image size in one number": (["--image-size", "64"], "expected height and width"),
    "image size in words": (["--image-size", "big"], "image_size=big does not fit"),
    "image size that is tiny": (["--image-size", "16x64"], "expected height and width of at least 32"),
    "size and scale": (["--scale", "0.5"], "image_size and scale were given; expected at most one of "),
    "size and defect": (["--defect-size", "9px"], "image_size and defect_size were given; expected at most"),
    "scale in words": (["--scale", "half"], "scale half: expected a number above 0, or two as in 0.5x0.25"),
    "defect in millimetres": (["--defect-size", "0.3mm"], "defect size 0.3mm: expected pixels of the image"),
    "no batch": (["--set", "batch_size=0"], "batch size 0: expected at least 1"),
    "two lengths": (["--steps", 5, "--epochs", 5], "argument --epochs: not allowed with argument --steps"),
    "no steps": (["--steps", 0], "steps 0: expected more than 0"),
    "negative epochs": (["--epochs", -3], "epochs -3: expected more than 0"),
    "settings without steps": (["--set", "steps=0", "--set", "epochs=0"], "expected one of them above 0"),
    "budget without a unit": (["--budget", "10"], "budget '10': expected a duration such as 90s, 10m or 2h"),
    "false-reject rate of 0": (
        ["--false-reject-rate", 0],
        "false reject rate is 0.0; expected above 0 and below 1",
    ),
    "false-reject rate of 2": (
        ["--false-reject-rate", 2],
        "false reject rate is 2.0; expected above 0 and below 1",
    ),
    "unknown device": (["--device", "tpu"], "unknown device 'tpu'; expected auto, cpu or cuda"),
    "device that is absent": (["--device", "cuda"], "this torch sees no CUDA device; use --device cpu"),
    "unknown precision": (["--precision", "fp8"], "unknown precision 'fp8'; expected auto, fp32 or bf16"),
    "unknown layout": (["--layout", "mvtce"], "unknown layout 'mvtce' (did you mean 'mvtec'?)"),
    "missing weights": (["--weights", "none.safetensors"], "found no weights file at none.safetensors"),
    "memory that is no number": (["--memory", "nan"], "memory nan: expected gigabytes, 0 or more"),
    "negative memory": (["--memory", "-1"], "memory -1: expected gigabytes, 0 or more"),
}


@pytest.mark.parametrize("case", TRAINING)
def test_impossible_training_options_are_refused(
    case: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    words, says = TRAINING[case]
    assert says in refused(training(tiny, tmp_path / "m.blemish", *words), tmp_path, capsys)


def write_parts(folder: Path, count: int) -> list[Path]:
    """Write good parts into a folder."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        images.write_png(path, drawn.part(number))
    return paths


DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda root: None, "found nothing at "),
    "empty": (lambda root: root.mkdir(), "the empty folder "),
    "a file": (lambda root: root.write_text("no manifest"), "found the file "),
    "without images": (lambda root: (root / "train/good").mkdir(parents=True), "holds no images"),
    "without good images": (
        lambda root: write_parts(root / "train" / "scratch", 1),
        "expected the good parts in good/",
    ),
    "of one good image": (
        lambda root: write_parts(root / "good", 1),
        "found 1 good images for training",
    ),
    "of three good images": (
        lambda root: drawn.data_set(root, train=3, good=0, bad=0),
        "expected at least 4, of which 2 are held out",
    ),
    "of mixed folders": (
        lambda root: (drawn.data_set(root), write_parts(root / "vall", 1)),
        "found vall/",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_trained_on_are_refused(
    case: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says = DATA[case]
    make(tmp_path / "parts")
    assert says in refused(training(tiny, tmp_path / "m.blemish", data=tmp_path / "parts"), tmp_path, capsys)


def test_a_truncated_training_image_is_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = drawn.data_set(tmp_path / "parts")
    broken = data / "train/good/003.png"
    broken.write_bytes(broken.read_bytes()[:300])
    said = refused(training(tiny, tmp_path / "m.blemish", data=data), tmp_path, capsys, after_words=True)
    assert f"{broken} is damaged or truncated" in said


def test_missing_weights_are_refused(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "supersimplenet", "--set", "backbone=resnet50_v1", "--set", "layers=layer2"]
    said = refused(["train", tiny.data, *words, "--out", tmp_path / "m.blemish"], tmp_path, capsys)
    assert "the weights of resnet50_v1 are not on this machine" in said
    assert "`blemish weights add resnet50_v1 FILE`" in said


def test_weights_that_do_not_fit_are_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = drawn.weights(tmp_path / "w.safetensors", pdn_small())
    said = refused(training(tiny, tmp_path / "m.blemish", "--weights", file), tmp_path, capsys)
    assert f"{file} does not fit: it lacks the parameter _conv_stem.weight (32, 3, 3, 3)" in said
    file.write_bytes(b"no weights")
    said = refused(training(tiny, tmp_path / "m.blemish", "--weights", file), tmp_path, capsys)
    assert f"{file} cannot be read as weights" in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--image-size", "128x256"],
            "image size 128x256: EfficientAD needs at least 256 pixels in each direction",
        ),
        (["--image-size", "256x258"], "image size 256x258: EfficientAD needs multiples of 4"),
        (["--set", "size=large"], "size=large does not fit; expected 'small' or 'medium'"),
        (["--set", "dropout=1"], "dropout=1.0 does not fit; expected at least 0 and less than 1"),
        (["--set", "high_quantile=0.8"], "low_quantile=0.9 does not fit; expected less than high_quantile"),
        (["--natural-images", "missing"], "found no folder at missing; expected a folder of photographs"),
        (["--natural-images", "empty"], "no images in empty; expected photographs"),
        (["--natural-images", "./drawn"], "found no folder at drawn; expected a folder of photographs"),
        (
            ["--natural-images", "none", "--set", "penalty=false"],
            "natural images none: this run has no pretraining penalty; leave it out",
        ),
    ],
)
def test_impossible_options_of_efficientad_are_refused(
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


def test_only_the_same_run_can_be_resumed(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Start a run in Python, and resume it from the command line."""
    out, events = tmp_path / "m.blemish", list[Event]()
    with pytest.raises(StoppedError, match="stopped after step 2 of 5"):
        blemish.train(
            tiny.data,
            model="supersimplenet",
            out=out,
            weights=tiny.weights,
            settings=drawn.TINY,
            steps=5,
            precision="fp32",
            device="cpu",
            report=events.append,
            stop=lambda: (events[-1].phase, events[-1].step) == ("training", 2),
        )
    changed = training(tiny, out, "--steps", 5, "--set", "batch_size=4")
    said = refused([*changed, "--resume"], tmp_path, capsys, after_words=True)
    assert "m.blemish.checkpoint belongs to another run: its config is {" in said
    said = refused([*training(tiny, out, "--steps", 6), "--resume"], tmp_path, capsys, after_words=True)
    assert "belongs to a run of 5 steps; 6 were asked for" in said
    said = refused(training(tiny, out, "--steps", 5), tmp_path, capsys, after_words=True)
    assert "continue it with --resume, or delete the file" in said
    assert run([*training(tiny, out, "--steps", 5), "--resume"]) == 0


def write_no_bundle(path: Path) -> None:
    path.write_bytes(b"not a zip")


def truncate(path: Path) -> None:
    path.write_bytes(MODEL.read_bytes()[:10_000])


def flip(path: Path) -> None:
    data = bytearray(MODEL.read_bytes())
    data[data.index(GRAPH.encode()) + 500] ^= 1  # in a weight, as a failing disk might
    path.write_bytes(data)


def make_foreign(path: Path) -> None:
    opened = bundle.read(MODEL)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST, json.dumps(opened.manifest.to_json() | {"format": 99}))
        archive.writestr(WEIGHTS, opened.weights)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "found no model file at "),
    "a folder": (Path.mkdir, "found no model file at "),
    "something else": (write_no_bundle, "is not a model file, or is damaged"),
    "truncated": (truncate, "is not a model file, or is damaged"),
    "damaged": (flip, "damaged"),
    "foreign": (make_foreign, "has format 99; this version of Blemish reads formats 1 and 2"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_invalid_model_file_is_refused(
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


def test_missing_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    images.write_png(tmp_path / "a" / "1.png", drawn.part(1))
    images.write_png(tmp_path / "b" / "1.png", drawn.part(2))
    for paths, says in (
        ([tmp_path / "none.png"], f"found nothing at {tmp_path}/none.png; expected an image or a folder"),
        ([tmp_path / "a", tmp_path / "none"], f"found nothing at {tmp_path}/none"),
        ([tmp_path / "empty"], f"no images in {tmp_path}/empty"),
        ([tmp_path / "a", tmp_path / "b"], "/b/1.png would have the same name 1.png"),
    ):
        assert says in refused(["predict", MODEL, *paths], tmp_path, capsys)


def test_a_broken_image_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_an_evaluation_without_test_images_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = drawn.data_set(tmp_path / "parts", good=0, bad=0)
    words = ["evaluate", MODEL, data, "--json", tmp_path / "e.json", "--report", tmp_path / "e.html"]
    assert "holds no test images; expected good and defective ones" in refused(words, tmp_path, capsys)
    assert "found nothing at" in refused(["evaluate", MODEL, tmp_path / "none"], tmp_path, capsys)
    assert "unknown layout 'x'; expected auto, " in refused(
        ["evaluate", MODEL, data, "--layout", "x"], tmp_path, capsys
    )


@pytest.mark.parametrize(
    ("count", "more", "says"),
    [
        (1, [], "there are 1 held-out good images; expected at least 2"),
        (0, [], "/good; expected a folder of good images"),
        (3, ["--false-reject-rate", 0], "false reject rate is 0.0; expected above 0 and below 1"),
        (3, ["--false-reject-rate", 2], "false reject rate is 2.0; expected above 0 and below 1"),
    ],
)
def test_impossible_calibrations_are_refused(
    count: int, more: Words, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(count):
        images.write_png(tmp_path / "good" / f"{number}.png", drawn.part(number))
    words = ["calibrate", MODEL, tmp_path / "good", "--out", tmp_path / "new.blemish", *more]
    assert says in refused(words, tmp_path, capsys, after_words=count == 1)


def test_calibrating_on_a_broken_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        images.write_png(tmp_path / "good" / f"{number}.png", drawn.part(number))
    (tmp_path / "good/1.png").write_bytes(b"none")
    words = ["calibrate", MODEL, tmp_path / "good", "--out", tmp_path / "new.blemish"]
    assert "1.png begins with b'none'" in refused(words, tmp_path, capsys)


def test_unwritable_outputs_are_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Try a path below a file, where not even root can write, and the name of a folder."""
    file, folder, good = tmp_path / "file", tmp_path / "folder", tiny.data / "test" / "good"
    file.write_text("in the way")
    folder.mkdir()
    for out, says in (
        (file / "x", f"cannot write to {file}: {file} is a file; expected a folder"),
        (file / "x" / "y", f"cannot write to {file}/x: {file} is a file; expected a folder"),
        (folder, f"cannot write {folder}: it is a folder; expected the name of a file"),
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
        assert f"cannot write to {file}: {file} is a file" in refused(words, tmp_path, capsys)


def test_a_refused_run_creates_no_folder(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = training(tiny, tmp_path / "runs" / "m.blemish", data=tmp_path / "none")
    assert "found nothing at" in refused(words, tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["add", "resnet19", "w.pth"], "unknown weights 'resnet19'; expected one of efficientnet_lite0, "),
        (["add", "pdn_small", "none.pth"], "found no weights file at none.pth"),
        (["add", "pdn_medium", "small.safetensors"], "small.safetensors does not fit: "),
        (["add", "pdn_small", "garbage.pth"], "garbage.pth cannot be read as weights"),
        (["fetch", "resnet19"], "unknown weights 'resnet19'"),
        (["fetch", "pdn_small"], "pdn_small has no publisher's address"),
        (["fetch", "resnet18"], "could not download https://download.pytorch.org/models/resnet18-"),
    ],
)
def test_weights_that_cannot_be_added_are_refused(
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


def test_a_demo_that_would_overwrite_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images.write_png(tmp_path / "d/parts/mine.png", drawn.part(1))
    said = refused(["demo", "--out", tmp_path / "d"], tmp_path, capsys, after_words=True)
    assert "holds files that do not belong to a demo" in said


def test_checking_a_missing_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "found nothing at" in refused(["check", tmp_path / "none"], tmp_path, capsys)


def test_a_check_that_finds_problems_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = drawn.data_set(tmp_path / "parts")
    (data / "train/good/000.png").write_bytes(b"none")
    assert run(["check", data]) == 1
    assert "000.png" in capsys.readouterr().out


def test_a_line_break_in_a_name_does_not_break_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


# --- how a command ends ---


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[Command], int]:
    """Run a function as the only command; return the exit status."""

    def end(command: Command) -> int:
        monkeypatch.setattr(main, "COMMANDS", (("mine", command, lambda sub: None, "test it"),))
        return run(["mine"])

    return end


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_exit_status_is_the_commands_own(status: int, ending: Callable[[Command], int]) -> None:
    assert ending(lambda options: status) == status


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), OSError(5, "by zero"), ModuleNotFoundError("by zero", name="no")]
)
def test_an_internal_error_prints_its_traceback_and_returns_70(
    error: Exception, ending: Callable[[Command], int], capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(options: object) -> int:
        raise error

    assert ending(broken) == 70
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("in broken" in line for line in lines)
    assert lines[-2].startswith(f"{type(error).__name__}: ")
    assert lines[-2].endswith("by zero")
    assert lines[-1] == "blemish: this is an error in Blemish itself; please report it with the lines above"


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (BlemishError("found one,\nexpected two"), 2, "blemish: found one, expected two\n"),
        (
            ModuleNotFoundError(name="torch"),
            2,
            "blemish: torch is not installed; this needs blemish[train]\n",
        ),
        (KeyboardInterrupt(), 130, "blemish: stopped\n"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(
    error: BaseException,
    status: int,
    says: str,
    ending: Callable[[Command], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raising(options: object) -> int:
        raise error

    assert ending(raising) == status
    assert capsys.readouterr() == ("", says)


def test_a_process_that_crashes_ends_with_70() -> None:
    program = (
        "import sys\n"
        "from blemish.cli import main\n"
        "main.COMMANDS = (('mine', lambda options: 1 // 0, lambda sub: None, 'fail'),)\n"
        "sys.exit(main.main(['mine']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (70, "")
    assert "ZeroDivisionError" in done.stderr


# --- sizes ---


def test_train_says_what_the_network_sees(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = drawn.data_set(tmp_path / "parts", size=(126, 50)), tmp_path / "m.blemish"
    fixed = training(tiny, file, "--steps", 1, data=data)
    words = [word for word in fixed if not str(word).startswith("--set=image_size")]
    for more, expected, says in (
        (["--set=side=64"], [160, 64], "160 x 64 (shape kept; 1.3 of the size)"),
        (["--scale", "0.5x1"], [64, 64], "64 x 64 (scale 0.5 x 1)"),
        (
            ["--set=side=64", "--defect-size", "9px"],
            [160, 64],
            "160 x 64 (a defect of 9 pixels covers 11.4, ",
        ),
    ):
        assert run([*words, *more]) == 0
        assert f"images are 126 x 50: the network sees {says}" in capsys.readouterr().err
        assert bundle.read(file).manifest.config["image_size"] == expected
    assert run(fixed) == 0
    assert "the network sees" not in capsys.readouterr().err


def test_check_answers_for_the_smallest_defect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = drawn.data_set(tmp_path / "parts", good=0, bad=2, size=(280, 560))
    assert run(["check", data]) == 0
    assert capsys.readouterr().out.endswith("\n\nno problems found\n")
    assert run(["check", data, "--defect-size", "12px"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a defect of 12 pixels covers 8.2 pixels of the default 192 x 384, of 12 needed" in said
    assert "try --defect-size 12px (288 x 576, 2.2 times the pixels)" in said
    assert "with patchcore, a defect of 12 pixels covers 11 pixels of the default 256 x 512, of 12" in said
    assert "efficientad" not in said  # its default size is enough
    assert "defect size big: expected pixels" in refused(["check", data, "--defect-size=big"], data, capsys)


# --- Python ---


def test_python_and_the_commands_have_the_same_results(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = drawn.data_set(tmp_path / "parts", good=5)
    for number in range(6):  # labelled defective, but without a defect, so they escape
        images.write_png(data / f"test/unseen/{number}.png", drawn.part(7000 + number))

    checked = blemish.check(data)
    assert run(["check", data]) == (0 if checked.passed else 1)
    assert capsys.readouterr().out == format_check(checked) + "\n"

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    words = ["evaluate", tiny.file, data, "--json", theirs / "e.json", "--csv", theirs / "e.csv"]
    assert run([*words, "--report", theirs / "e.html"]) == 0
    found = blemish.evaluate(blemish.load(tiny.file), data)
    said = capsys.readouterr()
    assert said.out == table(found) + "\n"
    assert "evaluating: 100% 15/15" in said.err
    assert [exhibit.title for exhibit in found.exhibits] == [*["Escape"] * 4, "Clearest detection"]
    for write, name in (
        (report.write_json, "e.json"),
        (report.write_csv, "e.csv"),
        (report.write_html, "e.html"),
    ):
        write(found, ours / name)

    more = write_parts(tmp_path / "more", 7)[0].parent
    words = ["calibrate", tiny.file, more, "--false-reject-rate", 0.2, "--out", theirs / "c.blemish"]
    assert run(words) == 0
    calibration = blemish.calibrate(tiny.file, more, false_reject_rate=0.2, out=ours / "c.blemish")
    said = capsys.readouterr()
    assert said.out == describe(calibration) + "\n"
    assert "calibrating: 100% 7/7" in said.err
    assert blemish.load(ours / "c.blemish").calibration == calibration
    assert calibration.false_reject_rate == 0.2

    assert drawn.snapshot(ours) == drawn.snapshot(theirs)
    assert len(drawn.snapshot(ours)) == 4


def test_every_field_of_a_training_request_is_an_option_of_train() -> None:
    words = "train parts --model simplenet --out a/m.blemish --from old.blemish --layout mvtec "
    words += "--supervision full --train-defects 3 --train-masks 0.5 --weights w.pth --natural-images none "
    words += "--preset paper --schedule paper --seed 4 --device cpu --precision bf16 --memory 1 --cache off "
    words += "--false-reject-rate 0.2 --resume --set noise_ratio=0.5 --light standardise --light-limit 0.1"
    given: dict[str, Any] = {
        **{"data": Path("parts"), "model": "simplenet", "out": Path("a/m.blemish")},
        **{"start": Path("old.blemish"), "layout": "mvtec", "supervision": "full"},
        **{"train_defects": "3", "train_masks": "0.5", "weights": Path("w.pth"), "natural_images": "none"},
        **{"preset": "paper", "schedule": "paper", "seed": 4, "device": "cpu", "precision": "bf16"},
        **{"memory": 1 << 30, "cache": "off", "false_reject_rate": 0.2, "resume": True},
        **{"light": "standardise", "light_limit": 0.1},
        "settings": {"noise_ratio": "0.5"},
    }
    either: list[tuple[str, str, dict[str, Any]]] = [
        ("--steps", "7", {"steps": 7}),
        ("--epochs", "8", {"epochs": 8}),
        ("--budget", "90s", {"budget": 90.0}),
        ("--scale", "0.5x0.25", {"scale": (0.5, 0.25)}),
        ("--defect-size", "12px", {"defect_size": 12.0}),
        ("--image-size", "64x32", {"settings": {"noise_ratio": "0.5", "image_size": "64x32"}}),
    ]
    for option, value, expected in either:
        request = request_of(main.parser().parse_args([*words.split(), option, value]))
        assert request == blemish.TrainingRequest(**given | expected)
    # `fold` is set by --folds, in one request for each fold.
    names = {*given, *(name for _, _, expected in either for name in expected), "fold"}
    assert names == {field.name for field in fields(blemish.TrainingRequest)}


# --- threads ---


@pytest.mark.parametrize(
    ("chosen", "busy", "expected"),
    [(None, 0.1, "None"), (None, 1.0, "PASSIVE"), ("ACTIVE", 1.0, "ACTIVE"), ("ACTIVE", 0.0, "ACTIVE")],
)
@pytest.mark.parametrize("command", ["train", "distill"])
def test_waiting_threads_sleep_in_company_unless_the_user_says_otherwise(
    command: str, chosen: str | None, busy: float, expected: str
) -> None:
    """OpenMP reads the variable when torch is loaded, so it is looked at then."""
    program = f"""
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()

sys.meta_path.insert(0, Watch())
import blemish.cli.main
from blemish import devices
devices.busy_elsewhere = lambda: {busy}
arguments = {{"train": ["--model", "simplenet"], "distill": ["--size", "small"]}}["{command}"]
blemish.cli.main.main(["{command}", "nowhere", "--out", "m.safetensors", *arguments])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if chosen is not None:
        environment["OMP_WAIT_POLICY"] = chosen
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == [expected]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how busy its cores are")
def test_a_busy_process_is_noticed() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            found = devices.busy_elsewhere(0.5)
        finally:
            process.kill()
    assert 0.3 < found <= devices.cores() + 0.01


# --- progress, warnings and signals ---


class Screen(io.StringIO):
    """A standard error stream that is a terminal."""

    @override
    def isatty(self) -> bool:
        return True


class Clock:
    """Replaces the module `time`; the test sets `now`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


def show(report: Report, clock: Clock, *events: tuple[float, Event]) -> None:
    """Report each event at its time, in seconds."""
    for clock.now, event in events:
        report(event)


def shown_live(clock: Clock, *events: tuple[float, Event]) -> str:
    """Return what is written to a terminal when each event is reported at its time."""
    screen = Screen()
    with redirect_stderr(screen):
        show(Terminal(), clock, *events)
    return screen.getvalue()


def test_a_log_gets_a_line_of_progress_every_half_minute_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [(10.0 * number, Event("training", number, 10, {"loss": 0.5})) for number in range(11)]
    show(Terminal(), clock, *steps)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "training:  30% 3/10 [00:30<01:10, 10.00s/step, loss 0.500]",
        "training:  60% 6/10 [01:00<00:40, 10.00s/step, loss 0.500]",
        "training:  90% 9/10 [01:30<00:10, 10.00s/step, loss 0.500]",
        "training: 100% 10/10 [01:40<00:00, 10.00s/step, loss 0.500]",
    ]


def test_the_rate_of_a_resumed_phase_counts_only_new_steps(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    show(
        Terminal(),
        clock,
        (100, Event("training", 500, 1000)),
        (140, Event("training", 600, 1000)),
        (300, Event("training", 1000, 1000)),
    )
    assert capsys.readouterr().err.splitlines() == [
        "training:  60% 600/1000 [00:40<02:40,  2.50step/s]",
        "training: 100% 1000/1000 [03:20<00:00,  2.50step/s]",
    ]


def test_a_terminal_shows_one_line_that_is_updated_in_place(clock: Clock) -> None:
    shown = shown_live(
        clock,
        (0.0, Event("predicting", 0, 4, unit="image")),
        (0.1, Event("predicting", 1, 4, unit="image")),
        (0.25, Event("predicting", 2, 4, unit="image")),
        (0.3, Event("predicting", 3, 4, unit="image")),
        (0.4, Event("predicting", 4, 4, unit="image")),
    )
    assert shown == (
        "\r\x1b[Kpredicting:  50% 2/4 [00:00<00:00,  8.00image/s]"
        "\r\x1b[Kpredicting: 100% 4/4 [00:00<00:00, 10.00image/s]\n"
    )


def test_a_message_replaces_a_progress_line_that_is_not_finished(clock: Clock) -> None:
    shown = shown_live(
        clock,
        (0, Event(message="before")),
        (0, Event("training", 0, 4)),
        (1, Event("training", 1, 4)),
        (1, Event(message="at step 1: halved")),
        (2, Event("training", 4, 4)),
        (2, Event(message="after")),
    )
    assert shown == (
        "before\n"
        "\r\x1b[Ktraining:  25% 1/4 [00:01<00:03,  1.00step/s]"
        "\r\x1b[Kat step 1: halved\n"
        "\r\x1b[Ktraining: 100% 4/4 [00:02<00:00,  2.00step/s]\n"
        "after\n"
    )


def test_lines_of_parallel_tasks_begin_with_their_source(clock: Clock) -> None:
    """They are not updated in place, because they would overwrite one another."""
    shown = shown_live(
        clock,
        (0, Event("training", 0, 2, source="seed 0")),
        (5, Event("training", 0, 4, source="seed 1")),
        (35, Event("training", 1, 2, source="seed 0")),
        (36, Event("training", 1, 4, source="seed 1", message="noted")),
        (40, Event("training", 2, 2, source="seed 0")),
    )
    assert shown.splitlines() == [
        "seed 0: training:  50% 1/2 [00:35<00:35, 35.00s/step]",
        "seed 1: noted",
        "seed 1: training:  25% 1/4 [00:31<01:33, 31.00s/step]",
        "seed 0: training: 100% 2/2 [00:40<00:00, 20.00s/step]",
    ]


def test_a_repeated_phase_starts_a_new_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    for start in (0, 1000):
        show(terminal, clock, (start, Event("encoding", 0, 2)), (start + 4, Event("encoding", 2, 2)))
    show(terminal, clock, (2000, Event("encoding", 2, 2)))
    assert capsys.readouterr().err.splitlines() == [
        *["encoding: 100% 2/2 [00:04<00:00,  2.00s/step]"] * 2,
        "encoding: 100% 2/2 [00:00<?, ?step/s]",
    ]


def test_without_progress_messages_are_still_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Terminal(progress=False)
    show(quiet, clock, (0, Event("training", 0, 1)), (60, Event("training", 1, 1, message="done")))
    assert capsys.readouterr() == ("", "done\n")


def test_predict_shows_progress_only_with_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_parts(tmp_path / "in", 2)
    assert run(["predict", MODEL, *paths]) == 0
    assert "predicting" not in capsys.readouterr().err
    assert run(["predict", MODEL, *paths, "--jsonl", tmp_path / "lines.jsonl"]) == 0
    assert "predicting: 100% 2/2" in capsys.readouterr().err


def test_warnings_are_shown_once_and_only_while_a_command_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logging.getLogger("blemish.somewhere")
    before = logging.getLogger("blemish").handlers[:]
    with shown_warnings():
        log.warning("%d images are odd", 3)
        log.info("nothing")
    assert capsys.readouterr() == ("", "blemish: 3 images are odd\n")
    assert logging.getLogger("blemish").handlers == before


def test_a_first_signal_asks_to_stop_and_a_second_one_interrupts() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with stop_requests() as asked:
            assert not asked()
            os.kill(os.getpid(), number)
            assert asked()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_does_not_handle_signals() -> None:
    def ask() -> tuple[object, bool]:
        with stop_requests() as asked:
            return signal.getsignal(signal.SIGINT), asked()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask).result() == (signal.getsignal(signal.SIGINT), False)
