"""Standardised light: trained, judged, limited, calibrated, evaluated, exported, continued."""

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import blemish
import drawn
from blemish import images
from blemish.cli.main import main
from blemish.data.loading.cache import Memory
from blemish.data.loading.stores import ImageStore
from blemish.errors import BlemishError, ConfigError, ModelFileError, StoppedError
from blemish.evaluation import report
from blemish.files import digest
from blemish.images import Preprocessing
from blemish.images.light import measure
from blemish.inference import bundle
from blemish.inference.predictor import Predictor
from blemish.training import run
from blemish.training.plan import plan
from blemish.training.request import TrainingRequest
from blemish.types import AnyArray
from drawn import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")

USUAL: dict[str, Any] = {
    "model": "supersimplenet",
    "settings": drawn.TINY,
    "steps": drawn.STEPS,
    "precision": "fp32",
    "device": "cpu",
}
GOOD = range(1000, 1004)
BAD = range(2000, 2004)


@pytest.fixture(scope="module")
def lit(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Predictor]:
    """Train as `tiny` was, with standardised light."""
    out = tmp_path_factory.mktemp("lit") / "lit.blemish"
    given = {"data": tiny.data, "weights": tiny.weights, "out": out, "light": "standardise"}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run.train(**USUAL | given)
    torch.set_num_threads(before)


def darker(image: AnyArray, gain: float = 0.8) -> AnyArray:
    dark: AnyArray = np.rint(gain * image).astype(np.uint8)
    return dark


def command(*words: Any) -> int:
    return main([str(word) for word in words])


# --- verdicts ---


def test_a_darker_part_gets_the_verdict_of_the_part_with_standardised_light_only(
    tiny: Tiny, lit: Predictor
) -> None:
    good = [drawn.part(number) for number in GOOD]
    bad = [drawn.spotted(number)[0] for number in BAD]
    for part in (*good, *bad):
        usual, dark = lit.predict(part), lit.predict(darker(part))
        assert dark.label == usual.label
        assert dark.score == pytest.approx(usual.score, rel=0.1, abs=0.5)
    assert {lit.predict(part).label for part in bad} == {"defect"}
    assert [lit.predict(darker(part)).label for part in good] == ["ok"] * 4
    assert [tiny.model.predict(part).label for part in good] == ["ok"] * 4
    found = [tiny.model.predict(darker(part)).label for part in good]
    assert found.count("defect") >= 2  # 3 here, the fourth just below the threshold
    assert [tiny.model.predict(darker(part, 0.6)).label for part in good] == ["defect"] * 4
    assert [lit.predict(darker(part, 0.6)).label for part in good] == ["ok"] * 4


def test_what_was_taken_from_a_darker_part_shows_in_its_light_p_value(lit: Predictor) -> None:
    least = 1 / (1 + len(lit.calibration.scores))
    usual = [lit.predict(drawn.part(number)).light_p for number in range(4000, 4040)]
    assert all(p is not None for p in usual)
    assert np.mean([p == least for p in usual]) < 0.5
    assert {lit.predict(darker(drawn.part(number))).light_p for number in GOOD} == {least}


def test_a_part_of_another_colour_has_the_least_light_p_value(lit: Predictor) -> None:
    for channel in range(3):
        tinted = drawn.part(1000).copy()
        tinted[..., channel] = darker(tinted[..., channel], 0.85)
        assert lit.predict(tinted).light_p == 1 / (1 + len(lit.calibration.scores))


# --- one path ---


def test_a_store_makes_the_inputs_that_prediction_makes(tiny: Tiny) -> None:
    paths = images.list_images(tiny.data / "train/good")
    plain = Preprocessing((48, 32), 65535.0)
    store = ImageStore(paths, plain, Memory(1 << 30)).fill()
    before = [store.inputs(index) for index in range(len(paths))]
    light = measure(inputs[0] for inputs in before)
    store.set_light(light)
    lit = Preprocessing((48, 32), 65535.0, light=light)
    for index, path in enumerate(paths):
        image = images.read(path)
        assert np.array_equal(store.inputs(index), lit.inputs(image))
        assert np.array_equal(store.batch([index]).numpy(), lit.inputs(image))
        assert not np.array_equal(store.inputs(index), plain.inputs(image))
    assert store.light_scores() == [lit.with_light_score(lit.resized(images.read(path)))[1] for path in paths]
    assert ImageStore(paths, plain, Memory(0)).light_scores() == []


