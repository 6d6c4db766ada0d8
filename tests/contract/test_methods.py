"""What every method promises, over the whole dictionary.

Pretrained weights are drawn. EfficientAD's networks keep their shape but have few channels: the recorded
tensors of test_parity.py pin the published widths.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

import drawn
from blemish import seeding
from blemish.backbones import BACKBONES, choose_layers
from blemish.backbones.pdn import CHANNELS, PDNS
from blemish.detectors.base import Detector
from blemish.detectors.registry import METHODS, build, configure
from blemish.detectors.settings import Config, as_json
from blemish.images.resizing import to_input
from blemish.inference import bundle
from blemish.inference.choice import Choice
from blemish.inference.engines import open_graph
from blemish.inference.predictor import Predictor
from blemish.inference.predictor import load as load_model
from blemish.training import finalise, loop, run
from blemish.types import Batch, FloatArray, Supervision

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

RESNET = {"backbone": "resnet18", "hidden_channels": 32, "image_size": (64, 96), "noise_ratio": 1.0}
SMALL = drawn.TINY | {"layers": ("stage2",)}
FEW = SMALL | {"batch_size": 4}
BOTH = {"statistics": ("head", "maximum")}
HEAD = BOTH | {"classification_head": True, "stop_gradient": False}
CASES: dict[str, tuple[str, Supervision, dict[str, Any], int]] = {
    "efficientad-s": ("efficientad-s", "none", {}, 2),
    "efficientad-m": ("efficientad-m", "none", {"image_size": (256, 320)}, 1),
    "supersimplenet": ("supersimplenet", "none", RESNET, 30),
    "supersimplenet weak": ("supersimplenet", "weak", FEW, 30),
    "supersimplenet mixed": ("supersimplenet", "mixed", FEW | BOTH, 30),
    "supersimplenet full": (
        "supersimplenet",
        "full",
        FEW | {"mask_dilation": 3, "distance_weights": True},
        30,
    ),
    "simplenet": ("simplenet", "none", SMALL, 60),
}
"""Method, supervision, settings and steps."""
MASKS = {"weak": 0, "mixed": 2}
"""How many of four training defects keep their masks."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all elements": ("efficientad-s", {"hard_quantile": 0.0}),
    "no penalty": ("efficientad-s", {"penalty": False}),
    "no autoencoder": ("efficientad-s", {"autoencoder": False}),
    "raw maps": ("efficientad-s", {"map_normalisation": False}),
    "padding": ("efficientad-s", {"padding": True, "crop": 0}),
    "the whole and Adam": (
        "efficientad-s",
        {"crop": 0, "optimiser": "adam", "learning_rate": 5e-4, "hard_quantile": 0.999},
    ),
    "no upscaling": ("supersimplenet", SMALL | {"upscale": False}),
    "features before the adaptor": (
        "supersimplenet",
        SMALL | HEAD | {"adapt_classification_features": False},
    ),
    "anomalies on whole copies": ("supersimplenet", SMALL | {"anomalies": "whole"}),
    "no focal loss": ("supersimplenet", SMALL | {"focal_loss": False}),
    "no blur": ("supersimplenet", SMALL | {"blur_sigma": 0.0}),
    "fixed noise": ("supersimplenet", SMALL | {"noise": 0.015}),
    "three layers": ("supersimplenet", RESNET | {"layers": ("layer1", "layer2", "layer4")}),
}


def narrow_pdn(channels: int = CHANNELS, *, padding: bool = False) -> nn.Sequential:
    """Build a patch description network like the small one, with 8 channels inside."""
    pad = int(padding)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, padding=3 * pad),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(8, 8, 4, padding=3 * pad),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(8, 8, 3, padding=pad),
        nn.ReLU(),
        nn.Conv2d(8, channels, 4),
    )


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in PDNS:
            patch.setitem(PDNS, name, narrow_pdn)
        yield


