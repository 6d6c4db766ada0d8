"""The ports of the published methods against numbers recorded from their implementations.

Parameters and inputs are drawn as they were for the recording: parameter number i of a network from the seed
base + i, an input from the seed that its name has.

Everything is computed in float64. In float32 the same network differs between processors, and with the number
of threads, by up to 5e-5 of a tensor's largest value, gradients by 3e-4: more than a mistake may. In float64
that is below 1e-12, so that what a comparison finds is the same everywhere: what the recording lost.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blemish import seeding
from blemish.backbones import Backbone
from blemish.backbones.pdn import PDNS
from blemish.detectors import ops
from blemish.detectors.efficientad import detector as efficientad
from blemish.detectors.efficientad.config import EfficientADConfig
from blemish.detectors.efficientad.detector import EfficientAD
from blemish.detectors.registry import build, configure
from blemish.detectors.supersimplenet.config import SuperSimpleNetConfig
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.devices import keep_freed_memory
from blemish.types import Batch

FILES = Path(__file__).parents[1] / "files"
PARAMETERS = json.loads((FILES / "parameters.json").read_text())
ROUNDING = 1e-5
"""Largest difference, relative to a tensor's largest value, from what was recorded or computed in float32."""
EXACT = 1e-9
"""The same from what was recorded in float64: there the sums' order moves a gradient by some 1e-13."""


@cache
def recorded(file: str) -> dict[str, Tensor]:
    return load_file(FILES / f"{file}.safetensors")


