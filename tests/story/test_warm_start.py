"""A run that goes on from an earlier model is shorter than a new one, and forgets nothing."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

import drawn
from blemish import images
from blemish.backbones import weights
from blemish.cli.main import main
from blemish.detectors.registry import build, configure, own_settings
from blemish.errors import BlemishError, ConfigError, ModelFileError, StoppedError, WeightsError
from blemish.evaluation.run import evaluate
from blemish.files import short_digest
from blemish.inference import bundle
from blemish.inference.manifest import UsedFiles
from blemish.inference.predictor import Predictor
from blemish.training import run
from blemish.training.plan import Plan, plan
from blemish.training.request import TrainingRequest

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 0.02
"""Loss of image AUROC that is allowed on the old test images."""


def go_on(data: Path, out: Path, start: Path, **changes: Any) -> Predictor:
    given: dict[str, Any] = {"start": start, "precision": "fp32", "device": "cpu"}
    return run.train(data, out=out, **given | changes)


def begin(data: Path, out: Path, start: Path) -> None:
    """Go on for one step, then stop."""
    with pytest.raises(StoppedError, match="stopped after step 1 of 2"):
        go_on(data, out, start, steps=2, **drawn.stop_after(1))


def planned(data: Path, start: Path, **changes: Any) -> Plan:
    return plan(TrainingRequest(data=data, out=Path("m.blemish"), start=start, **changes))


def grown(root: Path, *, train: int = 18) -> Path:
    """Render the data of the small model again, with more good images and with labelled defects."""
    return drawn.data_set(root, train=train, train_bad=4)


def dented(number: int) -> Any:
    """Render a part with a flat bright bar, a kind of defect that `drawn` does not have."""
    image = drawn.part(number).copy()
    image[20:26, 8:56] = 250
    return image


def image_auroc(model: Predictor, data: Path) -> float:
    found = evaluate(model, data, exhibits=0).rows[0].image_auroc
    assert found is not None
    return found


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> drawn.Tiny:
    """Train a model smaller than `tiny`, whose many cells would be slow with a classification head."""
    folder = tmp_path_factory.mktemp("old")
    data, file = drawn.data_set(folder / "parts"), folder / "old.blemish"
    given = drawn.tiny_weights(folder / "lite0.safetensors", layers=("stage2",))
    settings = drawn.TINY | {"layers": ("stage2",)}
    model = run.train(
        data,
        model="supersimplenet",
        out=file,
        weights=given,
        settings=settings,
        steps=drawn.STEPS,
        precision="fp32",
        device="cpu",
    )
    return drawn.Tiny(data, given, file, model)


@pytest.fixture(scope="module")
def better(old: drawn.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """Go on from the small model with more good parts, and the first labelled defects."""
    folder = tmp_path_factory.mktemp("warm")
    data = grown(folder / "grown")
    return go_on(data, folder / "better.blemish", old.file, settings={"steps": drawn.STEPS})


def test_nothing_old_is_forgotten_in_a_shorter_run(old: drawn.Tiny, better: Predictor) -> None:
    assert better.manifest.training.steps == np.ceil(0.3 * drawn.STEPS)
    assert image_auroc(better, old.data) >= image_auroc(old.model, old.data) - TOLERANCE


def test_a_new_kind_of_defect_is_learned(old: drawn.Tiny, tmp_path: Path) -> None:
    data = drawn.data_set(tmp_path / "grown", train=12)
    for number in range(6):
        images.write_png(data / f"train/dent/{number:03}.png", dented(3000 + number))
        images.write_png(data / f"test/dent/{number:03}.png", dented(4000 + number))
    model = go_on(data, tmp_path / "better.blemish", old.file, steps=40)
    assert model.manifest.training.run.supervision == "weak"
    assert image_auroc(model, data) > 0.95
    assert image_auroc(model, old.data) >= image_auroc(old.model, old.data) - TOLERANCE


def test_the_old_weights_are_where_training_begins(old: drawn.Tiny) -> None:
    opened = bundle.read(old.file)
    settings = own_settings("supersimplenet", "default", "none", opened.manifest.config)
    config = configure("supersimplenet", "default", settings, "full")
    detector = build("supersimplenet", config, seed=5)
    drawn_head = {
        key: value.clone() for key, value in detector.state_dict().items() if "classification" in key
    }
    run.load_weights(detector, opened, None)
    state, before = detector.state_dict(), load(opened.weights)
    assert drawn_head.keys() == state.keys() - before.keys() != set()
    for key, value in state.items():
        assert torch.equal(value, before[key] if key in before else drawn_head[key])


def test_method_and_settings_are_the_old_ones_but_for_what_the_labels_change(
    old: drawn.Tiny, better: Predictor
) -> None:
    before, new = old.model.manifest, better.manifest
    assert new.method == before.method
    changed = {key for key, value in new.config.items() if value != before.config[key]}
    assert changed - {"steps"} == {
        "adaptor_learning_rate",
        "classification_head",
        "clip_norm",
        "perlin_threshold",
        "raise_noise",
        "statistics",
        "stop_gradient",
    }
    assert new.training.run.pretrained == before.training.run.pretrained


def test_labels_keep_what_was_learned_of_places_and_components(tmp_path: Path) -> None:
    """What the weights depend on is the earlier model's, although labels alone have other defaults."""
    learned = {"whitening": 0.1, "components": 12, "misplaced": 0.25, "differences": 0.5, "upscale": False}
    first = run.train(
        drawn.data_set(tmp_path / "parts", train=8),
        model="supersimplenet",
        out=tmp_path / "old.blemish",
        weights=drawn.tiny_weights(tmp_path / "lite0.safetensors", layers=("stage2", "stage3")),
        settings=drawn.TINY | {"anomalies": "whole", "layers": ("stage2", "stage3")} | learned,
        steps=4,
        device="cpu",
    )
    new = go_on(grown(tmp_path / "grown", train=8), tmp_path / "new.blemish", first.path, steps=4)
    config = new.manifest.config
    assert new.manifest.training.run.supervision == "full"
    assert config["classification_head"]
    assert {key: config[key] for key in learned} == learned | {"differences": 0.0}
    before, after = (load(bundle.read(each.path).weights) for each in (first, new))
    assert before.keys() < after.keys()
    assert after["segmentation.place.weight"].shape == before["segmentation.place.weight"].shape


