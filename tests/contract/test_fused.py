"""Fused networks: each rewrite against the plain network, and approximations against the error they state."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drawn
from blemish.backbones import BACKBONES, IMAGENET, Backbone, Normalise
from blemish.backbones.folding import without_norms
from blemish.backbones.pdn import CHANNELS, PDNS
from blemish.detectors.base import Detector
from blemish.detectors.efficientad.channels import insert_bottleneck, reduce, rotate
from blemish.detectors.efficientad.fused import (
    FusedEfficientAD,
    absorb,
    difference,
    normalised,
    scaled,
    stacked,
    used,
    window,
)
from blemish.detectors.efficientad.integers import before_pooling, convolved, equalise, largest
from blemish.detectors.fusing import Kept
from blemish.detectors.registry import build, configure
from blemish.detectors.supersimplenet.fused import FusedSuperSimpleNet
from blemish.errors import ConfigError
from blemish.images.resizing import to_input
from blemish.testing.slim import slimmer

pytestmark = pytest.mark.usefixtures("one_thread", "slim")

SMALL = drawn.TINY | {"image_size": (64, 96)}
HEAD = {"classification_head": True, "stop_gradient": False, "statistics": ("head", "maximum")}
RESNET = {"backbone": "resnet18", "hidden_channels": 32, "image_size": (96, 64)}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "efficientad-m": ("efficientad-m", {"autoencoder": False}),
    "not square": ("efficientad-s", {"image_size": (256, 292), "autoencoder": False}),
    "not square, with autoencoder": ("efficientad-s", {"image_size": (292, 256), "logical_weight": 0.3}),
    "padding": ("efficientad-s", {"padding": True, "crop": 0}),
    "medium with padding": ("efficientad-m", {"padding": True, "crop": 0}),
    "reflected edges": ("efficientad-s", {"edges": "reflect"}),
    "whole image": ("efficientad-s", {"image_size": (256, 292), "statistics": ("maximum", "whole_image")}),
    "whole image, medium": (
        "efficientad-m",
        {"autoencoder": False, "statistics": ("whole_image", "top_mean")},
    ),
    "no autoencoder": ("efficientad-s", {"autoencoder": False}),
    "supersimplenet": ("supersimplenet", SMALL),
    "no upscaling": ("supersimplenet", SMALL | {"upscale": False}),
    "no blur": ("supersimplenet", SMALL | {"blur_sigma": 0.0}),
    "head": ("supersimplenet", SMALL | HEAD),
    "head before the adaptor": ("supersimplenet", SMALL | HEAD | {"adapt_classification_features": False}),
    "head unasked": ("supersimplenet", SMALL | HEAD | {"statistics": ("maximum",)}),
    "resnet18": ("supersimplenet", RESNET),
    "three layers and head": ("supersimplenet", RESNET | HEAD | {"layers": ("layer1", "layer2", "layer4")}),
    "simplenet": ("simplenet", SMALL),
    "places and components": (
        "supersimplenet",
        SMALL | {"upscale": False, "misplaced": 0.25, "whitening": 0.1, "components": 12, "edges": "rings"},
    ),
    "rings": ("supersimplenet", SMALL | {"edges": "rings"}),
    "rings and head": ("supersimplenet", SMALL | HEAD | {"edges": "rings"}),
    "blind": ("supersimplenet", SMALL | {"edges": "blind"}),
    "blind and head": ("simplenet", SMALL | HEAD | {"edges": "blind"}),
}


@pytest.fixture(scope="module")
def slim() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, by in (("pdn_small", 2), ("pdn_medium", 8)):
            patch.setitem(PDNS, name, slimmer(PDNS[name], by))
        yield


def parts(count: int, size: tuple[int, int]) -> Tensor:
    """Return parts as (B, 3, H, W) images, every other one with a spot."""
    images = [drawn.spotted(n, size)[0] if n % 2 else drawn.part(n, size) for n in range(count)]
    return torch.from_numpy(np.stack([to_input(image) for image in images]))


def shaken(detector: Detector) -> Detector:
    """Replace every number that a fresh network leaves at 0 or 1; return the detector in evaluation mode."""
    draw = torch.Generator().manual_seed(1)
    for name, value in [*detector.named_parameters(), *detector.named_buffers()]:
        if name.endswith(("running_var", "norm.weight", "teacher_std")):
            value.data.uniform_(0.5, 2.0, generator=draw)
        elif name.endswith(("bias", "running_mean", "teacher_mean")):
            value.data.normal_(0, 0.2, generator=draw)
        elif name == "quantiles":
            value.copy_(torch.tensor([0.2, 0.7, -0.1, 0.3]))
        elif name.startswith("image_"):
            value.normal_(0, 0.2, generator=draw)
        elif name == "ring_gain":
            value.uniform_(0.3, 3.0, generator=draw)
        elif name == "ring_shift":
            value.normal_(0, 1.0, generator=draw)
    for layer in detector.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 2.0, generator=draw)
    return detector.eval()


def near(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Assert that tensors agree to a share of the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_fused_network_has_the_outputs_of_its_detector(variant: str) -> None:
    method, settings = VARIANTS[variant]
    detector = shaken(build(method, configure(method, settings=settings), 0))
    images = parts(2, detector.config.image_size)[-1 if method.startswith("efficientad") else 0 :]
    fused = detector.fused()
    assert isinstance(fused, FusedEfficientAD | FusedSuperSimpleNet)
    expected = detector(images)
    for found, wanted in zip(fused(images), expected, strict=True):
        if wanted.ndim == 3:  # there is something to compare
            assert float(wanted.std()) > 1e-3 * float(wanted.abs().max())
        near(found, wanted)
    for value in detector.parameters():  # the weights are copies
        value.data.zero_()
    near(fused(images[-1:])[0], expected[0][-1:])


def test_a_detector_without_a_fused_form_is_returned_itself() -> None:
    detector = Detector()
    assert detector.fused() is detector
    assert not detector.training


# --- EfficientAD, rewrite by rewrite ---


@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_normalisation_is_absorbed(padding: int) -> None:
    layer, normalise, images = (
        nn.Conv2d(3, 5, 4, padding=padding),
        Normalise(*IMAGENET),
        torch.rand(2, 3, 9, 11),
    )
    centred = images - normalise.mean if padding else images
    near(absorb(layer, normalise)(centred), layer(normalise(images)))


@torch.no_grad()
def test_convolutions_are_stacked_subtracted_and_scaled() -> None:
    one, other, x, y = (
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3),
        torch.randn(2, 4, 9, 8),
        torch.randn(2, 4, 9, 8),
    )
    mean, std = torch.randn(6, 1, 1), torch.rand(6, 1, 1) + 0.5
    near(stacked([one, other])(x), torch.cat([one(x), other(x)], 1))
    near(difference(one, other)(torch.cat([x, y], 1)), one(x) - other(y))
    near(scaled(one, torch.tensor(-0.3))(x), -0.3 * one(x))
    near(normalised(one, mean, std)(x), (one(x) - mean) / std)


@pytest.mark.parametrize("length", [256, 257, 258, 259, 292])
@pytest.mark.parametrize("name", PDNS)
def test_cropping_drops_only_pixels_that_reach_no_output(name: str, length: int) -> None:
    """The gradient says which pixels an output depends on."""
    network = PDNS[name]()
    for value in network.parameters():
        value.data.fill_(0.1)  # no ReLU is off
    seen = torch.ones(1, 3, length, 36, requires_grad=True)
    network(seen).sum().backward()
    assert seen.grad is not None
    reached = int(seen.grad[0, 0].abs().sum(1).nonzero().max()) + 1
    windows = [window(layer) for layer in network if not isinstance(layer, nn.ReLU)]
    assert used(length, windows) == reached


@torch.no_grad()
def test_teacher_and_student_share_one_first_convolution_that_reads_253_pixels() -> None:
    detector = build("efficientad-s", configure("efficientad-s"), 0).eval()
    fused, sizes = detector.fused(), []
    assert isinstance(fused, FusedEfficientAD)
    fused.first.register_forward_pre_hook(lambda layer, inputs: sizes.append(inputs[0].shape[2:]))
    fused(parts(1, (256, 256)))
    assert sizes == [(253, 253)]
    assert fused.first.out_channels == 2 * 64
    assert fused.structural.out_channels == CHANNELS  # not 384 of the teacher and 768 of the student
    assert fused.structural.in_channels == 2 * 128


# --- SuperSimpleNet ---


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
@torch.no_grad()
def test_batch_norms_are_multiplied_into_convolutions(name: str) -> None:
    backbone = Backbone(name, BACKBONES[name].default)
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value, low, high in (
                (layer.running_mean, -0.2, 0.2),
                (layer.running_var, 0.5, 2.0),
                (layer.weight, 0.5, 2.0),
                (layer.bias, -0.2, 0.2),
            ):
                assert value is not None
                value.data.uniform_(low, high)
    images, made = torch.rand(2, 3, 64, 96), without_norms(backbone)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in made.modules())
    assert torch.equal(made.normalise.std, torch.ones(3, 1, 1))
    for found, wanted in zip(made(images), backbone(images), strict=True):
        near(found, wanted)


# --- for eight-bit integers ---


def fitted(method: str, **settings: Any) -> tuple[FusedEfficientAD, list[Tensor]]:
    """Return a fused EfficientAD whose statistics fit two rendered parts, and the two parts."""
    detector = build(method, configure(method, settings=settings), 0).eval()
    batches = [image[None] for image in parts(2, (256, 256))]
    for layer in detector.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(layer.out_channels))
    with torch.no_grad():
        detector.prepare([detector.encode(batch) for batch in batches])
        detector.finish(batches)
    fused = detector.fused()
    assert isinstance(fused, FusedEfficientAD)
    return fused, batches


@pytest.fixture(scope="module")
def detector(slim: None) -> Detector:
    return build("efficientad-s", configure("efficientad-s"), 0)


@pytest.fixture(scope="module")
def efficientad(slim: None) -> tuple[FusedEfficientAD, list[Tensor]]:
    return fitted("efficientad-s")


def inner(network: FusedEfficientAD) -> list[nn.Module]:
    """Return the layers at whose inputs channels of teacher and student get one range."""
    layers = before_pooling(network).values()
    return [*layers, network.structural, *([network.logical] if network.logical else [])]


@pytest.mark.parametrize("statistics", ["maximum", "maximum,whole_image"])
@pytest.mark.parametrize("method", ["efficientad-s", "efficientad-m"])
@torch.no_grad()
def test_equalised_channels_share_one_range_and_change_no_output(
    method: str, statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: where a channel's terms nearly cancel, what is left depends on rounding in float32."""
    network, batches = fitted(method, statistics=statistics)
    batches = [batch.double() for batch in batches]
    network.double()
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # what leaves half precision for float32 stays, too
    made = copy.deepcopy(network)
    equalise(made, batches)
    for found, wanted in zip(made(batches[0]), network(batches[0]), strict=True):
        near(found, wanted, 1e-10)
    before, after = (largest(each, inner(each), batches) for each in (network, made))
    assert max(float(x.max() / x.min()) for x in before.values()) > 2
    for ranges in after.values():
        torch.testing.assert_close(ranges, torch.ones_like(ranges), rtol=1e-10, atol=0)


