"""PaDiM's features, fitting and scoring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from blemish import seeding
from blemish.backbones import Backbone, choose_layers
from blemish.detectors import cells, edges, gaussians, ops
from blemish.detectors.base import ImagePass, first_images
from blemish.detectors.on_backbone import OnBackbone
from blemish.detectors.padim.config import PaDiMConfig
from blemish.errors import ConfigError
from blemish.types import Batch

FEWEST = 3
"""Good images needed: leaving one of two out would leave no variance."""


class Samples:
    """Rows of all training images, as (n, positions, D) samples; can be iterated more than once.

    make: returns the (B, P, D) rows of encoded images; pooled: whether all positions are taken for one.
    """

    def __init__(
        self, batches: Iterable[Batch], make: Callable[[Sequence[Tensor]], Tensor], pooled: bool
    ) -> None:
        self.batches, self.make, self.pooled = batches, make, pooled

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the samples of each batch."""
        for batch in self.batches:
            rows = self.make(batch.encoded)
            yield rows.flatten(0, 1)[:, None] if self.pooled else rows


class PaDiM(OnBackbone):
    """Frozen backbone and Gaussians."""

    projection: Tensor
    mean: Tensor
    factor: Tensor
    share: Tensor
    count: Tensor
    gain: Tensor
    shift: Tensor
    kernel: Tensor

    def __init__(self, config: PaDiMConfig) -> None:
        super().__init__()
        self.config: PaDiMConfig = config
        self.backbone = Backbone(config.backbone, choose_layers(config.backbone, config.layers))
        shapes = cells.cell_parts(self.backbone, config.image_size)
        self.cell_size = (shapes[0].shape[1], shapes[0].shape[2])
        self.channels = tuple(shape.shape[3] for shape in shapes)
        features = sum(self.channels)
        if config.dimensions > features:
            raise ConfigError(
                f"dimensions {config.dimensions}: the features have {features}; expected at most that, or 0"
            )
        size = config.dimensions or features
        positions = self.cell_size[0] * self.cell_size[1] if config.place == "each" else 1
        self.register_buffer("projection", torch.eye(features, size))
        self.register_buffer("mean", torch.zeros(positions, size))
        self.register_buffer("factor", torch.eye(size).repeat(positions, 1, 1))
        self.register_buffer("share", torch.zeros(positions))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("gain", torch.ones(self.cell_size))
        self.register_buffer("shift", torch.zeros(self.cell_size))
        taps = 2 * math.ceil(4 * config.blur_sigma) + 1
        self.register_buffer("kernel", ops.gaussian_kernel(config.blur_sigma or 1.0, taps))

    @property
    @override
    def config_buffers(self) -> set[str]:
        return {"kernel"}

    def features(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return the (B, P, C) features of the cells, before they are reduced."""
        if self.config.average:
            return cells.joined(encoded).flatten(1, 2)
        planes = [cells.repeated(part.permute(0, 3, 1, 2), self.cell_size) for part in encoded]
        return torch.cat(planes, 1).permute(0, 2, 3, 1).flatten(1, 2)

    def rows(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return the (B, P, D) reduced features of the cells."""
        rows: Tensor = self.features(encoded) @ self.projection
        return rows

    # --- fitting ---

    @override
    def fit(self, batches: ImagePass, generator: torch.Generator) -> str:
        """Measure the reduction of the features, then the Gaussians."""
        if self.count > 0:
            raise ConfigError("this method measures its Gaussians on all images at once; leave out --from")
        self.projection.copy_(self.reduction(batches, generator))
        found = gaussians.moments(Samples(batches, self.rows, self.pooled))
        images = found.count // (self.cell_size[0] * self.cell_size[1] if self.pooled else 1)
        if images < FEWEST:
            raise ConfigError(f"found {images} good images; this method needs at least {FEWEST}")
        covariances, share = gaussians.shrunk(found, self.config.shrinkage)
        self.mean.copy_(found.mean)
        self.factor.copy_(gaussians.factors(covariances))
        self.share.copy_(share)
        self.count.fill_(images)
        if self.config.edges in edges.MEASURED:
            maps = (
                self.planes(self.squared_left_out(batch.encoded))
                for batch in first_images(batches, edges.IMAGES)
            )
            gain, shift = edges.measure(maps, self.config.edges)
            self.gain.copy_(gain)
            self.shift.copy_(shift)
        kind = "one Gaussian" if self.pooled else f"{len(self.mean)} Gaussians"
        return f"{kind} of {self.mean.shape[1]} features, covariances shrunk by {float(share.mean()):.1%}"

    @property
    def pooled(self) -> bool:
        """Whether all positions share one Gaussian."""
        return self.config.place == "all"

    def reduction(self, batches: Iterable[Batch], generator: torch.Generator) -> Tensor:
        """Return the (C, D) matrix that reduces features: main axes of all cells, or channels at random."""
        size, channels = self.projection.shape[1], len(self.projection)
        if size == channels:
            return torch.eye(channels)
        if self.config.reduction == "random":
            draw = seeding.generator(generator.initial_seed(), "channels")
            return torch.eye(channels)[:, torch.randperm(channels, generator=draw)[:size]]
        whole = gaussians.moments(Samples(batches, self.features, pooled=True))
        _, axes = torch.linalg.eigh(whole.covariance[0])
        main: Tensor = axes.flip(1)[:, :size]
        return main

    # --- scoring ---

    def squared(self, rows: Tensor) -> Tensor:
        """Return the (B, P) squared Mahalanobis distances of (B, P, D) rows."""
        apart = rows - self.mean
        if self.pooled:
            return torch.matmul(apart, self.factor[0].T).square().sum(2)
        return torch.matmul(self.factor, apart[:, :, :, None])[..., 0].square().sum(2)

    def planes(self, squared: Tensor) -> Tensor:
        """Return the (B, h, w) distances that (B, P) squared ones stand for."""
        return squared.sqrt().view(-1, *self.cell_size)

    def judge(self, squared: Tensor) -> tuple[Tensor, Tensor]:
        """Return maps and statistics of (B, P) squared distances."""
        config = self.config
        planes = edges.treated(self.planes(squared), config.edges, self.gain, self.shift)
        maps = cells.resized(planes[:, None], config.image_size)[:, 0]
        if config.blur_sigma:
            maps = ops.gaussian_blur(maps, self.kernel)
        return maps, ops.map_statistics(maps, planes, config.statistics, config.top_share)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.judge(self.squared(self.rows(self.encode(images))))

    @override
    def leave_out(self, encoded: tuple[Tensor, ...], names: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the outputs of `forward` as if the Gaussians had been measured without these very images."""
        return self.judge(self.squared_left_out(encoded))

    def squared_left_out(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return the (B, P) squared distances of images from the Gaussians of all others."""
        rows = self.rows(encoded)
        if self.pooled:
            return torch.stack([self.squared_without(one) for one in rows])
        return gaussians.left_out(self.squared(rows), int(self.count), self.share)

    def squared_without(self, rows: Tensor) -> Tensor:
        """Return the (P,) squared distances of one image's (P, D) rows from the Gaussian of all others."""
        own, mean, count = rows.double(), self.mean[0].double(), int(self.count) * len(rows)
        inverse = self.factor[0].double().T @ self.factor[0].double()
        left = count - len(own)
        others = (count * mean - own.sum(0)) / left
        apart = own - mean
        # The shrunk covariance stands for the whole one; of it, this image's part is taken away.
        scatter = torch.linalg.inv(inverse) * (count - 1) - (1 - self.share[0]) * apart.T @ apart
        shift = mean - others
        scatter = scatter - (1 - self.share[0]) * left * torch.outer(shift, shift)
        factor = gaussians.factors((scatter / (left - 1))[None])[0]
        return ((own - others) @ factor.T).square().sum(1).float()

    @override
    def fused(self) -> nn.Module:
        from blemish.detectors.padim.fused import FusedPaDiM

        return FusedPaDiM(self).eval()
