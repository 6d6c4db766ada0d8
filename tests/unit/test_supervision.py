"""What SuperSimpleNet makes of labelled defects: which cells get noise, which teach, and how much."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import drawn
from blemish import images
from blemish.detectors.registry import build, configure
from blemish.detectors.schedules import SCHEDULES
from blemish.detectors.settings import STATISTICS
from blemish.detectors.supersimplenet import heads
from blemish.detectors.supersimplenet.anomalies import real_masks
from blemish.detectors.supersimplenet.config import SuperSimpleNetConfig
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.detectors.supersimplenet.heads import SegmentationHead, scatter_rows, spread_shifted
from blemish.errors import BlemishError, ConfigError, DataError
from blemish.progress import Event
from blemish.training import loop, run
from blemish.training.plan import Plan, plan
from blemish.training.request import TrainingRequest
from blemish.types import Batch, LabelRules, Supervision

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = {"classification_head": True}
CELLS = (16, 12)
SIZE = (64, 48)
"""Of the masks: four pixels to a cell on each axis."""
B = 6


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**settings: Any) -> SuperSimpleNet:
    """Build a small SuperSimpleNet whose pretrained part stays empty."""
    config = configure("supersimplenet", settings=drawn.TINY | {"perlin_threshold": 0.0} | settings)
    built = build("supersimplenet", config, 0)
    assert isinstance(built, SuperSimpleNet)
    return built


def encoded(count: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 8, 6, 16, generator=draw(1)), torch.randn(count, 4, 3, 24, generator=draw(2))


def cells_of(*cells: tuple[slice, slice]) -> Tensor:
    """Draw a mask whose pixels fill some rectangles of cells."""
    mask = torch.zeros(CELLS)
    for place in cells:
        mask[place] = 1
    return mask.repeat_interleave(4, 0).repeat_interleave(4, 1)


def batch_of(masks: Tensor | None, labels: Sequence[int], masked: Sequence[bool], **more: Any) -> Batch:
    truth = torch.tensor(labels, dtype=torch.float32)
    return Batch(torch.empty(0), encoded(len(labels)), truth, torch.tensor(masked), masks, **more)


def mixed(**more: Any) -> Batch:
    """Return two good images, two masked defects, two unmasked ones."""
    masks = torch.zeros(B, *SIZE)
    masks[2] = cells_of((slice(0, 9), slice(0, 12)))
    masks[3] = cells_of((slice(5, 12), slice(2, 7)), (slice(1, 3), slice(8, 12)))
    return batch_of(masks, [0, 0, 1, 1, 1, 1], [True] * 4 + [False] * 2, **more)


class Losses:
    """What `loss` hands on to `losses`."""

    def __init__(self, detector: SuperSimpleNet, batch: Batch, seed: int = 0) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(detector, "losses", self.take)
            detector.loss(batch, draw(seed))

    def take(
        self,
        parts: Any,
        noisy: Tensor,
        noise: Tensor,
        target: Tensor,
        labels: Tensor,
        weights: Tensor,
        remade: None,
    ) -> dict[str, Tensor]:
        self.noisy, self.noise, self.target = noisy, noise, target
        self.labels, self.weights = labels, weights
        assert remade is None
        return {}


def cells(masks: Tensor) -> Tensor:
    """Bring masks that fill whole cells down to them."""
    return masks[:, ::4, ::4] > 0


# --- where synthetic noise goes ---


def test_no_noise_falls_on_real_defects_unless_it_is_asked_for() -> None:
    batch = mixed()
    assert batch.masks is not None
    real = cells(batch.masks).repeat(2, 1, 1)
    on = Losses(make(noise_on_defects=True, noise_on_unmasked=True), batch)
    off = Losses(make(noise_on_unmasked=True), batch)
    assert (on.noisy & real).any()
    assert torch.equal(off.noisy, on.noisy & ~real)  # and nothing else is different
    # Defective images have noise in their normal areas.
    assert off.noisy[[2, 3, 8, 9]].any()
    for found in (on, off):
        assert torch.equal(found.target, real | found.noisy)
        assert len(found.noise) >= int(found.noisy.sum()) > len(found.noise) - 64
        assert not found.noise[int(found.noisy.sum()) :].any()
        assert found.noise[: int(found.noisy.sum())].all()


def test_no_noise_falls_on_unmasked_defects_unless_it_is_asked_for() -> None:
    on, off = Losses(make(noise_on_unmasked=True), mixed()), Losses(make(), mixed())
    unmasked = torch.tensor([False] * 4 + [True] * 2).repeat(2)
    assert on.noisy[unmasked].any()
    assert not off.noisy[unmasked].any()
    assert torch.equal(off.noisy[~unmasked], on.noisy[~unmasked])
    for found in (on, off):  # either way it is not known which of their pixels are defective
        assert not found.weights[unmasked].any()
        assert found.weights[~unmasked].all()
        assert found.labels[unmasked].all()


def test_labels_are_real_or_synthetic() -> None:
    found = Losses(make(), mixed(), seed=1)
    any_noise = found.noisy.flatten(1).any(1)
    defective = torch.tensor([0, 0, 1, 1, 1, 1] * 2) > 0
    assert 0 < int(any_noise[~defective].sum()) < 4
    assert torch.equal(found.labels, (any_noise | defective).float())


def test_each_copy_has_noise_of_its_own_and_the_same_real_defects() -> None:
    batch = mixed()
    assert batch.masks is not None
    found = Losses(make(), batch)
    assert found.noisy.shape == (2 * B, *CELLS)
    assert not torch.equal(found.noisy[:B], found.noisy[B:])
    assert torch.equal(found.target & ~found.noisy, cells(batch.masks).repeat(2, 1, 1))


def test_whole_anomalies_are_noise_on_one_copy() -> None:
    batch = mixed()
    assert batch.masks is not None
    found = Losses(make(anomalies="whole"), batch)
    assert not found.noisy[:B].any()
    expected = ~cells(batch.masks)
    expected[4:] = False  # unmasked
    assert torch.equal(found.noisy[B:], expected)
    everywhere = Losses(make(anomalies="whole", noise_on_defects=True, noise_on_unmasked=True), batch)
    assert everywhere.noisy[B:].all()


def test_without_synthetic_anomalies_there_is_one_copy() -> None:
    batch = mixed()
    assert batch.masks is not None
    found = Losses(make(anomalies="none"), batch)
    assert torch.equal(found.target, cells(batch.masks))
    assert torch.equal(found.labels, batch.labels)
    assert not found.noisy.any()
    assert found.noise.numel() == 0
    detector = make(anomalies="none", **HEAD).train()
    terms = detector.loss(batch, draw())
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(
        value.grad is not None and value.grad.isfinite().all()
        for value in detector.parameters()
        if value.requires_grad
    )


# --- real masks on cells ---


def test_masks_come_down_bilinearly_and_count_from_a_half() -> None:
    masks = (torch.rand(3, *SIZE, generator=draw(4)) < 0.5).float()
    small, weights = real_masks(batch_of(masks, [1, 1, 1], [True] * 3), CELLS)
    # With ends not aligned, the middle of four pixels lies between its two inner ones.
    inner = masks.view(3, 16, 4, 12, 4)[:, :, 1:3, :, 1:3].mean((2, 4))
    assert torch.equal(small, inner >= 0.5)
    assert set(inner.flatten().tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert (weights == 1).all()


@pytest.mark.parametrize("size", [SIZE, (61, 43)])
def test_a_defect_that_vanishes_marks_the_cells_that_it_touches(size: tuple[int, int]) -> None:
    for y, x in ((0, 0), (3, 5), (30, 20), (size[0] - 1, size[1] - 1)):
        masks = torch.zeros(3, *size)
        masks[0, y, x] = 1
        masks[1, : size[0] // 2] = 1
        masks[1, -1, -1] = 1  # beside one that does not vanish, this is lost
        small, _ = real_masks(batch_of(masks, [1, 1, 0], [True] * 3), CELLS)
        marked = small[0].nonzero().tolist()
        assert [y * 16 // size[0], x * 12 // size[1]] in marked
        assert len(marked) <= (1 if size == SIZE else 4)
        assert not small[1, 9:].any()
        assert not small[2].any()


def test_a_defect_that_vanishes_is_still_a_defect_and_teaches() -> None:
    masks = torch.zeros(2, *SIZE)
    masks[1, 21, 30] = 1
    found = Losses(make(anomalies="none"), batch_of(masks, [0, 1], [True, True]))
    assert found.labels.tolist() == [0, 1]
    assert found.target.nonzero().tolist() == [[1, 5, 7]]
    assert found.weights.all()


def test_weights_count_on_real_defects_alone() -> None:
    masks = mixed().masks
    assert masks is not None
    given = torch.rand(B, *SIZE, generator=draw(5)) * 3
    found = Losses(make(), mixed(weights=given))
    inner = given.view(B, 16, 4, 12, 4)[:, :, 1:3, :, 1:3].mean((2, 4))
    known = torch.tensor([1, 1, 1, 1, 0, 0])[:, None, None]
    expected = torch.where(cells(masks), inner, 1.0) * known
    torch.testing.assert_close(found.weights, expected.repeat(2, 1, 1))


# --- the loss ---


def by_hand(logits: Tensor, target: Tensor, weights: Tensor) -> dict[str, float]:
    """Compute the segmentation's terms cell by cell."""
    sums = dict.fromkeys(("normal", "anomalous", "focal"), 0.0)
    counts = dict.fromkeys(sums, 0)
    for s, t, w in zip(logits.tolist(), target.tolist(), weights.tolist(), strict=True):
        if w == 0:
            continue
        name = "anomalous" if t else "normal"
        sums[name] += w * max(0.0, 0.5 - s if t else 0.5 + s)
        right = 1 / (1 + np.exp(-s if t else s))
        sums["focal"] += w * -((1 - right) ** 4) * np.log(right)
        for each in (name, "focal"):
            counts[each] += 1
    return {name: sums[name] / max(counts[name], 1) for name in sums}


