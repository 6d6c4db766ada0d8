"""Scores of good images, as calibration needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blemish.inference.predictor import Predictor
from blemish.progress import Progress
from blemish.types import FloatArray


def measure(model: Predictor, paths: Sequence[Path]) -> tuple[FloatArray, FloatArray]:
    """Give the (N, K) statistics and the (N,) largest map values of images, as calibration wants them.

    Raises ImageError for the first image that cannot be read: a threshold must not stand on the rest.
    """
    statistics, maxima = [], []
    progress = Progress("calibrating", len(paths), unit="image")
    for number, path in enumerate(paths):
        found = model.engine.run(model.prepare(path).inputs[None])
        statistics.append(found["statistics"][0])
        maxima.append(found["map"].max())
        progress.show(number + 1)
    width = len(model.calibration.statistics)
    return np.array(statistics, np.float32).reshape(-1, width), np.array(maxima, np.float32)
