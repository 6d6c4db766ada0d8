"""The ports of the published methods against tensors recorded from their implementations.

Parameters and inputs are drawn as they were for the recording: parameter number i of a network from the seed
base + i, an input from the seed that its name has. Tolerances are those of float32 in another order of sums.
"""

import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blemish import seeding
from blemish.backbones import Backbone
from blemish.detectors import efficientad, ops
from blemish.detectors.efficientad.detector import EfficientAD
from blemish.detectors.registry import configure
from blemish.detectors.supersimplenet.config import SuperSimpleNetConfig
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.devices import keep_freed_memory
from blemish.types import Batch

FILES = Path(__file__).parents[1] / "files"
PARAMETERS = json.loads((FILES / "parameters.json").read_text())
ROUNDING = 1e-5
"""Largest difference relative to a tensor's largest value."""


@cache
def recorded(method: str) -> dict[str, Tensor]:
    return load_file(FILES / f"{method}.safetensors")


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(parameters: Iterable[Tensor], base: int, *, norms: tuple[int, ...] = ()) -> None:
    """Draw parameters as the recording did; norms: places of the batch norms' weights."""
    for place, parameter in enumerate(parameters):
        drawn = rand(base + place, *parameter.shape)
        if parameter.ndim > 1:
            drawn = drawn * math.sqrt(2 / parameter.shape[1:].numel())
        else:
            drawn = 1 + 0.1 * drawn if place in norms else 0.01 * drawn
        parameter.data.copy_(drawn)