@pytest.mark.parametrize("weighted", [False, True])
def test_cells_that_are_not_known_do_not_enter_the_means(weighted: bool) -> None:
    """Weights enter as factors, not as counts; an unmasked defect teaches by its label alone."""
    detector = make(**HEAD).eval()
    given = torch.rand(B, *SIZE, generator=draw(5)) * 3 if weighted else None
    batch = mixed(weights=given)
    passed = Losses(detector, batch)
    with torch.no_grad():
        terms = detector.loss(batch, draw())
        logits = detector.segment(batch.encoded, passed.noisy, passed.noise)
        score = detector.classify(batch.encoded, logits.view(-1, *CELLS), passed.noisy, passed.noise)
    expected = by_hand(logits, passed.target.flatten(), passed.weights.flatten())
    for name, value in expected.items():
        assert value > 0
        assert float(terms[name]) == pytest.approx(value, rel=1e-4), name
    right = torch.where(passed.labels > 0, score, -score).double().sigmoid()
    assert float(terms["score"]) == pytest.approx(float((-((1 - right) ** 4) * right.log()).mean()), rel=1e-4)
    # What the logits of unmasked defects are does not count.
    changed = logits.clone()
    changed.view(-1, *CELLS)[[4, 5, 10, 11]] += 7
    again = heads.segmentation_losses(
        changed, passed.target.flatten().float(), passed.weights.flatten(), focal_loss=True
    )
    assert all(float(again[name]) == pytest.approx(float(terms[name]), rel=1e-5) for name in again)


