"""A store of many scores: sorted arrays while they fit in memory, a histogram of ranks beyond that.

Sorting and counting use all cores, as NumPy releases the interpreter lock meanwhile.

Bins are delimited by rank, never by score, so that neither the range nor the distribution of the scores
matters. They hold equal shares of the anomalous scores. Their shares of the normal scores decrease towards
the highest ones, which determine precision and low false-positive rates. A score that many pixels share
fills a bin of its own and keeps its exact value. Later scores first enter as bins of their own, between or
outside the existing ones, before bins are merged again: scores may drift from image to image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from blemish.types import AnyArray, FloatArray

Doubles = npt.NDArray[np.float64]

Counts = npt.NDArray[np.int64]

BYTES_PER_BIN = 1024
"""Memory per bin while histograms are joined, for the parameter `bins` of the functions below."""

THREADS = os.cpu_count() or 1

CHUNK = 2**14
"""Number of scores that a thread ranks at a time."""

WORTH_A_THREAD = 2**18
"""Number of scores from which sorting takes longer than starting a thread."""


class Scores:
    """Normal and anomalous scores, with weights of the latter: in memory while they fit, then a histogram.

    The store and the computations of `metrics` on it stay within `budget` bytes.
    """

    def __init__(self, budget: int) -> None:
        self.adds = 0
        self.histogram: Histogram | None = None
        self._budget = budget
        self.bins = budget // BYTES_PER_BIN
        self._start()

    def _start(self) -> None:
        self._normals = _Pile(np.float32)
        self._anomalous = _Pile(np.float32)
        self._weights = _Pile(np.float64)
        self._in_order = True

    def add(self, normals: FloatArray, anomalous: FloatArray, weights: Doubles) -> None:
        """Add copies of (N,) normal scores, (A,) anomalous scores and their (A,) weights."""
        if self._in_memory() and not self._fits(normals.size, anomalous.size):
            self._fold()
        self._normals.add(normals)
        self._anomalous.add(anomalous)
        self._weights.add(weights)
        self._in_order = False
        self.adds += 1

    def normals(self) -> FloatArray:
        """Return the normal scores in memory, ascending, sorted in place; invalid after the next `add`."""
        if not self._in_order:
            sort(self._normals.values())
            self._in_order = True
        return self._normals.values()

    def anomalous(self) -> tuple[FloatArray, Doubles]:
        """Return the unsorted anomalous scores in memory and their weights; invalid after the next `add`."""
        return self._anomalous.values(), self._weights.values()

    def histograms(self) -> list[Histogram]:
        """Return the histogram including the scores in memory; if there is none, a new one for each class."""
        if self.histogram and self._in_memory():
            self._fold()
        return [self.histogram] if self.histogram else self._new_histograms()

    def _in_memory(self) -> int:
        return self._normals.size + self._anomalous.size

    def _fits(self, normals: int, anomalous: int) -> bool:
        """Return whether so many more scores fit into the budget.

        A normal score is sorted in place, in an array with some slack. An anomalous score has a weight with
        which it is sorted, and may become a step of a metric, both for its kind of defect and for the whole
        set. A histogram takes up a quarter of the budget, but needs no steps.
        """
        normals, anomalous = normals + self._normals.size, anomalous + self._anomalous.size
        if self.histogram:
            return 5 * normals + 48 * anomalous <= self._budget * 3 // 4
        return 5 * normals + 128 * anomalous <= self._budget

    def _fold(self) -> None:
        """Move the scores in memory into the histogram, creating it if necessary."""
        new = self._new_histograms()
        self._start()
        self.histogram = joined([self.histogram, *new] if self.histogram else new, self.bins)

    def _new_histograms(self) -> list[Histogram]:
        found = []
        if self._normals.size:
            found.append(normal_histogram(self.normals(), self.bins))
        if self._anomalous.size:
            found.append(anomalous_histogram(*sorted_anomalous([self]), self.bins))
        return found


class _Pile:
    """An array that grows by a quarter when it is full, without a copy if the system can extend it."""

    def __init__(self, dtype: type[np.floating[Any]]) -> None:
        self._array: AnyArray = np.empty(0, dtype)
        self.size = 0

    def add(self, values: AnyArray) -> None:
        end = self.size + values.size
        if end > self._array.size:
            self._grow(max(end, self._array.size * 5 // 4))
        self._array[self.size : end] = values
        self.size = end

    def _grow(self, size: int) -> None:
        try:
            self._array.resize(size)
        except ValueError:  # a view of the array still exists and must stay valid
            grown = np.zeros(size, self._array.dtype)
            grown[: self.size] = self._array[: self.size]
            self._array = grown

    def values(self) -> AnyArray:
        """Return a view of the current values; while the view exists, growing requires a copy."""
        return self._array[: self.size]


def sorted_anomalous(parts: Sequence[Scores]) -> tuple[FloatArray, Doubles]:
    """Return the anomalous scores in memory of all parts, ascending, with their weights."""
    scores = np.concatenate([part.anomalous()[0] for part in parts])
    weights = np.concatenate([part.anomalous()[1] for part in parts])
    order = np.argsort(scores)
    return scores[order], weights[order]


def joint_histogram(parts: Sequence[Scores]) -> Histogram:
    """Join the histograms of all parts, at least one of which has one, with the first part's `bins`."""
    histograms = [histogram for part in parts for histogram in part.histograms()]
    return histograms[0] if len(histograms) == 1 else joined(histograms, parts[0].bins)


