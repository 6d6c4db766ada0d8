"""The interface of a detector. The base class has only names, docstrings and trivial defaults.

Its contract is in `blemish.testing`, which the tests run on every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from blemish.detectors.fusing import Kept
from blemish.detectors.settings import Config
from blemish.errors import ConfigError
from blemish.types import Batch, LabelRules


class ImagePass(Protocol):
    """Batches that hold every image once, then its altered copies, to be iterated as often as needed.

    Copies have the name of their image.
    """

    @property
    def count(self) -> int:
        """The number of images and copies."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""


def first_images(batches: ImagePass, count: int) -> Iterator[Batch]:
    """Yield batches until they hold `count` images."""
    for batch in batches:
        yield batch
        count -= len(batch.names)
        if count <= 0:
            return


@dataclass(frozen=True)
class Match:
    """The remembered cell that is most similar to an image's most anomalous cell."""

    digest: str
    """First hexadecimal digits of the SHA-256 of the good image that it comes from."""
    cell: tuple[int, int]
    """Its row and column there."""
    worst: tuple[int, int]
    """Row and column of the most anomalous cell."""
    size: tuple[int, int]
    """Number of rows and columns of cells."""
    distance: float


class Detector(nn.Module):
    """An anomaly detector, which maps images to anomaly maps and image-level statistics.

    Everything that scoring depends on is a parameter, a buffer or part of the config. Frozen parts refuse
    gradients. A detector is trained in steps (`optimizer` and `loss`) or fitted in one pass (`fit`),
    depending on the method.
    """

    outputs: tuple[str, ...] = ("map", "statistics")
    """Names of the outputs of `forward`, in order; those after the first two are the parts of the map."""
    wants_images: bool = False
    """Whether a training step needs the images as well as their encodings."""
    integer_layers: int = 0
    """How many layers, the last ones, int8 may compute in integers; 0: all."""
    fitted_buffers: tuple[str, ...] = ()
    """Names of the buffers whose size is determined by fitting."""

    config: Config

    @property
    def pretrained_name(self) -> str:
        """Name of the network whose pretrained weights the detector uses; empty without a frozen part."""
        return ""

    @property
    def frozen(self) -> bool:
        """Whether the detector has a frozen part, which `load_pretrained` fills and `encode` runs."""
        return bool(self.pretrained_name)

    @property
    def encoding_key(self) -> tuple[str, ...]:
        """What the result of `encode` depends on, apart from the pretrained weights."""
        return (self.pretrained_name,)

    @property
    def config_buffers(self) -> set[str]:
        """Names of the buffers set by the config, which a warm start must not overwrite."""
        return set()

    @property
    def label_rules(self) -> LabelRules:
        """How labelled defects are used in training."""
        return LabelRules()

    def load_pretrained(self, path: Path) -> None:
        """Load the weights of the frozen part from a file; raise WeightsError if they do not fit."""

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the frozen part on (B, 3, H, W) images; its result does not change during training."""
        return ()

    def prepare(self, encoded: Iterable[tuple[Tensor, ...]]) -> str:
        """Measure what the first step needs to know about the good training images.

        encoded: the result of `encode` for each image, as batches of one. Returns a note for the user, or "".
        """
        return ""

    def optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser of the trainable parameters, with the base learning rates."""
        raise NotImplementedError

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the named terms of the loss of one step: scalars whose sum is minimised."""
        raise NotImplementedError

    def fit(self, batches: ImagePass, generator: torch.Generator) -> str:
        """Fit the detector to all training images, without optimiser steps.

        `batches` hold every image once, in an order that does not depend on their names, and can be iterated
        more than once. Returns a note for the user, or "".
        """
        raise NotImplementedError

    def leave_out(self, encoded: tuple[Tensor, ...], names: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the outputs of `forward` as if the detector had not been fitted to these images.

        encoded, names: results of `encode` and digests of B training images. Only for methods that leave one
        out to set thresholds.
        """
        raise NotImplementedError

    def inspect(self, encoded: Iterable[tuple[Tensor, ...]], generator: torch.Generator) -> str:
        """Check the training on held-out images and adjust it; called after every 5 % of the steps.

        Returns a note for the user, or "".
        """
        return ""

    @property
    def settles_on(self) -> int:
        """The largest number of good training images that `settle` measures; 0 if it measures nothing."""
        return 0

    def settle(self, batches: Iterable[Batch]) -> None:
        """Measure, after the last step, what scoring needs to know about the good training images.

        batches: at most `settles_on` of them, evenly spaced, one by one. A method that is fitted without
        steps measures this in `fit`.
        """

    def finish(self, images: Iterable[Tensor]) -> None:
        """Measure what scoring needs on held-out good images, after training."""

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 3, H, W) images to (B, H, W) anomaly maps, (B, K) statistics and the parts of the map."""
        raise NotImplementedError

    def matches(self, images: Tensor) -> list[Match]:
        """Return, for each of (B, 3, H, W) images, what the most anomalous cell is most like.

        Raises ConfigError for a method that does not remember good images.
        """
        raise ConfigError("this model does not remember good images, so it cannot say what a place is like")

    def fused(self) -> nn.Module:
        """Return a fused network with copied weights: the same outputs with fewer operations, for inference.

        A method without a fused network returns the detector itself, in evaluation mode.
        """
        return self.eval()

    def with_fewer_channels(
        self, network: nn.Module, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
    ) -> tuple[nn.Module, list[Kept]]:
        """Return an approximation of the fused network with fewer channels, and how many each layer keeps.

        good, other: (B, 3, H, W) batches of good images and of rendered ones. tolerance: the change that each
        reduction may cause in the map of the good images, in standard deviations of that map. Raises
        ConfigError for a method that does not support this.
        """
        raise ConfigError("--reduced: this method does not support reduced channels; leave it out")

    def for_integers(self, network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        """Return the form of a fused network that quantisation starts from; batches: good images."""
        return network
