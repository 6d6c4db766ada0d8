"""PaDiM for inference: what is linear is done first, where there is least of it.

Exact rewrites, equal to the plain network up to rounding: batch norms are folded into convolutions; the
reduction, and with one Gaussian for all positions its whitening, too, runs on the backbone's outputs before
they are resized; means are a constant; the map is resized and blurred by one matrix product for each axis.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from blemish.detectors import cells, edges, ops
from blemish.detectors.fusing import Fused, enlarge, enlarging_matrix
from blemish.detectors.padim.detector import PaDiM


class FusedPaDiM(Fused):
    """Map (B, 3, H, W) images in [0, 1] to the outputs of `PaDiM.forward`."""

    full_precision = ("down", "across", "gain", "shift")
    down: Tensor
    across: Tensor
    factor: Tensor
    mean: Tensor
    gain: Tensor
    shift: Tensor

    def __init__(self, detector: PaDiM) -> None:
        super().__init__()
        self.config, self.cell_size, self.pooled = detector.config, detector.cell_size, detector.pooled
        kernel = detector.kernel if self.config.blur_sigma else None
        sizes = zip(self.cell_size, self.config.image_size, strict=True)
        down, across = (enlarging_matrix(n, length, kernel=kernel) for n, length in sizes)
        self.register_buffer("down", down)
        self.register_buffer("across", across)
        matrix, mean = detector.projection, detector.mean
        if self.pooled:
            matrix, mean = matrix @ detector.factor[0].T, mean @ detector.factor[0].T
        self.projected = cells.Projected(
            detector.backbone,
            cells.projections(matrix, detector.channels),
            self.cell_size,
            average=self.config.average,
            resize=cells.resized if self.config.average else cells.repeated,
        )
        self.register_buffer("gain", detector.gain.detach().clone())
        self.register_buffer("shift", detector.shift.detach().clone())
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("factor", detector.factor.detach().clone())

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the map and the statistics."""
        apart: Tensor = self.projected(images).flatten(2).transpose(1, 2) - self.mean
        if not self.pooled:
            apart = torch.matmul(self.factor, apart[:, :, :, None])[..., 0]
        planes = apart.float().square().sum(2).sqrt().view(-1, *self.cell_size)
        planes = edges.treated(planes, self.config.edges, self.gain, self.shift)
        maps = enlarge(planes, self.down, self.across)
        return maps, ops.map_statistics(maps, planes, self.config.statistics, self.config.top_share)
