"""Reduce redundant channels: a fused EfficientAD, approximated to within a stated error.

This is not from a paper. Each half of the map is the squared length of a vector of 384 numbers, and rotating
a vector preserves its length. Once the vectors are rotated to their principal axes, the last components are
almost zero, so the last convolutions need not compute them. Likewise, the first convolution reads 48 numbers
and outputs 128 or 256: what the second, most expensive one reads of them lies nearly in a space of fewer
dimensions.

The axes come from held-out good images and from rendered images of nothing in particular, so that directions
absent from good images are kept, too. The number of channels kept is determined by the error of the map on
the good images.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from blemish.detectors.efficientad.fused import FusedEfficientAD, convolution
from blemish.detectors.fusing import Kept

STEP = 32
"""The number of channels kept is a multiple of this, the number that a processor multiplies at once."""


def reduce(
    network: nn.Module, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
) -> tuple[FusedEfficientAD, list[Kept]]:
    """Keep as few channels as the tolerance allows, one layer after another.

    good, other: (B, 3, H, W) batches; the error is measured on the good ones. Returns a copy, and how many
    channels each layer keeps.
    """
    made = copy.deepcopy(cast(FusedEfficientAD, network))
    with torch.no_grad():
        notes = [rotate(made, number, good, other, tolerance) for number in range(len(made.halves(good[0])))]
        notes.append(insert_bottleneck(made, good, other, tolerance))
    return made, notes


def rotate(
    network: FusedEfficientAD, half: int, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
) -> Kept:
    """Rotate the vectors of one half of the map to their principal axes, and drop the last components."""
    vectors = [
        torch.cat([as_vectors(network.halves(batch)[half]) for batch in batches]) for batches in (good, other)
    ]
    axes = principal(vectors)
    lengths = (vectors[0] @ axes).square().cumsum(1)
    whole = lengths[:, -1]
    for kept in range(STEP, len(axes) + 1, STEP):
        short = lengths[:, kept - 1]
        gain = (whole @ short) / (short @ short)
        error = float((whole - gain * short).square().mean().sqrt() / whole.std())
        if error <= tolerance:
            break
    matrix = (gain.sqrt() * axes[:, :kept].T).float()
    if half == 0:
        network.structural = multiplied(matrix, network.structural)
    elif network.logical is not None and network.autoencoder is not None:
        network.logical = multiplied(matrix, network.logical)
        network.autoencoder.last = multiplied(matrix, network.autoencoder.last)
    return Kept(("structural", "logical")[half], kept, len(axes), error)


def insert_bottleneck(
    network: FusedEfficientAD, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
) -> Kept:
    """Insert a narrow layer before the second convolutions of teacher and student."""
    whole = maps(network, good)
    channels = second(network.teacher).in_channels
    bases = [basis(network, part, [*good, *other]) for part in (0, 1)]
    plain = network.trunks
    kept, error = channels, 0.0
    for fewer in range(channels - STEP, 0, -STEP):
        network.teacher, network.student = (
            with_bottleneck(trunk, into, fewer) for trunk, into in zip(plain, bases, strict=True)
        )
        found = float((maps(network, good) - whole).square().mean().sqrt() / whole.std())
        if not found <= tolerance:
            break
        kept, error = fewer, found
    network.teacher, network.student = (
        trunk if kept == channels else with_bottleneck(trunk, into, kept)
        for trunk, into in zip(plain, bases, strict=True)
    )
    return Kept("second", kept, channels, error)


def basis(network: FusedEfficientAD, part: int, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (C, C) matrices into the space that the second convolution of one trunk reads, and back.

    The principal axes come first: those of the inputs, with each channel weighted by its effect on the
    output.
    """
    seen = [as_vectors(network.shallow(batch).chunk(2, 1)[part]) for batch in batches]
    weight = second(network.trunks[part]).weight.double()
    weigh = root(torch.einsum("oixy,ojxy->ij", weight, weight))
    axes = torch.linalg.svd(weigh @ root(summed(seen)))[0]
    into, back = axes.T @ weigh, torch.linalg.solve(weigh, axes)
    # Giving all channels the same range costs nothing and makes quantisation more accurate.
    largest = torch.stack([(each @ into.T).abs().amax(0) for each in seen]).amax(0)
    return into / largest[:, None], back * largest


def with_bottleneck(trunk: nn.Sequential, matrices: tuple[Tensor, Tensor], kept: int) -> nn.Sequential:
    """Return a trunk whose first convolution reads its input through `kept` channels."""
    into, back = (matrix.float() for matrix in matrices)
    wide, rest = second(trunk), list(trunk)[1:]
    weight = torch.einsum("oixy,ik->okxy", wide.weight, back[:, :kept])
    entrance = convolution(into[:kept, :, None, None], None)
    return nn.Sequential(entrance, convolution(weight, wide.bias, wide), *rest)


def second(trunk: nn.Sequential) -> nn.Conv2d:
    """Return the second convolution of a network, which is the first layer of its trunk."""
    return cast(nn.Conv2d, trunk[0])


def maps(network: FusedEfficientAD, batches: Sequence[Tensor]) -> Tensor:
    """Return the maps of all batches at the networks' resolution, flattened, in float64."""
    halves = [network.cells(batch)[0].flatten() for batch in batches]
    return torch.cat(halves).double()


def as_vectors(x: Tensor) -> Tensor:
    """Rearrange (B, C, h, w) to (B h w, C), in float64."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).double()


def moments(vectors: Tensor) -> Tensor:
    """Return the (C, C) second moments of (N, C) vectors, normalised to a mean squared length of one."""
    products = vectors.T @ vectors
    return products / products.trace()


def summed(groups: Sequence[Tensor]) -> Tensor:
    """Return the sum of the moments of groups of (N, C) vectors; all groups have the same weight."""
    return torch.stack([moments(group) for group in groups]).sum(0)


def principal(groups: Sequence[Tensor]) -> Tensor:
    """Return the principal axes of groups of vectors as columns, in order of decreasing second moment."""
    axes: Tensor = torch.linalg.eigh(summed(groups))[1]
    return axes.flip(1)


def root(matrix: Tensor) -> Tensor:
    """Return the square root of a positive semidefinite matrix, its eigenvalues kept slightly above zero."""
    values, axes = torch.linalg.eigh(matrix)
    lifted: Tensor = (axes * values.clamp(min=1e-9 * float(values[-1])).sqrt()) @ axes.T
    return lifted


def multiplied(matrix: Tensor, layer: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution whose output vectors are multiplied by a (kept, outputs) matrix."""
    weight = torch.einsum("ko,oixy->kixy", matrix, layer.weight)
    return convolution(weight, matrix @ cast(Tensor, layer.bias), layer)
