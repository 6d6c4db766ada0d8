"""PatchCore for inference: what is linear is done first, where there is least of it.

Exact rewrites, equal to the plain network up to rounding:
- the batch norms of the backbone are folded into its convolutions;
- centring and projection run on the backbone's outputs, before they are averaged and resized, and the place
  of a cell is added as a constant;
- halves of the squared lengths of the remembered rows are computed beforehand, so that the search is a
  product, a sum and a maximum;
- the map is resized and blurred by one matrix product for each axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from blemish.detectors import cells, edges, ops
from blemish.detectors.fusing import Fused, enlarge, enlarging_matrix
from blemish.detectors.patchcore.aggregation import kernels
from blemish.detectors.patchcore.detector import SMOOTHING, PatchCore, reweighted


@dataclass(frozen=True)
class Place:
    """How a cell's place takes part in the product with the bank: in copies, smaller in the image.

    8-bit integers have one scale for all numbers of an image's rows, and one for each row of the bank. A
    place is much larger than a feature, and would leave few levels to it. The product is the same.
    """

    copies: int = 1
    factor: float = 1.0
    """What a copy is divided by in the image."""

    def in_image(self, place: Tensor) -> Tensor:
        """Return the (..., 2 copies) copies of (..., 2) places."""
        return place.repeat(*(1,) * (place.ndim - 1), self.copies) / self.factor

    def in_bank(self, bank: Tensor, places: bool) -> Tensor:
        """Return (M, D) rows with copies of their places, their last two numbers, if they have any."""
        if not places:
            return bank
        return torch.cat([bank[:, :-2], bank[:, -2:].repeat(1, self.copies) * (self.factor / self.copies)], 1)

    def halves(self, bank: Tensor, places: bool) -> Tensor:
        """Return the (M,) halves of the squared lengths of rows that `in_bank` returned, rounded or not."""
        if not places:
            return bank.square().sum(1) / 2
        features, copies = bank.tensor_split([bank.shape[1] - 2 * self.copies], 1)
        place = copies.reshape(-1, self.copies, 2).sum(1) / self.factor
        halves: Tensor = (features.square().sum(1) + place.square().sum(1)) / 2
        return halves

    def shares(self, numbers: int, places: bool) -> Tensor:
        """Return what the square of each number of a row counts for in its squared length."""
        if not places:
            return torch.ones(numbers)
        copies = torch.full((2 * self.copies,), self.factor**2 / self.copies)
        return torch.cat([torch.ones(numbers - 2), copies])

    @staticmethod
    def for_integers(bank: Tensor, weight: float) -> Place:
        """Return the form in which no place is larger than the features beside it."""
        features = bank[:, :-2].abs()
        largest, usual = float(features.max()), float(features.amax(1).median())
        if not largest * usual:  # good images without any difference
            return Place()
        return Place(min(math.ceil(weight**2 / (largest * usual)), features.shape[1]), weight / largest)


class FusedPatchCore(Fused):
    """Map (B, 3, H, W) images in [0, 1] to the outputs of `PatchCore.forward`."""

    full_precision = ("down", "across", "halves", "gain", "shift")
    down: Tensor
    across: Tensor
    halves: Tensor
    bank: Tensor
    constant: Tensor
    gain: Tensor
    shift: Tensor
    shares: Tensor

    def __init__(self, detector: PatchCore, place: Place | None = None) -> None:
        super().__init__()
        self.config, self.cell_size = detector.config, detector.cell_size
        self.place = place or Place()
        self.places = 2 * self.place.copies * bool(self.config.place_weight)
        kernel = detector.kernel if self.config.blur_sigma else None
        sizes = zip(self.cell_size, self.config.image_size, strict=True)
        down, across = (enlarging_matrix(n, length, kernel=kernel, border="symmetric") for n, length in sizes)
        self.register_buffer("down", down)
        self.register_buffer("across", across)
        published = self.config.aggregation == "published"
        self.projected = cells.Projected(
            detector.backbone,
            kernels(detector.channels) if published else projections(detector, self.places),
            self.cell_size,
            average=not published,
        )
        self.register_buffer("gain", detector.gain.detach().clone())
        self.register_buffer("shift", detector.shift.detach().clone())
        self.register_buffer("constant", constant(detector, self.place))
        bank = self.place.in_bank(detector.bank.detach(), self.places > 0)
        if place is not None:
            bank = to_integers(bank)
        self.register_buffer("bank", bank.T.clone())
        self.register_buffer("halves", self.place.halves(bank, self.places > 0))
        self.register_buffer("shares", self.place.shares(detector.bank.shape[1], self.places > 0))

    def rows(self, images: Tensor) -> Tensor:
        """Return the (B, h w, D) rows that are compared with the bank."""
        joined: Tensor = self.projected(images) + self.constant
        rows = joined.flatten(2).transpose(1, 2)
        if not self.config.dimensions:
            return rows
        features = rows.shape[2] - self.places
        kept, rest, place = rows.tensor_split([self.config.dimensions, features], 2)
        return torch.cat([kept, rest.square().sum(2, keepdim=True).sqrt(), place], 2)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the map and the statistics."""
        config, rows = self.config, self.rows(images)
        closeness = torch.matmul(rows, self.bank).float() - self.halves
        if config.neighbours == 1:
            nearest = closeness.amax(2)
        else:
            nearest = closeness.topk(min(config.neighbours, len(self.halves)), 2).values.mean(2)
        # Of the rows as the product reads them: what rounding does to a place is then no distance.
        squared = functional.relu((rows.float().square() * self.shares).sum(2) - 2 * nearest)
        distances = squared if config.squared else (squared + SMOOTHING**2).sqrt()
        planes = distances.view(-1, *self.cell_size)
        planes = edges.treated(planes, config.edges, self.gain, self.shift)
        maps = enlarge(planes, self.down, self.across)
        statistics = ops.map_statistics(
            maps,
            planes,
            config.statistics,
            config.top_share,
            reweighted=lambda: reweighted(rows.float(), squared, self.bank.T.float(), config.support),
        )
        return maps, statistics


def to_integers(bank: Tensor, most: int = 127) -> Tensor:
    """Round (M, D) rows to the multiples of a scale of their own that 8-bit integers can express.

    What is remembered is then moved a little, and its length known, instead of mistaken: a product with a row
    that is rounded later is wrong by a part of the row's length, which is many times a usual distance.
    """
    scale = bank.abs().amax(1, keepdim=True).clamp(min=1e-12) / most
    return (bank / scale).round() * scale


def projections(detector: PatchCore, places: int) -> list[Tensor]:
    """Return the (D, C_i, 1, 1) kernels that project each layer, with zeros for the cell's place."""
    return cells.projections(functional.pad(detector.projection, (0, places)), detector.channels)


def constant(detector: PatchCore, form: Place) -> Tensor:
    """Return the (1, D, h, w) constant added to the projected layers: minus the mean, and the place."""
    height, width = detector.cell_size
    if detector.config.aggregation == "published":
        fixed = detector.mean.new_zeros(len(detector.mean), height, width)
    else:
        shift = -(detector.mean @ detector.projection)
        fixed = shift[:, None, None].expand(-1, height, width)
    place = form.in_image(detector.place).permute(2, 0, 1)
    return (torch.cat([fixed, place]) if detector.config.place_weight else fixed)[None].detach().clone()
