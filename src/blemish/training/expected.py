"""What is known of a run's model file before it is trained: by this, a finished run is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blemish.detectors.settings import as_json
from blemish.files import digest
from blemish.training import fingerprint
from blemish.training.length import Length
from blemish.training.plan import drop_copies, find_copies, find_repeated, plan
from blemish.training.request import TrainingRequest


def expected(request: TrainingRequest) -> dict[str, Any]:
    """Return the part of a model file's manifest that is known before training."""
    planned = plan(request)
    planned = drop_copies(planned, find_copies(planned.parts))
    if planned.method.leaves_one_out:
        planned = drop_copies(planned, find_repeated(planned.parts), "others")
    config = planned.config
    made: dict[str, Any] = {
        "model": planned.model,
        "preset": planned.preset,
        "seed": request.seed,
        "config": as_json(config),
        "supervision": planned.supervision,
        "light": planned.light,
        "images": fingerprint.digest_samples(planned.samples),
        "from": fingerprint.digest_start(planned.start),
        "held_out": fingerprint.digest_all(digest(sample.path) for sample in planned.parts.held_out),
    }
    if request.weights is not None:
        made["pretrained"] = fingerprint.digest_all([digest(request.weights)])
    if config.reads_natural_images and request.natural_images in ("drawn", "none"):
        made["natural_images"] = request.natural_images
    training: dict[str, Any] = {"run": made}
    asked = request.length
    if asked.budget is None and planned.method.has_steps:
        usual = planned.length if planned.start else Length(config.steps, config.epochs)
        length = asked if asked != Length() else usual
        training |= {"epochs": length.epochs} if length.epochs else {"steps": length.steps}
    found: dict[str, Any] = {
        "training": training,
        "calibration": {"false_reject_rate": request.false_reject_rate},
    }
    return found if planned.light == "off" else found | {"light_calibration": {"limit": request.light_limit}}


def difference(found: Any, wanted: Any, name: str) -> str:
    """Describe the first wanted value that differs from the one found; "" if none does."""
    if not isinstance(found, Mapping) or not isinstance(wanted, Mapping):
        return "" if found == wanted else f"its {name} is {found!s:.60}, not {wanted!s:.60}"
    each = (difference(found.get(key), value, f"{name} {key}".strip()) for key, value in wanted.items())
    return next(filter(None, each), "")
