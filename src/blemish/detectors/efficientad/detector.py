"""EfficientAD's networks, training loss and scoring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish.backbones import IMAGENET, Normalise, weights
from blemish.backbones.pdn import CELL, CHANNELS, MARGIN, PDNS
from blemish.detectors import gaussians, ops
from blemish.detectors.base import Detector
from blemish.detectors.efficientad.config import EfficientADConfig
from blemish.detectors.fusing import Kept
from blemish.detectors.muon import Muon
from blemish.detectors.ops import crops
from blemish.errors import ConfigError
from blemish.types import Batch

MEASURED_ON = 500
"""Good training images that the statistic `whole_image` is measured on."""


class Autoencoder(nn.Module):
    """Map (B, 3, H, W) through a narrow bottleneck to (B, channels, H/4 - 2 margin, W/4 - 2 margin)."""

    def __init__(self, channels: int, image_size: tuple[int, int], margin: int, dropout: float) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 64)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(64, 64, 8))
        self.decoder = nn.ModuleList([nn.Conv2d(64, 64, 4, padding=2) for _ in range(6)])
        self.penultimate = nn.Conv2d(64, 64, 3, padding=1)
        self.last = nn.Conv2d(64, channels, 3, padding=1)
        self.dropout = dropout
        # At 256 pixels: 3, 8, 15, 32, 63, 127 and 56 (64 without a margin).
        plan = ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1), (CELL, 2 * margin))
        self.sizes = [tuple(length // by - less for length in image_size) for by, less in plan]

    @property
    def entrance(self) -> nn.Conv2d:
        """The convolution that reads the image."""
        return cast(nn.Conv2d, self.encoder[0])

    def replace_entrance(self, layer: nn.Conv2d) -> None:
        """Replace the convolution that reads the image."""
        self.encoder[0] = layer

    @override
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruct the teacher's normalised output; dropout is applied only if a generator is given."""
        x = self.encoder(x)
        for size, convolution in zip(self.sizes, self.decoder, strict=False):
            x = torch.relu(convolution(functional.interpolate(x, size, mode="bilinear")))
            if generator is not None and self.dropout > 0:
                kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout
                x = x * (kept / (1 - self.dropout)).to(x.dtype)
        x = torch.relu(self.penultimate(functional.interpolate(x, self.sizes[-1], mode="bilinear")))
        described: Tensor = self.last(x)
        return described