def test_unmasked_defects_alone_teach_the_score_alone() -> None:
    detector = make(stop_gradient=False, **HEAD).train()
    terms = detector.loss(batch_of(None, [1, 1], [False, False]), draw())
    assert [float(terms[name].detach()) for name in ("normal", "anomalous", "focal")] == [0, 0, 0]
    assert float(terms["score"].detach()) > 0
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert detector.classification is not None
    assert detector.classification.linear.weight.grad is not None
    assert detector.classification.linear.weight.grad.any()


def score_gradients(**settings: Any) -> dict[str, bool]:
    """Return which parts learn from the score's term alone."""
    detector = make(**HEAD | settings).train()
    detector.loss(mixed(), draw())["score"].backward()  # type: ignore[no-untyped-call]
    parts = {"adaptor": detector.adaptor, "segmentation": detector.segmentation}
    parts["classification"] = cast(nn.Module, detector.classification)
    return {
        name: any(value.grad is not None and bool(value.grad.any()) for value in part.parameters())
        for name, part in parts.items()
    }


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("stop", [True, False])
def test_the_scores_gradient_reaches_the_segmentation_unless_it_is_stopped(stop: bool, adapt: bool) -> None:
    found = score_gradients(stop_gradient=stop, adapt_classification_features=adapt)
    assert found["classification"]
    assert found["segmentation"] == (not stop)
    assert found["adaptor"] == (adapt or not stop)