def near(found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    assert found.shape == expected.shape
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance


# --- EfficientAD ---


class Case:
    """EfficientAD as it was recorded: parameters, teacher statistics, and what the networks make of x."""

    def __init__(self, size: str) -> None:
        self.recorded = {
            key.removeprefix(f"{size}."): value
            for key, value in recorded("efficientad").items()
            if key.startswith(size)
        }
        config = configure(f"efficientad-{size[0]}", "paper", {"dropout": 0.0})
        self.detector = EfficientAD(config)
        d = self.detector
        fill(d.teacher.parameters(), 1000)
        fill(d.student.parameters(), 2000)
        fill(d.autoencoder.parameters(), 3000)
        d.normalise.mean.zero_()
        d.normalise.std.fill_(1)
        d.to(memory_format=torch.channels_last)  # as in training: twice as fast
        self.x = rand(1, 1, 3, 256, 256)
        with torch.no_grad():
            self.described = d.encode(self.x)
        assert d.prepare([self.described]) == ""
        self.mean, self.std = d.teacher_mean.clone(), d.teacher_std.clone()
        # The recording scales the statistics, so that a network that ignores them cannot pass.
        d.teacher_mean.mul_(0.9)
        d.teacher_std.mul_(1.1)
        with torch.no_grad():
            self.maps = d.raw_maps(self.x)


@pytest.fixture(scope="module", autouse=True)
def freed_memory_kept() -> None:
    keep_freed_memory()


@pytest.fixture(scope="module", params=["small", "medium"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_efficientad_parameters(case: Case) -> None:
    size, d = case.detector.config.size, case.detector
    for network, name in (
        (d.teacher, f"pdn_{size}_teacher"),
        (d.student, f"pdn_{size}_student"),
        (d.autoencoder, "autoencoder"),
    ):
        assert [list(parameter.shape) for parameter in network.parameters()] == PARAMETERS[name]
    count = sum(parameter.numel() for parameter in d.parameters())
    assert count == {"small": 8_057_856, "medium": 20_738_432}[size]  # published as 8.06 M and 21 M


def test_teacher_statistics(case: Case) -> None:
    near(0.9 * case.mean, case.recorded["teacher_mean"][0])
    near(1.1 * case.std, case.recorded["teacher_std"][0])


def test_efficientad_maps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    d, maps = case.detector, case.maps
    near(maps[0], case.recorded["map_st"][:, 0])
    near(maps[1], case.recorded["map_ae"][:, 0])
    monkeypatch.setattr(d, "raw_maps", lambda images: maps)  # they cost most of the time and are right
    with torch.no_grad():
        d.finish([case.x])
        near(d.quantiles, case.recorded["quantiles"])
        whole, scores, structural, logical = d(case.x)
    near((structural + logical) / 2, case.recorded["map_combined"][:, 0])
    near(whole[:, ::4, ::4], case.recorded["map_full_every4"][:, 0])
    assert scores.shape == (1, 1)
    near(scores[:, 0], case.recorded["image_score"])


def test_padded_teacher(case: Case) -> None:
    pdn = efficientad.PDNS[case.detector.pretrained_name]
    padded = pdn(padding=True)
    padded.load_state_dict(case.detector.teacher.state_dict())
    with torch.no_grad():
        found = padded(case.x)
    near(found[:, ::8, ::4, ::4], case.recorded["padded_teacher_every8ch_every4px"])


def test_efficientad_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    augmented = rand(2, 1, 3, 256, 256)
    monkeypatch.setattr(efficientad, "jitter", lambda images, generator: augmented)
    monkeypatch.setattr(efficientad, "sometimes_grey", lambda images, probability, generator: images)
    batch = Batch(case.x, case.described, torch.zeros(1), torch.ones(1) > 0, natural=rand(3, 1, 3, 256, 256))
    optimizer, losses = case.detector.optimizer(), []
    for step in range(3):
        terms = case.detector.loss(batch, seeding.generator(0))
        assert list(terms) == ["hard", "penalty", "autoencoder", "student_autoencoder"]
        losses.append([float(term.detach()) for term in terms.values()])
        if step < 2:  # the recording has the losses before each of three steps
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
    near(torch.tensor(losses), case.recorded["losses_hard_penalty_ae_stae"])


# --- SuperSimpleNet ---

SIZES = [(256, 256), (96, 160)]
BACKBONES = ["resnet18", "wide_resnet50_2"]
GRADIENT_ROUNDING = 3e-5
LOSSES = ("normal", "anomalous", "focal", "score")


@cache
def backbone(name: str) -> Backbone:
    """Give a recorded backbone without statistics of its batch norms, which depend on the image size."""
    built = Backbone(name, ("layer2", "layer3"))
    named = list(built.network.named_parameters())
    assert [[key, list(value.shape)] for key, value in named] == PARAMETERS[f"backbone_{name}"]
    norms = [place for place, (key, value) in enumerate(named) if value.ndim == 1 and key.endswith("weight")]
    fill((value for _, value in named), 5000, norms=tuple(norms))
    built.normalise.mean.zero_()
    built.normalise.std.fill_(1)
    return built


def set_norms(built: Backbone, images: Tensor) -> None:
    """Set the statistics of the batch norms by one pass in training mode."""
    norms = [module for module in built.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum, norm.training = 1.0, True
    with torch.no_grad():
        built(images)
    for norm in norms:
        norm.training = False


def recorded_detector(name: str, size: tuple[int, int], stop_gradient: bool) -> SuperSimpleNet:
    d = SuperSimpleNet(
        SuperSimpleNetConfig(
            hidden_channels=1024,
            backbone=name,
            image_size=size,
            classification_head=True,
            statistics=("head",),
            stop_gradient=stop_gradient,
        )
    )
    d.backbone = backbone(name)
    set_norms(d.backbone, rand(12, 4, 3, *size))
    fill(d.adaptor.parameters(), 6000)
    # In the recording's order: segmentation 0-4, classification 5-10; 2 and 7 are the norms' weights.
    fill([*d.segmentation.parameters(), *d.classification.parameters()], 7000, norms=(2, 7))
    return d.eval()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", BACKBONES)
def test_supersimplenet(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    key = f"{name}.{size[0]}x{size[1]}."
    expected = {k.removeprefix(key): v for k, v in recorded("supersimplenet").items() if k.startswith(key)}
    d = recorded_detector(name, size, stop_gradient=True)
    x = rand(11, 2, 3, *size)
    with torch.no_grad():
        encoded = d.encode(x)
        near(sampled(d.features(encoded)), expected["features_every16ch_every4px"])
        near(sampled(d.adapted(encoded)), expected["adapted_every16ch_every4px"])
        cells = d.hidden(encoded)
        logits = d.segmentation(cells.flatten(0, 2)).view(cells.shape[:3])
        near(logits[:, None], expected["segmentation_logits"])
        monkeypatch.setattr(d, "encode", lambda images: encoded)  # it costs most of the time and is right
        maps, scores = d(x)
    near(maps[:, None, ::4, ::4], expected["anomaly_map_every4px"])
    near(scores[:, 0], expected["score_logits"])
    stopped, flowing = (terms_and_norms(d, encoded, stop) for stop in (True, False))
    near_each(stopped, expected["train.stop_grad_1"])
    near_each(flowing, expected["train.stop_grad_0"])
    # The classification head's gradient reaches the adaptor and the segmentation head's first layer alone.
    differing = (
        expected["train.stop_grad_1"] / expected["train.stop_grad_0"] - 1
    ).abs() > 2 * GRADIENT_ROUNDING
    assert differing.tolist() == [False] * 5 + [True, True, False, False]


def sampled(features: Tensor) -> Tensor:
    return features.permute(0, 3, 1, 2)[:, ::16, ::4, ::4]


def near_each(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=GRADIENT_ROUNDING, atol=0)


def terms_and_norms(d: SuperSimpleNet, encoded: tuple[Tensor, ...], stop: bool) -> Tensor:
    """Give the losses, their sum, and the norms of four gradients, in training mode."""
    d.config = SuperSimpleNetConfig(backbone=d.config.backbone, classification_head=True, stop_gradient=stop)
    d.train()
    d.zero_grad()
    masks = rand(13, 2, 1, *d.feature_size(encoded))[:, 0] > 1.2
    masks[0] = False
    clean = torch.zeros_like(masks)
    terms = d.losses(encoded, clean, torch.zeros(0, d.adaptor.out_features), masks, torch.tensor([0.0, 1.0]))
    assert tuple(terms) == LOSSES
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    weights = (d.adaptor, d.segmentation.first, d.classification.convolution[0], d.classification.linear)
    norms = [module.weight.grad.norm() for module in weights]
    return torch.stack([*terms.values(), total, *norms]).detach()


# --- Perlin noise ---


@pytest.mark.parametrize(("size", "periods"), [((32, 64), (1, 16)), ((64, 64), (4, 8)), ((128, 64), (32, 2))])
def test_perlin_noise(size: tuple[int, int], periods: tuple[int, int]) -> None:
    key = f"perlin.{size[0]}x{size[1]}.{periods[0]}x{periods[1]}"
    angles = recorded("supersimplenet")[f"{key}.angles"]
    noise = ops.perlin_noise(angles[None], torch.tensor([periods]), size)
    near(noise[0], recorded("supersimplenet")[f"{key}.noise"])
