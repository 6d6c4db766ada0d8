"""SuperSimpleNet's network, training loss and scoring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish.backbones import Backbone, choose_layers
from blemish.detectors import edges, ops
from blemish.detectors.cells import places
from blemish.detectors.on_backbone import OnBackbone
from blemish.detectors.supersimplenet.anomalies import Remade, draw_remade, real_masks
from blemish.detectors.supersimplenet.config import PUBLISHED_NOISE, SuperSimpleNetConfig
from blemish.detectors.supersimplenet.heads import (
    ClassificationHead,
    SegmentationHead,
    focal,
    layer_columns,
    noisy_indices,
    round_up,
    scatter_rows,
    segmentation_losses,
    spread,
    spread_shifted,
)
from blemish.errors import ConfigError
from blemish.types import Batch, LabelRules

DOUBLINGS = 3
"""How many times the noise may be doubled."""
TOLD_APART = 0.6
"""Share of noisy and clean cells that must be classified correctly once training is under way."""


class SuperSimpleNet(OnBackbone):
    """Frozen backbone, adaptor, segmentation head and, if configured, classification head."""

    noise_std: Tensor
    doublings: Tensor
    kernel: Tensor
    ring_gain: Tensor
    ring_shift: Tensor

    def __init__(self, config: SuperSimpleNetConfig) -> None:
        super().__init__()
        self.config: SuperSimpleNetConfig = config
        self.backbone = Backbone(config.backbone, choose_layers(config.backbone, config.layers))
        joined, coarsest = sum(self.backbone.channels), self.backbone.channels[-1]
        channels = joined - coarsest + min(coarsest, config.components or coarsest)
        # The paper's 1x1 convolutions, as linear layers on cells with their channels last.
        self.adaptor = nn.Linear(joined, channels)
        hidden = config.hidden_channels or max(256, 2 * channels // 3)
        self.segmentation = SegmentationHead(channels, hidden, placed=config.misplaced > 0)
        self.classification = ClassificationHead(channels) if config.classification_head else None
        for module in (self.adaptor, self.segmentation, self.classification):
            for part in module.modules() if module is not None else ():
                if isinstance(part, nn.Conv2d | nn.Linear):
                    nn.init.xavier_normal_(part.weight)
        self.given_noise = config.noise or PUBLISHED_NOISE.get(config.backbone)
        self.register_buffer("noise_std", torch.tensor(self.given_noise or 1.0))
        self.register_buffer("doublings", torch.tensor(0))
        size = 2 * math.ceil(3 * config.blur_sigma) + 1
        self.register_buffer("kernel", ops.gaussian_kernel(config.blur_sigma or 1.0, size))
        for name, value in zip(("ring_gain", "ring_shift"), edges.neutral(), strict=True):
            self.register_buffer(name, value)

    @property
    @override
    def config_buffers(self) -> set[str]:
        measured = {"ring_gain", "ring_shift"}  # anew, after the last step
        return {"kernel", *measured, *(["noise_std"] if self.given_noise else [])}

    @property
    @override
    def label_rules(self) -> LabelRules:
        return LabelRules(self.config.flip_defects, self.config.mask_dilation, self.config.distance_weights)

    @override
    def prepare(self, encoded: Iterable[tuple[Tensor, ...]]) -> str:
        """Measure the spread of the adapted features, and set the noise level by it unless that is given.

        The spread is the root mean square, over channels, of the standard deviation of a channel. It is
        measured after the adaptor, because the noise is added there. The adaptor starts at random with unit
        gain, or as a whitening of the features.
        """
        with torch.no_grad():
            if self.config.whitening:
                spread = self.whiten(encoded)
            else:
                planes = (self.adapted(parts).permute(0, 3, 1, 2) for parts in encoded)
                spread = float(ops.channel_moments(planes)[1].mean().sqrt())
        if not self.given_noise:
            self.noise_std.fill_(self.config.noise_ratio * spread)
        return f"features spread by {spread:.3g}, noise {float(self.noise_std):.3g}"

    def whiten(self, encoded: Iterable[tuple[Tensor, ...]]) -> float:
        """Start the adaptor as a whitening of the features; return their spread after it.

        Of the coarsest layer, `components` may leave the leading principal components only. The whitened axes
        are rotated at random, after which all channels have about the same variance.
        """
        mean, covariance = ops.cell_covariance(self.features(parts).flatten(0, 2) for parts in encoded)
        axes = self.leading_axes(covariance)
        matrix, variances = ops.whitening(axes.T @ covariance @ axes, self.config.whitening)
        rotation = torch.linalg.qr(self.adaptor.weight.double().cpu())[0]
        weight = rotation @ matrix.T @ axes.T
        self.adaptor.weight.copy_(weight)
        self.adaptor.bias.copy_(-weight @ mean)
        return float(variances.mean().sqrt())

    def leading_axes(self, covariance: Tensor) -> Tensor:
        """Return the (C, kept) axes, as columns, that are kept of all layers, given the (C, C) covariance."""
        count, kept = self.backbone.channels[-1], self.adaptor.out_features
        axes = torch.eye(len(covariance), dtype=covariance.dtype)[:, :kept]
        if kept < len(covariance):
            own = ops.principal_axes(covariance[-count:, -count:])[0]
            axes[-count:, -count:] = 0
            axes[-count:, len(covariance) - count :] = own[:, : kept - len(covariance)]
        return axes

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

    def feature_size(self, parts: Sequence[Tensor]) -> tuple[int, int]:
        """Return the height and width of the features in cells, from (B, h_i, w_i, C) parts."""
        factor = 2 if self.config.upscale else 1
        return factor * parts[0].shape[1], factor * parts[0].shape[2]

    def features(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """Join the backbone's outputs into (B, h, w, C), before the adaptor."""
        size = self.feature_size(encoded)
        return torch.cat([spread([part], size) for part in encoded], 3)

    def adapted(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """Return the adapted features, (B, h, w, C)."""
        parts = [
            functional.linear(x, weight)
            for x, weight in zip(encoded, layer_columns(self.adaptor.weight, encoded), strict=True)
        ]
        return spread(parts, self.feature_size(encoded)) + self.adaptor.bias

    def hidden(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """Return the segmentation head's first layer of the adapted features, (B, h, w, hidden)."""
        first = self.segmentation.first
        weights = (first.weight @ columns for columns in layer_columns(self.adaptor.weight, encoded))
        parts = [functional.linear(x, weight) for x, weight in zip(encoded, weights, strict=True)]
        bias = functional.linear(self.adaptor.bias, first.weight, first.bias)
        return spread(parts, self.feature_size(encoded)) + bias

    def placed(self, size: Sequence[int]) -> Tensor | None:
        """Return what a cell's place adds to the head's first layer, (h w, hidden), if it is read."""
        layer = self.segmentation.place
        if layer is None:
            return None
        added: Tensor = layer(places(size[0], size[1]).flatten(0, 1).to(layer.weight))
        return added

    @override
    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the loss terms on two copies of every image, each with its own noise mask (section 3.2)."""
        size = self.feature_size(batch.encoded)
        masks, weights = real_masks(batch, size)
        if self.config.anomalies != "none":
            masks, weights = masks.repeat(2, 1, 1), weights.repeat(2, 1, 1)
        noisy = self.draw_masks(len(masks), size, generator)
        if not self.config.noise_on_defects:
            noisy = noisy & ~masks
        masked = batch.masked.repeat(len(masks) // len(batch.masked))
        if not self.config.noise_on_unmasked:
            noisy = noisy & masked[:, None, None]
        noise = self.draw_noise(int(noisy.sum()), generator)
        target = masks | noisy
        weights = torch.where(masks, weights, 1.0) * masked[:, None, None]
        labels = batch.labels.repeat(len(masks) // len(batch.labels))
        labels = torch.maximum(labels, target.flatten(1).any(1).float())
        remade = draw_remade(self.config, noise, len(batch.labels) * size[0] * size[1], generator)
        return self.losses(batch.encoded, noisy, noise, target, labels, weights, remade)

    def draw_masks(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Sample (count, h, w) boolean masks of the cells that receive noise."""
        if self.config.anomalies == "perlin":
            return ops.perlin_masks(count, size, self.config.perlin_threshold, generator)
        noisy = torch.zeros(count, *size, dtype=torch.bool, device=generator.device)
        if self.config.anomalies == "whole":
            noisy[count // 2 :] = True
        return noisy

    def draw_noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Sample a row of C noise values for each of `count` noisy cells, padded with rows of zeros.

        The padding is to a round number: a new number of rows at every step would each time leave a freed
        buffer of a new size.
        """
        shape, device = (round_up(count), self.adaptor.out_features), self.noise_std.device
        noise = torch.randn(shape, generator=generator, device=device).mul_(self.noise_std)
        noise[count:] = 0
        return noise

    def losses(
        self,
        encoded: tuple[Tensor, ...],
        noisy: Tensor,
        noise: Tensor,
        masks: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        remade: Remade | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss terms of section 3.3 on N images: one or more copies of the B encoded ones.

        noisy: (N, h, w) booleans, the cells that receive the rows of `noise` in order (surplus rows are
        zeros); masks: (N, h, w) booleans, the anomalous cells; labels: (N,), whether each image is anomalous;
        weights: (N, h, w), those of the cells in the segmentation loss, 0 where a cell is left out; remade:
        anomalies made of good cells.
        """
        found = self.segment(encoded, noisy, noise, remade)
        logits, strays = found[: noisy.numel()], found[noisy.numel() :]
        target = masks.flatten().float()
        weight = torch.ones_like(target) if weights is None else weights.flatten().float()
        terms = segmentation_losses(logits, target, weight, focal_loss=self.config.focal_loss)
        if len(strays):
            terms["misplaced"] = self.config.misplaced * (0.5 - strays).relu().mean()
        if self.classification is not None:
            seen = logits.detach() if self.config.stop_gradient else logits
            score = self.classify(encoded, seen.view(noisy.shape), noisy, noise).float()
            terms["score"] = focal(score, labels).mean()
        return terms

    def segment(
        self, encoded: tuple[Tensor, ...], noisy: Tensor, noise: Tensor, remade: Remade | None = None
    ) -> Tensor:
        """Return the segmentation logits of every cell, then those of misplaced cells, float32.

        A cell without noise is the same in all copies, so it is computed once: the rows are the cells of the
        B images, followed by the noisy ones and the misplaced ones.
        """
        bare = self.hidden(encoded).flatten(0, 2)
        placed = self.placed(noisy.shape[1:])
        rows = bare if placed is None else (bare.view(-1, *placed.shape) + placed).flatten(0, 1)
        cells, copies = len(rows), noisy.numel() // len(rows)
        if not len(noise):
            noisy = torch.zeros_like(noisy)
        at = noisy.flatten().nonzero()[:, 0]
        origin = functional.pad(at % cells, (0, len(noise) - len(at)))
        added = rows[origin] + functional.linear(noise, self.segmentation.first.weight).to(rows.dtype)
        strays = bare[:0]
        if remade is not None:
            reach = remade.reach[:, None].to(rows.dtype)
            added = added + reach * (bare[remade.pairs[0]] - bare[remade.pairs[1]])
            if placed is not None:
                strays = bare[remade.strays[0]] + placed[remade.strays[1] % len(placed)]
        counts = (~noisy).view(copies, cells).sum(0).float()
        counts = functional.pad(counts, (0, len(at)), value=1.0)
        counts = functional.pad(counts, (0, len(noise) - len(at)))
        counts = functional.pad(counts, (0, len(strays)), value=1.0)
        logits: Tensor = self.segmentation(torch.cat([rows, added, strays]), counts).float()
        clean, changed = logits[:cells].repeat(copies), logits[cells : cells + len(at)]
        return torch.cat([clean.index_copy(0, at, changed), logits[cells + len(noise) :]])

    def classify(
        self,
        encoded: tuple[Tensor, ...],
        segmentation: Tensor,
        noisy: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the (N,) logits of the classification head, given the (N, h, w) segmentation."""
        head = self.classification
        if head is None:
            raise ConfigError(
                "this model has no classification head; expected --set classification_head=true"
            )
        adapt = self.config.adapt_classification_features
        kernel = head.weights()[0]
        columns = layer_columns(self.adaptor.weight if adapt else kernel, encoded)
        parts = []
        for x, part in zip(encoded, columns, strict=True):
            weight = kernel @ part if adapt else part
            parts.append([functional.linear(x, row.flatten(0, 1)) for row in weight])
        size = self.feature_size(encoded)
        seen = spread_shifted(parts, size, len(kernel))
        if noisy is not None and noise is not None:
            seen = seen.repeat(len(noisy) // len(seen), 1, 1, 1)
            rows = functional.linear(noise, kernel.flatten(0, 2)).view(-1, *kernel.shape[:3])
            seen = seen + scatter_rows(
                rows.to(seen.dtype), noisy_indices(noisy, len(noise)), (len(noisy), *size)
            )
        score: Tensor = head(seen, self.adaptor.bias if adapt else None, segmentation)
        return score

    @override
    def inspect(self, encoded: Iterable[tuple[Tensor, ...]], generator: torch.Generator) -> str:
        """Check whether noisy and clean cells are told apart on held-out images; if not, double the noise.

        This happens at most DOUBLINGS times: if it does not help, the noise level is not the cause.
        """
        raising = self.config.raise_noise and self.config.anomalies != "none"
        if not raising or self.given_noise or self.doublings >= DOUBLINGS:
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

    @property
    @override
    def settles_on(self) -> int:
        return edges.IMAGES if self.config.edges == "rings" else 0

    @override
    def settle(self, batches: Iterable[Batch]) -> None:
        """Measure the rings of the map, for `edges=rings`."""
        with torch.no_grad():
            gain, shift = edges.measure_rings(self.cells(batch.encoded) for batch in batches)
        self.ring_gain.copy_(gain)
        self.ring_shift.copy_(shift)

    def cells(self, encoded: tuple[Tensor, ...]) -> Tensor:
        """Return the (B, h, w) segmentation logits in evaluation mode, before anything is done at edges."""
        hidden = self.hidden(encoded)
        placed = self.placed(hidden.shape[1:3])
        if placed is not None:
            hidden = hidden + placed.view(hidden.shape[1:])
        logits: Tensor = self.segmentation(hidden.flatten(0, 2))
        return logits.view(hidden.shape[:3])

    @property
    def blind_margin(self) -> int:
        """Width of the margin that `edges=blind` leaves out, in cells of the map."""
        return edges.MARGIN * (2 if self.config.upscale else 1)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the map, which is the logits resized and blurred (section 3.4), and the statistics.

        The classification head reads the logits as they were in training, whatever is done at the edges.
        """
        encoded = self.encode(images)
        cells = self.cells(encoded)
        gain, shift = (edges.by_cell(each, cells.shape[1:]) for each in (self.ring_gain, self.ring_shift))
        shown = edges.treated(cells, self.config.edges, gain, shift, self.blind_margin)
        size = (images.shape[2], images.shape[3])
        maps = functional.interpolate(shown[:, None], size, mode="bilinear")[:, 0]
        if self.config.blur_sigma:
            maps = ops.gaussian_blur(maps, self.kernel)
        head = partial(self.classify, encoded, cells)
        return maps, ops.map_statistics(maps, shown, self.config.statistics, head=head)

    @override
    def fused(self) -> nn.Module:
        from blemish.detectors.supersimplenet.fused import FusedSuperSimpleNet

        return FusedSuperSimpleNet(self).eval()