def test_a_model_file_has_the_light_of_its_training_images_and_the_scores_of_the_others(
    tiny: Tiny, lit: Predictor
) -> None:
    manifest, preprocessing = lit.manifest, lit.preprocessing
    files, known = manifest.training.files, manifest.light_calibration
    assert files is not None
    assert known is not None
    by_digest = {
        digest(path)[: len(files.train[0])]: images.read(path)
        for path in images.list_images(tiny.data / "train/good")
    }
    plain = Preprocessing(preprocessing.image_size, preprocessing.white)
    assert preprocessing.light == measure(plain.inputs(by_digest[name])[0] for name in files.train)
    held_out = [by_digest[name] for name in files.held_out]
    scores = [preprocessing.with_light_score(preprocessing.resized(image))[1] for image in held_out]
    assert list(known.scores) == sorted(float(score or 0) for score in scores)
    assert (known.limit, manifest.training.run.light) == (0.0, "standardise")


def test_features_of_another_light_are_not_read(tiny: Tiny, tmp_path: Path) -> None:
    folders = []
    for light in ("off", "standardise"):
        given = {"data": tiny.data, "weights": tiny.weights, "out": tmp_path / f"{light}.blemish"}
        run.train(**USUAL | given | {"light": light, "steps": 1, "cache": tmp_path / "cache"})
        folders.append({path.name for path in (tmp_path / "cache").iterdir()})
    assert len(folders[0]) == 1
    assert len(folders[1]) == 2


# --- commands ---


def test_parts_of_unusual_light_are_reviewed_if_asked_for(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, limit = tmp_path / "m.blemish", 0.2  # the 5 held-out images give p-values of 1/6 and more
    settings = [f"--set={key}={as_word(value)}" for key, value in drawn.TINY.items()]
    words = ["train", tiny.data, "--model", "supersimplenet", "--weights", tiny.weights, *settings]
    words += ["--precision", "fp32", "--device", "cpu", "--steps", drawn.STEPS, "--out", file]
    assert command(*words, "--light", "standardise", "--light-limit", limit) == 0
    images.write_png(tmp_path / "parts/dark.png", darker(drawn.part(1000)))
    images.write_png(tmp_path / "parts/spot.png", darker(drawn.spotted(2000)[0]))
    capsys.readouterr()
    assert command("predict", file, tmp_path / "parts") == 0
    dark, spot = map(json.loads, capsys.readouterr().out.splitlines())
    assert (dark["label"], dark["reason"], dark["light_p"]) == ("review", "light", 1 / 6)
    assert (spot["label"], spot["reason"], spot["light_p"]) == ("defect", "", 1 / 6)

    more = tmp_path / "more"
    for number in range(4000, 4009):
        images.write_png(more / f"{number}.png", drawn.part(number))
    assert command("calibrate", file, more, "--out", tmp_path / "again.blemish") == 0
    known = bundle.read(tmp_path / "again.blemish").manifest.light_calibration
    assert known is not None
    assert (len(known.scores), known.limit) == (9, limit)
    words = ["calibrate", file, more, "--light-limit"]
    assert command(*words, 0, "--out", tmp_path / "off.blemish") == 0
    again, off = (
        blemish.load(tmp_path / name).predict(tmp_path / "parts/dark.png")
        for name in ("again.blemish", "off.blemish")
    )
    assert again.light_p == off.light_p == 0.1
    assert off.reason == ""
    if off.label == "ok":
        assert again == replace(off, label="review", reason="light")
    else:  # by other thresholds
        assert again == off
    assert command(*words, 0.09, "--out", tmp_path / "no.blemish") == 2
    assert "9 held-out images give no p-value below 0.1" in capsys.readouterr().err
    assert not (tmp_path / "no.blemish").exists()


def as_word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_an_evaluation_says_what_the_light_was(tiny: Tiny, lit: Predictor, tmp_path: Path) -> None:
    found = blemish.evaluate(lit, tiny.data)
    assert {result.light_p is not None for result in found.images} == {True}
    assert found.provenance["light"] == "standardise"
    report.write_csv(found, tmp_path / "images.csv")
    with (tmp_path / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["light_p"]) for row in rows] == [result.light_p for result in found.images]


