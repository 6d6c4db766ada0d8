"""What is done about places where even good parts score high: the rim of a map, or any cell of it.

For every method whose map is made of (B, h, w) cells. A padded backbone sees zeros beyond the image's border,
which no part has, so that good parts often have the map's maximum in its rim. Where parts always lie alike,
other places differ, too: an edge or a print scores higher than a plain surface. The setting `edges` says what
is done, before the statistics are taken and before the map is enlarged:

- none: nothing.
- rings: cells at the same distance from the border form a ring. Each ring is scaled and shifted so that its
  mean and deviation on good training images are those of all cells. Units stay those of the map.
- cells: the same for each cell by itself, with its neighbours.
- blind: cells within a margin get the lowest value of the others, so that nothing there can raise the map or
  a statistic.

All are constants for each cell in the graph, or depend on no more than a minimum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from blemish.detectors.settings import Edges
from blemish.errors import ConfigError

RINGS = 8
"""Number of rings, each one cell wide but the innermost, which holds all other cells."""
IMAGES = 200
"""Number of good training images that rings or cells are measured on, at most."""
PRIOR = 20
"""How many images the moments of all cells count for in those of a ring or a cell."""
MARGIN = 2
"""Width of the blind margin in cells of the finest layer: at its stride of 8, 16 pixels."""
MEASURED = ("rings", "cells")
"""The choices that are measured on good images."""


def measure(maps: Iterable[Tensor], edges: Edges) -> tuple[Tensor, Tensor]:
    """Return the (h, w) gain and shift that level rings or cells, given (B, h, w) cells of good images.

    Mean and variance of a ring or cell are over all n images: n / (n + PRIOR) its own, and the rest those of
    all cells. Gains stay finite where a map is constant.
    """
    whole = torch.cat([part.double().cpu() for part in maps])
    own = len(whole) / (len(whole) + PRIOR)
    level, width = whole.mean(), whole.var(correction=0)
    mean = averaged(whole.mean(0), edges)
    variance = averaged((whole - mean).square().mean(0), edges)
    mean, variance = torch.lerp(level, mean, own), torch.lerp(width, variance, own)
    gain = torch.where(variance > 0, (width / variance.clamp(min=1e-300)).sqrt(), 1.0)
    return gain.float(), (level - gain * mean).float()


def averaged(values: Tensor, edges: Edges) -> Tensor:
    """Average (h, w) values over each ring, or over the 3 x 3 neighbourhood of each cell."""
    if edges == "cells":
        return functional.avg_pool2d(values[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    ring = distances(values.shape).clamp(max=RINGS - 1).flatten()
    sums = torch.zeros(RINGS, dtype=values.dtype).index_add(0, ring, values.flatten())
    return (sums / ring.bincount(minlength=RINGS).clamp(min=1))[ring].view_as(values)


def distances(size: Sequence[int]) -> Tensor:
    """Return the (h, w) distance of each cell from the nearest border in cells, 0 at the border."""
    down, across = (torch.minimum(torch.arange(n), torch.arange(n).flip(0)) for n in size)
    return torch.minimum(down[:, None], across)


def blinded(cells: Tensor, margin: int) -> Tensor:
    """Return (B, h, w) cells with those within `margin` of the border set to the lowest of the others.

    Raises ConfigError if there are no others.
    """
    height, width = cells.shape[1], cells.shape[2]
    if min(height, width) <= 2 * margin:
        raise ConfigError(
            f"edges=blind leaves nothing of a map of {height}x{width} cells, {margin} of them blind on each "
            "side; expected a larger image size"
        )
    lowest = cells[:, margin : height - margin, margin : width - margin].amin((1, 2), keepdim=True)
    return torch.where((distances((height, width)) >= margin).to(cells.device), cells, lowest)


def treated(cells: Tensor, edges: Edges, gain: Tensor, shift: Tensor, margin: int = MARGIN) -> Tensor:
    """Return (B, h, w) cells as statistics and map take them; gain and shift: (h, w), as measured."""
    if edges in MEASURED:
        return cells * gain + shift
    return blinded(cells, margin) if edges == "blind" else cells
