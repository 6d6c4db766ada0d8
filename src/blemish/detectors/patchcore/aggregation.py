"""The paper's aggregation of features (section 3.1), which is linear and collapses into one convolution.

The authors take the 3 x 3 neighbourhood of each cell, pool its C x 9 values, channel by channel, to 1,024
numbers, resize these to the finest layer, and pool the numbers of all layers once more to 1,024.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

NUMBERS = 1024
"""Numbers to which each layer is pooled, and again all layers together."""


def pooling(inputs: int, outputs: int) -> Tensor:
    """Return the (outputs, inputs) matrix of an adaptive average pooling."""
    ends = torch.arange(outputs + 1) * inputs
    first, last = ends[:-1] // outputs, -(-ends[1:] // outputs)
    place = torch.arange(inputs)
    inside = (place >= first[:, None]) & (place < last[:, None])
    return inside.float() / (last - first)[:, None]


@lru_cache(maxsize=2)
def kernels(channels: tuple[int, ...], numbers: int = NUMBERS) -> tuple[Tensor, ...]:
    """Return for each layer the (numbers, C_i, 3, 3) kernel of the convolution that aggregates it.

    The cell's vector is the outputs of all layers added, after those of coarser layers are resized.
    """
    joined = torch.split(pooling(len(channels) * NUMBERS, numbers), NUMBERS, 1)
    return tuple(
        (share @ pooling(9 * count, NUMBERS)).view(numbers, count, 3, 3)
        for share, count in zip(joined, channels, strict=True)
    )


def aggregate(planes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Aggregate (B, C_i, h_i, w_i) layers to (B, numbers, h, w), with zeros beyond the borders."""
    found = [functional.conv2d(x, kernel, padding=1) for x, kernel in zip(planes, weights, strict=True)]
    size = found[0].shape[2:]
    return torch.stack(
        [x if x.shape[2:] == size else functional.interpolate(x, size, mode="bilinear") for x in found]
    ).sum(0)
