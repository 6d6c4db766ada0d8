"""Cells of frozen features: one row of numbers for each position of the finest layer.

`joined` is what methods define their cells by, and `Projected` computes linear functions of them for
inference: averaging and resizing act on positions, a projection acts on channels, so that the order is free,
and projecting first leaves the least to do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish.backbones import Backbone
from blemish.backbones.folding import without_norms


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


def repeated(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, h_i, w_i) to (B, C, h, w) by repeating the nearest position."""
    return x if tuple(x.shape[2:]) == size else functional.interpolate(x, size, mode="nearest")


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join (B, h_i, w_i, C_i) parts into (B, h, w, C), each averaged over 3 x 3 and resized to the first."""
    planes = [averaged(part.permute(0, 3, 1, 2)) for part in parts]
    size = (planes[0].shape[2], planes[0].shape[3])
    return torch.cat([resized(plane, size) for plane in planes], 1).permute(0, 2, 3, 1)


def places(height: int, width: int) -> Tensor:
    """Return the (h, w, 2) vertical and horizontal places of the cells, from -1 to 1."""
    axes = [torch.linspace(-1, 1, length) if length > 1 else torch.zeros(1) for length in (height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), 2)


class Projected(nn.Module):
    """Map (B, 3, H, W) images to the (B, D, h, w) sum of a backbone's outputs, each convolved and resized.

    kernels: for each part that `by_cells` returns, an odd (D, C_i, k, k) kernel. average: whether to average
    over 3 x 3, as `joined` does. resize: to (h, w).
    """

    def __init__(
        self,
        backbone: Backbone,
        kernels: Iterable[Tensor],
        size: tuple[int, int],
        *,
        average: bool = True,
        resize: Callable[[Tensor, tuple[int, int]], Tensor] = resized,
    ) -> None:
        super().__init__()
        self.size, self.average, self.resize = size, average, resize
        self.backbone = without_norms(backbone)
        self.layers = nn.ModuleList(convolution(kernel) for kernel in kernels)

    @override
    def forward(self, images: Tensor) -> Tensor:
        outputs = [x.permute(0, 3, 1, 2) for x in by_cells(self.backbone(images))]
        planes = [layer(x) for x, layer in zip(outputs, self.layers, strict=True)]
        if self.average:
            planes = [averaged(plane) for plane in planes]
        planes = [self.resize(plane, self.size) for plane in planes]
        total: Tensor = planes[0]
        for plane in planes[1:]:
            total = total + plane
        return total


def projections(matrix: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """Return the (D, C_i, 1, 1) kernels of a (C, D) projection of joined features."""
    return [part[:, :, None, None] for part in torch.split(matrix.T, list(channels), 1)]


def convolution(kernel: Tensor) -> nn.Conv2d:
    """Return a convolution without bias, with a copy of these (outputs, inputs, k, k) weights, k odd."""
    outputs, inputs, size, _ = kernel.shape
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    layer.weight = nn.Parameter(kernel.detach().clone().contiguous(), requires_grad=False)
    return layer
