"""Joined detectors: their scores and maps on one scale, and summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish.detectors import ops
from blemish.detectors.base import Detector, Match
from blemish.detectors.cells import resized
from blemish.detectors.fusing import Fused, Kept, enlarge
from blemish.detectors.joined.config import JoinedConfig
from blemish.detectors.settings import Config
from blemish.errors import ConfigError

CELL = 4
"""Side in pixels of the cells of the joined map that statistics are taken of."""


@dataclass(frozen=True)
class Scale:
    """How good images look to one part: what its scores and maps are measured by."""

    centers: Sequence[float]
    """Of the part's K statistics, as in its own calibration."""
    scales: Sequence[float]
    score: tuple[float, float]
    """Centre and scale of the part's scores, the largest of its statistics' z-scores."""
    level: float
    """What its map shows nearly everywhere."""
    peak: float
    """What its map usually shows at most."""


class Reduction(nn.Module):
    """Resize (B, 3, H, W) images to the smaller size of a part, as images are resized when they are read."""

    down: Tensor
    across: Tensor

    def __init__(self, size: tuple[int, int], wanted: tuple[int, int]) -> None:
        super().__init__()
        for name, length, reduced in zip(("down", "across"), size, wanted, strict=True):
            unit = torch.eye(length)[None, None]
            matrix = functional.interpolate(unit, (reduced, length), mode="bilinear", antialias=True)
            self.register_buffer(name, matrix[0, 0], persistent=False)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Resize images."""
        planes = enlarge(images.flatten(0, 1), self.down, self.across)
        return planes.view(-1, images.shape[1], *planes.shape[1:])


class Sum(nn.Module):
    """Bring the maps and statistics of several parts to one scale, and add them up."""

    centers: Tensor
    scales: Tensor
    score_centers: Tensor
    score_scales: Tensor
    levels: Tensor
    units: Tensor

    def __init__(self, config: JoinedConfig, parts: Sequence[Config]) -> None:
        """Start with scales that change nothing; parts: the config of each part."""
        super().__init__()
        self.size, self.names = config.image_size, config.statistics
        self.counts = counts = [len(part.statistics) for part in parts]
        self.reductions = nn.ModuleList(
            nn.Identity() if part.image_size == self.size else Reduction(self.size, part.image_size)
            for part in parts
        )
        for name, number, value in (
            *(("centers", sum(counts), 0.0), ("scales", sum(counts), 1.0)),
            *(("score_centers", len(counts), 0.0), ("score_scales", len(counts), 1.0)),
            *(("levels", len(counts), 0.0), ("units", len(counts), 1.0)),
        ):
            self.register_buffer(name, torch.full((number,), value))

    def measure(self, scales: Sequence[Scale]) -> None:
        """Take the scales of the parts."""
        self.centers.copy_(torch.tensor([value for each in scales for value in each.centers]))
        self.scales.copy_(torch.tensor([value for each in scales for value in each.scales]))
        self.score_centers.copy_(torch.tensor([each.score[0] for each in scales]))
        self.score_scales.copy_(torch.tensor([each.score[1] for each in scales]))
        self.levels.copy_(torch.tensor([each.level for each in scales]))
        self.units.copy_(torch.tensor([(each.peak - each.level) or 1.0 for each in scales]))

    def seen(self, images: Tensor) -> list[Tensor]:
        """Return (B, 3, H, W) images as each part sees them, at its size."""
        return [reduction(images) for reduction in self.reductions]

    @override
    def forward(self, maps: Sequence[Tensor], statistics: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the (B, H, W) mean map, the (B, K) statistics, and each part's map on the common scale.

        maps, statistics: (B, H_i, W_i) and (B, K_i) of each part.
        """
        shown = [
            resized((each - self.levels[place])[:, None] / self.units[place], self.size)[:, 0]
            for place, each in enumerate(maps)
        ]
        mean = torch.stack(shown).mean(0)
        cells = functional.avg_pool2d(mean[:, None], CELL)[:, 0]
        return mean, ops.map_statistics(mean, cells, self.names, sum=partial(self.added, statistics)), *shown

    def added(self, statistics: Sequence[Tensor]) -> Tensor:
        """Return the (B,) sum of the parts' z-scores from the (B, K_i) statistics of each."""
        scaled = (torch.cat(list(statistics), 1) - self.centers) / self.scales
        scores = torch.stack([part.amax(1) for part in torch.split(scaled, self.counts, 1)], 1)
        return ((scores - self.score_centers) / self.score_scales).sum(1)


class Joined(Detector):
    """Detectors, in evaluation mode, that see the same image, each at its own size."""

    config: JoinedConfig

    def __init__(self, config: JoinedConfig, parts: Sequence[Detector]) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(parts)
        self.sum = Sum(config, [part.config for part in parts])
        self.outputs = ("map", "statistics", *names_of([each["method"] for each in config.parts]))
        self.fitted_buffers = tuple(
            f"parts.{number}.{name}" for number, part in enumerate(parts) for name in part.fitted_buffers
        )

    @property
    def detectors(self) -> list[Detector]:
        """The parts."""
        return [part for part in self.parts if isinstance(part, Detector)]

    @property
    @override
    def pretrained_name(self) -> str:
        return "+".join(part.pretrained_name for part in self.detectors)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return joined(self.parts, self.sum, images)

    @override
    def matches(self, images: Tensor) -> list[Match]:
        """Return what the first part that remembers good images says."""
        for part, seen in zip(self.detectors, self.sum.seen(images), strict=True):
            if part.fitted_buffers:
                return part.matches(seen)
        return super().matches(images)

    @override
    def fused(self) -> nn.Module:
        return FusedJoined([part.fused() for part in self.detectors], self.sum).eval()

    @override
    def with_fewer_channels(
        self, network: nn.Module, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
    ) -> tuple[nn.Module, list[Kept]]:
        raise ConfigError("--reduced: joined methods do not support reduced channels; leave it out")

    @override
    def for_integers(self, network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        if not isinstance(network, FusedJoined):
            return network
        seen = [network.sum.seen(batch) for batch in batches]
        parts = [
            part.for_integers(fused, [each[place] for each in seen])
            for place, (part, fused) in enumerate(zip(self.detectors, network.parts, strict=True))
        ]
        return FusedJoined(parts, network.sum).eval()


class FusedJoined(Fused):
    """Fused parts. What they compute alike, such as a backbone that they share, is one part of the graph."""

    def __init__(self, parts: Sequence[nn.Module], total: Sum) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sum = total

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return joined(self.parts, self.sum, images)


def joined(parts: nn.ModuleList, total: Sum, images: Tensor) -> tuple[Tensor, ...]:
    """Return the outputs of joined parts."""
    found = [part(seen) for part, seen in zip(parts, total.seen(images), strict=True)]
    outputs: tuple[Tensor, ...] = total([each[0] for each in found], [each[1].float() for each in found])
    return outputs


def names_of(methods: Sequence[str]) -> list[str]:
    """Return a name for each part: its method, with a number if several have the same."""
    seen: Counter[str] = Counter()
    names = []
    for method in methods:
        seen[method] += 1
        names.append(f"{method}-{seen[method]}" if methods.count(method) > 1 else method)
    return names