class EfficientAD(Detector):
    """Teacher, student and autoencoder, with the statistics that normalise their outputs and maps."""

    outputs: tuple[str, ...] = ("map", "statistics", "structural", "logical")
    wants_images = True
    teacher_mean: Tensor
    teacher_std: Tensor
    quantiles: Tensor
    image_mean: Tensor
    image_factor: Tensor

    def __init__(self, config: EfficientADConfig) -> None:
        super().__init__()
        if min(config.image_size) < config.LEAST:
            height, width = config.image_size
            raise ConfigError(
                f"image size {height}x{width}: EfficientAD needs at least {config.LEAST} pixels in each "
                "direction"
            )
        if any(length % CELL for length in config.image_size):
            height, width = config.image_size
            raise ConfigError(f"image size {height}x{width}: EfficientAD needs multiples of {CELL}")
        self.config: EfficientADConfig = config
        self.margin = 0 if config.padding or config.edges == "reflect" else MARGIN
        if not config.autoencoder:
            self.outputs = ("map", "statistics")
        pdn = PDNS[self.pretrained_name]
        self.normalise = Normalise(*IMAGENET)
        self.teacher = pdn(CHANNELS, padding=config.padding).requires_grad_(False).eval()
        self.student = pdn(CHANNELS * (2 if config.autoencoder else 1), padding=config.padding)
        self.autoencoder = (
            Autoencoder(CHANNELS, config.image_size, self.margin, config.dropout)
            if config.autoencoder
            else None
        )
        self.register_buffer("teacher_mean", torch.zeros(CHANNELS, 1, 1))
        self.register_buffer("teacher_std", torch.ones(CHANNELS, 1, 1))
        # Low and high quantile of the structural, then of the logical map. These leave a map unchanged.
        self.register_buffer("quantiles", torch.tensor([0.0, 0.1, 0.0, 0.1]))
        if "whole_image" in config.statistics:
            self.register_buffer("image_mean", torch.zeros(CHANNELS))
            self.register_buffer("image_factor", torch.eye(CHANNELS))

    @property
    @override
    def pretrained_name(self) -> str:
        return f"pdn_{self.config.size}"

    @property
    @override
    def encoding_key(self) -> tuple[str, ...]:
        return (self.pretrained_name, f"padding {self.config.padding}", f"edges {self.config.edges}")

    @property
    @override
    def config_buffers(self) -> set[str]:
        return set() if self.config.map_normalisation else {"quantiles"}

    @override
    def load_pretrained(self, path: Path) -> None:
        weights.fill(self.teacher, path)

    @override
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.teacher(self.surround(self.normalise(images))),)

    def surround(self, x: Tensor) -> Tensor:
        """Return (B, 3, H, W) images as teacher and student read them: H + 32, W + 32 with edges=reflect.

        The networks, which do not pad, lose just this reflected rim, so that their cells match the map's. The
        receptive field of a cell is centred 1.5 pixels up and left of the cell's own centre, as in the
        paper's map.
        """
        if self.config.edges == "blind":
            return x
        return functional.pad(x, (CELL * MARGIN,) * 4, mode="reflect")

    @override
    def prepare(self, encoded: Iterable[tuple[Tensor, ...]]) -> str:
        mean, variance = ops.channel_moments(part for (part,) in encoded)
        flat = int((variance <= 0).sum())
        self.teacher_mean.copy_(mean[:, None, None])
        self.teacher_std.copy_(torch.where(variance > 0, variance.sqrt(), 1.0)[:, None, None])
        return f"{flat} of the teacher's channels never change on these images" if flat else ""

    @override
    def optimizer(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        rate, decay = self.config.learning_rate, self.config.weight_decay
        if self.config.optimiser == "muon":
            return Muon(trained, rate, decay)
        return torch.optim.Adam(trained, rate, weight_decay=decay, fused=True)

    @override
    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the loss terms of algorithm 1, lines 12 to 24; the student runs once on all its images."""
        count, described = len(batch.images), self.describe(batch.encoded[0])
        images = [self.normalise(batch.images)]
        if self.config.penalty and batch.natural is not None:
            images.append(self.normalise(sometimes_grey(batch.natural, 0.3, generator)))
        imitating = len(images) * count
        if self.autoencoder is not None:
            augmented = self.normalise(jitter(batch.images, generator))
            images.append(augmented)
        seen = self.surround(torch.cat(images))
        places = self.sample_origins(seen, generator)
        seen = crops(seen, places, self.config.crop, CELL)
        cells = self.config.crop // CELL - 2 * MARGIN
        features = self.student.features(seen)
        imitate, rebuild = self.student_heads()
        first = functional.conv2d(features[:imitating], *imitate).float()
        wanted = crops(described, places[:count], cells)
        terms = {"hard": self.hard_loss((wanted - first[:count]).square())}
        if imitating > count:
            terms["penalty"] = first[count:].square().mean()
        if self.autoencoder is not None:
            second = functional.conv2d(features[imitating:], *rebuild)
            with torch.no_grad():
                target = self.describe(self.teacher(seen[imitating:]).float())
            rebuilt = crops(self.autoencoder(augmented, generator).float(), places[imitating:], cells)
            terms["autoencoder"] = (target - rebuilt).square().mean()
            terms["student_autoencoder"] = (rebuilt - second.float()).square().mean()
        return terms

    def student_heads(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Return weight and bias of both halves of the student's last convolution.

        The first half imitates the teacher, the second the autoencoder; without an autoencoder it is empty.
        """
        last = self.student.last
        biases = (None, None) if last.bias is None else (last.bias[:CHANNELS], last.bias[CHANNELS:])
        return (last.weight[:CHANNELS], biases[0]), (last.weight[CHANNELS:], biases[1])

    def sample_origins(self, seen: Tensor, generator: torch.Generator) -> list[tuple[int, int]]:
        """Sample the first cell, down and across, of each image's crop; empty if images are used whole."""
        if not self.config.crop:
            return []
        room = [(length - self.config.crop) // CELL + 1 for length in seen.shape[2:]]
        draw = torch.rand((len(seen), 2), generator=generator, device=seen.device)
        places = (draw * draw.new_tensor(room)).long().tolist()  # one wait for the device, not two an image
        return [(down, across) for down, across in places]

    def describe(self, raw: Tensor) -> Tensor:
        """Normalise the teacher's output by its statistics over the training images."""
        return (raw - self.teacher_mean) / self.teacher_std

    def hard_loss(self, error: Tensor) -> Tensor:
        """Return the mean of the (B, C, h, w) squared errors at or above their own image's hard quantile."""
        if self.config.hard_quantile == 0:
            return error.mean()
        flat = error.flatten(1)
        count = flat.shape[1]
        # The number of elements at or above the linearly interpolated quantile; topk need not sort them all.
        hard = count - math.ceil((count - 1) * self.config.hard_quantile)
        return flat.topk(hard, sorted=False).values.mean()

    @property
    @override
    def settles_on(self) -> int:
        return MEASURED_ON if "whole_image" in self.config.statistics else 0

    @override
    def settle(self, batches: Iterable[Batch]) -> None:
        """Measure mean and covariance of the summaries of good images, for the statistic `whole_image`."""
        if not self.settles_on:
            return
        with torch.no_grad():
            summaries = torch.cat([self.summary(batch.images) for batch in batches])
        found = gaussians.moments([summaries[:, None]])
        self.image_mean.copy_(found.mean[0])
        self.image_factor.copy_(gaussians.factors(gaussians.shrunk(found)[0])[0])

    def summary(self, images: Tensor) -> Tensor:
        """Return what whole images show, (B, C): the means of the student's first outputs over all places."""
        described: Tensor = self.student(self.surround(self.normalise(images)))
        return described[:, :CHANNELS].mean((2, 3))

    def image_distance(self, images: Tensor) -> Tensor:
        """Return the (B,) Mahalanobis distances of the summaries from those of good images (PUAD)."""
        apart = (self.summary(images) - self.image_mean) @ self.image_factor.T
        distances: Tensor = torch.linalg.vector_norm(apart, dim=1)
        return distances

    @override
    def finish(self, images: Iterable[Tensor]) -> None:
        """Measure the quantiles of the maps on held-out good images: algorithm 1, lines 26 to 36."""
        if not self.config.map_normalisation:
            return
        pairs = [self.raw_maps(batch) for batch in images]
        for number, maps in enumerate(zip(*pairs, strict=True)):
            pixels = torch.cat([part.double().flatten() for part in maps])
            for place, share in enumerate((self.config.low_quantile, self.config.high_quantile)):
                self.quantiles[2 * number + place] = quantile(pixels, share)

    def raw_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the (B, h, w) structural map, and the logical one if there is an autoencoder."""
        x = self.normalise(images)
        seen = self.surround(x)
        student = self.student(seen)
        structural = (self.describe(self.teacher(seen)) - student[:, :CHANNELS]).square().mean(1)
        if self.autoencoder is None:
            return (structural,)
        return structural, (self.autoencoder(x) - student[:, CHANNELS:]).square().mean(1)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return map, statistics and halves by algorithm 2, in which the logical map has a weight of 0.5."""
        parts = []
        for number, raw in enumerate(self.raw_maps(images)):
            low, high = self.quantiles[2 * number], self.quantiles[2 * number + 1]
            parts.append(0.1 * (raw - low) / (high - low))
        weight = self.config.logical_weight
        cells = parts[0] if len(parts) == 1 else (1 - weight) * parts[0] + weight * parts[1]
        padded = functional.pad(cells, (self.margin,) * 4)
        size = (images.shape[2], images.shape[3])
        maps = functional.interpolate(padded[:, None], size, mode="bilinear")[:, 0]
        distance = partial(self.image_distance, images)
        statistics = ops.map_statistics(maps, cells, self.config.statistics, whole_image=distance)
        return (maps, statistics, *(parts if len(parts) > 1 else ()))

    @override
    def fused(self) -> nn.Module:
        from blemish.detectors.efficientad.fused import FusedEfficientAD

        return FusedEfficientAD(self).eval()

    @override
    def with_fewer_channels(
        self, network: nn.Module, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
    ) -> tuple[nn.Module, list[Kept]]:
        from blemish.detectors.efficientad import channels

        return channels.reduce(network, good, other, tolerance)

    @override
    def for_integers(self, network: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
        from blemish.detectors.efficientad import integers

        return integers.ready_for_integers(network, batches)


def quantile(values: Tensor, share: float) -> Tensor:
    """Return a linearly interpolated quantile, of more elements than torch.quantile accepts."""
    place = (values.numel() - 1) * share
    low = values.kthvalue(math.floor(place) + 1).values
    high = values.kthvalue(math.ceil(place) + 1).values
    return torch.lerp(low, high, place - math.floor(place))


def luma(images: Tensor) -> Tensor:
    """Return the (B, 1, H, W) luma of RGB images, by ITU-R 601."""
    return (images * images.new_tensor(ops.LUMA)[:, None, None]).sum(1, keepdim=True)


def sometimes_grey(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Convert each of (B, 3, H, W) images to grey with the given probability."""
    draw = torch.rand((len(images), 1, 1, 1), generator=generator, device=images.device)
    return torch.where(draw < probability, luma(images).expand_as(images), images)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast or saturation of each image, at random, by a factor from U(0.8, 1.2)."""
    shape, device = (len(images), 1, 1, 1), images.device
    which = torch.randint(3, shape, generator=generator, device=device)
    factor = 0.8 + 0.4 * torch.rand(shape, generator=generator, device=device)
    grey = luma(images)
    anchor = torch.where(which == 0, 0.0, torch.where(which == 1, grey.mean((2, 3), keepdim=True), grey))
    return torch.lerp(anchor.expand_as(images), images, factor.expand_as(images)).clamp(0, 1)
