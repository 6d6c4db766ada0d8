"""Many scores in order: sorted where they fit in memory, a histogram of ranks where they do not.

Sorting and counting run on all cores: NumPy lets go of the interpreter's lock meanwhile.

The histogram's bins are cut by rank, never by score, so that neither the range nor the shape of the scores
matters. They hold equal shares of the anomalous scores. Of the normal scores they hold shares that shrink
towards the highest ones, where precision and the low false-positive rates are decided. A score that many
pixels share outweighs its bin and so stays where it is. Later scores take their own places, between the bins
or outside them, before bins are cut anew: scores may drift from image to image.
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
"""Memory for each of the `bins` that the functions take, while histograms are joined."""

THREADS = os.cpu_count() or 1

CHUNK = 2**14
"""Scores that a thread ranks at a time."""

WORTH_A_THREAD = 2**18
"""Scores whose sorting takes longer than starting a thread for them."""


class Scores:
    """Normal and anomalous scores, with weights of the latter, while they fit; a histogram beyond.

    What is gathered stays within `budget` bytes together with the work on it that `metrics` does.
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
        """Take in a copy of (N,) normal scores, (A,) anomalous ones and their (A,) weights."""
        if self._in_memory() and not self._fits(normals.size, anomalous.size):
            self._fold()
        self._normals.add(normals)
        self._anomalous.add(anomalous)
        self._weights.add(weights)
        self._in_order = False
        self.adds += 1

    def normals(self) -> FloatArray:
        """Give the normal scores in memory ascending, sorted where they lie: void after the next `add`."""
        if not self._in_order:
            sort(self._normals.values())
            self._in_order = True
        return self._normals.values()

    def anomalous(self) -> tuple[FloatArray, Doubles]:
        """Give the anomalous scores in memory and their weights, as they came: void after the next `add`."""
        return self._anomalous.values(), self._weights.values()

    def histograms(self) -> list[Histogram]:
        """Give the histogram with all that came since; without one, a new one of either class that came."""
        if self.histogram and self._in_memory():
            self._fold()
        return [self.histogram] if self.histogram else self._new_histograms()

    def _in_memory(self) -> int:
        return self._normals.size + self._anomalous.size

    def _fits(self, normals: int, anomalous: int) -> bool:
        """Say whether there is room for so many more.

        A normal score is sorted where it lies, on a pile with some slack. An anomalous one brings its weight,
        is sorted together with it, and may become a step of a metric, for its own kind of defect and for all.
        A histogram needs a quarter of the budget for itself, but no steps.
        """
        normals, anomalous = normals + self._normals.size, anomalous + self._anomalous.size
        if self.histogram:
            return 5 * normals + 48 * anomalous <= self._budget * 3 // 4
        return 5 * normals + 128 * anomalous <= self._budget

    def _fold(self) -> None:
        """Move what is in memory into the histogram, which starts here if there is none yet."""
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
    """Values in one array that grows by a quarter when it is full: without a copy, where the system can."""

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
        except ValueError:  # somebody still looks at it: leave them what they see
            grown = np.zeros(size, self._array.dtype)
            grown[: self.size] = self._array[: self.size]
            self._array = grown

    def values(self) -> AnyArray:
        """Give a view of what is there now; while it is held, growing costs a copy."""
        return self._array[: self.size]


def sorted_anomalous(parts: Sequence[Scores]) -> tuple[FloatArray, Doubles]:
    """Give the anomalous scores in memory of all parts ascending, with their weights."""
    scores = np.concatenate([part.anomalous()[0] for part in parts])
    weights = np.concatenate([part.anomalous()[1] for part in parts])
    order = np.argsort(scores)
    return scores[order], weights[order]


def joint_histogram(parts: Sequence[Scores]) -> Histogram:
    """Give one histogram of all parts, of which one at least has one, in the first one's bins."""
    histograms = [histogram for part in parts for histogram in part.histograms()]
    return histograms[0] if len(histograms) == 1 else joined(histograms, parts[0].bins)


def sort(scores: FloatArray, threads: int = THREADS) -> None:
    """Sort (N,) scores in place: part them at their median, then sort either half on its own threads."""
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

    Chunk by chunk of the scores, so that the values between its ends stay in the cache, on all cores.
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
    above = _normals_above(np.arange(bins, -1, -1), ascending.size, bins)
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
    """Move ascending cuts, the first 0, down to where none is between equal scores; give each place once."""
    places = np.searchsorted(ascending, ascending[cuts])
    return places[first_of_each(places)]


def _thinned(histogram: Histogram, bins: int) -> Histogram:
    """Merge neighbours that share a bin of the normal scores and a bin of the anomalous scores.

    What fills a bin by itself stays alone, or it would swallow its neighbours, more with every thinning. The
    merged bin stands at its middle score by rank: a lower or upper end would move all normal scores the same
    way past the anomalous ones.
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