@dataclass(frozen=True)
class Case:
    """One method with small settings, and a trained model of it."""

    method: str
    supervision: Supervision
    config: Config
    steps: int
    weights: Path
    data: Path
    file: Path
    model: Predictor

    def detector(self, seed: int = 0) -> Detector:
        """Build it untrained, with its pretrained part."""
        built = build(self.method, self.config, seed)
        built.load_pretrained(self.weights)
        return built

    def trained(self) -> Detector:
        """Build it with the weights of the model file."""
        built = build(self.method, self.config, 0)
        built.load_state_dict(load(bundle.read(self.file).weights))
        return built.eval()

    def train(self, out: Path, **changes: Any) -> Predictor:
        """Train anew."""
        given: dict[str, Any] = {
            "model": self.method,
            "supervision": self.supervision,
            "train_masks": MASKS.get(self.supervision),
            "weights": self.weights,
            "natural_images": self.data / "test" / "good" if self.method == "efficientad-m" else "drawn",
            "settings": as_json(self.config),
            "steps": self.steps,
            "precision": "fp32",
            "device": "cpu",
        }
        return run.train(self.data, out=out, **given | changes)


def draw_weights(path: Path, method: str, config: Config) -> Path:
    name = build(method, config, 0).pretrained_name
    network = PDNS[name]() if name in PDNS else BACKBONES[name].build(choose_layers(name, config.layers))
    return drawn.weights(path, network)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, narrow: None, tmp_path_factory: pytest.TempPathFactory) -> Case:
    method, supervision, settings, steps = CASES[request.param]
    config = configure(method, settings=settings, supervision=supervision)
    folder = tmp_path_factory.mktemp("contract")
    drawn_weights = draw_weights(folder / "weights.safetensors", method, config)
    root = drawn.data_set(folder / "parts", train=10, good=2, bad=0, train_bad=4, size=(80, 100))
    empty = Case(method, supervision, config, steps, drawn_weights, root, folder / "model.blemish", None)
    torch.set_num_threads(1)
    return dataclasses.replace(empty, model=empty.train(empty.file))


def inputs(case: Case, count: int = 3) -> Tensor:
    size = case.config.image_size
    return torch.from_numpy(np.stack([to_input(drawn.part(50 + n, size)) for n in range(count)]))


def batch_of(detector: Detector, images: Tensor) -> Batch:
    """Make a batch of good parts."""
    with torch.no_grad():
        encoded = tuple(part.float() for part in detector.encode(images))
    natural = images.flip(3) if detector.wants_natural_images else None
    return Batch(images, encoded, torch.zeros(len(images)), torch.ones(len(images)) > 0, natural=natural)


def labelled_batch(case: Case, detector: Detector, count: int) -> Batch:
    """Make a batch as the case has them: with supervision two of three parts are defective."""
    images, size = inputs(case, count), case.config.image_size
    labels, masked = torch.zeros(count), torch.ones(count) > 0
    masks = torch.zeros(count, *size)
    for row in range(count if case.supervision != "none" else 0):
        if row % 3:
            image, mask = drawn.spotted(50 + row, size)
            images[row], labels[row] = torch.from_numpy(to_input(image)), 1
            masked[row] = case.supervision == "full" or (case.supervision == "mixed" and row % 3 == 1)
            masks[row] = torch.from_numpy(mask) * masked[row]
    known = masks if case.supervision in ("mixed", "full") else None
    return dataclasses.replace(batch_of(detector, images), labels=labels, masked=masked, masks=known)