def rand(seed: int, *shape: int) -> Tensor:
    """Draw the normal numbers of torch.randn in float64, from the uniform ones that it makes them of.

    Those are the same everywhere; the logarithms, sines and cosines that it takes of them in float32 are not.
    """
    generator, count = torch.Generator().manual_seed(seed), math.prod(shape)
    if count < 16:
        return torch.randn(shape, generator=generator, dtype=torch.float32).double()

    def drawn(count: int) -> Tensor:
        """Turn each sixteen uniform numbers into eight radii and angles: Box and Muller."""
        uniform = torch.rand(count, generator=generator, dtype=torch.float32).double()
        first, second = uniform[: count // 16 * 16].view(-1, 2, 8).unbind(1)
        radius, angle = (-2 * torch.log1p(-first)).sqrt(), 2 * math.pi * second
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()

    whole = drawn(count)
    if count % 16:  # the last sixteen are drawn anew
        whole = torch.cat([whole[: count - 16], drawn(16)])
    return whole.view(shape)


def fill(parameters: Iterable[Tensor], base: int, *, norms: Sequence[int] = ()) -> None:
    """Draw parameters as the recording did; norms: places of the batch norms' weights."""
    for place, parameter in enumerate(parameters):
        drawn = rand(base + place, *parameter.shape)
        if parameter.ndim > 1:
            drawn = drawn * math.sqrt(2 / parameter.shape[1:].numel())
        else:
            drawn = 1 + 0.1 * drawn if place in norms else 0.01 * drawn
        parameter.data.copy_(drawn)


def near(found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance


def near_each(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare every number relative to itself."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    """Compute in float64, where a loss leaves half precision for float32 too."""
    keep_freed_memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(3,), (16,), (7, 7), (40, 30)])
def test_numbers_are_those_of_the_recording(shape: tuple[int, ...]) -> None:
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float32)
    torch.testing.assert_close(rand(5, *shape), plain.double(), rtol=1e-5, atol=1e-6)


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
        self.detector = EfficientAD(cast(EfficientADConfig, config))
        d = self.detector
        assert d.autoencoder is not None
        self.autoencoder = d.autoencoder
        fill(d.teacher.parameters(), 1000)
        fill(d.student.parameters(), 2000)
        fill(d.autoencoder.parameters(), 3000)
        d.normalise.mean.zero_()
        d.normalise.std.fill_(1)
        d.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in training: twice as fast
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


@pytest.fixture(scope="module", params=["small", "medium"])
def case(request: pytest.FixtureRequest, float64: None) -> Case:
    return Case(request.param)


def test_efficientad_parameters(case: Case) -> None:
    size, d = case.detector.config.size, case.detector
    for network, name in (
        (d.teacher, f"pdn_{size}_teacher"),
        (d.student, f"pdn_{size}_student"),
        (case.autoencoder, "autoencoder"),
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
    pdn = PDNS[case.detector.pretrained_name]
    padded = pdn(padding=True)
    padded.load_state_dict(case.detector.teacher.state_dict())
    with torch.no_grad():
        found = padded(case.x)
    near(found[:, ::8, ::4, ::4], case.recorded["padded_teacher_every8ch_every4px"])


def losses(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    augmented = rand(2, 1, 3, 256, 256)
    monkeypatch.setattr(efficientad, "jitter", lambda images, generator: augmented)
    monkeypatch.setattr(efficientad, "sometimes_grey", lambda images, probability, generator: images)
    natural, good = rand(3, 1, 3, 256, 256), torch.zeros(1)
    batch = Batch(case.x, case.described, good, good == 0, natural=natural)
    terms = case.detector.loss(batch, seeding.generator(0))
    assert list(terms) == ["hard", "penalty", "autoencoder", "student_autoencoder"]
    return terms


def test_efficientad_losses(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        found = torch.stack(list(losses(case, monkeypatch).values()))
    near_each(found, recorded("efficientad_step")[f"{case.detector.config.size}.losses"][0], EXACT)
    near_each(found, case.recorded["losses_hard_penalty_ae_stae"][0].double(), ROUNDING)


def sample(values: Tensor) -> Tensor:
    """Return sixteen values from all over a parameter."""
    return values.flatten()[:: values.numel() // 16]


def test_efficientad_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the small networks: the gradients, where Adam goes by them, and the losses there."""
    case, expected = Case("small"), recorded("efficientad_step")
    parameters = [*case.detector.student.parameters(), *case.autoencoder.parameters()]
    optimizer = case.detector.optimizer()
    torch.stack(list(losses(case, monkeypatch).values())).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    near_each(torch.stack([each.norm() for each in gradients]), expected["small.gradient_norms"], EXACT)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    moved = [sample(after.detach() - start) for after, start in zip(parameters, before, strict=True)]
    for place, (gradient, step) in enumerate(zip(gradients, moved, strict=True)):
        near(sample(gradient), expected["small.gradients"][place], EXACT)
        near(step, expected["small.moved"][place], EXACT)
    with torch.no_grad():
        after = torch.stack(list(losses(case, monkeypatch).values()))
    near_each(after, expected["small.losses"][1], EXACT)
    near_each(after, case.recorded["losses_hard_penalty_ae_stae"][1].double(), ROUNDING)


# --- SuperSimpleNet ---

SIZES = [(256, 256), (96, 160)]
BACKBONES = ["resnet18", "wide_resnet50_2"]
RESIZING = 1e-6
"""Largest relative difference that the weights of the resizing leave, which are rounded to float32."""
LOSSES = ("normal", "anomalous", "focal", "score")


def places_of_norms(named: Sequence[tuple[str, Tensor]]) -> list[int]:
    return [place for place, (key, value) in enumerate(named) if value.ndim == 1 and key.endswith("weight")]


@cache
def backbone(name: str) -> Backbone:
    """Return a recorded backbone without statistics of its batch norms, which depend on the image size."""
    built = Backbone(name, ("layer2", "layer3"))
    named = list(built.network.named_parameters())
    assert [[key, list(value.shape)] for key, value in named] == PARAMETERS[f"backbone_{name}"]
    fill((value for _, value in named), 5000, norms=places_of_norms(named))
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
    assert d.classification is not None
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
        near(sampled(d.features(encoded)), expected["features_every16ch_every4px"], RESIZING)
        near(sampled(d.adapted(encoded)), expected["adapted_every16ch_every4px"], RESIZING)
        cells = d.hidden(encoded)
        logits = d.segmentation(cells.flatten(0, 2)).view(cells.shape[:3])
        near(logits[:, None], expected["segmentation_logits"], RESIZING)
        monkeypatch.setattr(d, "encode", lambda images: encoded)  # it costs most of the time and is right
        maps, scores = d(x)
    near(maps[:, None, ::4, ::4], expected["anomaly_map_every4px"], RESIZING)
    near(scores[:, 0], expected["score_logits"], RESIZING)
    stopped, flowing = (terms_and_norms(d, encoded, stop) for stop in (True, False))
    near_each(stopped, expected["train.stop_grad_1"], RESIZING)
    near_each(flowing, expected["train.stop_grad_0"], RESIZING)
    # The classification head's gradient reaches the adaptor and the segmentation head's first layer alone.
    differing = (expected["train.stop_grad_1"] / expected["train.stop_grad_0"] - 1).abs() > 2 * RESIZING
    assert differing.tolist() == [False] * 5 + [True, True, False, False]


def sampled(features: Tensor) -> Tensor:
    return features.permute(0, 3, 1, 2)[:, ::16, ::4, ::4]


def terms_and_norms(d: SuperSimpleNet, encoded: tuple[Tensor, ...], stop: bool) -> Tensor:
    """Return the losses, their sum, and the norms of four gradients, in training mode."""
    d.config = SuperSimpleNetConfig(backbone=d.config.backbone, classification_head=True, stop_gradient=stop)
    d.train()
    d.zero_grad()
    masks = rand(13, 2, 1, *d.feature_size(encoded))[:, 0] > 1.2
    masks[0] = False
    clean = torch.zeros_like(masks)
    terms = d.losses(encoded, clean, torch.zeros(0, d.adaptor.out_features), masks, torch.tensor([0.0, 1.0]))
    assert tuple(terms) == LOSSES
    total = torch.stack(list(terms.values())).sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert d.classification is not None
    layers = (d.adaptor, d.segmentation.first, d.classification.kernel, d.classification.linear)
    norms = [cast(Tensor, layer.weight.grad).norm() for layer in layers]
    return torch.stack([*terms.values(), total, *norms]).detach()


# --- The papers' optimisers ---


@pytest.mark.parametrize(
    ("method", "settings", "numbers"),
    [
        ("efficientad-s", {}, {"student": (1e-4, 1e-5), "autoencoder": (1e-4, 1e-5)}),
        (
            "supersimplenet",
            {"backbone": "resnet18"},
            {"adaptor": (1e-4, 1e-2), "segmentation": (2e-4, 1e-5), "classification": (2e-4, 1e-5)},
        ),
    ],
)
def test_each_step_is_the_papers(
    method: str, settings: dict[str, str], numbers: dict[str, tuple[float, float]]
) -> None:
    """Every step is compared from the state that it began with, in shares of the learning rate."""
    detector = build(method, configure(method, "paper", settings), 0)
    optimizer, decoupled = detector.optimizer(), method == "supersimplenet"
    trained = [
        (parameter, *of) for name, of in numbers.items() for parameter in getattr(detector, name).parameters()
    ]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    for number in (1, 2, 3):
        expected = []
        for place, (parameter, _, decay) in enumerate(trained):
            # From far below Adam's epsilon, where it counts, to far above.
            size = 10.0 ** -torch.arange(parameter.numel()).remainder(12).view(parameter.shape)
            parameter.grad = size * rand(100 * number + place, *parameter.shape)
            state = optimizer.state[parameter]
            first, second = (
                state[name].clone() if state else torch.zeros(()) for name in ("exp_avg", "exp_avg_sq")
            )
            start = parameter.detach().clone()
            after = adam(start, parameter.grad, first, second, number, decay, decoupled=decoupled)
            expected.append((start, *after))
        optimizer.step()
        for (parameter, rate, _), (start, step, first, second) in zip(trained, expected, strict=True):
            near((start - parameter.detach()) / rate, step, EXACT)
            near(optimizer.state[parameter]["exp_avg"], first, EXACT)
            near(optimizer.state[parameter]["exp_avg_sq"], second, EXACT)


def adam(
    start: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    number: int,
    decay: float,
    *,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return step number 1, 2 ... in learning rates, and both moments then: Kingma and Ba, algorithm 1.

    The decay joins the gradient, or, decoupled, the step (Loshchilov and Hutter, algorithm 2).
    """
    if not decoupled:
        gradient = gradient + decay * start
    first = 0.9 * first + (1 - 0.9) * gradient
    second = 0.999 * second + (1 - 0.999) * gradient**2
    step = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
    return (step + decay * start if decoupled else step), first, second


# --- Perlin noise ---


@pytest.mark.parametrize(("size", "periods"), [((32, 64), (1, 16)), ((64, 64), (4, 8)), ((128, 64), (32, 2))])
def test_perlin_noise(size: tuple[int, int], periods: tuple[int, int]) -> None:
    key = f"perlin.{size[0]}x{size[1]}.{periods[0]}x{periods[1]}"
    angles = recorded("perlin")[f"{key}.angles"]
    noise = ops.perlin_noise(angles[None], torch.tensor([periods]), size)
    near(noise[0], recorded("perlin")[f"{key}.noise"])