@pytest.mark.parametrize("limit", [0.0, 0.01, 1000.0])
def test_a_step_clips_the_gradients_norm(limit: float) -> None:
    gradients = []
    for clip in (0.0, limit):
        detector = make(clip_norm=clip, **HEAD).train()
        optimizer = detector.optimizer()
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
        run = SimpleNamespace(
            detector=detector,
            optimizer=optimizer,
            batches=SimpleNamespace(at=lambda step: mixed()),
            seed=0,
            device="cpu",
            dtype=torch.float32,
            steps=10,
        )
        loop.one_step(cast(loop.Run, run), 0)
        values = [value.grad for value in detector.parameters() if value.grad is not None]
        gradients.append(torch.cat([value.flatten() for value in values]))
    raw, clipped = gradients
    norm = float(raw.norm())
    assert 0.05 < norm < 100
    factor = min(1.0, limit / norm) if limit else 1.0
    torch.testing.assert_close(clipped, raw * factor, rtol=1e-4, atol=1e-7)


# --- heads ---

LAYERS = ((7, 5, 6), (4, 3, 8), (2, 2, 3))
"""Heights, widths and channels."""


@pytest.mark.parametrize("size", [(14, 10), (7, 5), (13, 9)])
@pytest.mark.parametrize("taps", [1, 3, 5])
def test_a_convolution_on_the_layers_is_that_on_the_joined_features(size: tuple[int, int], taps: int) -> None:
    """Odd sizes, several layers, noise on some cells of the second copy; forward and all gradients."""
    count, kernels = 2, 4
    parts = [
        torch.randn(count, *layer, generator=draw(n), requires_grad=True) for n, layer in enumerate(LAYERS)
    ]
    channels = sum(layer[2] for layer in LAYERS)
    kernel = torch.randn(taps, taps, kernels, channels, generator=draw(7), requires_grad=True)
    places = torch.randperm(2 * count * size[0] * size[1], generator=draw(8))[:30]
    places[0], places[1] = 0, 2 * count * size[0] * size[1] - 1  # corners, too
    noise = torch.randn(30, channels, generator=draw(9), requires_grad=True)
    leaves = [*parts, kernel, noise]

    resized = [
        functional.interpolate(part.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=True)
        for part in parts
    ]
    joined = functional.avg_pool2d(torch.cat(resized, 1), 3, stride=1, padding=1).repeat(2, 1, 1, 1)
    cells_ = joined.permute(0, 2, 3, 1).reshape(-1, channels).index_add(0, places, noise)
    plain = functional.conv2d(
        cells_.view(2 * count, *size, channels).permute(0, 3, 1, 2),
        kernel.permute(2, 3, 0, 1),
        padding=taps // 2,
    ).permute(0, 2, 3, 1)
    seed = torch.randn(plain.shape, generator=draw(10))
    expected = torch.autograd.grad((plain * seed).sum(), leaves)

    columns = torch.split(kernel, [layer[2] for layer in LAYERS], -1)
    multiplied = [
        [functional.linear(part, row.flatten(0, 1)) for row in own]
        for part, own in zip(parts, columns, strict=True)
    ]
    found = spread_shifted(multiplied, size, taps).repeat(2, 1, 1, 1)
    if taps > 1:
        rows = functional.linear(noise, kernel.flatten(0, 2)).view(-1, taps, taps, kernels)
        found = found + scatter_rows(rows, places, (2 * count, *size))
    else:
        found = found.flatten(0, 2).index_add(0, places, noise @ kernel[0, 0].T).view(plain.shape)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    for mine, wanted in zip(torch.autograd.grad((found * seed).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-3)


def head_and_rows(count: int = 300) -> tuple[SegmentationHead, Tensor, Tensor]:
    """Return a head whose batch norm has no neutral weights, rows away from 0, and how often each counts."""
    head = SegmentationHead(5, 24).train()
    for value in (head.norm.weight, head.norm.bias, head.last.weight):
        nn.init.normal_(value, mean=0.5, generator=draw(1))
    rows = 3 + 2 * torch.randn(count, 24, generator=draw(2))
    counts = torch.randint(0, 4, (count,), generator=draw(3))
    assert {0, 1, 2, 3} == set(counts.tolist())
    return head, rows, counts


def three_layers(head: SegmentationHead) -> nn.Sequential:
    """Return the same layers as torch has them."""
    norm, last = nn.BatchNorm1d(24), nn.Linear(24, 1, bias=False)
    norm.load_state_dict(head.norm.state_dict())
    last.load_state_dict(head.last.state_dict())
    return nn.Sequential(norm, nn.LeakyReLU(0.2), last)


def test_rows_that_count_several_times_are_rows_that_come_several_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heads, "CHUNK", 64)  # several, and the last one shorter
    head, rows, counts = head_and_rows()
    plain, own, repeated = three_layers(head), rows.clone().requires_grad_(), rows.clone().requires_grad_()
    origin = torch.repeat_interleave(torch.arange(len(rows)), counts)
    expected = plain(repeated[origin])[:, 0]
    found = head(own, counts.float())
    torch.testing.assert_close(found[origin], expected, rtol=1e-4, atol=1e-4)
    pull = torch.randn(len(origin), generator=draw(4))
    (expected * pull).sum().backward()
    (found * torch.zeros(len(rows)).index_add(0, origin, pull)).sum().backward()
    pairs = [
        (own.grad, repeated.grad),
        (head.norm.weight.grad, plain[0].weight.grad),
        (head.norm.bias.grad, plain[0].bias.grad),
        (head.last.weight.grad, plain[2].weight.grad),
    ]
    for mine, wanted in pairs:
        assert mine is not None
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-3)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(head.norm, name), getattr(plain[0], name), rtol=1e-5, atol=1e-5)
    # And so in use, where rows count alike.
    with torch.no_grad():
        torch.testing.assert_close(head.eval()(rows), plain.eval()(rows)[:, 0], rtol=1e-4, atol=1e-4)


