"""The choice of the cells to remember: a subset that covers all of them (section 3.2).

Farthest-first search (Gonzalez, 1985) repeatedly takes the cell farthest from all that were taken. Taken
literally, each choice reads every cell once, which is limited by memory. Here the cells farthest at the
moment form a pool, and the search goes on inside it as long as it must: a distance only ever falls, so while
the farthest cell of the pool is at least as far as any outside was, it is the farthest of all. The distances
of all cells are then lowered for many choices at once, by one product of matrices. The choices are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

POOL = 2048
"""Cells in a pool."""

CHUNK = 4096
"""Cells whose distances are computed at a time."""

COLUMNS = 256
"""Cells that they are computed from at a time, so that a product fits the processor's cache."""

RESOLUTION = 1e-5
"""Squared distances of this share of the mean squared length, and below, are taken for 0."""

START = 10
"""Cells whose mean distance is the published start value."""


def farthest_first(points: Tensor, count: int, distances: Tensor, least: float = 0.0) -> Tensor:
    """Return the indices of at most `count` of the (n, D) points, each the farthest when it is taken.

    distances: (n,) squared distances to start with, lowered in place to those from the points taken. Ends
    early once no squared distance exceeds `least`.
    """
    squares = points.square().sum(1)
    least = max(least, RESOLUTION * float(squares.mean()))
    taken: list[int] = []
    while len(taken) < count:
        pool = distances.topk(min(POOL, len(points)))
        outside = float(pool.values[-1]) if len(pool.values) < len(points) else -1.0
        chosen = search(points[pool.indices], pool.values.clone(), outside, count - len(taken), least)
        if not len(chosen):
            break
        indices = pool.indices[chosen]
        lower(distances, points, squares, indices)
        taken += indices.tolist()
    return torch.tensor(taken, dtype=torch.long, device=points.device)


def search(points: Tensor, distances: Tensor, outside: float, count: int, least: float) -> Tensor:
    """Return the indices of the points taken before one outside the pool might be farther."""
    squares = points.square().sum(1)
    taken: list[int] = []
    while len(taken) < count:
        farthest = int(distances.argmax())
        distance = float(distances[farthest])
        if distance <= least or (taken and distance < outside):
            break
        taken.append(farthest)
        apart = torch.addmv(squares + squares[farthest], points, points[farthest], alpha=-2)
        torch.minimum(distances, apart.clamp_(min=0), out=distances)
        distances[farthest] = 0
    return torch.tensor(taken, dtype=torch.long, device=points.device)


def lower(distances: Tensor, points: Tensor, squares: Tensor, taken: Tensor) -> None:
    """Lower (n,) squared distances, in place, to those from the points taken."""
    nearest_to(points[taken], points, squares, distances)
    distances[taken] = 0


def nearest_to(bank: Tensor, points: Tensor, squares: Tensor, distances: Tensor) -> None:
    """Lower the (n,) squared distances of points, in place, to those from the rows of a bank."""
    halves = bank.square().sum(1) / 2
    for first in range(0, len(bank), COLUMNS):
        half, columns = halves[first : first + COLUMNS], bank[first : first + COLUMNS].T.contiguous()
        for start in range(0, len(points), CHUNK):
            rows = slice(start, start + CHUNK)
            apart = torch.addmm(half, points[rows], columns, alpha=-1).amin(1)
            torch.minimum(distances[rows], (squares[rows] + 2 * apart).clamp_(min=0), out=distances[rows])


def cover(points: Tensor, count: int) -> tuple[Tensor, float]:
    """Choose `count` of (n, D) points that cover all of them.

    Begins with the point farthest from the mean. Returns the indices, and the largest squared distance of a
    point from the nearest chosen one.
    """
    first = (points - points.mean(0)).square().sum(1).argmax()[None]
    distances = (points - points[first]).square().sum(1)
    others = farthest_first(points, min(count, len(points)) - 1, distances)
    return torch.cat([first, others]), float(distances.amax())


def extend(bank: Tensor, points: Tensor, count: int, radius: float) -> Tensor:
    """Choose at most `count` of (n, D) points until none is farther than `radius`, squared, from the bank."""
    squares = points.square().sum(1)
    distances = torch.full_like(squares, torch.inf)
    nearest_to(bank, points, squares, distances)
    return farthest_first(points, count, distances, radius)


def published(points: Tensor, count: int, projection: Tensor, start: Tensor) -> Tensor:
    """Choose `count` of (n, D) points as the authors' approximation does.

    projection: (E, D) matrix to fewer dimensions, in which distances are measured; start: indices of points,
    whose mean distance to a point is that point's start value, and a ceiling for ever.
    """
    small = functional.linear(points, projection)
    distances = torch.cdist(small, small[start]).mean(1).square()
    return farthest_first(small, count, distances)


def draw_published(points: Tensor, count: int, generator: torch.Generator, size: int = 128) -> Tensor:
    """Choose points by `published`, with a random projection (a linear layer's usual weights) and start."""
    bound = points.shape[1] ** -0.5
    projection = torch.empty(size, points.shape[1]).uniform_(-bound, bound, generator=generator)
    start = torch.randperm(len(points), generator=generator)[:START]
    return published(points, min(count, len(points)), projection.to(points), start.to(points.device))


def typical(points: Tensor, owners: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return a mask of the points left when a share of them, those least like other images', is left out.

    How like others a point is, is measured by its distance to the nearest of at most 10,000 random points of
    other images. points: (n, D); owners: (n,), the image that each comes from. Of one image, all are
    left.
    """
    if bool((owners == owners[0]).all()):
        return torch.ones(len(points), dtype=torch.bool, device=points.device)
    drawn = torch.randperm(len(points), generator=generator)[:10_000].to(points.device)
    reference, owner = points[drawn], owners[drawn]
    halves = reference.square().sum(1) / 2
    nearest = points.new_empty(len(points))
    for start in range(0, len(points), CHUNK):
        rows = slice(start, start + CHUNK)
        apart = torch.addmm(halves, points[rows], reference.T, alpha=-1)
        apart.masked_fill_(owners[rows, None] == owner, torch.inf)
        nearest[rows] = points[rows].square().sum(1) + 2 * apart.amin(1)
    kept = len(points) - round(share * len(points))
    mask = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    mask[nearest.topk(max(kept, 1), largest=False).indices] = True
    return mask
