"""Joined detectors: their maps on one scale, and averaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
    """How good images look to one part: what its map is measured by."""

    level: float
    """What its map shows nearly everywhere."""
    peak: float
    """What its map usually shows at most."""

    @property
    def unit(self) -> float:
        """The distance of both; 1 where the map of good images is the same everywhere."""
        distance = self.peak - self.level
        return distance if distance > 1e-6 * max(abs(self.peak), abs(self.level)) else 1.0


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


class Average(nn.Module):
    """Bring the maps of several parts to one scale, and average them."""

    full_precision = ("levels", "units")
    levels: Tensor
    units: Tensor

    def __init__(self, config: JoinedConfig, parts: Sequence[Config]) -> None:
        """Start with scales that change nothing; parts: the config of each part."""
        super().__init__()
        self.size, self.names = config.image_size, config.statistics
        self.reductions = nn.ModuleList(
            nn.Identity() if part.image_size == self.size else Reduction(self.size, part.image_size)
            for part in parts
        )
        self.register_buffer("levels", torch.zeros(len(parts)))
        self.register_buffer("units", torch.ones(len(parts)))

    def set_scales(self, scales: Sequence[Scale]) -> None:
        """Set the scale of each part."""
        self.levels.copy_(torch.tensor([each.level for each in scales]))
        self.units.copy_(torch.tensor([each.unit for each in scales]))

    def seen(self, images: Tensor) -> list[Tensor]:
        """Return (B, 3, H, W) images as each part sees them, at its size."""
        return [reduction(images) for reduction in self.reductions]

    @override
    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the (B, H, W) mean map, the (B, K) statistics, and each part's map on the common scale.

        maps: (B, H_i, W_i) of each part.
        """
        shown = [
            resized((each.float() - self.levels[place])[:, None] / self.units[place], self.size)[:, 0]
            for place, each in enumerate(maps)
        ]
        mean = torch.stack(shown).mean(0)
        cells = functional.avg_pool2d(mean[:, None], CELL)[:, 0]
        return mean, ops.map_statistics(mean, cells, self.names), *shown


class Joined(Detector):
    """Detectors, in evaluation mode, that see the same image, each at its own size."""

    config: JoinedConfig

    def __init__(self, config: JoinedConfig, parts: Sequence[Detector]) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList(parts)
        self.average = Average(config, [part.config for part in parts])
        self.outputs = ("map", "statistics", *outputs_of([each["method"] for each in config.parts]))
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
        return averaged(self.parts, self.average, images)

    @override
    def matches(self, images: Tensor) -> list[Match]:
        """Return what the first part that remembers good images says."""
        for part, seen in zip(self.detectors, self.average.seen(images), strict=True):
            if part.fitted_buffers:
                return part.matches(seen)
        return super().matches(images)

    @override
    def fused(self) -> nn.Module:
        return FusedJoined([part.fused() for part in self.detectors], self.average).eval()

    @override
    def with_fewer_channels(
        self, network: nn.Module, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
    ) -> tuple[nn.Module, list[Kept]]:
        raise ConfigError("--reduced: joined methods do not support reduced channels; leave it out")

    @override
    def for_integers(self, network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        if not isinstance(network, FusedJoined):
            return network
        seen = [network.average.seen(batch) for batch in batches]
        parts = [
            part.for_integers(fused, [each[place] for each in seen])
            for place, (part, fused) in enumerate(zip(self.detectors, network.parts, strict=True))
        ]
        return FusedJoined(parts, network.average).eval()


class FusedJoined(Fused):
    """Fused parts. What they compute alike, such as a backbone that they share, is one part of the graph."""

    def __init__(self, parts: Sequence[nn.Module], average: Average) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.average = average

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return averaged(self.parts, self.average, images)


def averaged(parts: nn.ModuleList, average: Average, images: Tensor) -> tuple[Tensor, ...]:
    """Return the outputs of joined parts."""
    outputs: tuple[Tensor, ...] = average(
        [part(seen)[0] for part, seen in zip(parts, average.seen(images), strict=True)]
    )
    return outputs


def outputs_of(methods: Sequence[str]) -> list[str]:
    """Return a name for each part: its method, with a number if several have the same."""
    seen: Counter[str] = Counter()
    names = []
    for method in methods:
        seen[method] += 1
        names.append(f"{method}-{seen[method]}" if methods.count(method) > 1 else method)
    return names
