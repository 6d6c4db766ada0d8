"""SuperSimpleNet's heads and their losses, computed where that is cheapest: before any upscaling.

Concatenating, upscaling and averaging the backbone's outputs is linear, and so are the adaptor and the first
layer of each head. Those layers therefore run on the outputs at their own resolution, on a quarter and a
sixteenth of the positions, with the adaptor multiplied into their weights. Upscaling and averaging are one
matrix product per axis, whose matrix also contains the shifts of a kernel wider than one cell. Noise is added
afterwards, to the noisy cells only. The results are the same, several times faster.

Channels are last: tensors are (B, h, w, C), and a cell is a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from typing_extensions import override

from blemish.types import FloatArray

SLOPE = 0.2
"""Slope of the leaky ReLU below 0."""

CHUNK = 1024
"""Rows processed at a time, so that their elements stay in the processor's cache."""

TAPS = 5
"""Height and width of the classification head's kernel."""


class SegmentationHead(nn.Module):
    """Map the first layer's output for any number of cells, (cells, hidden), to (cells,) logits.

    `first` is applied by the detector, which can do so on fewer positions. Cells that are equal are passed as
    one row with their count, which is the row's weight in the batch norm during training. `place`, if there
    is one, is applied by the detector too: to a cell's vertical and horizontal place, from -1 to 1.
    """

    def __init__(self, channels: int, hidden: int, *, placed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(channels, hidden)
        self.place = nn.Linear(2, hidden, bias=False) if placed else None
        self.norm = nn.BatchNorm1d(hidden)
        self.last = nn.Linear(hidden, 1, bias=False)

    @override
    def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
        if not self.training:
            logits: Tensor = self.last(functional.leaky_relu(self.norm(rows), SLOPE))
            return logits[:, 0]
        if counts is None:
            counts = torch.ones(len(rows), device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):  # sums over all cells need float32
            return self.forward_counted(rows, counts)

    def forward_counted(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return the logits of rows normalised by count-weighted moments; update the running moments."""
        norm = self.norm
        with torch.no_grad():
            total, mean, variance = counted_moments(rows, counts)
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.lerp_(mean, norm.momentum or 0.0)
                norm.running_var.lerp_(variance * total / (total - 1), norm.momentum or 0.0)
        scale, shares = (variance + norm.eps).rsqrt(), counts / total
        weights = norm.weight, norm.bias, self.last.weight[0]
        found: Tensor = NormalisedDot.apply(rows, *weights, mean, scale, shares)  # type: ignore[no-untyped-call]
        return found


def chunks(tensor: Tensor) -> Sequence[Tensor]:
    """Split rows to be worked on one after the other; not on a GPU, where it is launches that cost."""
    return (tensor,) if tensor.is_cuda else torch.split(tensor, CHUNK)


def counted_moments(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of cells, and mean and biased variance of (n, H) rows weighted by their counts."""
    total = counts.sum()
    first = rows[0].float()  # sums of squares around a value of the data avoid cancellation
    sums, squares = torch.zeros_like(first), torch.zeros_like(first)
    for part, count in zip(chunks(rows), chunks(counts), strict=True):
        moved = part.float() - first
        sums += count @ moved
        squares += count @ moved.square()
    mean = sums / total
    return total, mean + first, squares / total - mean.square()


class NormalisedDot(torch.autograd.Function):
    """Batch norm, leaky ReLU and dot product with a vector, on (n, H) rows in chunks that fit the cache.

    The only tensor of the rows' size kept for the backward pass is the rows themselves. They are read once in
    the forward pass and twice in the backward pass, whereas three separate layers read and write them a dozen
    times. shares: the weight of each row in the batch's moments; their sum is 1.
    """

    @staticmethod
    @override
    def forward(
        ctx: FunctionCtx,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        vector: Tensor,
        mean: Tensor,
        scale: Tensor,
        shares: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, vector, mean, scale, shares)
        gain = weight * scale
        offset = bias - gain * mean
        return torch.cat(
            [
                functional.leaky_relu(torch.addcmul(offset, part.float(), gain), SLOPE) @ vector
                for part in chunks(rows)
            ]
        )

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, vector, mean, scale, shares = ctx.saved_tensors
        gain = weight * scale
        offset = bias - gain * mean
        # All other sums follow from sum_i g_i m_ih and sum_i g_i m_ih x_ih, m the slope at each element.
        slopes, products = torch.zeros_like(weight), torch.zeros_like(weight)
        for part, grad in zip(chunks(rows), chunks(gradient), strict=True):
            values = part.float()
            slope = slope_of(torch.addcmul(offset, values, gain))
            slopes += grad @ slope
            products += grad @ slope.mul_(values)
        of_bias = vector * slopes
        of_weight = scale * (vector * products - mean * of_bias)
        of_vector = gain * products + offset * slopes
        # gain (g m v - share (of_bias + (x - mean) scale of_weight)), a linear function of x in each column
        line = -gain * scale * of_weight
        level = -gain * (of_bias - mean * scale * of_weight)
        of_rows = torch.empty_like(rows)
        pieces = (chunks(tensor) for tensor in (rows, gradient, shares, of_rows))
        for part, grad, share, out in zip(*pieces, strict=True):
            values = part.float()
            slope = slope_of(torch.addcmul(offset, values, gain)).mul_(gain * vector).mul_(grad[:, None])
            out.copy_(slope.addcmul_(torch.addcmul(level, values, line), share[:, None]))
        return of_rows, of_weight, of_bias, of_vector, None, None, None


def slope_of(values: Tensor) -> Tensor:
    """Return the leaky ReLU's slope at each value, overwriting the values."""
    return values.gt_(0).mul_(1 - SLOPE).add_(SLOPE)


class ClassificationHead(nn.Module):
    """Map features, their noise and a segmentation to (N,) score logits.

    The convolution reads the channels of the features, then the single one of the segmentation.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Sequential(
            nn.Conv2d(channels + 1, 128, TAPS, padding="same"), nn.BatchNorm2d(128), nn.ReLU()
        )
        self.linear = nn.Linear(2 * 128 + 2, 1)

    @property
    def kernel(self) -> nn.Conv2d:
        """The convolution."""
        return cast(nn.Conv2d, self.convolution[0])

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The batch norm after the convolution."""
        return cast(nn.BatchNorm2d, self.convolution[1])

    def weights(self) -> tuple[Tensor, Tensor]:
        """Split the kernel: (5, 5, 128, C) for the features, (128, 1, 5, 5) for the segmentation."""
        weight = self.kernel.weight
        return weight[:, :-1].permute(2, 3, 0, 1), weight[:, -1:]

    @override
    def forward(self, seen: Tensor, constant: Tensor | None, segmentation: Tensor) -> Tensor:
        """Return scores from the features' share of the convolution, (N, h, w, 128), and the segmentation.

        The share of the (N, h, w) segmentation is added here. constant: (C,), added to the features
        everywhere except beyond the borders, or None.
        """
        features, own = self.weights()
        planes, kernels = segmentation[:, None], own
        if constant is not None:
            planes = torch.cat([planes, torch.ones_like(planes)], 1)
            kernels = torch.cat([own, (features @ constant).permute(2, 0, 1)[:, None]], 1)
        planes = planes.contiguous(memory_format=torch.channels_last)
        more = functional.conv2d(planes, kernels, self.kernel.bias, padding=TAPS // 2)
        seen = seen.permute(0, 3, 1, 2) + more
        seen = torch.relu(self.norm(seen))
        # amax would divide its gradient among equal maxima, and takes nine times as long
        pooled = [functional.adaptive_max_pool2d(seen, 1).flatten(1), seen.mean((2, 3))]
        maps = segmentation[:, None]
        pooled += [functional.adaptive_max_pool2d(maps, 1).flatten(1), maps.mean((2, 3))]
        score: Tensor = self.linear(torch.cat(pooled, 1))
        return score[:, 0]


def spread(parts: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Resize (B, h_i, w_i, C) parts to (h, w), average over 3x3 cells, and sum: (B, h, w, C)."""
    return spread_shifted([[part] for part in parts], size, 1)


def spread_shifted(parts: Sequence[Sequence[Tensor]], size: tuple[int, int], taps: int) -> Tensor:
    """Resize, average and sum parts as `spread` does, each shifted to where a kernel's tap sees it.

    Returns (B, h, w, K). parts: for each layer and each row of the kernel, (B, h_i, w_i, taps K): the layer
    multiplied by the kernel's taps in that row. Beyond the borders are zeros, as in a convolution with "same"
    padding.
    """
    tall, across = [], []
    for rows in parts:
        _, height, width, channels = rows[0].shape
        # (h, taps h_i) times (taps h_i, w_i taps K)
        down = axis_matrices_like(rows[0], height, size[0], taps).permute(1, 0, 2).flatten(1)
        summed = torch.matmul(down, torch.cat([row.flatten(2) for row in rows], 1))
        tall.append(summed.view(-1, size[0], width * taps, channels // taps))
        # (taps, w, w_i) to (w, w_i taps), as the columns lie in memory
        across.append(axis_matrices_like(rows[0], width, size[1], taps).permute(1, 2, 0).flatten(1))
    return torch.matmul(torch.cat(across, 1), torch.cat(tall, 2))


def scatter_rows(rows: Tensor, places: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Convolve a few cells of an otherwise empty (N, h, w) grid: (N, h, w, K).

    rows: (M, taps, taps, K), each cell multiplied by every tap; places: (M,), the cells' indices in the
    flattened grid.
    """
    count, height, width = shape
    taps, channels = rows.shape[1], rows.shape[3]
    margin = taps // 2  # a frame around each image holds what falls beyond its borders
    tall, wide = height + 2 * margin, width + 2 * margin
    image, y, x = places // (height * width), places // width % height, places % width
    # The kernel's first tap adds to the cell `margin` further down and right, its last to that up and left.
    first = (image * tall + y + 2 * margin) * wide + x + 2 * margin
    tap = torch.arange(taps, device=places.device)
    target = first[:, None, None] - tap[:, None] * wide - tap
    grid = rows.new_zeros(count * tall * wide, channels).index_add(0, target.flatten(), rows.flatten(0, 2))
    return grid.view(count, tall, wide, channels)[:, margin:-margin, margin:-margin]


def noisy_indices(noisy: Tensor, count: int) -> Tensor:
    """Return the indices of the noisy cells in an (N, h, w) grid in order, padded to `count` with zeros."""
    found = noisy.flatten().nonzero()[:, 0]
    return functional.pad(found, (0, count - len(found)))


def round_up(count: int) -> int:
    """Round up to a multiple of 64, and from 512 on to one of four numbers between two powers of two."""
    step = max(64, 1 << count.bit_length() >> 3)
    return -(-count // step) * step


def layer_columns(weight: Tensor, encoded: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Split weights (..., C) on concatenated features into those on each (B, h_i, w_i, C_i)."""
    return torch.split(weight, [x.shape[3] for x in encoded], -1)


def segmentation_losses(
    logits: Tensor, target: Tensor, weight: Tensor, *, focal_loss: bool
) -> dict[str, Tensor]:
    """Return the terms of section 3.3: truncated L1 of each class and, if asked for, the focal loss.

    logits, target, weight: (cells,), targets 0 or 1. Means are over the cells with a weight above 0.
    """
    counted = (weight > 0).float()
    normal, anomalous = (1 - target) * counted, target * counted
    terms = {
        "normal": (normal * weight * (0.5 + logits).relu()).sum() / normal.sum().clamp(min=1),
        "anomalous": (anomalous * weight * (0.5 - logits).relu()).sum() / anomalous.sum().clamp(min=1),
    }
    if focal_loss:
        terms["focal"] = (weight * focal(logits, target)).sum() / counted.sum().clamp(min=1)
    return terms


def focal(logits: Tensor, targets: Tensor, gamma: float = 4.0) -> Tensor:
    """Return the focal loss of each logit against its 0/1 target, without class weights."""
    entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (1 - torch.exp(-entropy)) ** gamma * entropy


def axis_matrices(cells: int, length: int, taps: int) -> Tensor:
    """Return the (taps, length, cells) matrices that resize an axis linearly, ends aligned, and average.

    Each averages three cells and counts zeros beyond the ends, as in SimpleNet. Matrix k is then shifted to
    what tap k of a kernel sees, by k - taps // 2, with zeros from beyond the ends.
    """
    return torch.from_numpy(axis_weights(cells, length, taps))


def axis_matrices_like(x: Tensor, cells: int, length: int, taps: int) -> Tensor:
    """Return `axis_matrices` in the type and on the device of a tensor."""
    if x.is_cuda:
        kept: Tensor = axis_matrices_on(cells, length, taps, str(x.device), x.dtype)
        return kept
    return axis_matrices(cells, length, taps).to(x)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@lru_cache(maxsize=64)
def axis_matrices_on(cells: int, length: int, taps: int, device: str, dtype: torch.dtype) -> Tensor:
    """Keep `axis_matrices` on a GPU: a copy at every step waits for it, and no CUDA graph can record one."""
    with torch.inference_mode(False):  # a tensor made in that mode could not train later
        return axis_matrices(cells, length, taps).to(device, dtype)


@lru_cache(maxsize=64)
def axis_weights(cells: int, length: int, taps: int) -> FloatArray:
    """Compute `axis_matrices` with NumPy: a tensor made while tracing would be cached as a placeholder."""
    places = np.linspace(0, cells - 1, length)[:, None]
    resized = np.pad(np.maximum(0, 1 - np.abs(places - np.arange(cells))), ((1, 1), (0, 0)))
    averaged = (resized[:-2] + resized[1:-1] + resized[2:]) / 3
    margin = taps // 2
    padded = np.pad(averaged, ((margin, margin), (0, 0)))
    return np.stack([padded[k : k + length] for k in range(taps)]).astype(np.float32)