def files(model: Predictor) -> UsedFiles:
    """Return the digests of the images that a model has seen."""
    found = model.manifest.training.files
    assert found is not None
    return found


def test_no_threshold_comes_from_an_image_that_the_old_model_saw(old: drawn.Tiny, better: Predictor) -> None:
    before, new = files(old.model), files(better)
    assert set(before.train) <= set(new.train)
    assert not set(new.held_out) & set(before.train)
    assert len(new.held_out) == 5


def test_no_test_comes_from_an_image_that_any_earlier_model_saw(
    old: drawn.Tiny, better: Predictor, tmp_path: Path
) -> None:
    first, second = files(old.model), files(better)
    assert set(second.before) == set(first.train)
    third = go_on(
        drawn.data_set(tmp_path / "parts", train=8), tmp_path / "third.blemish", better.path, steps=1
    )
    assert set(files(third).before) == set(first.train) | set(second.train)
    for path in (old.data / "train/good").iterdir():
        shutil.copy(path, tmp_path / "parts/test/good" / f"again_{path.name}")
    found = evaluate(third, tmp_path / "parts", exhibits=0)
    kept = {image.path for image in found.images}
    assert not {f"test/good/again_{n:03}.png" for n in range(12) if known(old, n)} & kept


def known(old: drawn.Tiny, number: int) -> bool:
    """Return whether the first model learned from a good image."""
    return short_digest(old.data / f"train/good/{number:03}.png") in files(old.model).train


