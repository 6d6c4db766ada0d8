"""Places of a map where even good parts score high: its rim, or any cell.

For every method whose map is made of (B, h, w) cells. A padded backbone sees zeros beyond the image's border,
which are no part of any image, so that on good parts a map may well have its maximum in its rim. Where parts
lie alike, other places differ, too: an edge or a print scores higher than a plain surface. The setting
`edges` says what is done about it, before statistics are taken and before the map is enlarged:

- none: nothing.
- rings: a ring is the cells at one distance from one side. A ring whose highest cells, on good training
  images, reach further up than those inside is damped until they reach as far. All other cells stay as they
  are, and so do the map's units.
- cells: each cell is scaled and shifted so that, on good training images, its mean and deviation are those of
  all cells; units stay those of the map. For methods that score an image without itself, since a map of what
  was learned by heart says little.
- blind: cells within a margin get the lowest value of the others, so that nothing there can raise the map or
  a statistic of it.

Giving each ring the mean and the deviation of all cells, as `cells` does, gained less where the rim is loud
and lost where it is quiet (docs/papers.md): a maximum depends on the highest cells, and a quiet rim is best
left so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from blemish.detectors.cells import averaged
from blemish.detectors.settings import Edges
from blemish.errors import ConfigError

RINGS = 7
"""Number of rings along each side, each one cell wide; but at most a quarter of the map's shorter side."""
INSIDE = 4 * RINGS
"""Number of the region inside; before it come the rings of top, bottom, left and right, outermost first."""
IMAGES = 200
"""Number of good training images that the rings are measured on, at most."""
PRIOR = 20
"""For how many images the inside counts in what is measured of a ring, so that few images change little."""
MEASURED = ("rings", "cells")
"""The choices that are measured on good images."""
HIGHEST = 0.001
"""Share of a region's cells whose mean says how far up it reaches; at least 5 cells."""
MARGIN = 2
"""Width of the blind margin in cells of the finest layer: at its usual stride of 8, 16 pixels."""


Device = torch.device | str


def distances(size: Sequence[int], device: Device = "cpu") -> Tensor:
    """Return the (4, h, w) distances of each cell from top, bottom, left and right, 0 for the outermost.

    Made on the device: a copy from the host cannot be recorded into a CUDA graph.
    """
    down, across = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
    return torch.stack([down, size[0] - 1 - down, across, size[1] - 1 - across])


def ring_numbers(size: Sequence[int], device: Device = "cpu") -> Tensor:
    """Return the (h, w) numbers of the cells' rings; the nearest side counts, the first of several."""
    distance, side = distances(size, device).min(0)
    return torch.where(distance < min(RINGS, min(size) // 4), RINGS * side + distance, INSIDE)


def neutral() -> tuple[Tensor, Tensor]:
    """Return the (INSIDE + 1,) gain and shift that leave all cells as they are."""
    return torch.ones(INSIDE + 1), torch.zeros(INSIDE + 1)


def by_cell(values: Tensor, size: Sequence[int]) -> Tensor:
    """Spread (INSIDE + 1,) values, one for each ring and one for the inside, over (h, w) cells."""
    return values[ring_numbers(size, values.device)]


def measure_rings(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the (INSIDE + 1,) gain and shift that damp the rings, given (B, h, w) cells of good images.

    How far a region reaches up is the mean of its highest cells in all images, less the mean of the inside. A
    ring's own counts for n / (n + PRIOR), n the number of images, and that of the inside for the rest.
    """
    parts = [part.cpu() for part in maps]
    numbers = ring_numbers(parts[0].shape[1:]).flatten()
    cells = torch.cat(parts).flatten(1)
    own = len(cells) / (len(cells) + PRIOR)
    inside = cells[:, numbers == INSIDE]
    centre, usual = inside.double().mean(), highest(inside)
    gain = torch.ones(INSIDE + 1, dtype=torch.float64)
    for number in range(INSIDE):
        ring = cells[:, numbers == number]
        if ring.numel():
            further = own * (highest(ring) - usual)
            if further > 0 and usual > centre:
                gain[number] = (usual - centre) / (usual - centre + further)
    return gain.float(), ((1 - gain) * centre).float()


def highest(cells: Tensor) -> Tensor:
    """Return the mean of the highest cells."""
    count = min(cells.numel(), max(5, round(HIGHEST * cells.numel())))
    return cells.flatten().topk(count).values.double().mean()


def measure_cells(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the (h, w) gain and shift that level each cell, given (B, h, w) cells of good images.

    Mean and variance of a cell are averaged over its 3 x 3 neighbourhood; of n images, n / (n + PRIOR) of
    them count, and those of all cells for the rest. Gains stay finite where a map is constant.
    """
    whole = torch.cat([part.double().cpu() for part in maps])
    own = len(whole) / (len(whole) + PRIOR)
    level, width = whole.mean(), whole.var(correction=0)
    mean = averaged(whole.mean(0)[None])[0]
    variance = averaged((whole - mean).square().mean(0)[None])[0]
    mean, variance = torch.lerp(level, mean, own), torch.lerp(width, variance, own)
    gain = torch.where(variance > 0, (width / variance.clamp(min=1e-300)).sqrt(), 1.0)
    return gain.float(), (level - gain * mean).float()


def measure(maps: Iterable[Tensor], edges: Edges) -> tuple[Tensor, Tensor]:
    """Return the (h, w) gain and shift of rings or cells, given (B, h, w) cells of good images."""
    if edges == "cells":
        return measure_cells(maps)
    parts = list(maps)
    gain, shift = measure_rings(parts)
    size = parts[0].shape[1:]
    return by_cell(gain, size), by_cell(shift, size)


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
    return torch.where(distances((height, width), cells.device).amin(0) >= margin, cells, lowest)


def treated(cells: Tensor, edges: Edges, gain: Tensor, shift: Tensor, margin: int = MARGIN) -> Tensor:
    """Return (B, h, w) cells as statistics and map take them; gain and shift: (h, w), as measured."""
    if edges in MEASURED:
        return cells * gain + shift
    return blinded(cells, margin) if edges == "blind" else cells
