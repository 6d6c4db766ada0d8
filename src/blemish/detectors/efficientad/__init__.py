"""EfficientAD: a student that imitates a teacher on good images, an autoencoder for what is logically wrong.

Batzner, Heckler, König: "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies",
WACV 2024; networks of tables 5 to 8, training of algorithm 1, inference of algorithm 2 in its supplement.

Departures from the paper, each one word in the config, all undone by `--preset paper`:
- 70,000 iterations at 1e-4 are days on a CPU: the default is a shorter run of one cycle with Muon, on random
  squares of the images, whose student learns from more of its errors (hard quantile 0.9);
- the image score joins the map's maximum with its smoothed maximum and top mean.
The penalty's natural images are drawn unless photographs are given, in either preset.
The networks run without padding, as in the reproduction that reaches the published numbers; the finished map
is padded by the 4 cells that this costs on each side, so that it is blind there. With edges=reflect, which is
no paper's, it sees to the edge. The teacher's outputs are kept in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish.backbones import IMAGENET, Normalise, weights
from blemish.backbones.pdn import CHANNELS, PDNS
from blemish.detectors import ops
from blemish.detectors.base import Config, Detector
from blemish.detectors.muon import Muon
from blemish.errors import ConfigError
from blemish.types import Batch

CELL = 4
"""Pixels of the image on each side of a cell of the map."""

MARGIN = 4
"""Cells that the unpadded networks lose on each side of the map."""


@dataclass(frozen=True, kw_only=True)
class EfficientADConfig(Config):
    """EfficientAD's numbers."""

    size: Literal["small", "medium"] = "small"
    padding: bool = False
    """Zero-pad inside the networks, which then see to the edge but learn its zeros."""
    edges: Literal["blind", "reflect"] = "blind"
    """What makes up for the margin of unpadded networks: zeros in the map, or a rim of reflected pixels."""
    batch_size: int = 2
    steps: int = 2000
    learning_rate: float = 2e-3
    weight_decay: float = 1e-5
    hard_quantile: float = 0.9
    """Only elements of the student's error from this quantile up train it; 0: all of them."""
    penalty: bool = True
    """Keep the student from imitating the teacher on natural images."""
    autoencoder: bool = True
    """Use the autoencoder's half of the map."""
    logical_weight: float = 0.5
    """Share of that half in the map; it plays no part in training."""
    map_normalisation: bool = True
    """Scale the two halves by quantiles of held-out maps before they are joined."""
    low_quantile: float = 0.9
    high_quantile: float = 0.995
    dropout: float = 0.2
    crop: int = 128
    """Side in pixels of the square that the student sees of each image in a step; 0: all of it."""
    optimiser: Literal["adam", "muon"] = "muon"

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work and settings that contradict each other; raise ConfigError."""
        refuse_numbers(self)
        if self.padding and self.edges != "blind":
            raise ConfigError(
                f"edges={self.edges} beside padding=true: both fill the margin; expected one of them"
            )
        if self.padding and self.crop:
            raise ConfigError(
                f"crop={self.crop} beside padding=true: padded networks see all of an image; expected crop=0"
            )
        if self.crop and (self.crop % CELL or not 36 <= self.crop <= 256):
            raise ConfigError(f"crop={self.crop}: expected 0, or a multiple of {CELL} from 36 to 256")
        if not self.autoencoder and self.logical_weight != 0.5:
            raise ConfigError(
                f"logical_weight={self.logical_weight} beside autoencoder=false: "
                "there is no logical map to weigh"
            )


PAPER = {
    "steps": 70_000,
    "batch_size": 1,
    "crop": 0,
    "optimiser": "adam",
    "learning_rate": 1e-4,
    "hard_quantile": 0.999,
    "schedule": "step-95",
    "statistics": ("maximum",),
}


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
        # 3, 8, 15, 32, 63, 127 and 56 (64 without a margin) at 256 pixels.
        plan = ((64, 1), (32, 0), (16, 1), (8, 0), (4, 1), (2, 1), (CELL, 2 * margin))
        self.sizes = [tuple(length // by - less for length in image_size) for by, less in plan]

    @override
    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruct the teacher's description; with a generator dropout is on."""
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
    """Teacher, student and autoencoder with the statistics that join their maps."""

    outputs: tuple[str, ...] = ("map", "statistics", "structural", "logical")
    wants_images = True
    teacher_mean: Tensor
    teacher_std: Tensor
    quantiles: Tensor

    def __init__(self, config: EfficientADConfig) -> None:
        super().__init__()
        if min(config.image_size) < 256:
            height, width = config.image_size
            raise ConfigError(f"image size {height}x{width}: EfficientAD needs at least 256 in both axes")
        if any(length % CELL for length in config.image_size):
            height, width = config.image_size
            raise ConfigError(f"image size {height}x{width}: EfficientAD needs multiples of {CELL}")
        self.config: EfficientADConfig = config
        self.margin = 0 if config.padding or config.edges == "reflect" else MARGIN
        self.wants_natural_images = config.penalty
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
        # Low and high quantile of the structural, then of the logical map. These leave a map as it is.
        self.register_buffer("quantiles", torch.tensor([0.0, 0.1, 0.0, 0.1]))

    @property
    @override
    def pretrained_name(self) -> str:
        return f"pdn_{self.config.size}"

    @property
    @override
    def encoding(self) -> tuple[str, ...]:
        return (self.pretrained_name, f"padding {self.config.padding}", f"edges {self.config.edges}")

    @property
    @override
    def configured(self) -> set[str]:
        return set() if self.config.map_normalisation else {"quantiles"}

    @override
    def load_pretrained(self, path: Path | None) -> None:
        weights.fill(self.teacher, weights.find(self.pretrained_name, path))

    @override
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.teacher(self.surround(self.normalise(images))),)

    def surround(self, x: Tensor) -> Tensor:
        """Give (B, 3, H, W) images as teacher and student see them: with edges "reflect", H + 32, W + 32.

        What unpadded networks lose of that is the reflected rim, so that their cells are the map's. What a
        cell sees is centred 1.5 pixels up and left of the cell's own middle, as in the paper's map.
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
        """Algorithm 1, lines 12 to 24; the student reads all its images in one pass, half by half."""
        count, described = len(batch.images), self.describe(batch.encoded[0])
        images = [self.normalise(batch.images)]
        if self.config.penalty and batch.natural is not None:
            images.append(self.normalise(sometimes_grey(batch.natural, 0.3, generator)))
        imitating = len(images) * count
        if self.autoencoder is not None:
            augmented = self.normalise(jitter(batch.images, generator))
            images.append(augmented)
        seen = self.surround(torch.cat(images))
        places = self.draw_places(seen, generator)
        seen = squares(seen, places, self.config.crop, CELL)
        cells = self.config.crop // CELL - 2 * MARGIN
        trunk, last = self.student[:-1], cast(nn.Conv2d, self.student[-1])
        features = trunk(seen)
        bias = cast(Tensor, last.bias)
        first = functional.conv2d(features[:imitating], last.weight[:CHANNELS], bias[:CHANNELS]).float()
        wanted = squares(described, places[:count], cells)
        terms = {"hard": self.hard_loss((wanted - first[:count]).square())}
        if imitating > count:
            terms["penalty"] = first[count:].square().mean()
        if self.autoencoder is not None:
            second = functional.conv2d(features[imitating:], last.weight[CHANNELS:], bias[CHANNELS:])
            with torch.no_grad():
                target = self.describe(self.teacher(seen[imitating:]).float())
            rebuilt = squares(self.autoencoder(augmented, generator).float(), places[imitating:], cells)
            terms["autoencoder"] = (target - rebuilt).square().mean()
            terms["student_autoencoder"] = (rebuilt - second.float()).square().mean()
        return terms

    def draw_places(self, seen: Tensor, generator: torch.Generator) -> list[tuple[int, int]]:
        """Draw the first cell, down and across, of each image's square; none where all of it is shown."""
        if not self.config.crop:
            return []
        room = [(length - self.config.crop) // CELL + 1 for length in seen.shape[2:]]
        draw = torch.rand((len(seen), 2), generator=generator, device=seen.device)
        return [(int(down), int(across)) for down, across in draw * draw.new_tensor(room)]

    def describe(self, raw: Tensor) -> Tensor:
        """Normalise the teacher's output by its statistics over the training images."""
        return (raw - self.teacher_mean) / self.teacher_std

    def hard_loss(self, error: Tensor) -> Tensor:
        """Average the (B, C, h, w) squared errors that are at least their own image's hard quantile."""
        if self.config.hard_quantile == 0:
            return error.mean()
        flat = error.flatten(1)
        count = flat.shape[1]
        # The elements that are at least the linearly interpolated quantile, without sorting them all.
        hard = count - math.ceil((count - 1) * self.config.hard_quantile)
        return flat.topk(hard, sorted=False).values.mean()

    @override
    def inspect(self, encoded: Iterable[tuple[Tensor, ...]], generator: torch.Generator) -> str:
        return ""

    @override
    def finish(self, images: Iterable[Tensor]) -> None:
        """Measure the maps' quantiles on held-out good images: algorithm 1, lines 26 to 36."""
        if not self.config.map_normalisation:
            return
        pairs = [self.raw_maps(batch) for batch in images]
        for number, maps in enumerate(zip(*pairs, strict=True)):
            pixels = torch.cat([part.double().flatten() for part in maps])
            for place, share in enumerate((self.config.low_quantile, self.config.high_quantile)):
                self.quantiles[2 * number + place] = quantile(pixels, share)

    def raw_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Give the (B, h, w) structural map, and the logical one where there is an autoencoder."""
        x = self.normalise(images)
        seen = self.surround(x)
        student = self.student(seen)
        structural = (self.describe(self.teacher(seen)) - student[:, :CHANNELS]).square().mean(1)
        if self.autoencoder is None:
            return (structural,)
        return structural, (self.autoencoder(x) - student[:, CHANNELS:]).square().mean(1)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Algorithm 2, where the logical map has a weight of 0.5."""
        parts = []
        for number, raw in enumerate(self.raw_maps(images)):
            low, high = self.quantiles[2 * number], self.quantiles[2 * number + 1]
            parts.append(0.1 * (raw - low) / (high - low))
        weight = self.config.logical_weight
        cells = parts[0] if len(parts) == 1 else (1 - weight) * parts[0] + weight * parts[1]
        padded = functional.pad(cells, (self.margin,) * 4)
        size = (images.shape[2], images.shape[3])
        maps = functional.interpolate(padded[:, None], size, mode="bilinear")[:, 0]
        statistics = ops.map_statistics(maps, cells, self.config.statistics)
        joined = torch.stack([statistics[name] for name in self.config.statistics], 1)
        return (maps, joined, *(parts if len(parts) > 1 else ()))


def squares(x: Tensor, places: Sequence[tuple[int, int]], side: int, step: int = 1) -> Tensor:
    """Cut a square out of each of (B, C, H, W); places count in steps. Without places, give all."""
    if not places:
        return x
    cut = [
        one[:, step * down :, step * across :][:, :side, :side]
        for one, (down, across) in zip(x, places, strict=True)
    ]
    return torch.stack(cut).contiguous(memory_format=torch.channels_last)


def refuse_numbers(config: EfficientADConfig) -> None:
    """Refuse numbers out of their range, and those that are none; raise ConfigError."""
    c = config
    for name, value, fits, expected in (
        ("learning_rate", c.learning_rate, 0 < c.learning_rate < math.inf, "more than 0, and finite"),
        ("weight_decay", c.weight_decay, 0 <= c.weight_decay < math.inf, "at least 0, and finite"),
        ("logical_weight", c.logical_weight, 0 <= c.logical_weight <= 1, "0 to 1"),
        ("dropout", c.dropout, 0 <= c.dropout < 1, "at least 0 and less than 1"),
        ("hard_quantile", c.hard_quantile, 0 <= c.hard_quantile < 1, "at least 0 and less than 1"),
        ("low_quantile", c.low_quantile, 0 <= c.low_quantile < c.high_quantile, "less than high_quantile"),
        ("high_quantile", c.high_quantile, c.high_quantile <= 1, "at most 1"),
    ):
        if not fits:
            raise ConfigError(f"setting {name}={value} does not fit; expected {expected}")


def quantile(values: Tensor, share: float) -> Tensor:
    """Interpolate a quantile linearly, for more elements than torch.quantile takes."""
    place = (values.numel() - 1) * share
    low = values.kthvalue(math.floor(place) + 1).values
    high = values.kthvalue(math.ceil(place) + 1).values
    return torch.lerp(low, high, place - math.floor(place))


def luma(images: Tensor) -> Tensor:
    """Grey (B, 1, H, W) of RGB images, by ITU-R 601."""
    return (images * images.new_tensor(ops.LUMA)[:, None, None]).sum(1, keepdim=True)


def sometimes_grey(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Turn each of (B, 3, H, W) images grey with a probability."""
    draw = torch.rand((len(images), 1, 1, 1), generator=generator, device=images.device)
    return torch.where(draw < probability, luma(images).expand_as(images), images)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change one of brightness, contrast and saturation of each image by a factor from U(0.8, 1.2)."""
    shape, device = (len(images), 1, 1, 1), images.device
    which = torch.randint(3, shape, generator=generator, device=device)
    factor = 0.8 + 0.4 * torch.rand(shape, generator=generator, device=device)
    grey = luma(images)
    anchor = torch.where(which == 0, 0.0, torch.where(which == 1, grey.mean((2, 3), keepdim=True), grey))
    return torch.lerp(anchor.expand_as(images), images, factor.expand_as(images)).clamp(0, 1)
