"""Models with a damped or a blind rim: trained, exported, continued, measured on training images alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_format1 import BAD, FILES, GOOD
from safetensors.torch import load
from torch import Tensor

import blemish
import drawn
from blemish.cli.main import main
from blemish.detectors import edges
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.exporting.gate import LIMITS
from blemish.files import short_digest
from blemish.images import list_images
from blemish.inference import bundle
from blemish.inference.bundle import Bundle
from blemish.inference.engines.pytorch import restored
from drawn import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")

BOUNDS = {"fp32": (1e-3, 1e-3), "fp16": (1e-2, 0.1), "int8": (0.0, 0.5)}
"""How far scores may lie apart, relative and absolute; those of good parts are a few deviations."""


def words(tiny: Tiny, out: Path, *more: str, **changes: Any) -> list[str]:
    """Return the command that trains the tiny model with other settings."""
    given = drawn.TINY | changes
    settings = (f"--set={key}={','.join(map(str, as_tuple(value)))}" for key, value in given.items())
    usual = ["train", tiny.data, "--model", "supersimplenet", "--out", out, "--weights", tiny.weights]
    return [*map(str, usual), "--precision", "fp32", "--device", "cpu", *settings, *more]


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def rings_of(opened: Bundle) -> tuple[Tensor, Tensor]:
    """Return the gain and shift of each ring in a model file."""
    stored = load(opened.weights)
    return stored["ring_gain"], stored["ring_shift"]


@pytest.fixture(scope="module")
def models(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train small models from the command line, by what is done about the rim."""
    found = {kind: tmp_path_factory.mktemp("rim") / f"{kind}.blemish" for kind in ("rings", "blind")}
    for kind, out in found.items():
        assert main(words(tiny, out, "--steps", str(drawn.STEPS), edges=kind)) == 0
    return found


@pytest.fixture(scope="module")
def damped(models: dict[str, Path]) -> Path:
    return models["rings"]


def cells_of(opened: Bundle, paths: Iterable[Path]) -> list[Tensor]:
    """Return the (1, h, w) cells of images before anything is done about edges, from a model's detector."""
    detector = restored(opened)
    assert isinstance(detector, SuperSimpleNet)
    found = []
    with torch.no_grad(), blemish.load(opened.path) as model:
        for path in paths:
            parts = detector.encode(torch.from_numpy(model.prepare(path).inputs))
            found.append(detector.cells(tuple(part.half().float() for part in parts)))
    return found


