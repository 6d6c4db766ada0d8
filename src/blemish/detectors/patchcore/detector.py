"""PatchCore's features, fitting and scoring."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from blemish import seeding
from blemish.backbones import Backbone, choose_layers
from blemish.detectors import cells, edges, ops
from blemish.detectors.base import ImagePass, Match, first_images
from blemish.detectors.on_backbone import OnBackbone
from blemish.detectors.patchcore import coreset
from blemish.detectors.patchcore.aggregation import NUMBERS, aggregate, kernels
from blemish.detectors.patchcore.config import PatchCoreConfig
from blemish.errors import ConfigError
from blemish.types import Batch

SMOOTHING = 0.03
"""Distance added in squares under the root, in features of length 1: rounding errors of a squared distance
near 0 would otherwise grow a thousandfold in its root."""

DIGITS = 15
"""Hexadecimal digits of an image's digest that fit into a number of 64 bits with a sign."""

CHUNK = 256
"""Cells whose distances are computed at a time, so that a product fits the processor's cache."""

BLOCKS = 4
"""A single good image is judged by itself in BLOCKS x BLOCKS parts, each without its own cells."""


class PatchCore(OnBackbone):
    """Frozen backbone and a bank of remembered cells."""

    fitted_buffers = ("bank", "owners", "origins")
    integer_layers = 1  # the search: the backbone in integers costs more accuracy than it saves time
    mean: Tensor
    projection: Tensor
    place: Tensor
    bank: Tensor
    owners: Tensor
    origins: Tensor
    radius: Tensor
    fitted: Tensor
    gain: Tensor
    shift: Tensor
    kernel: Tensor

    def __init__(self, config: PatchCoreConfig) -> None:
        super().__init__()
        self.config: PatchCoreConfig = config
        layers = choose_layers(config.backbone, config.layers)
        self.backbone = Backbone(config.backbone, layers)
        shapes = cells.cell_parts(self.backbone, config.image_size)
        self.cell_size = (shapes[0].shape[1], shapes[0].shape[2])
        self.channels = tuple(shape.shape[3] for shape in shapes)
        features = NUMBERS if config.aggregation == "published" else sum(self.channels)
        if config.dimensions >= features:
            raise ConfigError(
                f"dimensions {config.dimensions}: the features have {features}; expected fewer, or 0"
            )
        numbers = (config.dimensions + 1 if config.dimensions else features) + 2 * (config.place_weight > 0)
        self.register_buffer("mean", torch.zeros(features))
        # What is published is compared as it is.
        projected = 0 if config.aggregation == "published" else features
        self.register_buffer("projection", torch.eye(projected))
        self.register_buffer("place", config.place_weight * cells.places(*self.cell_size))
        self.register_buffer("bank", torch.zeros(1, numbers))
        self.register_buffer("owners", torch.zeros(1, dtype=torch.long))
        self.register_buffer("origins", torch.zeros(1, dtype=torch.long))
        self.register_buffer("radius", torch.tensor(0.0))
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("gain", torch.ones(self.cell_size))
        self.register_buffer("shift", torch.zeros(self.cell_size))
        size = 2 * math.ceil(4 * config.blur_sigma) + 1
        self.register_buffer("kernel", ops.gaussian_kernel(config.blur_sigma or 1.0, size))

    @property
    @override
    def config_buffers(self) -> set[str]:
        return {"kernel", "place"}

    def features(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return the (B, h, w, C) features of the cells (section 3.1)."""
        if self.config.aggregation == "mean":
            return cells.joined(encoded)
        planes = [part.permute(0, 3, 1, 2) for part in encoded]
        weights = [kernel.to(planes[0]) for kernel in kernels(self.channels)]
        return aggregate(planes, weights).permute(0, 2, 3, 1)

    def embed(self, features: Tensor) -> Tensor:
        """Centre (..., C) features, project them and, if configured, keep their principal components."""
        if self.config.aggregation == "published":
            return features
        centred = (features - self.mean) @ self.projection
        if not self.config.dimensions:
            return centred
        kept, rest = centred.tensor_split([self.config.dimensions], -1)
        return torch.cat([kept, rest.square().sum(-1, keepdim=True).sqrt()], -1)

    def rows(self, encoded: Sequence[Tensor]) -> Tensor:
        """Return the (B, h w, D) rows that are compared: embedded features, and the cell's place."""
        embedded = self.embed(self.features(encoded))
        if self.config.place_weight:
            place = self.place.expand(len(embedded), -1, -1, -1)
            embedded = torch.cat([embedded, place], 3)
        return embedded.flatten(1, 2)

    # --- fitting ---

    @override
    def fit(self, batches: ImagePass, generator: torch.Generator) -> str:
        """Remember cells of good images, in one pass; or add to those that an earlier model remembered."""
        generator = seeding.generator(generator.initial_seed(), "choice")  # on the processor
        grown = bool(self.fitted)
        if grown and (self.config.choice != "cover" or not self.config.bank_size):
            raise ConfigError(
                "a model can only go on if it was fitted with choice=cover and a bank_size: "
                f"found choice={self.config.choice} and bank_size={self.config.bank_size}"
            )
        features, origins, owners = self.gather(batches, generator)
        if not grown:
            self.measure(features)
        points = self.embed(features)
        if self.config.place_weight:
            points = torch.cat([points, self.place.flatten(0, 1)[origins]], 1)
        if self.config.trim:
            kept = coreset.typical(points, owners, self.config.trim, generator)
            points, origins, owners = points[kept], origins[kept], owners[kept]
        if grown:
            chosen = coreset.extend(self.bank, points, self.config.bank_size, float(self.radius))
            before = (self.bank, self.owners, self.origins)
        else:
            chosen = self.choose(points, generator)
            before = (self.bank[:0], self.owners[:0], self.origins[:0])
            self.fitted.fill_(True)
        self.bank = torch.cat([before[0], points[chosen]])
        self.owners = torch.cat([before[1], owners[chosen]])
        self.origins = torch.cat([before[2], origins[chosen]])
        if self.config.edges in edges.MEASURED and not grown:
            planes = (self.planes_left_out(batch) for batch in first_images(batches, edges.IMAGES))
            gain, shift = edges.measure(planes, self.config.edges)
            self.gain.copy_(gain)
            self.shift.copy_(shift)
        more = f"{len(chosen)} more than before" if grown else f"of {len(points)} candidates"
        return f"{len(self.bank)} cells of good images remembered, {more}"

    def gather(self, batches: ImagePass, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the candidates: (n, C) features, (n,) cells they come from, and (n,) images.

        As many are drawn from each image, by a seed of its own, so that their order does not matter. All are
        kept in memory, so their number is bounded: of more images than candidates, the last are left out.
        """
        limit = self.config.candidates or math.prod(self.cell_size) * batches.count
        each = -(-limit // batches.count)
        rows, places, images = [], [], []
        seen: Counter[str] = Counter()
        for batch in first_images(batches, limit):
            features = self.features(batch.encoded).flatten(1, 2)
            for name, found in zip(batch.names, features, strict=True):
                copied = (seen[name],) if name in seen else ()
                draw = seeding.generator(generator.initial_seed(), "cells", name, *copied)
                seen[name] += 1
                cell = torch.randperm(len(found), generator=draw)[:each].to(found.device)
                rows.append(found[cell])
                places.append(cell)
                images.append(torch.full_like(cell, number_of(name)))
        return torch.cat(rows), torch.cat(places), torch.cat(images)

    def measure(self, features: Tensor) -> None:
        """Measure mean and projection: principal axes or none, whitened or not, to a mean length of 1."""
        if self.config.aggregation == "published":
            return
        wide = features.double()
        mean = wide.mean(0)
        covariance = (wide - mean).T @ (wide - mean) / len(wide)
        variances = covariance.diagonal()
        projection = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        if self.config.whitening:
            projection, variances = ops.whitening(covariance, self.config.whitening)
        elif self.config.dimensions:
            projection, variances = ops.principal_axes(covariance)
        length = variances.sum().sqrt()
        self.mean.copy_(mean)
        self.projection.copy_(projection / (length if length > 0 else 1.0))

    def choose(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Return the indices of the candidates to remember; set the radius that they cover."""
        count = self.config.bank_size or max(1, int(len(points) * self.config.bank_share))
        count = min(count, len(points))
        if self.config.choice == "random":
            return torch.randperm(len(points), generator=generator)[:count].to(points.device)
        if self.config.choice == "published":
            return coreset.draw_published(points, count, generator)
        chosen, radius = coreset.cover(points, count)
        self.radius.fill_(radius)
        return chosen

    # --- scoring (section 3.3) ---

    def squared(self, rows: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Return the (B, n) squared distances of (B, n, D) rows, each the mean over the nearest neighbours.

        left_out: (B, 1 or n, M) booleans, the rows of the bank that do not count.
        """
        columns, halves = self.bank.T, self.bank.square().sum(1) / 2
        count = min(self.config.neighbours, len(self.bank))
        nearest = []
        for start in range(0, rows.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            closeness = (rows[:, chunk] @ columns).sub_(halves)
            if left_out is not None:
                wide = left_out.shape[1] > 1
                closeness.masked_fill_(left_out[:, chunk] if wide else left_out, -torch.inf)
            nearest.append(closeness.amax(2) if count == 1 else closeness.topk(count, 2).values.mean(2))
        return (rows.square().sum(2) - 2 * torch.cat(nearest, 1)).clamp(min=0)

    def planes(self, squared: Tensor) -> Tensor:
        """Return the (B, h, w) distances that (B, h w) squared ones stand for."""
        distances = squared if self.config.squared else (squared + SMOOTHING**2).sqrt()
        return distances.view(-1, *self.cell_size)

    def levelled(self, squared: Tensor) -> Tensor:
        """Return the (B, h, w) distances as map and statistics take them."""
        return edges.treated(self.planes(squared), self.config.edges, self.gain, self.shift)

    def judge(self, rows: Tensor, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return maps and statistics of (B, h w, D) rows."""
        config = self.config
        squared = self.squared(rows, left_out)
        planes = self.levelled(squared)
        maps = cells.resized(planes[:, None], config.image_size)[:, 0]
        if config.blur_sigma:
            maps = ops.gaussian_blur(maps, self.kernel, border="symmetric")
        statistics = ops.map_statistics(
            maps,
            planes,
            config.statistics,
            config.top_share,
            reweighted=lambda: reweighted(rows, squared, self.bank, config.support),
        )
        return maps, statistics

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.judge(self.rows(self.encode(images)))

    @override
    def leave_out(self, encoded: tuple[Tensor, ...], names: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the outputs of `forward` without the cells that were remembered of these very images.

        Where nothing else is remembered, because there was but one image, each part of it is judged without
        the cells of that part.
        """
        return self.judge(self.rows(encoded), self.own_rows(names))

    def planes_left_out(self, batch: Batch) -> Tensor:
        """Return the (B, h, w) distances of images that were fitted to, each without itself."""
        return self.planes(self.squared(self.rows(batch.encoded), self.own_rows(batch.names)))

    def own_rows(self, names: Sequence[str]) -> Tensor:
        """Return which rows of the bank do not count for each cell of these images: (B, 1 or h w, M)."""
        numbers = self.owners.new_tensor([number_of(name) for name in names])
        own = (self.owners == numbers[:, None])[:, None]
        alone = own.all(2, keepdim=True)  # nothing of another image is remembered
        if bool(alone.any()):
            block = blocks(self.cell_size).to(self.owners.device)
            own = torch.where(alone, block[:, None] == block[self.origins], own)
        return own & ~own.all(2, keepdim=True)

    @override
    def matches(self, images: Tensor) -> list[Match]:
        rows, width = self.rows(self.encode(images)), self.cell_size[1]
        planes = self.levelled(self.squared(rows))
        found = []
        for one, worst in zip(rows, planes.flatten(1).argmax(1).tolist(), strict=True):
            distances = (self.bank - one[worst]).square().sum(1)
            nearest = int(distances.argmin())
            found.append(
                Match(
                    digest=f"{int(self.owners[nearest]):0{DIGITS}x}",
                    cell=divmod(int(self.origins[nearest]), width),
                    worst=divmod(worst, width),
                    size=self.cell_size,
                    distance=float(distances[nearest].sqrt()),
                )
            )
        return found

    @override
    def fused(self) -> nn.Module:
        from blemish.detectors.patchcore.fused import FusedPatchCore

        return FusedPatchCore(self).eval()

    @override
    def for_integers(self, network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        """Return the fused network with features turned, and places of their size (`fused.Place`)."""
        from blemish.detectors.patchcore.fused import FusedPatchCore, Place

        if "reweighted" in self.config.statistics:  # needs the rows themselves
            return network
        turned, weight = self.turned(), self.config.place_weight
        place = Place.for_integers(turned.bank, weight) if weight else Place()
        return FusedPatchCore(turned, place).eval()

    def turned(self) -> PatchCore:
        """Return the same detector with features turned at random, which changes no distance.

        Few large numbers in a row become many of middle size, to which 8-bit integers give more levels.
        Features reduced to principal components stay as they are.
        """
        made = copy.deepcopy(self)
        if self.config.dimensions or self.config.aggregation == "published":
            return made
        count = len(self.projection)
        drawn = torch.randn(count, count, generator=seeding.generator(0, "turn"), dtype=torch.float64)
        turn = torch.linalg.qr(drawn).Q.to(self.projection)
        made.projection.copy_(self.projection @ turn)
        made.bank[:, :count] = self.bank[:, :count] @ turn
        return made


def number_of(name: str) -> int:
    """Return the number by which a bank knows an image: the first digits of its digest."""
    return int(name[:DIGITS], 16)


def blocks(size: tuple[int, int]) -> Tensor:
    """Return the (h w,) numbers of the blocks that cells lie in, BLOCKS along each axis."""
    axes = [torch.arange(length) * BLOCKS // length for length in size]
    return (axes[0][:, None] * BLOCKS + axes[1]).flatten()


def reweighted(rows: Tensor, squared: Tensor, bank: Tensor, support: int) -> Tensor:
    """Return the (B,) image scores of equation 7: the largest distance, weighted by the bank around it.

    rows: (B, n, D), squared: (B, n) their squared distances. The weight is 1 less the softmax, at the nearest
    row of the bank, of the distances to the `support` rows nearest to that row, itself included.
    """
    worst = squared.argmax(1)[:, None, None].expand(-1, -1, rows.shape[2])
    row = rows.gather(1, worst)[:, 0]
    halves = bank.square().sum(1) / 2
    nearest = (row @ bank.T - halves).argmax(1)
    around = (bank[nearest] @ bank.T - halves).topk(min(support, len(bank)), 1).indices
    distances = (row[:, None] - bank[around]).square().sum(2).sqrt()
    own = (row - bank[nearest]).square().sum(1).sqrt()
    weight = 1 - torch.exp(own - torch.logsumexp(distances, 1))
    return weight * own
