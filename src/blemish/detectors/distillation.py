"""Distilling EfficientAD's teacher: a patch description network learns to give a big backbone's features.

Batzner, Heckler, König, WACV 2024: algorithm 3 of the supplement. Departures, each one word in the config,
all undone by `--preset paper`:
- Muon in place of Adam, and random squares of an image in place of the whole;
- no padding, as the detectors run the network, so that it never sees zeros at the border;
- images are mirrored at random, steps are fewer, the rate is higher and follows one cycle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from blemish import ops
from blemish.backbones import IMAGENET, Backbone, Normalise, choose_layers, fill_backbone
from blemish.backbones.pdn import CHANNELS, PDNS
from blemish.detectors.base import Config, Detector
from blemish.optimisers import Muon
from blemish.types import Batch

PATCH = 3
"""Side of the patch of the source's cells that one description sums up."""
MIDDLE = 1024
"""Numbers that a patch of one layer is averaged to before the layers are joined."""
STRIDE = 4
"""Pixels of the teacher's image from one description to the next."""
MARGIN = 4
"""Descriptions that a network without padding lacks on each side."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Config):
    """The numbers of algorithm 3."""

    size: Literal["small", "medium"] = "small"
    source: str = "wide_resnet101_2"
    """The backbone whose features are learned; it sees each image at twice the teacher's size."""
    layers: tuple[str, ...] = ()
    """Of the source; empty for its usual ones."""
    padding: bool = False
    """Zero-pad inside the network, and learn to describe up to the border."""
    crop: int = 128
    """Side in pixels of the square that is shown of each image, drawn anew each time; 0: all of it."""
    optimiser: Literal["muon", "adam"] = "muon"
    mirror: float = 0.5
    """Probability that an image is flipped left to right."""
    grey: float = 0.1
    """Probability that an image is shown grey."""
    batch_size: int = 4
    steps: int = 20_000
    learning_rate: float = 2e-3
    weight_decay: float = 1e-5


PAPER = {
    "padding": True,
    "crop": 0,
    "optimiser": "adam",
    "mirror": 0.0,
    "batch_size": 16,
    "steps": 60_000,
    "learning_rate": 1e-4,
    "schedule": "constant",
}


def aggregation(channels: Sequence[int]) -> list[Tensor]:
    """Give the (384, C, 3, 3) kernels, one for each layer of C channels, that sum up to the target.

    Algorithm 3 unfolds 3x3 patches, averages each layer's C * 9 numbers to 1,024, joins the layers and
    averages to 384. All of it is linear, so it is one convolution per layer and a sum.
    """
    wide = MIDDLE * len(channels)
    join = functional.adaptive_avg_pool1d(torch.eye(wide, dtype=torch.float64), CHANNELS).T
    kernels = []
    for number, count in enumerate(channels):
        pool = functional.adaptive_avg_pool1d(torch.eye(count * PATCH**2, dtype=torch.float64), MIDDLE).T
        kernel = join[:, number * MIDDLE : (number + 1) * MIDDLE] @ pool
        kernels.append(kernel.reshape(CHANNELS, count, PATCH, PATCH).float())
    return kernels


class Source(nn.Module):
    """A backbone with the aggregation behind it: (B, 3, 2H, 2W) in [0, 1] to (B, 384, H/4, W/4), frozen."""

    def __init__(self, name: str, layers: Sequence[str]) -> None:
        super().__init__()
        self.backbone = Backbone(name, choose_layers(name, layers))
        for number, kernel in enumerate(aggregation(self.backbone.channels)):
            self.register_buffer(f"kernel{number}", kernel, persistent=False)
        self.requires_grad_(False)

    @override
    def forward(self, images: Tensor) -> Tensor:
        size = [length // (2 * STRIDE) for length in images.shape[2:]]
        described = []
        for number, features in enumerate(self.backbone(images)):
            part = functional.conv2d(features, self.get_buffer(f"kernel{number}"), padding=PATCH // 2).float()
            if list(part.shape[2:]) != size:
                part = functional.interpolate(part, size, mode="bilinear")
            described.append(part)
        return torch.stack(described).sum(0)


class Distillation(Detector):
    """A patch description network that learns, in the detectors' training loop, to be a teacher."""

    wants_images = True
    mean: Tensor
    std: Tensor

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__()
        self.config: DistillationConfig = config
        self.normalise = Normalise(*IMAGENET)
        self.network = PDNS[f"pdn_{config.size}"](padding=config.padding)
        # In lists, not as modules of this one: the source is no part of a checkpoint, and the other holds
        # `network` once more.
        self.source = [Source(config.source, config.layers)]
        self.shared: list[nn.Module] = [self.network]
        self.register_buffer("mean", torch.zeros(CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(CHANNELS, 1, 1))

    @property
    @override
    def pretrained_name(self) -> str:
        return self.config.source

    @property
    @override
    def encoding(self) -> tuple[str, ...]:
        layers = choose_layers(self.config.source, self.config.layers)
        return (self.config.source, "distilled", *layers, f"padding {self.config.padding}")

    @override
    def load_pretrained(self, path: Path | None) -> None:
        fill_backbone(self.source[0].backbone, self.config.source, path)

    def share(self) -> None:
        """Average gradients over all processes from now on."""
        self.shared = [DistributedDataParallel(self.network)]

    @override
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        described = self.source[0](images)
        if not self.config.padding:
            described = described[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
        return (described,)

    @override
    def prepare(self, encoded: Iterable[tuple[Tensor, ...]]) -> str:
        self.settle(*ops.channel_moments(part for (part,) in encoded))
        return ""

    def settle(self, mean: Tensor, variance: Tensor) -> None:
        """Take the target's channel moments; a channel that never changes is learned as it is."""
        self.mean.copy_(mean[:, None, None])
        self.std.copy_(torch.where(variance > 0, variance.sqrt(), 1.0)[:, None, None])

    @override
    def optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        if c.optimiser == "muon":
            return Muon(self.network.parameters(), c.learning_rate, c.weight_decay)
        return torch.optim.Adam(
            self.network.parameters(), c.learning_rate, weight_decay=c.weight_decay, fused=True
        )

    @override
    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Algorithm 3, lines 9 to 14: the mean squared error of the normalised target."""
        images, target = batch.images, batch.encoded[0]
        if self.config.crop:
            images, target = self.cropped(images, target, generator)
        described = self.shared[0](self.normalise(images)).float()
        return {"distance": (self.normalised(target) - described).square().mean()}

    def cropped(self, images: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a square of each image with the part of its target that it describes."""
        cells = self.config.crop // STRIDE - 2 * MARGIN
        room = torch.tensor([length - cells + 1 for length in target.shape[2:]], device=generator.device)
        draw = torch.rand((len(images), 2), generator=generator, device=generator.device)
        places = (draw * room).long().tolist()
        squares = [
            (
                image[:, STRIDE * top :, STRIDE * left :][:, : self.config.crop, : self.config.crop],
                part[:, top : top + cells, left : left + cells],
            )
            for image, part, (top, left) in zip(images, target, places, strict=True)
        ]
        shown, wanted = zip(*squares, strict=True)
        return torch.stack(shown), torch.stack(wanted)

    def normalised(self, target: Tensor) -> Tensor:
        """Normalise a target by its moments over the training images."""
        return (target - self.mean) / self.std

    @override
    def inspect(self, encoded: Iterable[tuple[Tensor, ...]], generator: torch.Generator) -> str:
        return ""
