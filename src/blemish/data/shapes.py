"""The shape that most images of a data set have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAME_SHAPE = 0.05
"""Largest relative difference of height / width at which images count as having the same shape."""


@dataclass(frozen=True)
class Shape:
    """The most frequent shape among images."""

    size: tuple[int, int]
    """Height and width that most of the images of this shape have."""
    count: int
    """Number of images of this shape."""
    others: int
    """Number of images of another shape."""


def most_frequent(sizes: Sequence[tuple[int, int]]) -> Shape:
    """Return the shape of most images; sizes: the height and width of each, at least one.

    It is that of the size whose shape the largest number of images have; ties go to the size of more images.
    """
    counts = Counter(sizes)
    ratios = np.sort([height / width for height, width in sizes])
    alike = {size: int(np.diff(np.searchsorted(ratios, _limits(size)))[0]) for size in counts}
    middle = max(counts, key=lambda size: (alike[size], counts[size]))
    low, high = _limits(middle)
    size = max((size for size in counts if low <= size[0] / size[1] <= high), key=lambda size: counts[size])
    return Shape(size, alike[middle], len(sizes) - alike[middle])


def _limits(size: tuple[int, int]) -> tuple[float, float]:
    ratio = size[0] / size[1]
    return ratio / (1 + SAME_SHAPE), ratio * (1 + SAME_SHAPE)
