"""What a detector is. The base class has names, docstrings and defaults that do nothing.

Its contract is `blemish.testing`, which tests run over every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from blemish.detectors.fusing import Kept, first_convolution, round_evenly
from blemish.detectors.settings import Config
from blemish.errors import ConfigError
from blemish.types import Batch, LabelRules


class Detector(nn.Module):
    """An anomaly detector: images to anomaly maps and image statistics.

    Everything that scoring depends on is a parameter, a buffer or the config. Frozen parts refuse gradients.
    A detector is trained by steps (`optimizer` and `loss`) or fitted in one pass (`fit`), as its method says.
    """

    outputs: tuple[str, ...] = ("map", "statistics")
    """Names of what `forward` returns, in order; those after the first two are the map's parts."""
    frozen: bool = True
    """Whether it has a frozen part, which `load_pretrained` fills and `encode` runs."""
    wants_images: bool = False
    """Whether a training step needs the images besides what `encode` made of them."""
    fitted: tuple[str, ...] = ()
    """Buffers whose size comes from what they were fitted on."""

    config: Config

    @property
    def pretrained_name(self) -> str:
        """Name of the network whose pretrained weights this stands on; empty without a frozen part."""
        return ""

    @property
    def encoding(self) -> tuple[str, ...]:
        """What `encode` depends on, besides the pretrained weights."""
        return (self.pretrained_name,)

    @property
    def configured(self) -> set[str]:
        """Names of buffers that the config sets, so that an earlier model's do not replace them."""
        return set()

    @property
    def label_rules(self) -> LabelRules:
        """How training reads labelled defects."""
        return LabelRules()

    def load_pretrained(self, path: Path) -> None:
        """Fill the frozen part from a file of weights; raise WeightsError if they do not fit."""

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the frozen part, whose result never changes in training, on (B, 3, H, W) images."""
        return ()

    def prepare(self, encoded: Iterable[tuple[Tensor, ...]]) -> str:
        """Learn what must be known of all good training images before the first step.

        encoded: what `encode` makes of each, as batches of one. Returns a note for the user, or "".
        """
        return ""

    def optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser over what is trained, with the base learning rates."""
        raise NotImplementedError

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the named terms of a step's loss, scalars whose sum is minimised."""
        raise NotImplementedError

    def fit(self, batches: Iterable[Batch], generator: torch.Generator) -> str:
        """Learn from all training images, without steps; `batches` can be iterated more than once.

        Returns a note for the user, or "".
        """
        raise NotImplementedError

    def inspect(self, encoded: Iterable[tuple[Tensor, ...]], generator: torch.Generator) -> str:
        """Look at held-out images after every 5 % of the steps, and adjust what the training needs.

        Returns a note for the user, or "".
        """
        return ""

    def finish(self, images: Iterable[Tensor]) -> None:
        """Learn what must be known of the held-out good images after training."""

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 3, H, W) images to (B, H, W) anomaly maps, (B, K) statistics, and the map's parts."""
        raise NotImplementedError

    def fused(self) -> nn.Module:
        """Return a network with the same outputs from fewer operations, for inference; it copies the weights.

        Without such a form, that is the detector itself.
        """
        return self.eval()

    def with_fewer_channels(
        self, network: nn.Module, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
    ) -> tuple[nn.Module, list[Kept]]:
        """Return an approximation of the fused network with fewer channels, and what was kept of each layer.

        good, other: (B, 3, H, W) batches of good images, and of rendered ones. tolerance: the change of the
        good images' map that each cut may make, in its standard deviations. Raises ConfigError for a method
        that has no such form.
        """
        raise ConfigError("reduced channels: this method has none to reduce; expected no --reduced")

    def for_integers(self, network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        """Return the form of a fused network that quantisation starts from, given good images."""
        entrance = first_convolution(network)
        if entrance is not None:
            round_evenly(entrance)
        return network
