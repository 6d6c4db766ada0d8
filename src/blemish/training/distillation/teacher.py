"""Distil EfficientAD's teacher: a patch description network learns to predict a large backbone's features.

Batzner, Heckler, König, WACV 2024: algorithm 3 of the supplement. Departures, each a single setting, all
undone by `--preset paper`:
- Muon in place of Adam, and random crops in place of whole images;
- no padding, as in the detectors, so that the network never sees zeros at the border;
- images are mirrored at random, and the run is shorter, at a higher rate with a one-cycle schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from blemish.backbones import IMAGENET, Backbone, Normalise, choose_layers, fill_backbone
from blemish.backbones.pdn import CELL, CHANNELS, MARGIN, PDNS
from blemish.detectors.base import Detector
from blemish.detectors.muon import Muon
from blemish.detectors.ops import crops
from blemish.detectors.settings import Config, refuse_numbers
from blemish.errors import ConfigError
from blemish.training import distributed
from blemish.types import Batch

PATCH = 3
"""Side of the patch of the source's cells that one description summarises."""

MIDDLE = 1024
"""Values that a patch of one layer is averaged to before the layers are joined."""

SMALLEST = 64
"""Smallest length of the images' shorter side, in pixels."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Config):
    """The settings of algorithm 3."""

    image_size: tuple[int, int] = (256, 256)
    size: Literal["small", "medium"] = "small"
    source: str = "wide_resnet101_2"
    """The backbone whose features are distilled; it reads each image at twice the teacher's size."""
    layers: tuple[str, ...] = ()
    """Layers of the source; empty: its default ones."""
    padding: bool = False
    """Zero-pad inside the network, which then also learns to describe the border."""
    crop: int = 128
    """Side in pixels of the random square of each image that is used in a step; 0: the whole image."""
    optimiser: Literal["muon", "adam"] = "muon"
    mirror: float = 0.5
    """Probability that an image is flipped left to right."""
    grey: float = 0.1
    """Probability that an image is converted to grey."""
    batch_size: int = 4
    steps: int = 20_000
    learning_rate: float = 2e-3
    weight_decay: float = 1e-5

    @property
    def network(self) -> str:
        """Name of the network that is trained."""
        return f"pdn_{self.size}"


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


def check_numbers(config: DistillationConfig) -> None:
    """Raise ConfigError for values that are out of range, not finite, or do not go together."""
    c, (height, width) = config, config.image_size
    fine = height % (2 * CELL) == width % (2 * CELL) == 0 and min(height, width) >= SMALLEST
    if not fine:
        raise ConfigError(
            f"image size {height}x{width}: distillation needs multiples of {2 * CELL}, at least {SMALLEST}"
        )
    least, most = (2 * MARGIN + 1) * CELL, min(height, width)
    if c.crop and (c.padding or c.crop % CELL or not least <= c.crop <= most):
        raise ConfigError(
            f"crop={c.crop} with padding={str(c.padding).lower()}: expected 0, or without padding a multiple "
            f"of {CELL} from {least} to {most}"
        )
    refuse_numbers(
        (
            ("mirror", c.mirror, 0 <= c.mirror <= 1, "0 to 1"),
            ("grey", c.grey, 0 <= c.grey <= 1, "0 to 1"),
            ("learning_rate", c.learning_rate, 0 < c.learning_rate < math.inf, "more than 0, and finite"),
            ("weight_decay", c.weight_decay, 0 <= c.weight_decay < math.inf, "at least 0, and finite"),
        )
    )


def aggregation(channels: Sequence[int]) -> list[Tensor]:
    """Return the (384, C, 3, 3) kernels, one for each layer of C channels, whose outputs sum to the target.

    Algorithm 3 unfolds 3x3 patches, averages each layer's C * 9 values to 1,024, joins the layers and
    averages to 384. All of this is linear, so it amounts to one convolution per layer and a sum.
    """
    joins = pooling(MIDDLE * len(channels), CHANNELS).view(CHANNELS, len(channels), MIDDLE).unbind(1)
    return [
        (join @ pooling(count * PATCH**2, MIDDLE)).reshape(CHANNELS, count, PATCH, PATCH).float()
        for join, count in zip(joins, channels, strict=True)
    ]


