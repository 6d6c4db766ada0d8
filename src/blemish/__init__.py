"""Blemish finds defects on manufactured parts: from good images to a verdict, in milliseconds.

>>> import blemish
>>> model = blemish.load("bottle.blemish")  # doctest: +SKIP
>>> model.predict("part.png").label  # doctest: +SKIP
'ok'

Names are imported when they are first used, so that a PC without torch can judge images and help is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from blemish._version import __version__

if TYPE_CHECKING:
    from blemish.errors import BlemishError
    from blemish.evaluation.run import evaluate
    from blemish.inference.predictor import Predictor, load
    from blemish.training.run import train
    from blemish.types import Calibration, Evaluation, Region, Verdict

__all__ = [
    "BlemishError",
    "Calibration",
    "Evaluation",
    "Predictor",
    "Region",
    "Verdict",
    "__version__",
    "evaluate",
    "load",
    "train",
]

_ROOMS = {
    "BlemishError": "errors",
    "Calibration": "types",
    "Evaluation": "types",
    "Predictor": "inference.predictor",
    "Region": "types",
    "Verdict": "types",
    "evaluate": "evaluation.run",
    "load": "inference.predictor",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'blemish' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"blemish.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value
