"""SuperSimpleNet: tell frozen features from the same features with noise under Perlin masks.

Rolih, Fučka, Skočaj: "SuperSimpleNet: Unifying Unsupervised and Supervised Learning for Fast and Reliable
Surface Defect Detection", ICPR 2024. Section 3.1 is the network, 3.2 the synthetic anomalies, 3.3 the losses.

Departures from the paper, each one word in the config, all undone by `--preset paper`:
- the noise is set by the features' own spread, for the published 0.015 belongs to one set of weights;
- trained on good images only, the image score comes from the map, so the classification head is not built
  (the paper's ablation has both detection and localisation higher without it);
- the run is shorter, in smaller batches, under a one-cycle schedule, in bfloat16 where the processor has it.
In both presets the backbone's outputs are kept in half precision.

Everything from the backbone's outputs to the segmentation head's batch norm is linear. So the 1x1
convolutions run before the upscaling, on a quarter and a sixteenth of the positions, upscaling and averaging
are one product with a matrix per axis, and noise is added behind, on the cells that have any: the same
numbers, several times faster in training and at inference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish import ops
from blemish.backbones import BACKBONES, Backbone, choose_layers, fill_backbone
from blemish.detectors.base import Config, Detector
from blemish.errors import ConfigError
from blemish.types import Batch, FloatArray

ROUND = 4096
"""Noisy cells of a step are filled up to a multiple of this."""
DOUBLINGS = 3
"""How often the noise may be raised."""
TOLD_APART = 0.6
"""Share of cells, noisy and clean alike, that must be told apart when training has got under way."""


@dataclass(frozen=True, kw_only=True)
class SuperSimpleNetConfig(Config):
    """SuperSimpleNet's numbers."""

    backbone: str = "efficientnet_lite0"
    layers: tuple[str, ...] = ()
    """Backbone outputs that are joined, finest first; empty: the backbone's default."""
    batch_size: int = 8
    epochs: int = 0
    steps: int = 1000
    adaptor_learning_rate: float = 1e-4
    adaptor_weight_decay: float = 1e-2
    head_learning_rate: float = 2e-4
    head_weight_decay: float = 1e-5
    upscale: bool = True
    """Double the finest layer's resolution."""
    hidden_channels: int = 0
    """Of the segmentation head; 0: two thirds of the features' channels, as in the paper, at least 256."""
    classification_head: bool = False
    adapt_classification_features: bool = True
    stop_gradient: bool = True
    """Keep the classification head's gradient out of the segmentation map (good-only training)."""
    noise: float = 0.0
    """Standard deviation of the synthetic noise; 0: the backbone's published one, else by noise_ratio."""
    noise_ratio: float = 0.5
    """Noise in shares of the features' own spread."""
    perlin_threshold: float = 0.2
    focal_loss: bool = True
    blur_sigma: float = 4.0
    """Of the finished map, in pixels of the network's input."""
    statistics: tuple[str, ...] = ("maximum", "smoothed_maximum", "top_mean")


PAPER = {
    "backbone": "wide_resnet50_2",
    "batch_size": 32,
    "steps": 0,
    "epochs": 300,
    "schedule": "step-80-90",
    "classification_head": True,
    "hidden_channels": 1024,
    "noise": 0.015,
    "statistics": ("head",),
}


