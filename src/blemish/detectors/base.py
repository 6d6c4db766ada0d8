"""What a detector is. The base class has names and docstrings; its contract is a test over every method."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from blemish.detectors.ops import STATISTICS
from blemish.types import Batch, LabelRules


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every method can be told."""

    image_size: tuple[int, int] = (256, 256)
    """Height and width of the network's input."""
    statistics: tuple[str, ...] = STATISTICS
    """Numbers joined into the image score by robust z-scores on held-out images; one alone stays raw."""
    batch_size: int
    steps: int = 0
    """Optimiser steps when nothing else is asked for; 0: see epochs."""
    epochs: int = 0
    schedule: str = "one-cycle"
    """A name in SCHEDULES."""
    clip_norm: float = 0.0
    """Largest norm of a step's gradient; 0: any."""


class Detector(nn.Module):
    """An anomaly detector: images to anomaly maps and image statistics.

    Everything that scoring depends on is a parameter, a buffer or the config. Frozen parts refuse gradients.
    """

    outputs: tuple[str, ...] = ("map", "statistics")
    """Names of what `forward` returns, in order; what follows the first two are the map's parts."""
    wants_images: bool = False
    """Whether a training step needs the images besides what `encode` made of them."""
    wants_natural_images: bool = False
    """Whether training reads natural images, of anything but the product (EfficientAD's penalty)."""

    config: Config

    @property
    def pretrained_name(self) -> str:
        """Name the network whose pretrained weights this detector stands on."""
        raise NotImplementedError

    @property
    def encoding(self) -> tuple[str, ...]:
        """Say what `encode` depends on, besides the pretrained weights."""
        return (self.pretrained_name,)

    @property
    def configured(self) -> set[str]:
        """Name the buffers that the config sets, so that an earlier model's do not."""
        return set()

    @property
    def label_rules(self) -> LabelRules:
        """Say how training reads labelled defects."""
        return LabelRules()

    def load_pretrained(self, path: Path | None) -> None:
        """Fill the frozen part from a file, or from where the weights room finds it; raise WeightsError."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the frozen part, whose result never changes in training, on (B, 3, H, W) images."""
        raise NotImplementedError

    def prepare(self, encoded: Iterable[tuple[Tensor, ...]]) -> str:
        """Learn what must be known of all training images before the first step; say it, or ""."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        """Build the optimiser over what trains, with the base learning rates."""
        raise NotImplementedError

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Give the named terms of a step's loss, scalars whose sum is minimised."""
        raise NotImplementedError

    def inspect(self, encoded: Iterable[tuple[Tensor, ...]], generator: torch.Generator) -> str:
        """Look at how training goes on held-out images, every 5 % of it, and mend; say what, or ""."""
        raise NotImplementedError

    def finish(self, images: Iterable[Tensor]) -> None:
        """Learn what must be known of the held-out good images after the last step."""
        raise NotImplementedError

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 3, H, W) images to (B, H, W) anomaly maps, (B, K) statistics, and the map's parts."""
        raise NotImplementedError


def constant(progress: float) -> float:
    """Hold the rate (SimpleNet)."""
    return 1.0


def step_95(progress: float) -> float:
    """Hold the rate, then a tenth of it for the last 5 % (EfficientAD, algorithm 1)."""
    return 1.0 if progress < 0.95 else 0.1


def step_80_90(progress: float) -> float:
    """Hold the rate, times 0.4 from 80 % and again from 90 % (SuperSimpleNet, section 4)."""
    return 0.4 ** ((progress >= 0.8) + (progress >= 0.9))


def one_cycle(progress: float) -> float:
    """Rise linearly for 5 %, hold until half, fall as a cosine to 1 %: for short runs of known length."""
    if progress < 0.05:
        return 0.05 + 0.95 * progress / 0.05
    if progress < 0.5:
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.5) / 0.5))


SCHEDULES = {"constant": constant, "step-95": step_95, "step-80-90": step_80_90, "one-cycle": one_cycle}
"""Factor on the learning rates by the share of the steps that are done."""
