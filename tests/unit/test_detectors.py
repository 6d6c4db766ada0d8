"""The pieces that the methods are made of, each against a plainer way to compute it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drawn
from blemish.detectors import ops
from blemish.detectors.efficientad.detector import EfficientAD, jitter, luma, quantile, sometimes_grey
from blemish.detectors.registry import build, configure
from blemish.detectors.settings import STATISTICS
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.detectors.supersimplenet.heads import axis_matrices, focal, round_up
from blemish.types import Batch

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- EfficientAD ---


def test_grey_is_that_of_itu_601() -> None:
    images = torch.rand(2, 3, 4, 5, generator=draw())
    grey = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    torch.testing.assert_close(luma(images)[:, 0], grey)


def test_photographs_turn_grey_with_their_probability() -> None:
    images = torch.rand(2000, 3, 2, 2, generator=draw(1))
    for probability in (0.0, 0.3, 1.0):
        found = sometimes_grey(images, probability, draw())
        grey = (found == luma(images)).flatten(1).all(1)
        kept = (found == images).flatten(1).all(1)
        assert (grey | kept).all()
        assert float(grey.double().mean()) == pytest.approx(probability, abs=0.04)


def test_exactly_one_of_brightness_contrast_and_saturation_changes() -> None:
    images = 0.3 + 0.3 * torch.rand(600, 3, 4, 4, generator=draw(1))  # so that nothing is clamped
    found = jitter(images, draw())
    grey = luma(images)
    factors: list[list[float]] = [[], [], []]
    anchors = (
        torch.zeros_like(images),
        grey.mean((2, 3), keepdim=True).expand_as(images),
        grey.expand_as(images),
    )
    for row in range(len(images)):
        solved = [((found[row] - anchor[row]) / (images[row] - anchor[row])).flatten() for anchor in anchors]
        fitting = [place for place, factor in enumerate(solved) if factor.std() < 1e-3]
        assert fitting
        # A factor of nearly 1 fits all three.
        if abs(float(solved[fitting[0]].mean()) - 1) > 0.01:
            (place,) = fitting
            factors[place].append(float(solved[place].mean()))
    for kind in factors:
        assert 150 < len(kind) < 250
        assert min(kind) == pytest.approx(0.8, abs=0.01)
        assert max(kind) == pytest.approx(1.2, abs=0.01)
        assert np.mean(kind) == pytest.approx(1.0, abs=0.03)


def test_changed_images_stay_in_range() -> None:
    found = jitter((torch.rand(50, 3, 4, 4, generator=draw(1)) > 0.5).float(), draw())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 0.995, 0.999, 1.0])
def test_a_quantile_is_torchs(share: float) -> None:
    values = torch.randn(12345, generator=draw(), dtype=torch.float64)
    assert float(quantile(values, share)) == pytest.approx(float(values.quantile(share)), rel=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_the_hard_loss_averages_what_is_at_least_its_own_images_quantile(share: float) -> None:
    detector = build("efficientad-s", configure("efficientad-s", settings={"hard_quantile": share}), 0)
    assert isinstance(detector, EfficientAD)
    # The quantile falls between two elements.
    error = torch.rand(3, 7, 11, 14, generator=draw()) * torch.tensor([1.0, 5.0, 0.1])[:, None, None, None]
    hard = [one[one >= one.quantile(share)] for one in error.flatten(1)]
    assert len({len(one) for one in hard}) == 1
    expected = torch.stack([one.mean() for one in hard]).mean()
    torch.testing.assert_close(detector.hard_loss(error), expected)


def test_a_channel_that_never_changes_is_kept_and_told() -> None:
    detector = build("efficientad-s", configure("efficientad-s"), 0)
    assert isinstance(detector, EfficientAD)
    described = torch.randn(4, 384, 3, 3, generator=draw())
    described[:, 5] = 2.0
    said = detector.prepare((part,) for part in torch.split(described, 1))
    assert said == "1 of the teacher's channels never change on these images"
    assert float(detector.teacher_std[5]) == 1
    others = [channel for channel in range(384) if channel != 5]
    std = described.transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(detector.teacher_std[others, 0, 0], std[others])
    assert detector.describe(described).isfinite().all()


# --- SuperSimpleNet ---


@pytest.fixture(params=[True, False], ids=["adapted", "raw"])
def detector(request: pytest.FixtureRequest) -> SuperSimpleNet:
    """Build a small SuperSimpleNet with its head; what the head reads is adapted or not."""
    settings = drawn.TINY | {"classification_head": True, "adapt_classification_features": request.param}
    built = build("supersimplenet", configure("supersimplenet", settings=settings), 0)
    assert isinstance(built, SuperSimpleNet)
    return built.eval()


def encoded(count: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 8, 6, 16, generator=draw(1)), torch.randn(count, 4, 3, 24, generator=draw(2))


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Resize, join and average features as the paper says: (B, C, h, w)."""
    height, width = 2 * parts[0].shape[1], 2 * parts[0].shape[2]
    resized = [
        nn.functional.interpolate(
            part.permute(0, 3, 1, 2), (height, width), mode="bilinear", align_corners=True
        )
        for part in parts
    ]
    return nn.functional.avg_pool2d(torch.cat(resized, 1), 3, stride=1, padding=1)


