"""One trial of a sweep: a training run and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blemish.data.folds import Fold
from blemish.errors import ModelFileError
from blemish.evaluation.run import evaluate
from blemish.inference import bundle
from blemish.inference.predictor import load
from blemish.progress import Report, Stop, never, silent, tell
from blemish.types import Evaluation

if TYPE_CHECKING:
    from blemish.training.request import TrainingRequest


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep."""

    seed: int
    fold: Fold | None
    """None: the data set's own split."""
    out: Path
    """The model file."""

    def request(self, base: TrainingRequest) -> TrainingRequest:
        """Return the request of this trial; base: what all trials have in common."""
        return replace(base, seed=self.seed, fold=self.fold, out=self.out)


def run_trial(
    trial: Trial, base: TrainingRequest, *, threads: int = 0, report: Report = silent, stop: Stop = never
) -> Evaluation:
    """Train and evaluate one trial; threads: those of the evaluation, 0 lets ONNX Runtime choose.

    A finished trial is evaluated and not trained again; an interrupted one is resumed.
    """
    if trial.out.exists():
        tell(report, f"{trial.out} is already trained: evaluating it")
    else:
        from blemish.training import run
        from blemish.training.session import begun

        run.run(replace(trial.request(base), resume=begun(trial.out)), report=report, stop=stop)
    with load(trial.out, threads=threads) as model:
        return evaluate(model, base.data, layout=base.layout, exhibits=0, report=report, stop=stop)


def refuse_other(trial: Trial, base: TrainingRequest) -> None:
    """Raise ModelFileError for a model file of another run, as far as that is known without training.

    Device, precision, versions and photographs are not compared.
    """
    manifest = bundle.read(trial.out).manifest
    if text := difference(manifest.to_json(), expected(trial.request(base)), ""):
        raise ModelFileError(
            f"{trial.out} belongs to another run: {text}; delete it, or choose another --out"
        )


def expected(request: TrainingRequest) -> dict[str, Any]:
    """Return the part of a model file's manifest that is known before training."""
    from blemish.detectors import registry
    from blemish.detectors.settings import as_json
    from blemish.files import digest
    from blemish.training import fingerprint
    from blemish.training.length import Length
    from blemish.training.plan import drop_copies, find_copies, plan

    if len(registry.parts_of(request.model or "")) > 1:  # what else its parts must have is theirs to know
        return {"training": {"run": {"model": request.model, "seed": request.seed}}}
    planned = plan(request)
    planned = drop_copies(planned, find_copies(planned.parts))
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


def record(trial: Trial, evaluation: Evaluation) -> dict[str, Any]:
    """Return what a trial was, its figures, and the provenance of its model file."""
    fold = trial.fold
    dealt = fold and {"number": fold.index + 1, "count": fold.count, "seed": fold.seed, "file": fold.file}
    return {
        "out": trial.out,
        "seed": trial.seed,
        "fold": dealt,
        "data": evaluation.data,
        "rows": [asdict(row) for row in evaluation.rows],
        "skipped": evaluation.skipped,
        "provenance": evaluation.provenance,
    }