def near(found: FloatArray, expected: FloatArray) -> None:
    """Check that arrays agree but for the rounding that batches of another size bring about."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


def test_every_method_is_covered() -> None:
    covered = {(method, supervision) for method, supervision, _, _ in CASES.values()}
    assert {method for method, _ in covered} == set(METHODS)
    regimes = METHODS["supersimplenet"].presets["default"].regimes
    assert {known for method, known in covered if method == "supersimplenet"} == set(regimes)


# --- scoring ---


def test_outputs_are_finite_and_have_their_shapes(case: Case) -> None:
    detector, images = case.trained(), inputs(case)
    with torch.no_grad():
        maps, statistics, *parts = detector(images)
    height, width = case.config.image_size
    assert maps.shape == (3, height, width)
    assert statistics.shape == (3, len(case.config.statistics))
    assert detector.outputs[:2] == ("map", "statistics")
    assert len(parts) == len(detector.outputs) - 2
    for output in (maps, statistics, *parts):
        assert output.dtype == torch.float32
        assert output.isfinite().all()
    for part in parts:
        assert part.shape[0] == 3
        assert part.ndim == 3
    if "maximum" in case.config.statistics:
        place = case.config.statistics.index("maximum")
        assert torch.equal(statistics[:, place], maps.amax((1, 2)))


def test_an_image_scores_the_same_alone_and_in_a_batch(case: Case) -> None:
    images = [drawn.part(60), drawn.spotted(61)[0], drawn.part(62, (200, 70))]
    together = case.model.predict_batch(images)
    for image, found in zip(images, together, strict=True):
        alone = case.model.predict(image)
        assert found.score == pytest.approx(alone.score, rel=1e-4, abs=1e-4)
        near(found.map, alone.map)
    detector, several = case.trained(), inputs(case)
    with torch.no_grad():
        whole = detector(several)
        for row in range(len(several)):
            for all_rows, one in zip(whole, detector(several[row : row + 1]), strict=True):
                if one[0].ndim == 2:
                    near(all_rows[row].numpy(), one[0].numpy())
                else:  # a logit may be as good as 0, where nothing is left to be relative to
                    np.testing.assert_allclose(all_rows[row].numpy(), one[0].numpy(), rtol=1e-4, atol=1e-6)


def test_scoring_changes_nothing(case: Case) -> None:
    detector, images = case.trained(), inputs(case)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with torch.no_grad():
        first = detector(images)
        second = detector(images)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("size", [(64, 64), (37, 150), (300, 41)])
def test_any_image_size_gets_a_map_of_its_own_size(case: Case, size: tuple[int, int]) -> None:
    verdict = case.model.predict(drawn.part(63, size), parts=True, full_size=True)
    assert verdict.map.shape == size
    assert set(verdict.parts) == set(case.model.engine.outputs[2:])
    assert all(part.shape == size and np.isfinite(part).all() for part in verdict.parts.values())
    assert np.isfinite(verdict.map).all()
    assert np.isfinite(verdict.score)
    assert 0 < verdict.p_value <= 1


def test_a_planted_defect_outscores_good_parts(case: Case) -> None:
    size = (80, 100)
    good = [case.model.predict(drawn.part(70 + n, size)) for n in range(4)]
    bad = [case.model.predict(drawn.spotted(80 + n, size)[0]) for n in range(4)]
    assert min(verdict.score for verdict in bad) > max(verdict.score for verdict in good)
    assert {verdict.label for verdict in bad} == {"defect"}


def test_the_map_points_at_a_planted_defect(case: Case) -> None:
    for number in range(3):
        image, mask = drawn.spotted(90 + number, (128, 128))
        inner = np.zeros_like(mask)
        inner[20:-20, 20:-20] = True  # EfficientAD is blind at the edges
        found = case.model.predict(image, full_size=True).map
        assert found[mask & inner].mean() > found[inner & ~mask].mean() + found[inner & ~mask].std()


# --- the file ---


def test_a_saved_model_scores_as_its_source(case: Case) -> None:
    saved = load_model(case.file)
    for image in (drawn.part(64), drawn.spotted(65, (120, 90))[0]):
        before, after = case.model.predict(image), saved.predict(image)
        assert after == before
        assert np.array_equal(after.map, before.map)
    # The weights in the file are the detector's: with them it gives what the graph gives.
    graph = open_graph(bundle.read(case.file).graph, case.trained().outputs, Choice())
    images = inputs(case)
    assert finalise.compare(case.trained(), graph, [images[:1], images]) <= finalise.TOLERANCE


def test_the_comparison_refuses_another_model(case: Case) -> None:
    graph = open_graph(bundle.read(case.file).graph, case.trained().outputs, Choice())
    with pytest.raises(onnx.ExportError, match="differs from the trained model"):
        finalise.compare(case.detector(seed=5), graph, [inputs(case)])


def test_quantities_of_the_file_are_those_asked_for(case: Case) -> None:
    manifest = case.model.manifest
    assert manifest["method"] == case.method
    assert manifest["config"] == as_json(case.config)
    assert tuple(manifest["preprocessing"]["image_size"]) == case.config.image_size
    facts = manifest["training"]
    assert facts["steps"] == case.steps
    assert facts["run"]["supervision"] == case.supervision
    learned = {"none": (0, 0), "weak": (4, 0), "mixed": (4, 2), "full": (4, 4)}[case.supervision]
    assert (facts["good_images"], facts["defective_images"], facts["masked_images"]) == (5, *learned)
    assert len(case.model.calibration.scores) == 5


# --- training ---


def test_training_repeats_bit_for_bit(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bundle.read(case.file)
    monkeypatch.setattr(seal.onnx, "graph", lambda detector: first.graph)  # exporting takes most of the time
    case.train(tmp_path / "again.blemish")
    again = bundle.read(tmp_path / "again.blemish")
    assert again.weights == first.weights
    assert again.calibration == first.calibration


def test_a_resumed_run_ends_in_the_same_bytes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of an optimiser may walk its state as raw memory: a checkpoint must keep even the layout."""
    found: list[dict[str, Tensor]] = []
    one_step = loop.one_step

    def stop(run: loop.Run, step: int) -> dict[str, float]:
        if step == 2:
            run.save()
            raise InterruptedError
        return one_step(run, step)

    monkeypatch.setattr(run, "seal", lambda path, detector, *rest: found.append(detector.state_dict()))
    case.train(tmp_path / "whole.blemish", steps=4)
    monkeypatch.setattr(loop, "one_step", stop)
    with pytest.raises(InterruptedError):
        case.train(tmp_path / "stopped.blemish", steps=4)
    monkeypatch.setattr(loop, "one_step", one_step)
    case.train(tmp_path / "stopped.blemish", steps=4, resume=True)
    whole, resumed = found
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_another_seed_gives_another_model(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Detector] = []

    def keep(path: Path, detector: Detector, *arguments: Any) -> None:
        found.append(detector)

    monkeypatch.setattr(run, "seal", keep)
    case.train(tmp_path / "other.blemish", seed=1, steps=1)
    case.train(tmp_path / "other.blemish", seed=2, steps=1)
    assert not (tmp_path / "other.blemish.checkpoint").exists()
    one, two = (dict(detector.named_parameters()) for detector in found)
    matrices = [name for name, value in one.items() if value.requires_grad and value.ndim > 1]
    assert not any(torch.equal(one[name], two[name]) for name in matrices)


