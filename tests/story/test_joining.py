"""Joined methods: what each part is asked for, one scale, one file, and going on after an interruption."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import blemish
import drawn
from blemish.detectors import registry
from blemish.detectors.joined.config import JoinedConfig
from blemish.detectors.joined.detector import Average, Joined, Scale
from blemish.detectors.patchcore.config import PatchCoreConfig
from blemish.errors import BlemishError, ConfigError, ModelFileError, StoppedError
from blemish.files import short_digest
from blemish.inference import bundle
from blemish.inference.engines.pytorch import restored
from blemish.progress import Event
from blemish.training.joining import scales
from blemish.training.session import remains

pytestmark = pytest.mark.usefixtures("one_thread")

PAIR = "patchcore+simplenet"
SETTINGS = {
    "image_size": "64x64",
    "layers": "stage1,stage2",
    "bank_size": "100",
    "hidden_channels": "16",
    "steps": "30",
    "head_learning_rate": "1e-2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("joined")


@pytest.fixture(scope="module")
def parts(folder: Path) -> Path:
    return drawn.data_set(folder / "parts", train=24, good=6, bad=6)


@pytest.fixture(autouse=True)
def weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (folder / "efficientnet_lite0.safetensors").exists():
        drawn.tiny_weights(folder / "efficientnet_lite0.safetensors")
    monkeypatch.setenv("BLEMISH_WEIGHTS", str(folder))


def train(parts: Path, out: Path, model: str = PAIR, **options: Any) -> blemish.Predictor:
    given = SETTINGS | options.pop("settings", {})
    settings = {key: value for key, value in given.items() if value is not None}
    return blemish.train(parts, out=out, model=model, settings=settings, **options)


@pytest.fixture
def pair(parts: Path, folder: Path) -> Path:
    """A joined model, trained once."""
    out = folder / "pair.blemish"
    if not out.exists():
        train(parts, out)
    return out


def test_maps_are_brought_to_one_scale_and_averaged() -> None:
    config = JoinedConfig(image_size=(32, 32), statistics=("maximum",))
    average = Average(config, [PatchCoreConfig(image_size=(32, 32))] * 3)
    average.set_scales([Scale(0.5, 2.5), Scale(-1.0, 3.0), Scale(7.0, 7.0)])
    first, second, flat = (torch.full((1, 32, 32), level) for level in (0.5, -1.0, 7.0))
    first[0, 2, 3], second[0, 2, 3] = 4.5, 7.0
    maps, statistics, *shown = average([first, second, flat])
    assert (float(shown[0].min()), float(shown[0][0, 2, 3])) == (0.0, 2.0)
    assert (float(shown[1].min()), float(shown[1][0, 2, 3])) == (0.0, 2.0)
    assert not shown[2].any()
    assert float(maps[0, 2, 3]) == float(statistics) == pytest.approx(4 / 3)


def test_a_joined_model_tells_defects_apart_in_one_file(pair: Path, parts: Path) -> None:
    with blemish.load(pair) as model:
        assert model.manifest.method == PAIR
        assert model.manifest.outputs == ("map", "statistics", "patchcore", "simplenet")
        found = blemish.evaluate(model, parts)
    assert (found.rows[0].image_auroc or 0) > 0.95
    assert (found.rows[0].aupro or 0) > 0.5
    assert not list(pair.parent.glob("pair.blemish.*"))


def test_thresholds_come_from_images_that_no_part_learned_from(
    pair: Path, parts: Path, tmp_path: Path
) -> None:
    with blemish.load(pair) as model:
        training, calibration = model.manifest.training, model.manifest.calibration
    assert training.files is not None
    assert len(training.files.held_out) == len(calibration.scores) == training.held_out_images == 5
    assert not {*training.files.held_out} & {*training.files.train}
    assert len(training.files.train) == 19
    alone = train(parts, tmp_path / "one.blemish", "simplenet", settings={"bank_size": None, "steps": "2"})
    assert alone.manifest.training.files is not None
    assert set(training.files.held_out) == set(alone.manifest.training.files.held_out)
    assert calibration.left_out  # one part remembers those images, and scored each without itself


def test_methods_that_leave_one_out_are_joined_without_holding_images_out(
    parts: Path, tmp_path: Path
) -> None:
    settings = {key: SETTINGS[key] for key in ("image_size", "layers", "bank_size")} | {"dimensions": "8"}
    model = blemish.train(parts, out=tmp_path / "m.blemish", model="patchcore+padim", settings=settings)
    assert len(model.calibration.scores) == 24
    assert model.calibration.left_out
    assert model.manifest.training.held_out_images == 0


def test_the_graph_is_that_of_the_detector_and_has_a_shared_backbone_once(pair: Path, parts: Path) -> None:
    opened = bundle.read(pair)
    detector = restored(opened)
    inputs = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    with blemish.load(pair) as model, torch.no_grad():
        found = model.engine.run(inputs)
        for name, expected in zip(opened.manifest.outputs, detector(torch.from_numpy(inputs)), strict=True):
            np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-3, atol=1e-3)

    def convolutions(graph: bytes) -> int:
        return sum(node.op_type == "Conv" for node in onnx.load_from_string(graph).graph.node)

    assert isinstance(detector, Joined)
    one = detector.detectors[0]
    backbone = sum(isinstance(module, torch.nn.Conv2d) for module in one.modules())
    assert backbone <= convolutions(opened.graph) < 2 * backbone


def test_what_a_place_is_like_is_said_by_the_part_that_remembers(pair: Path) -> None:
    with blemish.load(pair) as model:
        image = torch.from_numpy(model.manifest.preprocessing.inputs(drawn.part(0)))
        files = model.manifest.training.files
    detector = restored(bundle.read(pair))
    assert isinstance(detector, Joined)
    found = detector.matches(image)
    assert found == detector.detectors[0].matches(image)
    assert files is not None
    assert found[0].digest in {digest[:15] for digest in files.names}


def test_parts_that_were_trained_are_not_trained_again(parts: Path, pair: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "m.blemish", list[Event]()

    def stop() -> bool:
        return bool(seen) and seen[-1].phase == "training" and seen[-1].step >= 10

    with pytest.raises(StoppedError):
        train(parts, out, report=seen.append, stop=stop)
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"part1 belongs to an unfinished run: continue it with --resume"):
        train(parts, out)
    with pytest.raises(
        ModelFileError, match=r"part1 belongs to another run: its training run seed is 0, not 1"
    ):
        train(parts, out, resume=True, seed=1)
    with pytest.raises(ModelFileError, match=r"part1 belongs to another run: its training run images is"):
        train(drawn.data_set(tmp_path / "others", train=10, good=2, bad=2), out, resume=True)
    said: list[str] = []
    model = train(parts, out, resume=True, report=lambda event: said.append(event.message))
    assert "m.blemish.part1, patchcore: trained before" in said
    with blemish.load(pair) as whole:
        assert model.calibration == whole.calibration
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.blemish", "others"]


def test_a_run_that_was_stopped_while_joining_goes_on(parts: Path, pair: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "m.blemish", list[Event]()
    with pytest.raises(StoppedError, match=r"while scoring .*; run the same command with --resume"):
        train(parts, out, report=seen.append, stop=lambda: bool(seen) and seen[-1].phase == "scoring")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.blemish.part1", "m.blemish.part2"]
    (tmp_path / "m.blemish.part3").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"part3 is no part of patchcore\+simplenet"):
        train(parts, out, resume=True)
    (tmp_path / "m.blemish.part3").unlink()
    with blemish.load(pair) as whole:
        assert train(parts, out, resume=True).calibration == whole.calibration


def test_a_sweep_of_one_method_ignores_what_joined_methods_left(tmp_path: Path) -> None:
    out = tmp_path / "m.blemish"
    for name in ("m.blemish.part1", "m.blemish.part2.checkpoint", "m.blemish.parts", "m.blemish.part2.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in remains(out, PAIR)] == ["m.blemish.part1", "m.blemish.part2.checkpoint"]
    assert remains(out, "patchcore") == []
    (tmp_path / "m.blemish.checkpoint").touch()
    assert [path.name for path in remains(out, None)] == ["m.blemish.checkpoint"]


def test_scales_are_the_medians_of_levels_and_peaks() -> None:
    maps = np.random.default_rng(0).gamma(2.0, size=(7, 2, 1, 15, 15)).astype(np.float32)
    found = scales([[torch.from_numpy(part) for part in image] for image in maps])
    for number, scale in enumerate(found):
        each = maps[:, number].reshape(7, -1)
        assert scale.level == pytest.approx(np.median(np.median(each, axis=1)))
        assert scale.peak == pytest.approx(np.median(each.max(axis=1)))


@pytest.mark.parametrize(("form", "precision"), [("onnx", "int8"), ("onnx", "fp16")])
def test_joined_models_are_exported(
    form: str, precision: str, pair: Path, parts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.blemish"
    blemish.export(pair, parts, out=out, format=form, precision=precision)
    with blemish.load(out) as model:
        assert (blemish.evaluate(model, parts).rows[0].image_auroc or 0) > 0.95


def test_a_joined_model_is_not_continued(parts: Path, pair: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a model of joined methods, which cannot be continued"):
        blemish.train(parts, out=tmp_path / "m.blemish", start=pair)


def test_a_part_that_remembers_scores_each_image_without_it(parts: Path, pair: Path, tmp_path: Path) -> None:
    """With the cells that are remembered of it, an image would score lower than the thresholds assume."""
    with blemish.load(pair) as model:
        held = model.manifest.training.files.held_out  # type: ignore[union-attr]
        known = model.calibration
        with_itself = []
        for path in sorted((parts / "train/good").iterdir()):
            if short_digest(path) in held:
                with_itself.append(model.predict(path).score)
    assert len(with_itself) == len(known.scores)
    assert np.median(with_itself) < np.median(known.scores)


def test_settings_go_to_the_parts_that_have_them() -> None:
    names = "simplenet+patchcore+simplenet"
    given = {"whitening": "0.1", "bank_size": 5, "1.layers": "stage1", "3.layers": "stage2", "steps": "7"}
    first, second, third = registry.settings_of_parts(names, given)
    assert first == {"whitening": "0.1", "layers": "stage1", "steps": "7"}
    assert second == {"whitening": "0.1", "bank_size": 5}
    assert third == {"whitening": "0.1", "layers": "stage2", "steps": "7"}
    assert registry.settings_of_parts(names, {"simplenet.noise": 1}) == [{"noise": 1}, {}, {"noise": 1}]


def test_what_a_later_part_cannot_do_is_refused_before_the_first_is_trained(
    parts: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match="dimensions 48: the features have 40"):
        blemish.train(
            parts,
            out=tmp_path / "m.blemish",
            model="patchcore+padim",
            settings={"image_size": "64x64", "layers": "stage1,stage2"},
            report=lambda event: said.append(event.message),
        )
    assert not said


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("patchcore+simplnet", {}, r"unknown model 'simplnet'; did you mean 'simplenet'\?"),
        ("patchcore+", {}, r"unknown model ''; expected one of"),
        (
            PAIR,
            {"settings": {"bank_sise": 5}},
            r"no part of .* has a setting 'bank_sise'; did you mean 'bank",
        ),
        (PAIR, {"settings": {"padim.side": 5}}, r"setting padim.side: .* has no part 'padim'"),
        (
            PAIR,
            {"settings": {"image_size": None, "1.image_size": "32x64", "2.image_size": "64x32"}},
            r"see 64 x 32 and 32 x 64 pixels; expected one of them to be the larger in both directions",
        ),
        (PAIR, {"settings": {"patchcore.noise": 1}}, r"no part of .* has a setting 'noise'"),
        (PAIR, {"light": "standardise"}, r"--light standardise: joined methods .* do not support it"),
        (
            "padim+padim",
            {
                "settings": {
                    "hidden_channels": None,
                    "head_learning_rate": None,
                    "bank_size": None,
                    "steps": None,
                }
            },
            r"two parts are the same; expected another method",
        ),
        (PAIR, {"start": "a.blemish"}, r"--from: joined methods .* do not support it"),
        (PAIR, {"weights": "a.safetensors"}, r"--weights: joined methods .* do not support it"),
        (PAIR, {"natural_images": "none"}, r"natural images none: no part of .* reads them"),
    ],
)
def test_what_cannot_be_joined_is_refused_before_any_work(
    model: str, options: dict[str, Any], sentence: str, parts: Path, tmp_path: Path
) -> None:
    with pytest.raises(BlemishError, match=sentence):
        train(parts, tmp_path / "m.blemish", model, **options)
    assert not list(tmp_path.iterdir())


def test_a_part_sees_images_at_its_own_size() -> None:
    """A smaller part sees what it would see of the image itself, up to being resized twice."""
    names = "simplenet+simplenet"
    settings = {"layers": "stage1,stage2", "1.image_size": "64x64", "2.image_size": "32x64"}
    detector = registry.build(names, registry.configure(names, settings=settings), 0).eval()
    assert isinstance(detector, Joined)
    images = torch.rand(2, 3, 64, 64)
    whole, reduced = detector.average.seen(images)
    assert whole is images
    expected = torch.nn.functional.interpolate(images, (32, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(reduced, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        found, fused = detector(images), detector.fused()(images)
    assert [each.shape for each in found[2:]] == [(2, 64, 64)] * 2
    for one, other in zip(found, fused, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_parts_of_different_sizes_are_one_file(parts: Path, tmp_path: Path) -> None:
    """Its graph is compared with the detector at the end of training; here, with what the file restores."""
    out, smaller = tmp_path / "m.blemish", tmp_path / "int8.blemish"
    settings = {"image_size": None, "patchcore.image_size": "96x96", "simplenet.image_size": "64x64"}
    with train(parts, out, settings=settings) as model:
        assert model.image_size == (96, 96)
        inputs = model.manifest.preprocessing.inputs(drawn.part(0))
        found = model.engine.run(inputs)
        outputs = model.manifest.outputs
    detector = restored(bundle.read(out))
    with torch.no_grad():
        for name, expected in zip(outputs, detector(torch.from_numpy(inputs)), strict=True):
            np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-3, atol=1e-3)
    assert detector.matches(torch.from_numpy(inputs))
    blemish.export(out, parts, out=smaller, format="onnx", precision="int8")
    with blemish.load(smaller) as model:
        assert (blemish.evaluate(model, parts).rows[0].image_auroc or 0) > 0.95


def test_untrained_joined_methods_have_the_largest_of_their_sizes() -> None:
    detector = registry.build("patchcore+simplenet", registry.configure("patchcore+simplenet"), 0)
    assert detector.config.image_size == (512, 512)
    with torch.no_grad():
        maps, statistics, *shown = detector(torch.rand(1, 3, 512, 512))
    assert maps.shape == (1, 512, 512)
    assert [each.shape for each in shown] == [maps.shape, maps.shape]
    assert statistics.shape == (1, 1)


def test_a_length_is_refused_where_no_part_has_steps(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"epochs: patchcore\+padim is fitted in one pass; expected none"):
        blemish.train(parts, out=tmp_path / "m.blemish", model="patchcore+padim", epochs=3)


def test_a_sweep_trains_joined_methods(parts: Path, tmp_path: Path, pair: Path) -> None:
    from blemish.sweeps import repeats
    from blemish.training.request import TrainingRequest

    base = TrainingRequest(data=parts, out=tmp_path / "m.blemish", model=PAIR, settings=SETTINGS)
    trials = repeats.plan(base.out, 0, 2, None, None)
    shutil.copy(pair, trials[0].out)
    results = repeats.run(trials, base, jobs=1)
    assert [trial.seed for trial, _ in results] == [0, 1]
    other = TrainingRequest(data=parts, out=base.out, model="simplenet+patchcore", settings=SETTINGS)
    with pytest.raises(ModelFileError, match="belongs to another run"):
        repeats.run(trials, replace(base, settings=SETTINGS | {"steps": "31"}), jobs=1)
    with pytest.raises(ModelFileError, match="belongs to another run"):
        repeats.run(trials, other, jobs=1)
