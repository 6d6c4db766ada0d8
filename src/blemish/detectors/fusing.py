"""TODO."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


def flops(network: nn.Module, image_size: tuple[int, int]) -> int:
    """Count the FLOPs of a network on one image, a multiply-add as two: of its products, as is usual.

    Nothing is computed: the count needs shapes alone.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).eval().to("meta")(torch.empty(1, 3, *image_size, device="meta"))
    return int(counter.get_total_flops())


KEPT = ("down", "across", "offsets")
"""Buffers behind the last layers, where a map is made of their sums: always in float32."""


class Lowered(nn.Module):
    """A copy of a fused network whose layers compute in another type; it takes and gives float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.network = copy.deepcopy(network).to(dtype)
        for name in KEPT:
            if hasattr(network, name):
                setattr(self.network, name, getattr(network, name).clone())

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.float() for output in self.network(images.to(self.dtype)))


def enlarging(cells: int, length: int, margin: int = 0, kernel: Tensor | None = None) -> Tensor:
    """Make the (length, cells) matrix that brings one axis of a map from cells to pixels.

    It pads with `margin` zeros on both sides, resizes linearly (align_corners off), and blurs with an odd
    kernel, borders reflected: what the detectors do to the map, done to each unit vector.
    """
    columns = functional.pad(torch.eye(cells)[None, None], (0, 0, margin, margin))
    columns = functional.interpolate(columns, (length, cells), mode="bilinear")
    if kernel is not None:
        half = kernel.shape[0] // 2
        columns = functional.pad(columns, (0, 0, half, half), mode="reflect")
        columns = functional.conv2d(columns, kernel.float()[None, None, :, None])
    return columns[0, 0]


def enlarge(cells: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Bring (B, h, w) cells to (B, H, W) pixels by an (H, h) and a (W, w) matrix.

    The matrices stand on the left of both products: on the right they would look like a layer's weights.
    """
    tall = torch.matmul(down, cells)
    return torch.matmul(across, tall.transpose(1, 2)).transpose(1, 2)