def pooling(inputs: int, outputs: int) -> Tensor:
    """Return the float64 (outputs, inputs) matrix of adaptive average pooling."""
    place, number = torch.arange(inputs), torch.arange(outputs)[:, None]
    inside = (place >= number * inputs // outputs) & (place < -(-(number + 1) * inputs // outputs))
    return inside / inside.sum(1, keepdim=True, dtype=torch.float64)


class Source(nn.Module):
    """A frozen backbone followed by the aggregation: (B, 3, 2H, 2W) in [0, 1] to (B, 384, H/4, W/4)."""

    def __init__(self, name: str, layers: Sequence[str]) -> None:
        super().__init__()
        self.backbone = Backbone(name, choose_layers(name, layers))
        for number, kernel in enumerate(aggregation(self.backbone.channels)):
            self.register_buffer(f"kernel{number}", kernel, persistent=False)
        self.requires_grad_(False)

    @override
    def forward(self, images: Tensor) -> Tensor:
        size = [length // (2 * CELL) for length in images.shape[2:]]
        described = []
        for number, features in enumerate(self.backbone(images)):
            part = functional.conv2d(features, self.get_buffer(f"kernel{number}"), padding=PATCH // 2).float()
            if list(part.shape[2:]) != size:
                part = functional.interpolate(part, size, mode="bilinear")
            described.append(part)
        return torch.stack(described).sum(0)


class Distillation(Detector):
    """A patch description network trained as a teacher, in the same loop as the detectors."""

    wants_images = True
    mean: Tensor
    std: Tensor

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__()
        self.config: DistillationConfig = config
        self.normalise = Normalise(*IMAGENET)
        self.network = PDNS[config.network](padding=config.padding)
        # In lists, so that they are not submodules: the source is not part of a checkpoint, and has to be
        # moved to a device separately; `shared` holds `network` a second time.
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
    def encoding_key(self) -> tuple[str, ...]:
        layers = choose_layers(self.config.source, self.config.layers)
        return (self.config.source, "distilled", *layers, f"padding {self.config.padding}")

    @override
    def load_pretrained(self, path: Path) -> None:
        fill_backbone(self.source[0].backbone, self.config.source, path)

    def average_gradients(self) -> None:
        """Average gradients over all processes from now on."""
        self.shared = [DistributedDataParallel(self.network)]

    @override
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        described = self.source[0](images)
        if not self.config.padding:
            described = described[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
        return (described,)

    def set_target_moments(self, mean: Tensor, variance: Tensor) -> None:
        """Set the target's channel moments; a channel that never changes is not scaled."""
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
        """Return the mean squared error of the normalised target: algorithm 3, lines 9 to 14."""
        images, target = self.cropped(batch.images, batch.encoded[0], generator)
        described = self.shared[0](self.normalise(images)).float()
        distance = (self.normalised(target) - described).square().mean()
        # The value is the mean over all processes; the gradient is this one's, averaged in the backward pass.
        own = distance.detach()
        return {"distance": distance + (distributed.gathered(own).mean(0) - own)}

    def cropped(self, images: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Crop a random square of each image, and the part of its target that it describes.

        The squares are sampled for the whole step, and each process takes its share of them.
        """
        if not self.config.crop:
            return images, target
        cells = self.config.crop // CELL - 2 * MARGIN
        room = torch.tensor([length - cells + 1 for length in target.shape[2:]], device=generator.device)
        count = len(images) * distributed.count()
        draw = torch.rand((count, 2), generator=generator, device=generator.device)
        places = (draw * room).long().tolist()[distributed.rank() :: distributed.count()]
        return crops(images, places, self.config.crop, CELL), crops(target, places, cells)

    def normalised(self, target: Tensor) -> Tensor:
        """Normalise a target by its moments over the training images."""
        return (target - self.mean) / self.std