def test_rings_are_measured_on_the_good_training_images_alone(damped: Path, tiny: Tiny) -> None:
    opened = bundle.read(damped)
    assert opened.manifest.config["edges"] == "rings"
    files = opened.manifest.training.files
    assert files is not None
    paths = {short_digest(path): path for path in list_images(tiny.data / "train/good")}
    trained = cells_of(opened, (paths[name] for name in files.train))
    both = [*trained, *cells_of(opened, (paths[name] for name in files.held_out))]
    gain, shift = rings_of(opened)
    assert not torch.equal(gain, edges.neutral()[0])
    for found, expected, other in zip((gain, shift), *map(edges.measure_rings, (trained, both)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, other, rtol=1e-4, atol=1e-4)


def test_training_itself_is_the_same(damped: Path, tiny: Tiny) -> None:
    before, after = (load(bundle.read(path).weights) for path in (tiny.file, damped))
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"ring_gain", "ring_shift"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("kind", ["rings", "blind"])
def test_exports_agree(
    kind: str, precision: str, models: dict[str, Path], tiny: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "exported.blemish"
    exporting = ["export", models[kind], "--format", "onnx", "--precision", precision, "--out", out]
    assert main([*map(str, exporting), "--data", str(tiny.data)]) == 0
    images = [drawn.part(40), drawn.part(41), *(drawn.spotted(number)[0] for number in (42, 43))]
    with blemish.load(models[kind]) as model, blemish.load(out) as exported:
        before, after = ([each.predict(image) for image in images] for each in (model, exported))
    # Eight-bit ranges are those of good parts, so that what exceeds them by far is cut off.
    good = slice(2) if precision == "int8" else slice(4)
    expected, found = (np.stack([verdict.map for verdict in each[good]]) for each in (before, after))
    assert np.sqrt(np.square(found - expected).mean()) / expected.std() < LIMITS[precision].map_error
    assert [verdict.label for verdict in after] == [verdict.label for verdict in before]
    assert {verdict.label for verdict in after[2:]} == {"defect"}
    relative, absolute = BOUNDS[precision]
    for one, other in zip(after[good], before[good], strict=True):
        assert one.score == pytest.approx(other.score, rel=relative, abs=absolute)


def test_a_run_killed_after_its_last_step_settles_again(damped: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "killed.blemish"
    command = words(tiny, out, "--steps", str(drawn.STEPS), edges="rings")
    script = (
        "import os, sys\n"
        "from blemish.cli.main import main\n"
        "from blemish.training import run\n"
        "run.finalise = lambda *_: os._exit(9)\n"
        "main(sys.argv[1:])\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", script, *command], env=environment, capture_output=True)
    assert killed.returncode == 9
    assert main([*command, "--resume"]) == 0
    assert bundle.read(out).weights == bundle.read(damped).weights


def test_a_limited_number_of_images_is_measured_evenly_spaced(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(edges, "IMAGES", 3)
    monkeypatch.setattr(
        SuperSimpleNet, "settle", lambda _, batches: seen.extend(batch.encoded for batch in batches)
    )
    assert main(words(tiny, tmp_path / "few.blemish", "--steps", "1", edges="rings")) == 0
    opened = bundle.read(tmp_path / "few.blemish")
    files = opened.manifest.training.files
    assert files is not None
    assert len(files.train) == 7
    paths = {short_digest(path): path for path in list_images(tiny.data / "train/good")}
    detector = restored(opened)
    with torch.no_grad(), blemish.load(opened.path) as model:
        for number, parts in zip((0, 2, 4), seen, strict=True):
            image = torch.from_numpy(model.prepare(paths[files.train[number]]).inputs)
            for found, expected in zip(parts, detector.encode(image), strict=True):
                torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_nothing_is_measured_that_nothing_needs(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SuperSimpleNet, "settle", lambda *_: pytest.fail("nothing to settle"))
    for kind in ("none", "blind"):
        assert main(words(tiny, tmp_path / f"{kind}.blemish", "--steps", "1", edges=kind)) == 0


def test_a_model_goes_on_with_other_edges(damped: Path, tiny: Tiny, tmp_path: Path) -> None:
    """No weight depends on what is done about the rim, so that a later model may do otherwise."""

    def go_on(start: Path, kind: str) -> Bundle:
        out = tmp_path / f"{kind}.blemish"
        words = ["train", tiny.data, "--from", start, "--out", out, "--steps", 1, "--set", f"edges={kind}"]
        assert main(list(map(str, words))) == 0
        return bundle.read(out)

    without, with_rings = go_on(damped, "none"), go_on(tiny.file, "rings")
    assert (without.manifest.config["edges"], with_rings.manifest.config["edges"]) == ("none", "rings")
    assert torch.equal(rings_of(without)[0], edges.neutral()[0])
    assert torch.equal(rings_of(without)[1], edges.neutral()[1])
    assert not torch.equal(rings_of(with_rings)[0], edges.neutral()[0])


def test_an_image_too_small_to_be_blind_is_refused_at_once(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = drawn.tiny_weights(tmp_path / "lite0.safetensors", layers=("stage3",))
    small = Tiny(tiny.data, given, tiny.file, tiny.model)
    changes = {"edges": "blind", "layers": ("stage3",), "image_size": (32, 64)}
    assert main(words(small, tmp_path / "m.blemish", **changes)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "edges=blind leaves nothing of a map of 8x16 cells, 4 of them blind on each side" in said
    assert list(tmp_path.iterdir()) == [given]


def test_a_file_from_before_is_judged_as_before() -> None:
    """By its weights as well as by its graph, which lack the rings."""
    file = FILES / "format1.blemish"
    assert not {"ring_gain", "ring_shift"} & load(bundle.read(file).weights).keys()
    parts = [drawn.part(number) for number in GOOD] + [drawn.spotted(number)[0] for number in BAD]
    expected = json.loads((FILES / "format1.json").read_text())
    with blemish.load(file, backend="torch", precision="fp32") as model:
        for part, before in zip(parts, expected, strict=True):
            verdict = model.predict(part)
            assert verdict.score == pytest.approx(before["score"], rel=1e-3, abs=1e-2)
            assert (verdict.label, verdict.p_value) == (before["label"], before["p_value"])
