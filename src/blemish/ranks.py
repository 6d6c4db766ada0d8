"""A histogram of ranks: what `metrics` keeps of pixel scores that do not fit in memory.

Bins are cut by rank, never by score, so that neither the range nor the shape of the scores matters. They hold
equal shares of the anomalous scores. Of the normal scores they hold shares that shrink towards the highest
ones, where precision and the low false-positive rates are decided. A score that many pixels share outweighs
its bin and so stays where it is. Later scores take their own places, between the bins or outside them, before
bins are cut anew: scores may drift from image to image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blemish.types import AnyArray, FloatArray

Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

BYTES_PER_BIN = 1024
"""Memory for each of the `bins` that the functions take, while histograms are joined."""


@dataclass(frozen=True)
class Histogram:
    """Bins that each stand at one score and hold what lay close to it in rank."""

    scores: FloatArray
    """(B,) ascending, distinct."""
    normals: Counts
    """(B,) normal scores in each bin."""
    anomalous: Counts
    """(B,) anomalous scores in each bin."""
    weights: Doubles
    """(B,) summed weights of those anomalous scores."""


def normal_histogram(ascending: FloatArray, bins: int) -> Histogram:
    """Put (N,) normal scores, N > 0, into at most `bins` + 1 bins."""
    above = _normals_above(np.arange(bins + 1), ascending.size, bins)
    firsts = _cut(ascending, ascending.size - 1 - np.minimum(above, ascending.size - 1))
    counts = np.diff(firsts, append=ascending.size)
    return Histogram(ascending[firsts + counts // 2], counts, np.zeros_like(counts), np.zeros(counts.size))


def anomalous_histogram(ascending: FloatArray, weights: Doubles, bins: int) -> Histogram:
    """Put (N,) anomalous scores, N > 0, with their (N,) weights, into at most `bins` bins."""
    firsts = _cut(ascending, np.arange(bins) * ascending.size // bins)
    counts = np.diff(firsts, append=ascending.size)
    return Histogram(
        ascending[firsts + counts // 2], np.zeros_like(counts), counts, np.add.reduceat(weights, firsts)
    )


def joined(histograms: Sequence[Histogram], bins: int) -> Histogram:
    """Join histograms into one of a few times `bins` bins."""
    scores = np.concatenate([histogram.scores for histogram in histograms])
    order = np.argsort(scores)
    scores = scores[order]
    firsts = first_of_each(scores)
    sums = [
        np.add.reduceat(np.concatenate(column)[order], firsts)
        for column in (
            [histogram.normals for histogram in histograms],
            [histogram.anomalous for histogram in histograms],
            [histogram.weights for histogram in histograms],
        )
    ]
    return _thinned(Histogram(scores[firsts], *sums), bins)


def first_of_each(values: AnyArray) -> Counts:
    """Give the index of the first of each run of equal values in (N,) values, N > 0."""
    return np.append(0, np.flatnonzero(values[1:] != values[:-1]) + 1)


def _cut(ascending: FloatArray, cuts: Counts) -> Counts:
    """Move cuts, index 0 among them, down to where none is between equal scores; give each place once."""
    return np.unique(np.searchsorted(ascending, ascending[cuts]))


def _thinned(histogram: Histogram, bins: int) -> Histogram:
    """Merge neighbours that share a bin of the normal scores and a bin of the anomalous scores.

    What fills a bin by itself stays alone, or it would swallow its neighbours, more with every thinning. The
    merged bin stands at its middle score by rank: a lower or upper end would move all normal scores the same
    way past the anomalous ones.
    """
    normals = np.cumsum(histogram.normals[::-1])[::-1]
    anomalous = np.cumsum(histogram.anomalous[::-1])[::-1]
    position = _normal_position(normals, int(normals[0]), bins)
    depth = position - _normal_position(normals - histogram.normals, int(normals[0]), bins)
    full = (depth >= 1) | (histogram.anomalous * bins >= max(int(anomalous[0]), 1))
    cell = np.stack((np.floor(position), anomalous * bins // max(int(anomalous[0]), 1)))
    apart = (cell[:, 1:] != cell[:, :-1]).any(axis=0) | full[1:] | full[:-1]
    firsts = np.append(0, np.flatnonzero(apart) + 1)
    below = np.append(0, np.cumsum(histogram.normals + histogram.anomalous))
    ends = below[np.append(firsts, below.size - 1)]
    middles = np.searchsorted(below, (ends[:-1] + ends[1:]) // 2, "right") - 1
    return Histogram(
        histogram.scores[middles],
        np.add.reduceat(histogram.normals, firsts),
        np.add.reduceat(histogram.anomalous, firsts),
        np.add.reduceat(histogram.weights, firsts),
    )


def _normal_position(above: Counts, total: int, bins: int) -> Doubles:
    """Give the place on a scale of `bins`, 0 at the top, of normal scores with that many of the total above.

    The logarithm makes bins of about one score at the top, and further down of a fixed share of those above.
    """
    scale = 16 / bins
    place: Doubles = bins * np.log1p(above * scale) / np.log1p(max(total, 1) * scale)
    return place


def _normals_above(position: Counts, total: int, bins: int) -> Counts:
    """Undo `_normal_position`, rounding down."""
    scale = 16 / bins
    above: Counts = np.floor(np.expm1(position / bins * np.log1p(total * scale)) / scale).astype(np.int64)
    return above
