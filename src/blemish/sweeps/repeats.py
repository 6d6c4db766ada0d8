"""Repeat a training over seeds and folds.

Finished trials are not trained again, and interrupted ones are resumed, so the same command starts a sweep
and completes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blemish import data
from blemish.data.folds import Fold, assign_fold
from blemish.data.split import choose_test
from blemish.errors import ConfigError, DataError
from blemish.files import check_writable
from blemish.progress import Report, Stop, never, silent, tell
from blemish.sweeps.local import in_parallel
from blemish.sweeps.trial import Trial, refuse_other, run_trial
from blemish.types import Evaluation

if TYPE_CHECKING:
    from blemish.training.request import TrainingRequest


def plan(
    out: Path, seed: int, seeds: int, folds: int | None, folds_file: Path | None, fold_seed: int = 0
) -> list[Trial]:
    """Return the trials of a sweep: `seeds` consecutive seeds from `seed` on, each with every fold.

    The folds are the same for every seed, so that only the training varies with the seed. Raises ConfigError
    for an invalid number, and for a file of folds without their number.
    """
    if seeds < 1:
        raise ConfigError(f"found {seeds} seeds; expected at least 1")
    if folds is not None and folds < 2:
        raise ConfigError(f"found {folds} folds; expected at least 2")
    if folds_file is not None and folds is None:
        raise ConfigError(f"found the file of folds {folds_file} without the number of folds; expected both")
    dealt: list[Fold | None] = [None]
    if folds is not None:
        dealt = [Fold(index, folds, fold_seed, folds_file) for index in range(folds)]
    trials = []
    for each in range(seed, seed + seeds):
        for fold in dealt:
            parts = [f"seed{each}"] * (seeds > 1) + ([f"fold{fold.index + 1}"] if fold else [])
            name = ".".join([out.stem, *parts]) + out.suffix
            trials.append(Trial(each, fold, out.with_name(name)))
    return trials


def run(
    trials: Sequence[Trial],
    base: TrainingRequest,
    *,
    jobs: int = 1,
    report: Report = silent,
    stop: Stop = never,
) -> list[tuple[Trial, Evaluation]]:
    """Train and evaluate every trial, `jobs` of them in parallel, each in a process of its own.

    base: what all trials have in common. A trial whose model file exists is only evaluated, and one with a
    checkpoint is resumed. The first error stops the other trials; finished ones are kept. Raises
    ModelFileError, before anything is trained, if a model file belongs to another run.
    """
    if jobs < 1:
        raise ConfigError(f"found {jobs} jobs; expected at least 1")
    root = base.data
    samples = data.scan(root, base.layout)
    for trial in trials:
        check_writable(trial.out)
        dealt = samples if trial.fold is None else assign_fold(samples, root, trial.fold)
        if not choose_test(dealt, root):
            raise DataError(f"{root} holds no test images; expected good and defective ones to evaluate on")
        if trial.out.exists():
            refuse_other(trial, base)
    if min(jobs, len(trials)) > 1:
        return in_parallel(trials, base, min(jobs, len(trials)), report, stop)
    results = []
    for number, trial in enumerate(trials):
        tell(report, f"trial {number + 1} of {len(trials)}: {trial.out.name}")
        results.append((trial, run_trial(trial, base, report=report, stop=stop)))
    return results