def test_frozen_weights_refuse_gradients_and_do_not_move(case: Case) -> None:
    detector, trained = case.detector(), case.trained()
    pretrained = load_file(case.weights)
    frozen = {name: value for name, value in detector.named_parameters() if not value.requires_grad}
    assert len(frozen) == sum(value.ndim > 0 and "running" not in key for key, value in pretrained.items())
    optimised = {id(value) for group in detector.optimizer().param_groups for value in group["params"]}
    assert optimised == {id(value) for value in detector.parameters() if value.requires_grad}
    detector.train()
    terms = detector.loss(labelled_batch(case, detector, 3), seeding.generator(0))
    torch.stack(list(terms.values())).sum().backward()
    for name, value in detector.named_parameters():
        assert (value.grad is None) == (name in frozen), name
    after = trained.state_dict()
    for name, value in detector.state_dict().items():
        part = name.partition(".")[0]
        if any(key.startswith(f"{part}.") for key in frozen) or part == "normalise":
            assert torch.equal(after[name], value), name  # batch statistics too
    moved = [name for name, value in detector.named_parameters() if not torch.equal(after[name], value)]
    assert set(moved) == set(dict(detector.named_parameters())) - set(frozen)


def falls(detector: Detector, batch: Batch) -> None:
    """Check that steps on one batch, with one draw, lower its loss, and that all of it stays finite."""
    detector.train()
    optimizer, totals = detector.optimizer(), []
    detector.prepare([batch.encoded])
    for _ in range(2 + detector.config.batch_size):
        terms = detector.loss(batch, seeding.generator(0))
        total = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert np.isfinite(totals).all()
    assert totals[-1] < totals[0]