def convolve(features: Tensor, layer: nn.Linear) -> Tensor:
    """Apply a linear layer to the channels of (B, C, h, w), as a 1x1 convolution."""
    return nn.functional.conv2d(features, layer.weight[:, :, None, None], layer.bias)


def test_noise_is_added_to_the_adapted_features_of_noisy_cells_alone(detector: SuperSimpleNet) -> None:
    parts = encoded()
    noisy = torch.rand(4, 16, 12, generator=draw(3)) < 0.3
    noise = detector.draw_noise(int(noisy.sum()), draw(4))
    added = torch.zeros(4, 16, 12, 40)
    added[noisy] = noise[: int(noisy.sum())]
    added = added.permute(0, 3, 1, 2)
    with torch.no_grad():
        raw = joined(parts).repeat(2, 1, 1, 1)
        adapted = convolve(raw, detector.adaptor)
        head = detector.segmentation
        expected = head(convolve(adapted + added, head.first).permute(0, 2, 3, 1).flatten(0, 2))
        torch.testing.assert_close(detector.segment(parts, noisy, noise), expected, rtol=1e-4, atol=1e-5)
        read = adapted if detector.config.adapt_classification_features else raw
        cells = torch.randn(4, 16, 12, generator=draw(5))
        found = detector.classify(parts, cells, noisy, noise)
        torch.testing.assert_close(found, plain_score(detector, read + added, cells), rtol=1e-4, atol=1e-5)


def plain_score(detector: SuperSimpleNet, features: Tensor, cells: Tensor) -> Tensor:
    """Run the classification head as the paper draws it, on (N, C, h, w) features and an (N, h, w) map."""
    head = detector.classification
    assert head is not None
    maps = cells[:, None]
    seen = head.convolution(torch.cat([features, maps], 1))
    pools = [seen.amax((2, 3)), seen.mean((2, 3)), maps.amax((2, 3)), maps.mean((2, 3))]
    score: Tensor = head.linear(torch.cat(pools, 1))[:, 0]
    return score


def test_noise_has_its_deviation(detector: SuperSimpleNet) -> None:
    detector.noise_std.fill_(0.25)
    noise = detector.draw_noise(5000, draw())[:5000]
    assert float(noise.std()) == pytest.approx(0.25, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.005)
    assert not detector.draw_noise(3, draw())[3:].any()


