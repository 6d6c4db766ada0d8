"""Which images make up an epoch: pure functions of the seed and the epoch's number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from blemish import seeding
from blemish.types import AnyArray

FLIPS = 4
"""An image as it is, flipped left to right, upside down, and both: turned by 180 degrees."""

Entry = tuple[int, int]
"""The position of a sample, and the number of its flip."""


def epoch_length(labels: Sequence[int], flips: int = FLIPS) -> int:
    """Count the entries of an epoch."""
    return 2 * flips * sum(labels) or len(labels)


def epoch_entries(labels: Sequence[int], seed: int, epoch: int, flips: int = FLIPS) -> list[Entry]:
    """List an epoch's entries in their order, for samples with labels 0 (good) and 1 (defective).

    With good images alone every image has one turn. With defective ones (SuperSimpleNet, section 4) each of
    those has a turn for every flip, and as many good images come in among them: those that had the fewest
    turns so far, which is what drawing by inverse frequency tends to, without anything to carry from epoch to
    epoch. So half of a batch is defective on average.
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
    """Give `count` of `size` positions from the `start`-th on of an endless row of shuffled rounds."""
    turns: list[int] = []
    while len(turns) < count:
        number, place = divmod(start + len(turns), size)
        order = torch.randperm(size, generator=seeding.generator(seed, "epoch", number))
        turns += order[place : place + count - len(turns)].tolist()
    return turns


def flipped(array: AnyArray, flip: int) -> AnyArray:
    """Flip an array whose last two axes are height and width."""
    across, down = flip & 1, flip & 2
    return np.ascontiguousarray(array[..., :: -1 if down else 1, :: -1 if across else 1])
