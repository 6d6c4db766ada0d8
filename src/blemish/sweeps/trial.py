"""One trial of a sweep: a training run and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blemish.data.folds import Fold
from blemish.errors import ModelFileError
from blemish.evaluation.run import evaluate
from blemish.inference import bundle
from blemish.inference.predictor import load
from blemish.progress import say
from blemish.types import Evaluation


@dataclass(frozen=True)
class Trial:
    """One training run of a series."""

    seed: int
    fold: Fold | None
    """None: the data set's own split."""
    out: Path
    """The model file."""


def one(trial: Trial, root: Path, options: Mapping[str, Any], layout: str, threads: int = 0) -> Evaluation:
    """Train and evaluate one trial; threads: of the evaluation, 0 lets ONNX Runtime choose."""
    if trial.out.exists():
        say(f"{trial.out} has ended before: it is evaluated, not trained again")
    else:
        from blemish.training.run import train

        begun = trial.out.with_name(trial.out.name + ".checkpoint").exists()
        train(root, out=trial.out, seed=trial.seed, fold=trial.fold, layout=layout, resume=begun, **options)
    return evaluate(load(trial.out, threads=threads), root, layout=layout, exhibits=0)


# --- what has ended before ---


def refuse_other(trial: Trial, root: Path, options: Mapping[str, Any], layout: str) -> None:
    """Refuse a model file that another run left, as far as can be told without training.

    Not compared are device, precision, versions, masks and natural images. Raises ModelFileError.
    """
    manifest = bundle.read(trial.out).manifest
    if text := difference(manifest, expected(trial, root, options, layout), ""):
        raise ModelFileError(f"{trial.out} is of another run, {text}; delete it, or choose another place")


def expected(trial: Trial, root: Path, options: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Give the part of a trial's manifest that is known before it is trained."""
    from blemish.detectors.settings import as_json
    from blemish.training import fingerprint, plan
    from blemish.training.length import Length

    given = {key: options[key] for key in ("supervision", "train_defects", "train_masks") if key in options}
    labels = plan.Labels(**given, fold=trial.fold)
    same = {key: options[key] for key in ("preset", "settings", "schedule", "start") if key in options}
    settled = plan.settle(root, model=options["model"], layout=layout, labels=labels, seed=trial.seed, **same)
    config = settled.config
    made = {
        "model": settled.model,
        "preset": settled.preset,
        "seed": trial.seed,
        "config": as_json(config),
        "supervision": settled.supervision,
        "images": fingerprint.digest_samples(settled.samples),
        "from": fingerprint.digest_start(settled.start),
        "held_out": fingerprint.digest_all([sample.path for sample in settled.parts.held_out]),
    }
    if weights_file := options.get("weights_file"):
        made["pretrained"] = fingerprint.digest_all([Path(weights_file)])
    natural = options.get("natural_images", "drawn")
    if getattr(config, "penalty", False) and natural in ("drawn", "none"):
        made["natural_images"] = natural
    length = {key: options[key] for key in ("steps", "epochs") if options.get(key)}
    if not length and not options.get("budget"):
        usual = settled.length if settled.start else Length(config.steps, config.epochs)
        length = {"epochs": usual.epochs} if usual.epochs else {"steps": usual.steps}
    calibration = {key: options[key] for key in ("false_reject_rate",) if key in options}
    return {"training": {"run": made} | length, "calibration": calibration}


def difference(found: Any, wanted: Any, name: str) -> str:
    """Say the first thing that was wanted and is not found so; nothing where there is none."""
    if not isinstance(found, Mapping) or not isinstance(wanted, Mapping):
        return "" if found == wanted else f"its {name} is {found!s:.60}, not {wanted!s:.60}"
    each = (difference(found.get(key), value, f"{name} {key}".strip()) for key, value in wanted.items())
    return next(filter(None, each), "")
