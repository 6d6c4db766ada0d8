"""What the fused networks of several methods have in common.

A fused network gives the outputs of its detector's `forward`, up to rounding, with fewer operations; a test
checks this for every method. Rewrites specific to one method are in that method's package.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from blemish.detectors.ops import Border, extended


class Fused(nn.Module):
    """A fused network, which maps (B, 3, H, W) images in [0, 1] to the detector's outputs, in float32."""

    full_precision: tuple[str, ...] = ()
    """Names of the buffers kept in float32 at any precision: they turn the last layers' outputs into the
    map."""


class Lowered(nn.Module):
    """A copy of a network whose layers compute in another type; its inputs and outputs stay in float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.network = copy.deepcopy(network).to(dtype)
        for whole, lowered in zip(network.modules(), self.network.modules(), strict=True):
            for name in getattr(whole, "full_precision", ()):
                lowered.register_buffer(name, whole.get_buffer(name).clone())

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.float() for output in self.network(images.to(self.dtype)))


def flops(network: nn.Module, image_size: tuple[int, int]) -> int:
    """Count the FLOPs of a network's matrix products on one image; a multiply-add counts as two.

    Only shapes are needed, so the network runs on meta tensors and nothing is computed.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).eval().to("meta")(torch.empty(1, 3, *image_size, device="meta"))
    return int(counter.get_total_flops())


# --- the final map as two matrix products: padding, resizing and blurring are linear along each axis ---


def enlarging_matrix(
    cells: int, length: int, margin: int = 0, kernel: Tensor | None = None, border: Border = "reflect"
) -> Tensor:
    """Return the (length, cells) matrix that resizes one axis of a map from cells to pixels.

    It pads with `margin` zeros on both sides, resizes linearly (align_corners=False) and blurs with an odd
    kernel. The matrix results from applying these operations, as the detectors do, to
    each unit vector.
    """
    columns = functional.pad(torch.eye(cells)[None, None], (0, 0, margin, margin))
    columns = functional.interpolate(columns, (length, cells), mode="bilinear")
    if kernel is not None:
        half = kernel.shape[0] // 2
        columns = extended(columns[0], half, 1, border)[None]
        columns = functional.conv2d(columns, kernel.float()[None, None, :, None])
    return columns[0, 0]


def enlarge(cells: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Resize (B, h, w) cells to (B, H, W) pixels with an (H, h) and a (W, w) matrix.

    The matrices are the left operands of both products: as right operands they would be taken for weights of
    a layer and quantised.
    """
    tall = torch.matmul(down, cells)
    return torch.matmul(across, tall.transpose(1, 2)).transpose(1, 2)


# --- fewer channels, and int8 ---


@dataclass(frozen=True)
class Kept:
    """How many channels of one layer a reduction keeps."""

    layer: str
    kept: int
    of: int
    error: float
    """Root mean square change of the good images' map, or of the layer's half of it, in standard
    deviations."""
