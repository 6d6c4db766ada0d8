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

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from blemish.detectors import cells, edges, ops
from blemish.detectors.fusing import Fused, enlarge, enlarging_matrix
from blemish.detectors.patchcore.aggregation import kernels
from blemish.detectors.patchcore.detector import SMOOTHING, PatchCore, reweighted


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

    def __init__(self, detector: PatchCore) -> None:
        super().__init__()
        self.config, self.cell_size = detector.config, detector.cell_size
        kernel = detector.kernel if self.config.blur_sigma else None
        sizes = zip(self.cell_size, self.config.image_size, strict=True)
        down, across = (enlarging_matrix(n, length, kernel=kernel, border="symmetric") for n, length in sizes)
        self.register_buffer("down", down)
        self.register_buffer("across", across)
        published = self.config.aggregation == "published"
        self.projected = cells.Projected(
            detector.backbone,
            kernels(detector.channels) if published else projections(detector),
            self.cell_size,
            average=not published,
        )
        self.register_buffer("gain", detector.gain.detach().clone())
        self.register_buffer("shift", detector.shift.detach().clone())
        self.register_buffer("constant", constant(detector))
        self.register_buffer("bank", detector.bank.T.detach().clone())
        self.register_buffer("halves", detector.bank.square().sum(1).detach() / 2)

    def rows(self, images: Tensor) -> Tensor:
        """Return the (B, h w, D) rows that are compared with the bank."""
        joined: Tensor = self.projected(images) + self.constant
        rows = joined.flatten(2).transpose(1, 2)
        if not self.config.dimensions:
            return rows
        features = rows.shape[2] - 2 * bool(self.config.place_weight)
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
        squared = functional.relu(rows.float().square().sum(2) - 2 * nearest)
        distances = squared if config.squared else (squared + SMOOTHING**2).sqrt()
        planes = distances.view(-1, *self.cell_size)
        planes = edges.treated(planes, config.edges, self.gain, self.shift)
        maps = enlarge(planes, self.down, self.across)
        statistics = ops.map_statistics(maps, planes, config.statistics, config.top_share)
        if "cell_maximum" in config.statistics:
            statistics["cell_maximum"] = planes.flatten(1).amax(1)
        if "reweighted" in config.statistics:
            statistics["reweighted"] = reweighted(rows.float(), squared, self.bank.T.float(), config.support)
        return maps, torch.stack([statistics[name] for name in config.statistics], 1)


def projections(detector: PatchCore) -> list[Tensor]:
    """Return the (D, C_i, 1, 1) kernels that project each layer, with zeros for the cell's place."""
    places = 2 * bool(detector.config.place_weight)
    return cells.projections(functional.pad(detector.projection, (0, places)), detector.channels)


def constant(detector: PatchCore) -> Tensor:
    """Return the (1, D, h, w) constant added to the projected layers: minus the mean, and the place."""
    height, width = detector.cell_size
    if detector.config.aggregation == "published":
        fixed = detector.mean.new_zeros(len(detector.mean), height, width)
    else:
        shift = -(detector.mean @ detector.projection)
        fixed = shift[:, None, None].expand(-1, height, width)
    place = detector.place.permute(2, 0, 1)
    return (torch.cat([fixed, place]) if detector.config.place_weight else fixed)[None].detach().clone()