def test_the_range_of_a_dead_channel_is_one() -> None:
    layer = nn.Conv2d(2, 3, 1)
    batch = torch.tensor([-3.0, 0.0])[None, :, None, None].expand(1, 2, 2, 2)
    assert largest(nn.Sequential(layer), [layer], [batch])[layer].tolist() == [3.0, 1.0]


def test_a_method_without_rewrites_of_its_own_leaves_a_network_as_it_is() -> None:
    plain = nn.Linear(2, 2)
    assert Detector().for_integers(plain, []) is plain
    with pytest.raises(ConfigError, match="--reduced: this method does not support reduced channels"):
        Detector().with_fewer_channels(plain, [], [], 0.1)


@torch.no_grad()
def test_pooling_is_written_as_a_convolution() -> None:
    pool, x = nn.AvgPool2d(2), torch.randn(2, 6, 9, 8)
    made = convolved(pool, 6)
    assert isinstance(made, nn.Conv2d)
    near(made(x), pool(x))
    for other in (nn.AvgPool2d(2, padding=1), nn.ReLU()):
        assert convolved(other, 6) is other


@torch.no_grad()
def test_a_network_ready_for_integers_has_no_pooling_and_nearly_the_same_map(
    detector: Detector, efficientad: tuple[FusedEfficientAD, list[Tensor]]
) -> None:
    network, batches = efficientad
    before = copy.deepcopy(network.state_dict())
    made = detector.for_integers(network, batches)
    assert not any(isinstance(layer, nn.AvgPool2d) for layer in made.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    near(made(batches[1])[0], network(batches[1])[0], 0.02)


# --- fewer channels ---


def changed(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of a change, in standard deviations of the expected values."""
    return float(
        np.sqrt(np.mean((found.numpy() - expected.numpy()).astype(np.float64) ** 2)) / expected.std()
    )


def cells(network: FusedEfficientAD, batches: list[Tensor]) -> Tensor:
    return torch.cat([network.cells(batch)[0] for batch in batches])


@torch.no_grad()
def test_the_stated_error_of_turned_halves_is_the_measured_one(
    efficientad: tuple[FusedEfficientAD, list[Tensor]],
) -> None:
    network, batches = efficientad
    good, other = batches[:1], batches[1:]
    for half, layer in enumerate(("structural", "logical")):
        made = copy.deepcopy(network)
        note = rotate(made, half, good, other, tolerance=0.1)
        before, after = (
            torch.cat([each.halves(batch)[half].square().sum(1) for batch in good])
            for each in (network, made)
        )
        assert note == Kept(layer, made.halves(good[0])[half].shape[1], CHANNELS, note.error)
        assert 0 < note.kept < CHANNELS
        assert note.error <= 0.1
        assert changed(after, before) == pytest.approx(note.error, rel=1e-3)
    again = rotate(copy.deepcopy(network), half, good, other, tolerance=note.error * 0.999)
    assert again.kept > note.kept


@torch.no_grad()
def test_the_stated_error_of_a_narrow_layer_is_the_measured_one(
    efficientad: tuple[FusedEfficientAD, list[Tensor]],
) -> None:
    network, batches = efficientad
    made, good = copy.deepcopy(network), batches[:1]
    note = insert_bottleneck(made, good, batches[1:], tolerance=0.2)
    assert note == Kept("second", 32, 64, note.error)
    assert note.error <= 0.2
    assert changed(cells(made, good), cells(network, good)) == pytest.approx(note.error, rel=1e-3)
    for trunk in made.trunks:
        assert isinstance(trunk[0], nn.Conv2d)
        assert trunk[0].weight.shape == (32, 64, 1, 1)


@torch.no_grad()
def test_reduced_channels_stay_within_the_tolerance(
    detector: Detector, efficientad: tuple[FusedEfficientAD, list[Tensor]]
) -> None:
    network, batches = efficientad
    before = copy.deepcopy(network.state_dict())
    made, kept = detector.with_fewer_channels(network, batches[:1], batches[1:], tolerance=0.1)
    assert isinstance(made, FusedEfficientAD)
    assert [note.layer for note in kept] == ["structural", "logical", "second"]
    assert all(note.error <= 0.1 for note in kept)
    assert sum(note.kept for note in kept) < sum(note.of for note in kept)
    assert changed(cells(made, batches[:1]), cells(network, batches[:1])) <= 0.2
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@torch.no_grad()
def test_a_tolerance_of_zero_cuts_nothing(efficientad: tuple[FusedEfficientAD, list[Tensor]]) -> None:
    network, batches = efficientad
    made, kept = reduce(network, batches[:1], batches[1:], tolerance=0.0)
    assert all(note.kept == note.of and note.error == 0 for note in kept)
    for found, wanted in zip(made(batches[1]), network(batches[1]), strict=True):
        near(found, wanted)