def test_a_validation_image_that_the_old_one_saw_gives_no_threshold(old: drawn.Tiny, tmp_path: Path) -> None:
    data = drawn.data_set(tmp_path / "parts", train=18)
    (data / "validation/good").mkdir(parents=True)
    for number in range(12):
        (data / f"train/good/{number:03}.png").rename(data / f"validation/good/{number:03}.png")
    model = go_on(data, tmp_path / "new.blemish", old.file, steps=1)
    held_out = set(files(model).held_out)
    assert len(held_out) == 5  # the seven of twelve that were trained on are left out
    assert not held_out & set(files(old.model).train)


def test_settings_follow_what_is_given_anew(old: drawn.Tiny, tmp_path: Path) -> None:
    journal = planned(grown(tmp_path / "parts"), old.file, preset="journal").config
    assert {"mask_dilation": 7, "distance_weights": True}.items() <= vars(journal).items()
    assert vars(journal)["layers"] == ("stage2",)
    opened = bundle.read(old.file)
    settings = own_settings("supersimplenet", "default", "none", opened.manifest.config)
    changed = settings | {"noise": 7.0, "blur_sigma": 2.0}
    detector = build("supersimplenet", configure("supersimplenet", "default", changed), 0)
    run.load_weights(detector, opened, None)
    assert float(detector.state_dict()["noise_std"]) == 7.0
    assert len(detector.state_dict()["kernel"]) == 13


def test_the_papers_schedule_goes_before_the_old_models(old: drawn.Tiny) -> None:
    config = planned(old.data, old.file, schedule="paper").config
    assert vars(config)["head_learning_rate"] == 2e-4
    assert config.batch_size == configure("supersimplenet", "paper").batch_size


def test_pretrained_weights_are_not_looked_for(
    old: drawn.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str, given: Path | None) -> Path:
        raise WeightsError("there are none")

    monkeypatch.setattr(weights, "find", find)
    begin(old.data, tmp_path / "new.blemish", old.file)


def test_old_images_that_are_missing_are_warned_of(
    old: drawn.Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = grown(tmp_path / "grown")
    trained = files(old.model).train
    gone = [path for path in sorted((data / "train/good").iterdir())[:12] if path.stem != "000"][:3]
    known = sum(short_digest(path) in trained for path in gone)
    assert known > 0
    for path in gone:
        path.unlink()
    begin(data, tmp_path / "new.blemish", old.file)
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("blemish")]
    assert f"{known} of the {len(trained)} images that {old.file} learned from" in warning


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "simplenet"}, ConfigError, "is a model of supersimplenet; expected simplenet"),
        (
            {"settings": {"hidden_channels": 8}},
            ConfigError,
            "hidden_channels=8: the weights in .* were trained with hidden_channels=16",
        ),
        ({"start": "missing.blemish"}, ModelFileError, "found no model file at missing.blemish"),
        ({"weights": "w.safetensors"}, ConfigError, "found --weights w.safetensors with --from"),
        (
            {"settings": {"noise_ratio": 0.25}},
            ConfigError,
            "noise_ratio=0.25: the weights in .* were trained with noise_ratio=1.0",
        ),
        (
            {"settings": {"whitening": 0.01}},
            ConfigError,
            "whitening=0.01: the weights in .* were trained with whitening=0.0",
        ),
        (
            {"settings": {"backbone": "resnet18"}},
            ConfigError,
            "were trained with backbone=efficientnet_lite0",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    old: drawn.Tiny, tmp_path: Path, changes: dict[str, Any], error: type[BlemishError], says: str
) -> None:
    with pytest.raises(error, match=says):
        go_on(old.data, tmp_path / "new.blemish", **{"start": old.file} | changes)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_goes_on(
    old: drawn.Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.blemish"
    command = ["train", str(old.data), "--out", str(out), "--steps", "2", "--device", "cpu"]
    assert main([*command, "--from", str(old.file)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