def test_noise_comes_in_few_sizes_that_waste_little() -> None:
    sizes = [round_up(count) for count in range(1, 20000)]
    assert all(count <= size < max(1.25 * count + 1, count + 64) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 4 * 9  # a freed buffer of each size stays with the process
    assert round_up(0) == 0


def test_noise_is_set_by_the_spread_of_the_adapted_features(detector: SuperSimpleNet) -> None:
    parts = encoded(5)
    with torch.no_grad():
        adapted = convolve(joined(parts), detector.adaptor)
    spread = float(adapted.transpose(0, 1).flatten(1).var(1).mean().sqrt())
    one_by_one: Iterator[Any] = (tuple(part[n : n + 1] for part in parts) for n in range(5))
    said = detector.prepare(one_by_one)
    assert float(detector.noise_std) == pytest.approx(drawn.TINY["noise_ratio"] * spread, rel=1e-4)
    assert f"features spread by {spread:.3g}" in said


def test_a_given_noise_stays(detector: SuperSimpleNet) -> None:
    settings = drawn.TINY | {"noise": 0.015}
    fixed = build("supersimplenet", configure("supersimplenet", settings=settings), 0)
    assert isinstance(fixed, SuperSimpleNet)
    fixed.prepare([encoded()])
    assert float(fixed.noise_std) == pytest.approx(0.015)
    assert fixed.inspect([encoded()], draw()) == ""


def test_an_image_with_synthetic_noise_or_a_real_defect_is_defective(
    detector: SuperSimpleNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def noted(
        parts: Any,
        noisy: Tensor,
        noise: Tensor,
        masks: Tensor,
        labels: Tensor,
        weights: Tensor,
        remade: None,
    ) -> dict[str, Tensor]:
        assert torch.equal(weights, torch.ones_like(weights))
        assert remade is None
        given.append((noisy, noise, masks, labels))
        return {}

    monkeypatch.setattr(detector, "losses", noted)
    truth = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
    detector.loss(Batch(torch.empty(0), encoded(5), truth, torch.ones(5) > 0), draw())
    ((noisy, noise, masks, labels),) = given
    assert noisy.shape == (10, 16, 12)
    assert torch.equal(noisy, masks)
    assert len(noise) >= int(noisy.sum())
    drawn_any = masks.flatten(1).any(1)
    assert 0 < int(drawn_any.sum()) < 10  # about half of the masks are emptied
    assert labels.tolist() == [float(t or m) for t, m in zip([*truth, *truth], drawn_any, strict=True)]
    assert not torch.equal(masks[:5], masks[5:])  # each copy has a mask of its own


def test_the_losses_are_those_of_the_paper(detector: SuperSimpleNet) -> None:
    parts, masks = encoded(), torch.rand(2, 16, 12, generator=draw(5)) < 0.1
    masks[0] = False
    labels, nothing = torch.tensor([0.0, 1.0]), torch.zeros(0, 40)
    with torch.no_grad():
        logits = detector.segment(parts, masks, nothing)
        found = detector.losses(parts, torch.zeros_like(masks), nothing, masks, labels)
        raw = joined(parts)
        read = convolve(raw, detector.adaptor) if detector.config.adapt_classification_features else raw
        score = plain_score(detector, read, logits.view(2, 16, 12))
    flat = masks.flatten()
    assert float(found["normal"]) == pytest.approx(float((0.5 + logits[~flat]).clamp(min=0).mean()), rel=1e-5)
    assert float(found["anomalous"]) == pytest.approx(
        float((0.5 - logits[flat]).clamp(min=0).mean()), rel=1e-5
    )
    assert float(found["focal"]) == pytest.approx(by_hand(logits, flat), rel=1e-4)
    assert float(found["score"]) == pytest.approx(by_hand(score, labels.bool()), rel=1e-4)


def by_hand(logits: Tensor, truth: Tensor) -> float:
    """Average -(1 - p)^4 log p, p the probability given to what is true (Lin et al., 2017, equation 4)."""
    right = torch.where(truth, logits, -logits).double().sigmoid()
    return float((-((1 - right) ** 4) * right.log()).mean())


def test_the_focal_loss_stays_finite_where_the_probability_vanishes() -> None:
    found = focal(torch.tensor([200.0, -200.0]), torch.tensor([0.0, 1.0])).mean()
    assert float(found) == pytest.approx(200)


def test_without_normal_or_anomalous_cells_a_loss_is_zero(detector: SuperSimpleNet) -> None:
    nothing, clean = torch.zeros(0, 40), torch.zeros(2, 16, 12, dtype=torch.bool)
    with torch.no_grad():
        found = detector.losses(encoded(), clean, nothing, clean, torch.zeros(2))
        assert float(found["anomalous"]) == 0
        found = detector.losses(encoded(), clean, nothing, ~clean, torch.ones(2))
        assert float(found["normal"]) == 0


def test_inspection_raises_noise_that_is_not_told_apart(
    detector: SuperSimpleNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector.prepare([encoded(1)])
    before = float(detector.noise_std)
    assert "told apart; noise raised to" in detector.inspect([encoded(1)], draw())  # untrained: chance
    assert float(detector.noise_std) == pytest.approx(2 * before)
    assert detector.training
    monkeypatch.setattr(detector, "segment", lambda parts, noisy, noise: 0.5 - noisy.flatten().float())
    said = [detector.inspect([encoded(1)], draw()) for _ in range(9)]
    # What three doublings do not mend does not fail for want of noise.
    assert [bool(text) for text in said] == [True] * 2 + [False] * 7
    assert float(detector.noise_std) == pytest.approx(8 * before)


def test_inspection_leaves_noise_that_is_told_apart(
    detector: SuperSimpleNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector.prepare([encoded(1)])
    before = float(detector.noise_std)
    monkeypatch.setattr(detector, "segment", lambda parts, noisy, noise: noisy.flatten().float() - 0.5)
    assert detector.inspect([encoded(1)], draw()) == ""
    assert float(detector.noise_std) == before


def test_layers_learn_at_their_own_rates(detector: SuperSimpleNet) -> None:
    adaptor, heads = detector.optimizer().param_groups
    assert {id(value) for value in adaptor["params"]} == {
        id(value) for value in detector.adaptor.parameters()
    }
    assert (adaptor["lr"], adaptor["weight_decay"]) == (1e-4, 1e-2)
    assert (heads["lr"], heads["weight_decay"]) == (drawn.TINY["head_learning_rate"], 1e-5)


@torch.no_grad()
def test_the_rim_is_treated_in_the_map_and_not_in_what_the_head_reads() -> None:
    head = {"classification_head": True, "statistics": ("head", "maximum")}
    images, found = torch.rand(2, 3, 64, 64, generator=draw()), {}
    for kind in ("none", "rings", "blind"):
        config = configure("supersimplenet", settings=drawn.TINY | head | {"edges": kind})
        built = build("supersimplenet", config, 0).eval()
        built.get_buffer("ring_gain").fill_(0.5)
        found[kind] = built(images)
    maps, statistics = found.pop("none")
    for other, changed in found.values():
        assert torch.equal(changed[:, 0], statistics[:, 0])
        assert not torch.equal(changed[:, 1], statistics[:, 1])
        assert not torch.equal(other, maps)


@pytest.mark.parametrize("cells", [1, 2, 7, 16])
@pytest.mark.parametrize("length", [1, 8, 14, 33])
def test_an_axis_is_resized_and_averaged_as_torch_does(cells: int, length: int) -> None:
    one = torch.eye(cells, dtype=torch.float64)[None]
    resized = nn.functional.interpolate(one, length, mode="linear", align_corners=True)
    expected = nn.functional.avg_pool1d(resized, 3, stride=1, padding=1)[0].T
    torch.testing.assert_close(axis_matrices(cells, length, 1)[0].double(), expected, rtol=0, atol=1e-6)


# --- shared pieces ---


def test_moments_are_torchs_however_the_images_come() -> None:
    x = 1000 + torch.randn(9, 5, 4, 3, generator=draw())
    mean, variance = ops.channel_moments(torch.split(x, [1, 4, 3, 1]))
    flat = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), flat.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance.double(), flat.var(1), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="moments of no tensors"):
        ops.channel_moments([])


def test_the_covariance_is_torchs_however_the_rows_come() -> None:
    x = 1000 + torch.randn(90, 5, generator=draw()) @ torch.randn(5, 5, generator=draw(1))
    mean, covariance = ops.cell_covariance(torch.split(x, [1, 40, 30, 19]))
    torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(covariance, x.double().T.cov(correction=0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="covariance of no rows"):
        ops.cell_covariance([])


def test_whitening_makes_variances_equal_but_for_its_share() -> None:
    mixed = torch.randn(5, 5, generator=draw(), dtype=torch.float64)
    covariance = mixed @ mixed.T
    for share in (1e-9, 0.5):
        matrix, variances = ops.whitening(covariance, share)
        torch.testing.assert_close(matrix.T @ covariance @ matrix, variances.diag(), rtol=0, atol=1e-9)
        before = torch.linalg.eigvalsh(covariance).flip(0)
        torch.testing.assert_close(variances, before / (before + share * before.mean()))
    flat, none = ops.whitening(torch.zeros(2, 2, dtype=torch.float64), 0.01)
    assert flat.isfinite().all()
    assert not none.any()


def test_the_blur_is_a_gaussian_with_reflected_borders() -> None:
    maps = torch.rand(2, 30, 40, generator=draw())
    kernel = ops.gaussian_kernel(2.0, 13)
    assert float(kernel.sum()) == pytest.approx(1)
    assert float(kernel[6] / kernel[8]) == pytest.approx(np.exp(4 / 8), rel=1e-5)
    whole = torch.outer(kernel, kernel)
    padded = np.pad(maps.numpy(), ((0, 0), (6, 6), (6, 6)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (13, 13), (1, 2))
    expected = torch.from_numpy((windows * whole.numpy()).sum((3, 4)))
    torch.testing.assert_close(ops.gaussian_blur(maps, kernel), expected, rtol=1e-5, atol=1e-6)


def test_half_of_the_perlin_masks_are_empty_and_the_others_differ() -> None:
    masks = ops.perlin_masks(400, (24, 40), 0.2, draw())
    assert masks.shape == (400, 24, 40)
    full = masks[masks.flatten(1).any(1)]
    assert 150 < len(full) < 230
    assert 0.1 < float(full.double().mean()) < 0.4
    assert len({mask.numpy().tobytes() for mask in full}) == len(full)
    assert torch.equal(masks, ops.perlin_masks(400, (24, 40), 0.2, draw()))
    higher = ops.perlin_masks(400, (24, 40), 0.6, draw())
    assert not (higher & ~masks).any()
    assert int(higher.sum()) < int(masks.sum()) / 2


def test_statistics_of_maps() -> None:
    maps, cells = torch.rand(3, 32, 48, generator=draw()), torch.rand(3, 20, 30, generator=draw(1))
    found = dict(zip(STATISTICS, ops.map_statistics(maps, cells, STATISTICS).T, strict=True))
    assert torch.equal(found["maximum"], maps.flatten(1).max(1).values)
    top = cells.flatten(1).sort(1, descending=True).values[:, :5]
    torch.testing.assert_close(found["top_mean"], top.mean(1))
    smooth = ops.gaussian_blur(cells, ops.gaussian_kernel(1.0, 7))
    torch.testing.assert_close(found["smoothed_maximum"], smooth.flatten(1).max(1).values)
    own = {"mean": lambda: cells.mean((1, 2)), "never": lambda: pytest.fail("not asked for")}
    some = ops.map_statistics(maps, cells, ["mean", "top_mean"], **own)
    assert torch.equal(some, torch.stack([cells.mean((1, 2)), found["top_mean"]], 1))