class SuperSimpleNet(Detector):
    """Frozen backbone, adaptor, segmentation head, and the classification head where it is asked for."""

    noise_std: Tensor
    doublings: Tensor
    kernel: Tensor

    def __init__(self, config: SuperSimpleNetConfig) -> None:
        super().__init__()
        self.config: SuperSimpleNetConfig = config
        if "head" in config.statistics and not config.classification_head:
            raise ConfigError("the statistic 'head' needs --set classification_head=true")
        self.backbone = Backbone(config.backbone, choose_layers(config.backbone, config.layers))
        channels = sum(self.backbone.channels)
        # The paper's 1x1 convolutions, as linear layers on cells whose channels lie last.
        self.adaptor = nn.Linear(channels, channels)
        hidden = config.hidden_channels or max(256, 2 * channels // 3)
        self.segmentation = SegmentationHead(channels, hidden)
        self.classification = ClassificationHead(channels) if config.classification_head else None
        for module in (self.adaptor, self.segmentation, self.classification):
            for part in module.modules() if module is not None else ():
                if isinstance(part, nn.Conv2d | nn.Linear):
                    nn.init.xavier_normal_(part.weight)
        self.given_noise = config.noise or BACKBONES[config.backbone].published_noise
        self.register_buffer("noise_std", torch.tensor(self.given_noise or 1.0))
        self.register_buffer("doublings", torch.tensor(0))
        size = 2 * math.ceil(3 * config.blur_sigma) + 1
        self.register_buffer("kernel", ops.gaussian_kernel(config.blur_sigma or 1.0, size))

    @property
    @override
    def pretrained_name(self) -> str:
        return self.config.backbone

    @override
    def load_pretrained(self, path: Path | None) -> None:
        fill_backbone(self.backbone, self.config.backbone, path)

    @override
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Give the backbone's outputs as (B, h_i, w_i, C_i)."""
        return tuple(x.permute(0, 2, 3, 1).contiguous() for x in self.backbone(images))

    @override
    def prepare(self, encoded: Iterable[tuple[Tensor, ...]]) -> str:
        """Measure the spread of the adapted features, and set the noise by it unless its level is given.

        The spread is the root mean square over channels of a channel's standard deviation. The adaptor starts
        with unit gain, so it is measured behind it: there the noise is added.
        """
        with torch.no_grad():
            _, variance = ops.channel_moments(self.adapted(parts).permute(0, 3, 1, 2) for parts in encoded)
        spread = float(variance.mean().sqrt())
        if not self.given_noise:
            self.noise_std.fill_(self.config.noise_ratio * spread)
        return f"features spread by {spread:.3g}, noise {float(self.noise_std):.3g}"

    @override
    def optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        heads = [*self.segmentation.parameters()]
        if self.classification is not None:
            heads += self.classification.parameters()
        adaptor = {"lr": c.adaptor_learning_rate, "weight_decay": c.adaptor_weight_decay}
        head = {"lr": c.head_learning_rate, "weight_decay": c.head_weight_decay}
        return torch.optim.AdamW(
            [{"params": list(self.adaptor.parameters()), **adaptor}, {"params": heads, **head}], fused=True
        )

    def spread(self, parts: Iterable[Tensor]) -> Tensor:
        """Resize (B, h_i, w_i, C) parts to the feature size, average over 3x3 cells, and sum: (B, h, w, C).

        Resizing and averaging are linear along each axis, so both are two products with fixed matrices.
        """
        parts = list(parts)
        height, width = self.feature_size(parts)
        tall = [torch.einsum("yh,bhwc->bywc", axis_matrix(x.shape[1], height).to(x), x) for x in parts]
        across = torch.cat([axis_matrix(x.shape[2], width) for x in parts], 1)
        return torch.matmul(across.to(tall[0]), torch.cat(tall, 2))

    def feature_size(self, parts: Sequence[Tensor]) -> tuple[int, int]:
        """Say the height and width in cells, from (B, h_i, w_i, C) parts."""
        factor = 2 if self.config.upscale else 1
        return factor * parts[0].shape[1], factor * parts[0].shape[2]

    def features(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """Join the backbone's outputs into (B, h, w, C), before the adaptor."""
        before, padded = 0, []
        for x in encoded:
            after = self.adaptor.in_features - before - x.shape[3]
            padded.append(functional.pad(x, (before, after)))
            before += x.shape[3]
        return self.spread(padded)

    def adapted_parts(self, encoded: tuple[Tensor, ...]) -> list[Tensor]:
        """Multiply each layer with its columns of the adaptor, at its own size, without the bias."""
        columns = torch.split(self.adaptor.weight, list(self.backbone.channels), 1)
        return [functional.linear(x, weight) for x, weight in zip(encoded, columns, strict=True)]

    def adapted(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """Give the adapted features (B, h, w, C)."""
        return self.spread(self.adapted_parts(encoded)) + self.adaptor.bias

    def hidden(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """Give the segmentation head's first convolution of the adapted features, (B, h, w, hidden)."""
        first = self.segmentation.first
        parts = [functional.linear(x, first.weight) for x in self.adapted_parts(encoded)]
        return self.spread(parts) + functional.linear(self.adaptor.bias, first.weight, first.bias)

    @override
    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Section 3.2: two copies of every image, each with noise under a mask of its own."""
        masks = self.draw_masks(2 * len(batch.labels), self.feature_size(batch.encoded), generator)
        noise = self.draw_noise(int(masks.sum()), generator)
        labels = torch.maximum(batch.labels.repeat(2), masks.flatten(1).any(1).float())
        return self.losses(batch.encoded, masks, noise, masks, labels)

    def draw_masks(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw (count, h, w) boolean masks of where noise goes."""
        return ops.perlin_masks(count, size, self.config.perlin_threshold, generator)

    def draw_noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw noise, a row of C for each of `count` noisy cells, and rows of zeros up to a round number.

        A number of rows that is new at every step would leave a freed buffer of a new size at every step.
        """
        shape, device = (-(-count // ROUND) * ROUND, self.adaptor.out_features), self.noise_std.device
        noise = torch.randn(shape, generator=generator, device=device).mul_(self.noise_std)
        noise[count:] = 0
        return noise

    def losses(
        self, encoded: tuple[Tensor, ...], noisy: Tensor, noise: Tensor, masks: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Section 3.3, on N = one or more copies of the B encoded images.

        noisy: (N, h, w) booleans, the cells that get the rows of `noise` in order (what rows are left over
        are zeros); masks: (N, h, w) booleans,
        what is anomalous; labels: (N,) likewise of whole images.
        """
        logits = self.segment(encoded, noisy, noise)
        target = masks.flatten().float()
        normal, anomalous = (1 - target) * (0.5 + logits).relu(), target * (0.5 - logits).relu()
        terms = {
            "normal": normal.sum() / (1 - target).sum().clamp(min=1),
            "anomalous": anomalous.sum() / target.sum().clamp(min=1),
        }
        if self.config.focal_loss:
            terms["focal"] = focal(logits, target)
        if self.classification is not None:
            size = self.feature_size(encoded)
            seen = logits.detach() if self.config.stop_gradient else logits
            score = self.classification(
                self.classified(encoded, noisy, noise), seen.view(-1, 1, *size)
            ).float()
            terms["score"] = focal(score, labels)
        return terms

    def segment(self, encoded: tuple[Tensor, ...], noisy: Tensor, noise: Tensor) -> Tensor:
        """Give the segmentation logits of every cell, (N h w,) float32.

        Cells are rows of a matrix here, so that noise can be added to a few of them.
        """
        rows = self.hidden(encoded).flatten(0, 2).repeat(len(noisy) // len(encoded[0]), 1)
        if len(noise):
            added = functional.linear(noise, self.segmentation.first.weight)
            rows = rows.index_add(0, places(noisy, len(noise)), added.to(rows.dtype))
        logits: Tensor = self.segmentation(rows)
        return logits.float()

    def classified(self, encoded: tuple[Tensor, ...], noisy: Tensor, noise: Tensor) -> Tensor:
        """Give what the classification head reads, (N, C, h, w), with the noise."""
        clean = self.adapted(encoded) if self.config.adapt_classification_features else self.features(encoded)
        rows = clean.repeat(len(noisy) // len(clean), 1, 1, 1).flatten(0, 2)
        rows = rows.index_add(0, places(noisy, len(noise)), noise.to(rows.dtype))
        return rows.view(*noisy.shape, -1).permute(0, 3, 1, 2)

    @override
    def inspect(self, encoded: Iterable[tuple[Tensor, ...]], generator: torch.Generator) -> str:
        """See whether noisy cells are told from clean ones on held-out images; if not, double the noise.

        At most DOUBLINGS times: what then still fails does not fail for want of noise.
        """
        if self.given_noise or self.doublings >= DOUBLINGS:
            return ""
        right = []
        self.eval()
        with torch.no_grad():
            for parts in encoded:
                shape = (1, *self.feature_size(parts))
                noisy = torch.rand(shape, generator=generator, device=generator.device) < 0.5
                logits = self.segment(parts, noisy, self.draw_noise(int(noisy.sum()), generator))
                right.append(((logits > 0) == noisy.flatten()).double().mean())
        self.train()
        share = float(torch.stack(right).mean())
        if share >= TOLD_APART:
            return ""
        self.noise_std.mul_(2)
        self.doublings += 1
        raised = f"noise raised to {float(self.noise_std):.3g}"
        return f"only {share:.0%} of noisy and clean cells are told apart; {raised}"

    @override
    def finish(self, images: Iterable[Tensor]) -> None:
        """Nothing to learn from the held-out images."""

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Section 3.4: the logits, resized and blurred, are the map."""
        encoded = self.encode(images)
        hidden = self.hidden(encoded)
        cells: Tensor = self.segmentation(hidden.flatten(0, 2)).view(hidden.shape[:3])
        size = (images.shape[2], images.shape[3])
        maps = functional.interpolate(cells[:, None], size, mode="bilinear")[:, 0]
        if self.config.blur_sigma:
            maps = ops.gaussian_blur(maps, self.kernel)
        statistics = ops.map_statistics(maps, cells, self.config.statistics)
        if self.classification is not None and "head" in self.config.statistics:
            adapt = self.config.adapt_classification_features
            features = self.adapted(encoded) if adapt else self.features(encoded)
            statistics["head"] = self.classification(features.permute(0, 3, 1, 2), cells[:, None])
        return maps, torch.stack([statistics[name] for name in self.config.statistics], 1)


def places(noisy: Tensor, count: int) -> Tensor:
    """Give the places of (N, h, w) noisy cells in order, then the first cell's up to `count`."""
    found = noisy.flatten().nonzero()[:, 0]
    return functional.pad(found, (0, count - len(found)))


class SegmentationHead(nn.Module):
    """Map the first layer's output of any number of cells, (cells, hidden), to (cells,) logits.

    `first` is applied by the detector, which knows how to do so on few positions.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.last = nn.Linear(hidden, 1, bias=False)

    @override
    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.last(functional.leaky_relu(self.norm(rows), 0.2))
        return logits[:, 0]


class ClassificationHead(nn.Module):
    """Map (B, C, h, w) features and a (B, 1, h, w) segmentation to (B,) score logits."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Sequential(
            nn.Conv2d(channels + 1, 128, 5, padding="same"), nn.BatchNorm2d(128), nn.ReLU()
        )
        self.linear = nn.Linear(2 * 128 + 2, 1)

    @override
    def forward(self, features: Tensor, segmentation: Tensor) -> Tensor:
        seen = self.convolution(torch.cat([features, segmentation.to(features.dtype)], 1))
        pooled = [x for part in (seen, segmentation) for x in (part.amax((2, 3)), part.mean((2, 3)))]
        score: Tensor = self.linear(torch.cat(pooled, 1))
        return score[:, 0]


def axis_matrix(cells: int, length: int) -> Tensor:
    """Make the (length, cells) matrix that resizes an axis linearly, ends aligned, and averages three cells.

    Beyond the ends are zeros, which count: 3x3 averaging with padding, as in SimpleNet.
    """
    return torch.from_numpy(axis_weights(cells, length))


@lru_cache(maxsize=64)
def axis_weights(cells: int, length: int) -> FloatArray:
    """Compute `axis_matrix` with NumPy: a tensor made while torch traces is a stand-in, and would be kept."""
    places = np.linspace(0, cells - 1, length)[:, None]
    resized = np.pad(np.maximum(0, 1 - np.abs(places - np.arange(cells))), ((1, 1), (0, 0)))
    averaged: FloatArray = ((resized[:-2] + resized[1:-1] + resized[2:]) / 3).astype(np.float32)
    return averaged


def focal(logits: Tensor, targets: Tensor, gamma: float = 4.0) -> Tensor:
    """Average the focal loss of logits against 0/1 targets, without class weights."""
    entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return ((1 - torch.exp(-entropy)) ** gamma * entropy).mean()
