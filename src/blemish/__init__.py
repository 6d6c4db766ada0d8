"""Blemish finds defects on manufactured parts: train on good images, judge new ones in milliseconds.

>>> import blemish
>>> model = blemish.load("bottle.blemish")  # doctest: +SKIP
>>> model.predict("part.png").label  # doctest: +SKIP
'ok'

Names are imported on first use, so that a PC without torch can judge images and `--help` is instant.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a host program decides what is shown

if TYPE_CHECKING:
    from blemish.errors import BlemishError
    from blemish.evaluation.run import evaluate
    from blemish.exporting.pipeline import export
    from blemish.inference.predictor import Outcome, Predictor, load
    from blemish.inference.recalibration import calibrate
    from blemish.progress import Event
    from blemish.training.advice import check
    from blemish.training.request import TrainingRequest
    from blemish.training.run import train
    from blemish.types import Calibration, Evaluation, Region, Verdict

__all__ = [
    "BlemishError",
    "Calibration",
    "Evaluation",
    "Event",
    "Outcome",
    "Predictor",
    "Region",
    "TrainingRequest",
    "Verdict",
    "__version__",
    "calibrate",
    "check",
    "evaluate",
    "export",
    "load",
    "train",
]

_HOMES = {
    "BlemishError": "errors",
    "Calibration": "types",
    "Evaluation": "types",
    "Event": "progress",
    "Outcome": "inference.predictor",
    "Predictor": "inference.predictor",
    "Region": "types",
    "TrainingRequest": "training.request",
    "Verdict": "types",
    "calibrate": "inference.recalibration",
    "check": "training.advice",
    "evaluate": "evaluation.run",
    "export": "exporting.pipeline",
    "load": "inference.predictor",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'blemish' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"blemish.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
