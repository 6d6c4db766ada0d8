"""Fewer channels where channels repeat each other: a fused EfficientAD, approximated to a stated error.

No paper's. Each half of the map is the squared length of a vector of 384 numbers, and turning a vector keeps
its length. Turned to the axes along which such vectors vary most, the last numbers are nearly nothing, so the
last convolutions need not compute them. Likewise, the first convolution looks at 48 numbers and gives 128 or
256: what the second, most expensive one reads of them is nearly a space of fewer dimensions.

Axes come from held-out good images and from drawn ones, which look like nothing in particular, so that what
no good image has is kept, too. How many are kept is found by the error of the map on the good images.
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
"""Channels are kept in multiples of this: of what a processor multiplies at once."""


def reduce(
    network: nn.Module, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
) -> tuple[FusedEfficientAD, list[Kept]]:
    """Keep as few channels as the tolerance allows, one layer after the other.

    good, other: (B, 3, H, W) batches; the error is that of the good ones. Returns a copy, and what was kept.
    """
    made = copy.deepcopy(cast(FusedEfficientAD, network))
    with torch.no_grad():
        notes = [turn(made, number, good, other, tolerance) for number in range(len(made.halves(good[0])))]
        notes.append(narrow(made, good, other, tolerance))
    return made, notes


def turn(
    network: FusedEfficientAD, half: int, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
) -> Kept:
    """Turn the vectors of one half of the map to their main axes, and drop the last ones."""
    vectors = [
        torch.cat([rows(network.halves(batch)[half]) for batch in batches]) for batches in (good, other)
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


def narrow(
    network: FusedEfficientAD, good: Sequence[Tensor], other: Sequence[Tensor], tolerance: float
) -> Kept:
    """Put a narrow layer before the second convolutions of teacher and student."""
    whole = maps(network, good)
    channels = second(network.teacher).in_channels
    bases = [basis(network, part, [*good, *other]) for part in (0, 1)]
    plain = network.trunks
    kept, error = channels, 0.0
    for fewer in range(channels - STEP, 0, -STEP):
        network.teacher, network.student = (
            squeezed(trunk, into, fewer) for trunk, into in zip(plain, bases, strict=True)
        )
        found = float((maps(network, good) - whole).square().mean().sqrt() / whole.std())
        if not found <= tolerance:
            break
        kept, error = fewer, found
    network.teacher, network.student = (
        trunk if kept == channels else squeezed(trunk, into, kept)
        for trunk, into in zip(plain, bases, strict=True)
    )
    return Kept("second", kept, channels, error)


def basis(network: FusedEfficientAD, part: int, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Give (C, C) matrices into the space where the second convolution of one trunk reads, and back.

    The main axes come first: of the inputs, each channel weighted by what the convolution makes of it.
    """
    seen = [rows(network.shallow(batch).chunk(2, 1)[part]) for batch in batches]
    weight = second(network.trunks[part]).weight.double()
    weigh = root(torch.einsum("oixy,ojxy->ij", weight, weight))
    axes = torch.linalg.svd(weigh @ root(summed(seen)))[0]
    into, back = axes.T @ weigh, torch.linalg.solve(weigh, axes)
    # An even range of all channels costs nothing, and whole numbers fit it better.
    largest = torch.stack([(each @ into.T).abs().amax(0) for each in seen]).amax(0)
    return into / largest[:, None], back * largest


def squeezed(trunk: nn.Sequential, matrices: tuple[Tensor, Tensor], kept: int) -> nn.Sequential:
    """Read the input of a trunk's first convolution through `kept` channels."""
    into, back = (matrix.float() for matrix in matrices)
    wide, rest = second(trunk), list(trunk)[1:]
    weight = torch.einsum("oixy,ik->okxy", wide.weight, back[:, :kept])
    entrance = convolution(into[:kept, :, None, None], None)
    return nn.Sequential(entrance, convolution(weight, wide.bias, wide), *rest)


def second(trunk: nn.Sequential) -> nn.Conv2d:
    """Return the second convolution of a network, which is the first of its trunk."""
    return cast(nn.Conv2d, trunk[0])


def maps(network: FusedEfficientAD, batches: Sequence[Tensor]) -> Tensor:
    """Give the map of all batches at the networks' resolution, flat, in float64."""
    halves = [network.cells(batch)[0].flatten() for batch in batches]
    return torch.cat(halves).double()


def rows(x: Tensor) -> Tensor:
    """Lay (B, C, h, w) out as (B h w, C), in float64."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).double()


def moments(vectors: Tensor) -> Tensor:
    """Give the (C, C) second moments of (N, C) vectors, for vectors of a mean squared length of one."""
    products = vectors.T @ vectors
    return products / products.trace()


def summed(groups: Sequence[Tensor]) -> Tensor:
    """Add the moments of groups of (N, C) vectors, which count alike."""
    return torch.stack([moments(group) for group in groups]).sum(0)


def principal(groups: Sequence[Tensor]) -> Tensor:
    """Give the axes, as columns, along which the vectors of groups are longest."""
    axes: Tensor = torch.linalg.eigh(summed(groups))[1]
    return axes.flip(1)


def root(matrix: Tensor) -> Tensor:
    """Give the square root of a symmetric matrix without negative eigenvalues, slightly lifted from zero."""
    values, axes = torch.linalg.eigh(matrix)
    lifted: Tensor = (axes * values.clamp(min=1e-9 * float(values[-1])).sqrt()) @ axes.T
    return lifted


def multiplied(matrix: Tensor, layer: nn.Conv2d) -> nn.Conv2d:
    """Multiply a convolution's output vectors with a (kept, outputs) matrix."""
    weight = torch.einsum("ko,oixy->kixy", matrix, layer.weight)
    return convolution(weight, matrix @ cast(Tensor, layer.bias), layer)
