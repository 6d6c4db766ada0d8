"""Cells of frozen features: one row of numbers for each position of the finest layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from blemish.backbones import Backbone


def by_cells(outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Rearrange (B, C_i, h_i, w_i) outputs to (B, h_i, w_i, C_i), those of the same size concatenated."""
    parts: list[Tensor] = []
    for x in outputs:
        if parts and parts[-1].shape[2:] == x.shape[2:]:
            parts[-1] = torch.cat([parts[-1], x], 1)
        else:
            parts.append(x)
    return tuple(x.permute(0, 2, 3, 1).contiguous() for x in parts)


def cell_parts(backbone: Backbone, image_size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return meta tensors, without memory, of the shapes (1, h_i, w_i, C_i) that `by_cells` returns."""
    with torch.device("meta"):
        return by_cells(copy.deepcopy(backbone).to("meta")(torch.empty(1, 3, *image_size)))


def averaged(x: Tensor) -> Tensor:
    """Average (B, C, h, w) over the 3 x 3 neighbourhood of each position, as far as it lies inside."""
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, h_i, w_i) bilinearly to (B, C, h, w); a tensor of that size is returned as it is."""
    return x if tuple(x.shape[2:]) == size else functional.interpolate(x, size, mode="bilinear")


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join (B, h_i, w_i, C_i) parts into (B, h, w, C), each averaged over 3 x 3 and resized to the first."""
    planes = [averaged(part.permute(0, 3, 1, 2)) for part in parts]
    size = (planes[0].shape[2], planes[0].shape[3])
    return torch.cat([resized(plane, size) for plane in planes], 1).permute(0, 2, 3, 1)


def places(height: int, width: int) -> Tensor:
    """Return the (h, w, 2) vertical and horizontal places of the cells, from -1 to 1."""
    axes = [torch.linspace(-1, 1, length) if length > 1 else torch.zeros(1) for length in (height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), 2)
