"""The same training several times, over seeds and folds, and how much the result varies.

A trial is one training run and its evaluation. What has ended is not trained again, what was interrupted goes
on, so the same command is how a series is begun and how it is finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blemish import data
from blemish.data.folds import Fold, assign
from blemish.data.split import choose_test
from blemish.errors import ConfigError, DataError
from blemish.files import check_writable
from blemish.progress import say
from blemish.sweeps.local import beside
from blemish.sweeps.trial import Trial, one, refuse_other
from blemish.types import Evaluation


def plan(
    out: Path, seed: int, seeds: int, folds: int | None, folds_file: Path | None, fold_seed: int = 0
) -> list[Trial]:
    """Name the trials of a series: `seeds` seeds from `seed` on, and for each of them every fold.

    The folds are the same for every seed, so that what varies with the seed is the training. Raises
    ConfigError for a number that cannot be, and a file of folds without their number.
    """
    if seeds < 1:
        raise ConfigError(f"found {seeds} seeds; expected at least 1")
    if folds is not None and folds < 2:
        raise ConfigError(f"found {folds} folds; expected at least 2")
    if folds_file is not None and folds is None:
        raise ConfigError(f"found the file of folds {folds_file} without their number; expected both")
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
    trials: Sequence[Trial], root: Path, options: Mapping[str, Any], *, layout: str = "auto", jobs: int = 1
) -> list[tuple[Trial, Evaluation]]:
    """Train and evaluate every trial, `jobs` of them beside each other in processes of their own.

    options: what `training.train` takes, without out, seed, fold, layout and resume. A trial whose model file
    is there is evaluated only, one with a checkpoint goes on. The first error stops the others, and what has
    ended stays. Raises ModelFileError before anything is trained where a model file is of another run.
    """
    if jobs < 1:
        raise ConfigError(f"found {jobs} jobs; expected at least 1")
    samples = data.scan(root, layout)
    for trial in trials:
        check_writable(trial.out)
        dealt = samples if trial.fold is None else assign(samples, root, trial.fold)
        if not choose_test(dealt, root):
            raise DataError(f"{root} holds no test images; expected good and defective ones to evaluate on")
        if trial.out.exists():
            refuse_other(trial, root, options, layout)
    if min(jobs, len(trials)) > 1:
        return beside(trials, root, options, layout, min(jobs, len(trials)))
    results = []
    for number, trial in enumerate(trials):
        say(f"trial {number + 1} of {len(trials)}: {trial.out.name}")
        results.append((trial, one(trial, root, options, layout)))
    return results
