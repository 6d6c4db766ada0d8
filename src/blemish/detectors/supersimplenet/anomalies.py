"""What SuperSimpleNet learns to find: the masks of real defects, and anomalies made of good cells.

Noise in Perlin masks (section 3.2) is drawn by the detector. What is here beyond the paper costs nothing at
inference, and is off unless a setting asks for it:

- differences: noise knows nothing of the ways in which features differ. A cell moved along the difference of
  two good ones does: it leaves the good ones in a direction that the backbone can produce.
- misplaced: a head that sees one cell at a time cannot know that a part is missing, since what lies there
  instead is good elsewhere. Told where a cell lies, and shown good cells in wrong places as anomalous, it
  learns what belongs where. If parts lie in any pose, what is good in one place is good in another, and the
  two cancel out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from blemish.detectors.supersimplenet.config import SuperSimpleNetConfig
from blemish.types import Batch

REACH = (0.3, 0.7)
"""How far a noisy cell is moved along the difference of two good cells, as a share of it: least and most."""


@dataclass(frozen=True)
class Remade:
    """Anomalies made of the n good cells of a batch.

    reach: for each noisy cell, how far it is moved along the difference of two cells, 0 if not at all; pairs:
    (2, noisy cells), the numbers of those two; strays: (2, misplaced cells), the numbers of the cell whose
    features and of the cell whose place a misplaced one has.
    """

    reach: Tensor
    pairs: Tensor
    strays: Tensor


def draw_remade(
    config: SuperSimpleNetConfig, noise: Tensor, cells: int, generator: torch.Generator
) -> Remade | None:
    """Sample anomalies made of a batch's good cells, if configured; rows of noise they replace become 0.

    noise: a row for each noisy cell; cells: the number of cells of the batch.
    """
    differences, misplaced = config.differences, config.misplaced
    if not differences and not misplaced:
        return None
    device, rows = noise.device, len(noise)
    reach = torch.rand(rows, generator=generator, device=device) * (REACH[1] - REACH[0]) + REACH[0]
    reach = reach * (torch.rand(rows, generator=generator, device=device) < differences)
    noise.mul_((reach == 0)[:, None])
    pairs = torch.randint(cells, (2, rows), generator=generator, device=device)
    strays = torch.randint(cells, (2, round(misplaced * cells)), generator=generator, device=device)
    return Remade(reach, pairs, strays)


def real_masks(batch: Batch, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize real masks and their weights to (B, h, w) bilinearly; cells of at least 0.5 are anomalous.

    If a mask vanishes in this way, every cell that it touches is anomalous.
    """
    if batch.masks is None:
        nothing = torch.zeros(len(batch.labels), *size, device=batch.labels.device)
        return nothing.bool(), nothing
    small = functional.interpolate(batch.masks[:, None], size, mode="bilinear")[:, 0] >= 0.5
    touched = functional.adaptive_max_pool2d(batch.masks, size) > 0
    vanished = ~small.flatten(1).any(1)[:, None, None]
    small = small | (touched & vanished)
    if batch.weights is None:
        return small, torch.ones_like(small, dtype=torch.float32)
    weights = functional.interpolate(batch.weights[:, None], size, mode="bilinear")[:, 0]
    return small, torch.where(vanished, functional.adaptive_max_pool2d(batch.weights, size), weights)