def test_an_export_standardises_light_as_its_model_does(tiny: Tiny, lit: Predictor, tmp_path: Path) -> None:
    out = tmp_path / "fast.blemish"
    blemish.export(lit.path, tiny.data, out=out, format="onnx")
    opened = bundle.read(out).manifest
    assert opened.preprocessing == lit.preprocessing
    assert opened.light_calibration == lit.manifest.light_calibration
    dark = darker(drawn.part(1001))
    exported, usual = blemish.load(out).predict(dark), lit.predict(dark)
    assert (exported.label, exported.light_p) == (usual.label, usual.light_p)
    assert exported.score == pytest.approx(usual.score, rel=1e-3, abs=1e-3)


# --- continuing ---


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Let runs end with their parameters in this list, without the export."""
    found: list[dict[str, Tensor]] = []

    def keep(path: Path, detector: torch.nn.Module, *arguments: Any) -> None:
        found.append({key: value.clone() for key, value in detector.state_dict().items()})

    monkeypatch.setattr(run, "finalise", keep)
    return found


def test_a_warm_start_keeps_to_the_light_of_its_model(tiny: Tiny, lit: Predictor) -> None:
    def planned(**changes: Any) -> str:
        return plan(TrainingRequest(data=tiny.data, out=Path("m.blemish"), **changes)).light

    assert planned(start=lit.path) == "standardise"
    assert planned(start=lit.path, light="off") == "off"
    assert planned(start=tiny.file) == "off"
    assert planned(start=tiny.file, light="standardise") == "standardise"
    assert planned(model="supersimplenet") == "off"


def test_a_run_resumes_to_the_same_weights_and_not_under_another_light(
    tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]]
) -> None:
    given = USUAL | {"data": tiny.data, "weights": tiny.weights, "out": tmp_path / "m.blemish", "steps": 6}
    with pytest.raises(StoppedError):
        run.train(**given, light="standardise", **drawn.stop_after(3))
    with pytest.raises(ModelFileError, match="its light is standardise, not off"):
        run.train(**given, resume=True)
    run.train(**given, light="standardise", resume=True)
    run.train(**given, light="standardise")
    run.train(**given)
    one, other, dark = states
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(not torch.equal(one[key], dark[key]) for key in one)


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"light": "on"}, "light 'on': expected off or standardise"),
        ({"light_limit": 0.2}, r"light limit 0\.2: expected it with light standardise only"),
        ({"light": "off", "light_limit": 0.2}, "expected it with light standardise only"),
        ({"light": "standardise", "light_limit": 0.1}, r"5 held-out images give no p-value below 0\.167; "),
        (
            {"light": "standardise", "light_limit": 1.0},
            r"the light limit is 1; expected 0 \(off\) to below 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_an_image_is_read(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "read_images", None)
    with pytest.raises(ConfigError, match=says):
        run.train(**USUAL | {"data": tiny.data, "weights": tiny.weights, "out": tmp_path / "m"} | changes)


def test_a_model_that_leaves_light_as_it_is_has_no_light_limit(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(BlemishError, match=r"found a light limit of 0\.2, but .*leaves light as it is"):
        blemish.calibrate(tiny.file, tiny.data / "test/good", out=tmp_path / "m.blemish", light_limit=0.2)
    assert list(tmp_path.iterdir()) == []
