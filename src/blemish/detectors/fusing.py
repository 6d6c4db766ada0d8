"""What the fused forms of several methods share.

A fused network has the outputs of its detector's `forward`, up to rounding, from fewer operations; a test
holds that for every method. Each method's own rewrites stand beside it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override


class Fused(nn.Module):
    """A fused network: (B, 3, H, W) images in [0, 1] to the detector's outputs, in float32."""

    full_precision: tuple[str, ...] = ()
    """Buffers that stay in float32 whatever the layers compute in: they make the map from the last layers."""


class Lowered(nn.Module):
    """A copy of a network whose layers compute in another type; its inputs and outputs stay float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.network = copy.deepcopy(network).to(dtype)
        for name in network.full_precision if isinstance(network, Fused) else ():
            self.network.register_buffer(name, network.get_buffer(name).clone())

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.float() for output in self.network(images.to(self.dtype)))


def flops(network: nn.Module, image_size: tuple[int, int]) -> int:
    """Count the FLOPs of a network's products on one image, a multiply-add as two.

    Nothing is computed: the count needs shapes alone.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).eval().to("meta")(torch.empty(1, 3, *image_size, device="meta"))
    return int(counter.get_total_flops())


# --- the finished map as two products: padding, resizing and blurring are linear along each axis ---


def enlarging(cells: int, length: int, margin: int = 0, kernel: Tensor | None = None) -> Tensor:
    """Return the (length, cells) matrix that brings one axis of a map from cells to pixels.

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


# --- fewer channels, and integers ---


@dataclass(frozen=True)
class Kept:
    """What a cut kept of one layer."""

    layer: str
    kept: int
    of: int
    error: float
    """Root mean square change of the good images' map, or of the layer's half of it, in its deviations."""


def first_convolution(network: nn.Module) -> nn.Conv2d | None:
    """Return the convolution that reads the image."""
    return next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)


def round_evenly(layer: nn.Conv2d, most: int = 127) -> None:
    """Round a convolution's weights to the integers that they are quantised to, keeping their sums, in place.

    Rounding each weight to the nearest integer lets a kernel's errors add up wherever an image is smooth,
    which is nearly everywhere. Here those that were rounded by most go to the other side, until the sum of
    each kernel is right to half an integer. On MVTec AD's bottle that makes a third of the error of nearest
    integers.
    """
    with torch.no_grad():
        scale = layer.weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / most
        exact = (layer.weight / scale).flatten(2)
        rounded = exact.round()
        error = rounded - exact
        excess = error.sum(2, keepdim=True).round()
        order = (error * -excess.sign()).argsort(2).argsort(2)
        rounded -= torch.where(order < excess.abs(), excess.sign(), 0.0)
        layer.weight.copy_(rounded.clamp(-most, most).view_as(layer.weight) * scale)