def test_the_loss_falls(case: Case) -> None:
    detector = case.detector()
    falls(detector, labelled_batch(case, detector, case.config.batch_size))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_score(variant: str, tmp_path: Path) -> None:
    method, settings = VARIANTS[variant]
    config = configure(method, settings=settings)
    detector = build(method, config, 0)
    detector.load_pretrained(draw_weights(tmp_path / "weights.safetensors", method, config))
    images = torch.from_numpy(np.stack([to_input(drawn.part(n, config.image_size)) for n in range(2)]))
    falls(detector, batch_of(detector, images))
    detector.eval()
    with torch.no_grad():
        detector.finish([images])
        outputs = detector(images)
    assert outputs[0].shape == (2, *config.image_size)
    assert len(outputs) == len(detector.outputs)
    assert all(output.isfinite().all() for output in outputs)


def test_variants_differ_from_the_default(tmp_path: Path) -> None:
    """Every switch does something: the same weights give another loss or another map."""
    for variant, (method, settings) in VARIANTS.items():
        if variant in ("three layers", "no autoencoder"):
            continue  # other parameters altogether
        other = configure(method, settings=settings)
        base = RESNET if settings.get("backbone") == "resnet18" else SMALL
        default = configure(
            method,
            settings={}
            if method.startswith("efficientad")
            else base | (HEAD if "statistics" in settings else {}),
        )
        file = draw_weights(tmp_path / "weights.safetensors", method, default)
        found = [figures(method, config, file) for config in (default, other)]
        assert any(
            one.shape != two.shape or not torch.equal(one, two) for one, two in zip(*found, strict=True)
        ), variant


def figures(method: str, config: Config, file: Path) -> tuple[Tensor, Tensor]:
    """Give the sum of the loss terms and the maps of one image."""
    detector = build(method, config, 0)
    detector.load_pretrained(file)
    count = config.batch_size  # of SuperSimpleNet several: half of its masks are empty
    images = torch.from_numpy(np.stack([to_input(drawn.part(n, config.image_size)) for n in range(count)]))
    batch = batch_of(detector, images)
    detector.prepare([batch.encoded])
    with torch.no_grad():
        loss = torch.stack(list(detector.train().loss(batch, seeding.generator(0)).values())).sum()
        detector.eval().finish([images])
        return loss, detector(images)[0]


def test_bfloat16_trains(tmp_path: Path) -> None:
    for method, settings in (("efficientad-s", {}), ("supersimplenet", SMALL | HEAD)):
        config = configure(method, settings=settings)
        detector = build(method, config, 0)
        detector.load_pretrained(draw_weights(tmp_path / "weights.safetensors", method, config))
        images = torch.from_numpy(to_input(drawn.part(1, config.image_size)))[None]
        batch = batch_of(detector, images)
        detector.prepare([batch.encoded])
        exact = detector.loss(batch, seeding.generator(0))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = detector.loss(batch, seeding.generator(0))
        for name, term in rounded.items():
            assert term.dtype == torch.float32
            torch.testing.assert_close(term, exact[name], rtol=0.05, atol=1e-3)
