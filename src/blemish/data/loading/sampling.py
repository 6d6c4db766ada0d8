"""The composition of an epoch, as pure functions of the random seed and the epoch's number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from blemish import seeding
from blemish.types import AnyArray

FLIPS = 4
"""Number of flips of an image: none, left to right, upside down, and both (a rotation by 180 degrees)."""
COPY = 16
"""Number of the first altered copy among the views of an image."""

Entry = tuple[int, int]
"""The index of a sample and the number of its view: one of its flips or, from COPY on, an altered copy."""


def epoch_length(labels: Sequence[int], flips: int = FLIPS) -> int:
    """Return the number of entries in an epoch."""
    return 2 * flips * sum(labels) or len(labels)


def epoch_entries(labels: Sequence[int], seed: int, epoch: int, flips: int = FLIPS) -> list[Entry]:
    """Return the entries of an epoch in order, for samples with labels 0 (good) and 1 (defective).

    Without defective images, every image is used once. With them (SuperSimpleNet, section 4), each defective
    image is used once per flip, together with the same number of good images: those used least often so far.
    This approximates the paper's sampling by inverse frequency without carrying state between epochs. On
    average, half of a batch is defective.
    """
    good = [index for index, label in enumerate(labels) if label == 0]
    defective = [(index, flip) for index, label in enumerate(labels) if label for flip in range(flips)]
    count = len(defective) or len(good)
    entries = [(good[turn], 0) for turn in fewest_turns(len(good), seed, epoch * count, count)]
    if not defective:
        return entries
    entries += defective
    order = torch.randperm(len(entries), generator=seeding.generator(seed, "balance", epoch))
    return [entries[place] for place in order]


def fewest_turns(size: int, seed: int, start: int, count: int) -> list[int]:
    """Return `count` indices below `size`, from position `start` of an endless sequence of permutations."""
    turns: list[int] = []
    while len(turns) < count:
        number, place = divmod(start + len(turns), size)
        order = torch.randperm(size, generator=seeding.generator(seed, "epoch", number))
        turns += order[place : place + count - len(turns)].tolist()
    return turns


def flipped(array: AnyArray, flip: int) -> AnyArray:
    """Return a flipped copy of an array whose last two axes are height and width."""
    across, down = flip & 1, flip & 2
    return np.ascontiguousarray(array[..., :: -1 if down else 1, :: -1 if across else 1])
