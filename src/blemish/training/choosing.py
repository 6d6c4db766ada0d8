"""The choice of a method for a user who names none."""

from __future__ import annotations

from blemish import data
from blemish.detectors.registry import FIRST, LABELLED
from blemish.training.request import TrainingRequest


def choose(request: TrainingRequest) -> tuple[str, str]:
    """Return the method for a request, and for the user why it is that one.

    It depends on what the data offer: defects to learn from, or good images alone. Only folders and tables
    are read, no image.
    """
    defects = sum(
        sample.label == 1 and sample.split == "train" for sample in data.scan(request.data, request.layout)
    )
    if request.supervision != "none" and (defects or request.train_defects is not None):
        return LABELLED, f"model {LABELLED}: the one that learns from labelled defects"
    if request.steps is not None or request.epochs is not None:
        return LABELLED, f"model {LABELLED}: steps or epochs were given, and the default takes none"
    return FIRST, f"model {FIRST}: good images alone are remembered, without steps"
