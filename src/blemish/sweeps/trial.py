"""One trial of a sweep: a training run and its evaluation."""

from __future__ import annotations

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
        from blemish.training.session import remains

        request = trial.request(base)
        begun = bool(remains(trial.out, request.model))
        run.run(replace(request, resume=begun), report=report, stop=stop)
    with load(trial.out, threads=threads) as model:
        return evaluate(model, base.data, layout=base.layout, exhibits=0, report=report, stop=stop)


def refuse_other(trial: Trial, base: TrainingRequest) -> None:
    """Raise ModelFileError for a model file of another run, as far as that is known without training.

    Device, precision, versions and photographs are not compared.
    """
    from blemish.detectors import registry
    from blemish.training.expected import difference, expected
    from blemish.training.joining import expected_of_parts

    manifest, request = bundle.read(trial.out).manifest, trial.request(base)
    wanted = (expected_of_parts if registry.is_joined(request.model) else expected)(request)
    if text := difference(manifest.to_json(), wanted, ""):
        raise ModelFileError(
            f"{trial.out} belongs to another run: {text}; delete it, or choose another --out"
        )


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
