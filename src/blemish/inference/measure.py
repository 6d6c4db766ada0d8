"""Run images through a graph: where inputs become the statistics and maps that are judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from blemish.images import Preprocessing
from blemish.images.preprocessing import stacked
from blemish.inference.engines import Engine
from blemish.types import FloatArray


@dataclass(frozen=True)
class Measured:
    """The outputs of a graph for one image."""

    statistics: FloatArray
    """(K,), the statistics that the image score is computed from."""
    map: FloatArray
    """(h, w), the anomaly map."""
    parts: dict[str, FloatArray]
    """The maps that the map was combined from, if the method has several."""


def run(engine: Engine, preprocessing: Preprocessing, images: Sequence[FloatArray]) -> list[Measured]:
    """Run several images in one batch; each is given as its inputs (N, 3, h, w)."""
    found = engine.run(stacked(list(images)))
    measured, first = [], 0
    for inputs in images:
        rows = slice(first, first := first + len(inputs))
        merged = {name: preprocessing.merge(found[name][rows]) for name in ("map", *engine.outputs[2:])}
        statistics = preprocessing.merge_statistics(found["statistics"][rows])
        measured.append(Measured(statistics, merged.pop("map"), merged))
    return measured


def measure(
    engine: Engine, preprocessing: Preprocessing, images: Iterable[FloatArray]
) -> tuple[FloatArray, FloatArray]:
    """Return the (M, K) statistics and the (M,) largest map values of M images, one image at a time.

    Calibration needs these of the held-out good images, of which there must be at least one.
    """
    statistics, maxima = [], []
    for inputs in images:
        (found,) = run(engine, preprocessing, [inputs])
        statistics.append(found.statistics)
        maxima.append(found.map.max())
    return np.stack(statistics), np.array(maxima)
