"""Pure functions on tensors that several methods share: moments, blur, Perlin noise, map statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def channel_moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel over the batch and the positions of (B, C, H, W) parts.

    Each part by Welford's rule, merged in float64 (Chan, Golub, LeVeque 1979): E[x^2] - E[x]^2 in float32
    goes negative. Returns two float64 (C,) tensors on the CPU; raises ValueError without parts.
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
        raise ValueError("moments of nothing")
    return mean, squares / max(count - 1, 1)


def merged_moments(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Join P parts, (P,) counts of elements with (P, C) means and unbiased variances, to (C,) of each."""
    total = counts.sum()
    mean = (counts[:, None] * means).sum(0) / total
    squares = (counts - 1)[:, None] * variances + counts[:, None] * (means - mean).square()
    return mean, squares.sum(0) / (total - 1)


def gaussian_kernel(sigma: float, size: int) -> Tensor:
    """Sample a normalised (size,) Gaussian around its middle."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    kernel = torch.exp(-0.5 * (x / sigma).square())
    return (kernel / kernel.sum()).float()


def gaussian_blur(maps: Tensor, kernel: Tensor) -> Tensor:
    """Blur (B, H, W) with the outer product of an odd (size,) kernel with itself, borders reflected."""
    half = kernel.shape[0] // 2
    x = functional.pad(maps[:, None], (half, half, half, half), mode="reflect")
    x = functional.conv2d(x, kernel[None, None, :, None])
    return functional.conv2d(x, kernel[None, None, None, :])[:, 0]


def perlin_noise(angles: Tensor, periods: Tensor, size: tuple[int, int]) -> Tensor:
    """Make (B, H, W) Perlin noise from (B, Y, X) gradient angles and (B, 2) periods, in about [-1, 1].

    Periods are per axis and divide the sizes; Y and X exceed them. Each image has its own periods, so a
    whole batch is drawn at once.
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
    """Draw (count, H, W) boolean masks from thresholded Perlin noise, half of them empty on average.

    SuperSimpleNet, section 3.2: per axis 2^0 to 2^largest periods, independently, at the next powers of two
    of the size, resized bilinearly to it.
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
"""Shares of red, green and blue in grey (ITU-R 601)."""


def map_statistics(maps: Tensor, cells: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Sum (B, H, W) maps and the (B, h, w) cells that they were made from up in named (B,) numbers.

    maximum: of the map, as the papers score an image. smoothed_maximum: of the cells after a Gaussian of one
    cell. top_mean: of the largest 0.5 % of the cells, at least 5.
    """
    found = {}
    for name in names:
        if name == "maximum":
            found[name] = maps.flatten(1).amax(1)
        elif name == "smoothed_maximum":
            kernel = gaussian_kernel(1.0, 7).to(cells)
            found[name] = gaussian_blur(cells, kernel).flatten(1).amax(1)
        elif name == "top_mean":
            count = cells.shape[1] * cells.shape[2]
            found[name] = cells.flatten(1).topk(min(count, max(5, count // 200))).values.mean(1)
    return found


def squares(x: Tensor, places: Sequence[tuple[int, int]], side: int, step: int = 1) -> Tensor:
    """Cut a square out of each of (B, C, H, W); places count in steps. Without places, return all of it."""
    if not places:
        return x
    cut = [
        one[:, step * down :, step * across :][:, :side, :side]
        for one, (down, across) in zip(x, places, strict=True)
    ]
    return torch.stack(cut).contiguous(memory_format=torch.channels_last)
