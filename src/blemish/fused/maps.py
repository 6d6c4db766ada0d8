"""The finished map as two products: padding, resizing and blurring are linear, one axis after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
