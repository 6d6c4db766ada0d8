"""Pure tensor functions that several methods share: moments, blur, Perlin noise, map statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def channel_moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of each channel over the batch and positions of (B, C, H, W) parts.

    Each part by Welford's algorithm, merged in float64 (Chan, Golub, LeVeque 1979): E[x^2] - E[x]^2 in
    float32 can become negative. Returns two float64 (C,) tensors on the CPU; raises ValueError without parts.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        number = part.numel() // part.shape[1]
        variance, center = (
            moment.double().cpu() for moment in torch.var_mean(part, dim=(0, 2, 3), correction=0)
        )
        delta, total = center - mean, count + number
        squares = squares + variance * number + delta.square() * (count * number / total)
        mean, count = mean + delta * (number / total), total
    if count == 0:
        raise ValueError("moments of no tensors; expected at least one part")
    return mean, squares / max(count - 1, 1)


def merged_moments(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Merge P parts, given as (P,) counts and (P, C) means and unbiased variances, into (C,) of each."""
    total = counts.sum()
    mean = (counts[:, None] * means).sum(0) / total
    squares = (counts - 1)[:, None] * variances + counts[:, None] * (means - mean).square()
    return mean, squares.sum(0) / (total - 1)


def cell_covariance(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the (n_i, C) rows of a stream, as float64 (C,) and (C, C) on the CPU.

    Merged in float64 like `channel_moments`; raises ValueError without rows.
    """
    count, mean, products = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        center = part.mean(0)
        moved = part - center
        delta, total = center.double().cpu() - mean, count + len(part)
        products = products + (moved.T @ moved).double().cpu()
        products = products + torch.outer(delta, delta) * (count * len(part) / total) if count else products
        count, mean = total, mean + delta * (len(part) / total)
    if count == 0:
        raise ValueError("covariance of no rows; expected at least one part")
    return mean, products / count


def principal_axes(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (C, C) principal axes, as columns, and the (C,) variances along them, the largest first."""
    values, axes = torch.linalg.eigh(covariance)
    return axes.flip(1), values.flip(0).clamp(min=0)


def whitening(covariance: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the (C, C) matrix that whitens rows of this covariance, and their (C,) variances after it.

    Columns are principal axes, scaled, that of the largest variance first. share: added to each variance
    before its root is divided by, as a share of their mean, so that directions of hardly any variance stay
    small.
    """
    axes, variances = principal_axes(covariance)
    floored = variances + share * variances.mean()
    scale = torch.where(floored > 0, floored.rsqrt(), 0.0)  # of rows that are all the same, nothing is left
    return axes * scale, variances * scale.square()


def gaussian_kernel(sigma: float, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return a normalised, centred (size,) Gaussian kernel."""
    x = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (x / sigma).square())
    return (kernel / kernel.sum()).float()


Border = Literal["reflect", "symmetric"]
"""What lies beyond the border of a map: its reflection without or with the outermost row and column."""


def gaussian_blur(maps: Tensor, kernel: Tensor, border: Border = "reflect") -> Tensor:
    """Blur (B, H, W) maps with the outer product of an odd (size,) kernel with itself."""
    half = kernel.shape[0] // 2
    x = extended(extended(maps, half, 1, border), half, 2, border)[:, None]
    x = functional.conv2d(x, kernel[None, None, :, None])
    return functional.conv2d(x, kernel[None, None, None, :])[:, 0]


def extended(maps: Tensor, margin: int, axis: int, border: Border) -> Tensor:
    """Extend (B, H, W) maps by a margin on both sides of an axis, smaller than its length."""
    length, skipped = maps.shape[axis], int(border == "reflect")
    if not margin:
        return maps
    before = maps.narrow(axis, skipped, margin).flip(axis)
    after = maps.narrow(axis, length - margin - skipped, margin).flip(axis)
    return torch.cat([before, maps, after], axis)


def perlin_noise(angles: Tensor, periods: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (B, H, W) Perlin noise in about [-1, 1], from (B, Y, X) gradient angles and (B, 2) periods.

    The numbers of periods along height and width divide these; Y and X exceed them. Each image has its own
    periods, so that a whole batch is computed at once.
    """
    device, (height, width) = angles.device, size
    y = torch.arange(height, device=device)[None, :] * periods[:, :1] / height
    x = torch.arange(width, device=device)[None, :] * periods[:, 1:] / width
    cell_y, cell_x = y.long(), x.long()
    y, x = (y - cell_y)[:, :, None], (x - cell_x)[:, None, :]
    image = torch.arange(len(angles), device=device)[:, None, None]
    slopes_y, slopes_x = angles.cos(), angles.sin()

    def corner(down: int, right: int) -> Tensor:
        place = image, cell_y[:, :, None] + down, cell_x[:, None, :] + right
        return slopes_y[place] * (y - down) + slopes_x[place] * (x - right)

    def fade(t: Tensor) -> Tensor:
        return t * t * t * (t * (6 * t - 15) + 10)

    left = torch.lerp(corner(0, 0), corner(1, 0), fade(y).expand(-1, -1, width))
    right = torch.lerp(corner(0, 1), corner(1, 1), fade(y).expand(-1, -1, width))
    return 2**0.5 * torch.lerp(left, right, fade(x).expand(-1, height, -1))


def perlin_masks(
    count: int, size: tuple[int, int], threshold: float, generator: torch.Generator, largest: int = 5
) -> Tensor:
    """Sample (count, H, W) boolean masks by thresholding Perlin noise; half of them are empty on average.

    SuperSimpleNet, section 3.2: 2^0 to 2^largest periods, sampled independently for each axis. The noise is
    computed at the next powers of two of the size and resized bilinearly.
    """
    device = generator.device
    powers = [1 << (length - 1).bit_length() for length in size]
    highest = torch.tensor([min(largest, power.bit_length() - 1) for power in powers], device=device)
    draw = torch.rand((count, 2), generator=generator, device=device)
    periods = 2 ** (draw * (highest + 1)).long()
    angles = 2 * torch.pi * torch.rand((count, 33, 33), generator=generator, device=device)
    noise = perlin_noise(angles, periods, (powers[0], powers[1]))
    if tuple(powers) != tuple(size):
        noise = functional.interpolate(noise[:, None], size, mode="bilinear")[:, 0]
    kept = torch.rand(count, generator=generator, device=device) < 0.5
    return (noise > threshold) & kept[:, None, None]


LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luma (ITU-R 601)."""


def map_statistics(
    maps: Tensor,
    cells: Tensor,
    names: Iterable[str],
    top_share: float = 0.005,
    /,
    **own: Callable[[], Tensor],
) -> Tensor:
    """Return the named statistics, (B, K), of (B, H, W) maps and of the (B, h, w) cells they were made from.

    maximum: the largest value of the map, by which the papers score an image. smoothed_maximum: the largest
    cell after a Gaussian blur with a sigma of one cell. top_mean: the mean of the largest cells, a share
    `top_share` of them, at least 5. cell_maximum: the largest cell. own: (B,) statistics of the method,
    computed if they are named.
    """

    def smoothed_maximum() -> Tensor:
        # Made on the device: a copy from the host cannot be recorded into a CUDA graph.
        kernel = gaussian_kernel(1.0, 7, cells.device).to(cells)
        return gaussian_blur(cells, kernel).flatten(1).amax(1)

    def top_mean() -> Tensor:
        count = cells.shape[1] * cells.shape[2]
        largest = min(count, max(5, int(top_share * count + 1e-6)))
        return cells.flatten(1).topk(largest).values.mean(1)

    known: dict[str, Callable[[], Tensor]] = {
        "maximum": lambda: maps.flatten(1).amax(1),
        "smoothed_maximum": smoothed_maximum,
        "top_mean": top_mean,
        "cell_maximum": lambda: cells.flatten(1).amax(1),
    } | own
    return torch.stack([known[name]() for name in names], 1)


def crops(x: Tensor, places: Sequence[tuple[int, int]], side: int, step: int = 1) -> Tensor:
    """Crop a square from each (C, H, W) tensor of a batch; without places, return the batch whole.

    places: top and left of each square, in multiples of `step`.
    """
    if not places:
        return x
    cut = [
        one[:, step * down :, step * across :][:, :side, :side]
        for one, (down, across) in zip(x, places, strict=True)
    ]
    return torch.stack(cut).contiguous(memory_format=torch.channels_last)