def test_without_counts_every_row_counts_once() -> None:
    head, rows, _ = head_and_rows()
    plain = three_layers(head)
    torch.testing.assert_close(head(rows), plain(rows)[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.norm.running_var, plain[0].running_var)


def test_moments_far_from_zero_do_not_cancel() -> None:
    rows = 1000 + 0.1 * torch.randn(3000, 4, generator=draw(1))
    counts = torch.randint(0, 3, (3000,), generator=draw(2))
    total, mean, variance = heads.counted_moments(rows, counts.float())
    repeated = rows.repeat_interleave(counts, 0).double()
    assert float(total) == len(repeated)
    torch.testing.assert_close(mean.double(), repeated.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), repeated.var(0, correction=0), rtol=1e-3, atol=0)


def test_rounded_rows_give_nearly_the_same() -> None:
    results: list[list[Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        head, rows, counts = head_and_rows()
        leaf = rows.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            found = head(leaf, counts.float())
        assert found.dtype == torch.float32
        (found * (counts > 0)).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        weight, variance = head.norm.weight.grad, head.norm.running_var
        assert weight is not None
        assert variance is not None
        results.append([found.detach(), variance, weight, leaf.grad.float()])
    for exact, rounded in zip(*results, strict=True):
        spread = float(exact.std())
        assert spread > 0
        assert float((exact - rounded).abs().max()) < 0.1 * spread
        assert float((exact - rounded).abs().mean()) < 0.02 * spread


# --- every row of the ablation ---


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """Load the program that runs the ablation."""
    path = Path(__file__).parents[2] / "benchmarks" / "labels.py"
    spec = importlib.util.spec_from_file_location("labels_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def observed(config: SuperSimpleNetConfig) -> dict[str, Any]:
    """See what a config does, by what comes out."""
    built = build("supersimplenet", config, 0)
    assert isinstance(built, SuperSimpleNet)
    batch = mixed()
    assert batch.masks is not None
    size = built.feature_size(batch.encoded)
    real = functional.avg_pool2d(batch.masks, SIZE[0] // size[0]).repeat(2, 1, 1) == 1
    noisy = torch.stack([Losses(built, batch, seed).noisy for seed in range(8)])
    whole = noisy.shape[1] > B and bool(noisy[:, B].all()) and not noisy[:, 0].any()
    terms = built.train().loss(batch, draw())
    flows = None
    if "score" in terms:
        terms["score"].backward()  # type: ignore[no-untyped-call]
        flows = built.segmentation.first.weight.grad is not None
    return {
        "cells": size,
        "anomalies": "none" if not noisy.any() else "whole" if whole else "perlin",
        "noise on defects": bool((noisy & real[: noisy.shape[1]]).any()),
        "terms": set(terms),
        "score reaches the segmentation": flows,
        "last rate": SCHEDULES[config.schedule](1.0),
    }


THREE = STATISTICS
HALF = {"upscale": False}, {"cells": (8, 6)}
NO_HEAD = (
    {"classification_head": False, "statistics": THREE},
    {"terms": {"normal", "anomalous", "focal"}, "score reaches the segmentation": None},
)
WHOLE = {"anomalies": "whole"}, {"anomalies": "whole"}
OLD = (
    {"focal_loss": False, "schedule": "constant"},
    {"terms": {"normal", "anomalous", "score"}, "last rate": 1.0},
)
STOPPED = (
    {"stop_gradient": True, "clip_norm": 0.0},
    {"score reaches the segmentation": False},
)
FLOWING = {"stop_gradient": False}, {"score reaches the segmentation": True}
ON_DEFECTS = {"noise_on_defects": True}, {"noise on defects": True}
NOTHING = {"anomalies": "none"}, {"anomalies": "none"}
NO_FOCAL = {"focal_loss": False}, {"terms": {"normal", "anomalous"}}
Change = tuple[dict[str, Any], dict[str, Any]]
ROWS: dict[str, list[Change]] = {
    "SuperSimpleNet": [],
    "without upscaling": [HALF],
    "without the classification head": [NO_HEAD],
    "... and with SimpleNet's anomalies": [NO_HEAD, WHOLE],
    "old training": [OLD],
    "noise also on real defects": [ON_DEFECTS],
    "SimpleNet's anomalies": [WHOLE],
    "no synthetic anomalies": [NOTHING],
    "SimpleNet with these anomalies": [HALF, NO_HEAD, NO_FOCAL],
    "SimpleNet": [HALF, NO_HEAD, NO_FOCAL, WHOLE],
}
"""Of each row of the paper's table 4 the fields of the config that change, and what is seen of it."""


def changes(*several: Change) -> Change:
    """Join changes of fields and of what is seen, the later over the earlier."""
    fields: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    for more_fields, more_seen in several:
        fields |= more_fields
        seen |= more_seen
    return fields, seen


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {name: other[name] for name, value in one.items() if other[name] != value}


@pytest.mark.parametrize("supervision", ["none", "full"])
def test_each_row_of_the_ablation_changes_what_it_names_and_nothing_else(
    benchmark: ModuleType, supervision: Supervision
) -> None:
    rows = benchmark.ablation(argparse.Namespace(supervision=supervision))
    skipped = {"no synthetic anomalies", "noise also on real defects"} if supervision == "none" else set()
    assert set(rows) == set(ROWS) - skipped

    def config(row: dict[str, Any]) -> SuperSimpleNetConfig:
        small = {"backbone": "efficientnet_lite0", "layers": ("stage1", "stage2"), "hidden_channels": 16}
        known = configure(row["model"], settings=row["settings"] | small, supervision=row["supervision"])
        assert isinstance(known, SuperSimpleNetConfig)
        return known

    base = config(rows["SuperSimpleNet"])
    seen = observed(base)
    for name, row in rows.items():
        found = config(row)
        fields, effects = changes(*ROWS[name])
        if name == "old training":
            fields, effects = changes((fields, effects), STOPPED if supervision == "full" else FLOWING)
        if row["model"] == "simplenet" and supervision == "full":
            # SimpleNet knows no rules of the supervised setting.
            fields |= {"stop_gradient": True, "clip_norm": 0.0}
        assert differing(vars(base), vars(found)) == fields, name
        assert differing(seen, observed(found)) == effects, name


# --- what a method is told to learn from ---


def planned(root: Path, model: str = "supersimplenet", **options: Any) -> Plan:
    """Plan a run, as far as that goes without decoding an image."""
    return plan(TrainingRequest(data=root, out=root / "m.blemish", model=model, **options))


def test_methods_that_know_no_labels_say_so(tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", bad=1, train_bad=3)
    for model in ("efficientad-s", "efficientad-m"):
        found = planned(root, model)
        assert (found.supervision, found.parts.train_defects) == ("none", ())
        assert f"; {model} cannot use the 3 defective images" in found.description
        for asked in ("weak", "mixed", "full"):
            with pytest.raises(ConfigError, match=f"{model} supports supervision none, not {asked}"):
                planned(root, model, supervision=asked)
    assert planned(root, "simplenet").supervision == "full"
    found = planned(root, "simplenet", train_masks=0)
    assert found.supervision == "none"
    assert "; simplenet cannot use the 3 defective images" in found.description
    with pytest.raises(ConfigError, match="simplenet supports supervision none or mixed or full, not weak"):
        planned(root, "simplenet", supervision="weak")


@pytest.mark.parametrize(
    ("labels", "supervision", "threshold"),
    [
        ({"supervision": "none"}, "none", 0.2),
        ({"supervision": "weak"}, "weak", 0.2),
        ({"train_masks": "0"}, "weak", 0.2),
        ({"train_masks": "1"}, "mixed", 0.6),
        ({}, "full", 0.6),
    ],
)
def test_a_run_has_the_numbers_of_its_supervision(
    tmp_path: Path, labels: dict[str, Any], supervision: Supervision, threshold: float
) -> None:
    found = planned(drawn.data_set(tmp_path / "parts", train_bad=2), **labels)
    assert found.supervision == supervision
    usual = configure("supersimplenet", supervision=supervision)
    square = (usual.side, usual.side)  # of parts of 64 x 64
    assert found.config == dataclasses.replace(usual, image_size=square)
    assert isinstance(found.config, SuperSimpleNetConfig)
    assert found.config.perlin_threshold == threshold


def test_settings_with_nothing_to_learn_from_are_refused(tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", train_bad=1)
    nothing = {"anomalies": "none"}
    assert planned(root, settings=nothing).supervision == "full"
    with pytest.raises(
        ConfigError, match="with good images alone and anomalies=none there is nothing to learn"
    ):
        planned(root, settings=nothing, supervision="none")


@pytest.mark.parametrize("side", [2, 8])
def test_masks_are_widened_evenly_or_not_at_all(side: int) -> None:
    with pytest.raises(ConfigError, match=f"mask dilation {side}: expected an odd number of pixels, or 0"):
        make(mask_dilation=side)
    for fits in (0, 1, 7):
        assert make(mask_dilation=fits, flip_defects=False).label_rules.dilation == fits


def test_label_rules_are_those_of_the_config() -> None:
    assert make().label_rules == LabelRules(flips=True, dilation=0, weighted=False)
    changed = make(flip_defects=False, mask_dilation=7, distance_weights=True)
    assert changed.label_rules == LabelRules(flips=False, dilation=7, weighted=True)


@pytest.mark.parametrize("may", [False, True])
def test_noise_is_raised_only_where_it_may_be(may: bool) -> None:
    detector = make(raise_noise=may)
    detector.prepare([encoded(1)])
    before = float(detector.noise_std)
    said = detector.inspect([encoded(1)], draw())  # untrained: cells are not told apart
    assert bool(said) == may
    assert float(detector.noise_std) == pytest.approx(2 * before if may else before)


def test_a_whitening_adaptor_gives_all_directions_the_same_variance() -> None:
    detector, parts = (
        make(whitening=1e-6),
        [tuple(part[None] + 3 for part in pair) for pair in zip(*encoded(40), strict=True)],
    )
    note = detector.prepare(parts)
    rows = torch.cat([detector.adapted(part).flatten(0, 2) for part in parts])
    torch.testing.assert_close(rows.mean(0), torch.zeros(rows.shape[1]), rtol=0, atol=1e-3)
    torch.testing.assert_close(rows.T.cov(correction=0), torch.eye(rows.shape[1]), rtol=0, atol=2e-2)
    assert note.startswith("features spread by 1, ")
    other = make(whitening=1e-6)
    other.prepare(parts)
    assert torch.equal(detector.adaptor.weight, other.adaptor.weight)


# --- data at the edge, through a whole run ---

SMALL = drawn.TINY | {"layers": ("stage2",)}


class Runs:
    """Trainings that end before the model file is made."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.batches = folder, list[int]()
        self.weights = drawn.tiny_weights(folder / "weights.safetensors")
        self.facts: dict[str, Any] = {}
        self.events: list[Event] = []
        loss = SuperSimpleNet.loss

        def noted(detector: SuperSimpleNet, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            self.batches.append(len(batch.labels))
            return loss(detector, batch, generator)

        def keep(path: Path, detector: nn.Module, held: Any, facts: dict[str, Any], *rest: Any) -> None:
            assert all(value.isfinite().all() for value in detector.state_dict().values())
            self.facts = facts

        patch.setattr(SuperSimpleNet, "loss", noted)
        patch.setattr(run, "finalise", keep)

    def train(self, root: Path, settings: dict[str, Any] | None = None, **changes: Any) -> list[int]:
        """Train for two epochs; return the sizes of the batches."""
        self.batches.clear()
        given: dict[str, Any] = {"epochs": 2, "precision": "fp32", "device": "cpu", "weights": self.weights}
        given |= {"model": "supersimplenet", "settings": SMALL | {"batch_size": 7} | (settings or {})}
        out = self.folder / "out" / "m.blemish"
        run.train(root, out=out, report=self.events.append, **given | changes)
        assert list(out.parent.iterdir()) == []
        return list(self.batches)

    def refused(self, root: Path, **changes: Any) -> str:
        """Train, see that it is refused before the first step, and return the sentence."""
        with pytest.raises(BlemishError) as raised:
            self.train(root, **changes)
        assert self.batches == []
        assert not list(self.folder.glob("out/*"))
        assert "\n" not in str(raised.value)
        return str(raised.value)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_one_defect_trains_and_so_does_a_last_batch_of_one(runs: Runs, tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", bad=1, train_bad=1)
    assert runs.train(root) == [7, 1, 7, 1]  # the defect in four positions and as many good images
    counts = [runs.facts[name] for name in ("good_images", "defective_images", "masked_images")]
    assert counts == [7, 1, 1]
    assert runs.train(root, train_defects=1, supervision="weak") == [7, 1, 7, 1]
    assert runs.train(root, settings={"flip_defects": False}) == [2, 2]
    head = {"classification_head": True, "statistics": "head", "batch_size": 3}
    assert runs.train(root, settings=head, supervision="none") == [3, 3, 1] * 2


def test_defects_without_masks_are_weak_labels(runs: Runs, tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", bad=0, train_bad=2)
    for path in (root / f"ground_truth/{drawn.KIND}").iterdir():
        path.unlink()
    runs.train(root)
    said = [event.message for event in runs.events]
    assert "supervision weak: 7 good and 2 defective training images, 0 with masks" in said
    assert runs.facts["run"]["supervision"] == "weak"
    assert (runs.facts["defective_images"], runs.facts["masked_images"]) == (2, 0)
    refused = runs.refused(root, supervision="full")
    assert refused.startswith(
        "found 2 defective training images, 0 of them with masks; supervision full expects"
    )


def test_a_defect_with_an_empty_mask_trains_as_unmasked(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = drawn.data_set(tmp_path / "parts", bad=0, train_bad=2)
    mask = root / f"ground_truth/{drawn.KIND}/100_mask.png"
    images.write_png(mask, np.zeros((64, 64), np.uint8))
    runs.train(root)
    first = root / f"train/{drawn.KIND}/100.png"
    assert caplog.messages == [f"ignoring the empty masks of 1 training defects; the first is {first}"]
    assert (runs.facts["defective_images"], runs.facts["masked_images"]) == (2, 1)


def test_a_mask_of_another_size_is_refused_before_training(runs: Runs, tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", bad=0, train_bad=2)
    mask = root / f"ground_truth/{drawn.KIND}/101_mask.png"
    images.write_png(mask, np.full((64, 32), 255, np.uint8))
    said = runs.refused(root)
    assert said == f"mask {mask} is 64 x 32 pixels (height x width); expected its image's 64 x 64"
    assert runs.train(root, supervision="weak") == [7, 7, 2] * 2  # where none is read, none is refused


def test_too_few_good_images_are_refused(runs: Runs, tmp_path: Path) -> None:
    one = drawn.data_set(tmp_path / "one", train=1, bad=0, train_bad=4)
    assert runs.refused(one) == f"found 1 good images for training in {one}; expected at least 2"
    none = drawn.data_set(tmp_path / "none", train=0, good=0, bad=3, train_bad=4)
    said = runs.refused(none, layout="folder")
    assert "good" in said
    three = drawn.data_set(tmp_path / "three", train=3, bad=0, train_bad=4)
    assert "expected at least 4, of which 2 are held out" in runs.refused(three)


def test_more_defects_than_there_are_cannot_train(runs: Runs, tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", bad=3)
    assert runs.refused(root, train_defects=4) == "train defects 4: only 3 are available"
    said = runs.refused(root, supervision="weak")
    assert said.endswith(
        "supervision weak expects at least one, from the data set's split or --train-defects"
    )
    with pytest.raises(DataError):
        runs.train(root, supervision="full", train_defects=0)