def sort(scores: FloatArray, threads: int = THREADS) -> None:
    """Sort (N,) scores in place: partition them at the median, then sort the halves in parallel."""
    if threads < 2 or scores.size < WORTH_A_THREAD:
        scores.sort()
        return
    half = scores.size // 2
    scores.partition(half)
    with ThreadPoolExecutor(1) as pool:
        upper = pool.submit(sort, scores[half:], threads // 2)
        sort(scores[:half], threads - threads // 2)
        upper.result()


def ranks(parts: Sequence[AnyArray], scores: AnyArray) -> Counts:
    """Count the values in ascending arrays below each of (S,) ascending scores, and at or below it: (2, S).

    The scores are processed in parallel, in chunks, so that the values in their range stay in the CPU cache.
    """
    counts = np.zeros((2, scores.size), np.int64)

    def count(first: int) -> None:
        chunk, counted = scores[first : first + CHUNK], counts[:, first : first + CHUNK]
        for values in filter(len, parts):
            low, high = np.searchsorted(values, chunk[[0, -1]])
            below = low + np.searchsorted(values[low:high], chunk)
            counted += below
            among = np.flatnonzero(values[np.minimum(below, values.size - 1)] == chunk)
            counted[1, among] += np.searchsorted(values, chunk[among], "right") - below[among]

    if scores.size <= CHUNK:
        count(0)
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(count, range(0, scores.size, CHUNK)))
    return counts


@dataclass(frozen=True)
class Histogram:
    """Bins, each at one score, that count the scores close to it in rank."""

    scores: FloatArray
    """(B,) ascending, distinct."""
    normals: Counts
    """(B,) number of normal scores in each bin."""
    anomalous: Counts
    """(B,) number of anomalous scores in each bin."""
    weights: Doubles
    """(B,) sum of the weights of those anomalous scores."""


def normal_histogram(ascending: FloatArray, bins: int) -> Histogram:
    """Return a histogram of (N,) normal scores, N > 0, in at most `bins` + 1 bins."""
    above = _normals_above(np.arange(bins, -1, -1), ascending.size, bins)
    firsts = _cut(ascending, ascending.size - 1 - np.minimum(above, ascending.size - 1))
    counts = np.diff(firsts, append=ascending.size)
    return Histogram(ascending[firsts + counts // 2], counts, np.zeros_like(counts), np.zeros(counts.size))


def anomalous_histogram(ascending: FloatArray, weights: Doubles, bins: int) -> Histogram:
    """Return a histogram of (N,) anomalous scores, N > 0, and their (N,) weights, in at most `bins` bins."""
    firsts = _cut(ascending, np.arange(bins) * ascending.size // bins)
    counts = np.diff(firsts, append=ascending.size)
    return Histogram(
        ascending[firsts + counts // 2], np.zeros_like(counts), counts, np.add.reduceat(weights, firsts)
    )


def joined(histograms: Sequence[Histogram], bins: int) -> Histogram:
    """Join histograms into one with at most a few times `bins` bins."""
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
    """Return the index of the first of each run of equal values in (N,) values, N > 0."""
    return np.append(0, np.flatnonzero(values[1:] != values[:-1]) + 1)


def _cut(ascending: FloatArray, cuts: Counts) -> Counts:
    """Move ascending cuts, the first of them 0, down so that none splits equal scores; drop duplicates."""
    places = np.searchsorted(ascending, ascending[cuts])
    return places[first_of_each(places)]


def _thinned(histogram: Histogram, bins: int) -> Histogram:
    """Merge neighbouring bins that fall into the same share of both the normal and the anomalous scores.

    A bin that makes up a share by itself is not merged, or it would absorb more and more neighbours with each
    merge. A merged bin is placed at its middle score by rank: its lower or upper end would shift all normal
    scores in the same direction relative to the anomalous ones.
    """
    normals = np.cumsum(histogram.normals[::-1])[::-1]
    anomalous = np.cumsum(histogram.anomalous[::-1])[::-1]
    position = _normal_position(normals, int(normals[0]), bins)
    depth = -np.diff(position, append=0)
    full = (depth >= 1) | (histogram.anomalous * bins >= max(int(anomalous[0]), 1))
    apart = np.diff(np.floor(position)) != 0
    apart |= np.diff(anomalous * bins // max(int(anomalous[0]), 1)) != 0
    apart |= full[1:] | full[:-1]
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
    """Return positions from 0 to `bins` of normal scores that have `above` of the `total` scores above them.

    The scale is logarithmic: a bin holds about one score at the top, and further down a fixed share of the
    scores above it.
    """
    scale = 16 / bins
    place: Doubles = bins * np.log1p(above * scale) / np.log1p(max(total, 1) * scale)
    return place


def _normals_above(position: Counts, total: int, bins: int) -> Counts:
    """Return the inverse of `_normal_position`, rounded down."""
    scale = 16 / bins
    above: Counts = np.floor(np.expm1(position / bins * np.log1p(total * scale)) / scale).astype(np.int64)
    return above
