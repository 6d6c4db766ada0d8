"""The same training several times, over seeds and folds, and how much the result varies.

A trial is one training run and its evaluation. What has ended is not trained again, what was interrupted goes
on, so the same command is how a series is begun and how it is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, TextIO

from blemish import bundle, data
from blemish.data.folds import Fold, assign
from blemish.data.split import choose_test
from blemish.errors import ConfigError, DataError, ModelFileError, StoppedError
from blemish.evaluation import COLUMNS, evaluate
from blemish.files import check_writable, write_whole
from blemish.machine import cores
from blemish.progress import say
from blemish.runtime import load
from blemish.types import Evaluation, MetricRow

CORES_EACH = 4
"""Of a processor, for one trial among several."""
POLL_SECONDS = 0.5
"""Between questions whether the person asked to stop."""
KILLED = (
    "a process with a trial was killed, often for want of memory; the same command goes on, with fewer jobs"
)


@dataclass(frozen=True)
class Trial:
    """One training run of a series."""

    seed: int
    fold: Fold | None
    """None: the data set's own split."""
    out: Path
    """The model file."""


@dataclass(frozen=True)
class Spread:
    """A metric over several trials."""

    mean: float | None
    """None where it is not defined in one of them."""
    deviation: float | None
    """Of the sample, with the divisor n - 1. None where there is no mean, or one trial."""
    count: int


@dataclass(frozen=True)
class Summary:
    """What the trials of a series have in common, and how far they are apart."""

    results: tuple[tuple[Trial, Evaluation], ...]
    over_folds: dict[int, dict[str, Spread]]
    """By seed and field name of MetricRow; empty without folds."""
    over_seeds: dict[str, Spread]
    """By field name; with folds, of each seed's mean over its folds."""


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


def one(trial: Trial, root: Path, options: Mapping[str, Any], layout: str, threads: int = 0) -> Evaluation:
    """Train and evaluate one trial; threads: of the evaluation, 0 lets ONNX Runtime choose."""
    if trial.out.exists():
        say(f"{trial.out} has ended before: it is evaluated, not trained again")
    else:
        from blemish.training import train

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
    from blemish import preflight
    from blemish.detectors import as_json

    given = {key: options[key] for key in ("supervision", "train_defects", "train_masks") if key in options}
    labels = preflight.Labels(**given, fold=trial.fold)
    same = {key: options[key] for key in ("preset", "settings", "schedule", "start") if key in options}
    settled = preflight.settle(
        root, model=options["model"], layout=layout, labels=labels, seed=trial.seed, **same
    )
    config = settled.config
    made = {
        "model": settled.model,
        "preset": settled.preset,
        "seed": trial.seed,
        "config": as_json(config),
        "supervision": settled.supervision,
        "images": preflight.digest_samples(settled.samples),
        "from": preflight.digest_start(settled.start),
        "held_out": preflight.digest_all([sample.path for sample in settled.parts.held_out]),
    }
    if weights_file := options.get("weights_file"):
        made["pretrained"] = preflight.digest_all([Path(weights_file)])
    natural = options.get("natural_images", "drawn")
    if getattr(config, "penalty", False) and natural in ("drawn", "none"):
        made["natural_images"] = natural
    length = {key: options[key] for key in ("steps", "epochs") if options.get(key)}
    if not length and not options.get("budget"):
        usual = settled.length if settled.start else preflight.Length(config.steps, config.epochs)
        length = {"epochs": usual.epochs} if usual.epochs else {"steps": usual.steps}
    calibration = {key: options[key] for key in ("false_reject_rate",) if key in options}
    return {"training": {"run": made} | length, "calibration": calibration}


def difference(found: Any, wanted: Any, name: str) -> str:
    """Say the first thing that was wanted and is not found so; nothing where there is none."""
    if not isinstance(found, Mapping) or not isinstance(wanted, Mapping):
        return "" if found == wanted else f"its {name} is {found!s:.60}, not {wanted!s:.60}"
    each = (difference(found.get(key), value, f"{name} {key}".strip()) for key, value in wanted.items())
    return next(filter(None, each), "")


# --- several beside each other ---


def room(device: str) -> int:
    """Say how many trials run beside each other by default: one on a GPU, else one for every four cores."""
    from blemish.hardware import choose_device

    return 1 if choose_device(device) == "cuda" else max(1, cores() // CORES_EACH)


def beside(
    trials: Sequence[Trial], root: Path, options: Mapping[str, Any], layout: str, jobs: int
) -> list[tuple[Trial, Evaluation]]:
    """Run trials in spawned processes, which are told to stop when one fails or when the person asks."""
    from blemish.loop import stop_requests

    threads, others = max(1, cores() // jobs), active_children()
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), start_worker, (threads,))
    futures: list[Future[Evaluation]] = []
    ended: list[Future[Evaluation]] = []
    failure: BaseException | None = None
    with stop_requests() as stopping, pool:
        while len(ended) < len(trials) and failure is None and not stopping():
            # No more are submitted than run: what waits inside the pool cannot be called back.
            for trial in trials[len(futures) : len(ended) + jobs]:
                futures.append(pool.submit(apart, trial, root, options, layout, threads))
            wait([future for future in futures if not future.done()], POLL_SECONDS, FIRST_COMPLETED)
            ended = [future for future in futures if future.done()]
            failure = next(filter(None, (future.exception() for future in ended)), None)
        if len(ended) < len(futures):
            for process in set(active_children()) - set(others):
                process.terminate()
    if isinstance(failure, BrokenProcessPool):
        raise StoppedError(KILLED) from failure
    if failure is not None:
        raise failure
    if len(ended) < len(trials):
        raise StoppedError(f"stopped after {len(ended)} of {len(trials)} trials; the same command goes on")
    return [(trial, future.result()) for trial, future in zip(trials, futures, strict=True)]


def start_worker(threads: int) -> None:
    """Prepare a process for trials: with its share of threads, deaf between trials, gone with its parent."""
    import torch

    torch.set_num_threads(threads)
    if sys.platform != "win32":
        os.setpgrp()  # Ctrl-C reaches the parent alone, which passes it on, once
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait until the parent is gone, and go; a pool's processes would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def apart(trial: Trial, root: Path, options: Mapping[str, Any], layout: str, threads: int) -> Evaluation:
    """Run one trial in a process that others run beside, until it is told to stop."""

    def stop(number: int, frame: object) -> None:
        raise StoppedError(f"stopped {trial.out.name} outside its training")

    signal.signal(signal.SIGTERM, stop)  # in training, the loop hears the signal and keeps a checkpoint
    try:
        with contextlib.redirect_stderr(Labelled(sys.stderr, trial.out.stem)):
            return one(trial, root, options, layout, threads)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Labelled(io.StringIO):
    """A standard error whose lines begin with a name."""

    def __init__(self, target: TextIO, name: str) -> None:
        super().__init__()
        self.target, self.name, self.rest = target, name, ""

    def write(self, text: str) -> int:  # type: ignore[explicit-override]  # in Python from 3.12 on
        """Pass on every line that has ended."""
        *lines, self.rest = (self.rest + text).split("\n")
        self.target.writelines(f"{self.name}: {line}\n" for line in lines)
        self.target.flush()
        return len(text)


# --- summing up ---


def summarise(results: Sequence[tuple[Trial, Evaluation]]) -> Summary:
    """Give the mean and deviation of every metric of the whole test set, over folds and then over seeds."""
    rows: dict[int, list[MetricRow]] = {}
    for trial, evaluation in results:
        rows.setdefault(trial.seed, []).append(evaluation.rows[0])
    over_folds = {
        seed: {name: spread([getattr(row, name) for row in several]) for name in COLUMNS}
        for seed, several in rows.items()
    }
    over_seeds = {name: spread([one[name].mean for one in over_folds.values()]) for name in COLUMNS}
    folded = any(trial.fold is not None for trial, _ in results)
    return Summary(tuple(results), over_folds if folded else {}, over_seeds)


def spread(values: Sequence[float | None]) -> Spread:
    """Give the mean and the sample's standard deviation, where every value is defined."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Spread(None, None, len(values))
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), deviation, len(known))


def table(summary: Summary) -> str:
    """Lay the trials out for a terminal, with means and deviations below.

    A metric that no trial has gets no column; "-" stands for a figure that there is not.
    """
    entries = list(lines_of(summary))
    names = [name for name in COLUMNS if any(figures[name] is not None for _, figures in entries)]
    lines = [["trial", *(COLUMNS[name] for name in names)]]
    for title, figures in entries:
        values = (figures[name] for name in names)
        lines.append([title, *("-" if value is None else f"{value:.4f}" for value in values)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    widths[0] = -widths[0]  # the first column is aligned to the left
    layout = "  ".join(f"%{width}s" for width in widths)
    return "\n".join(layout % tuple(line) for line in lines)


def lines_of(summary: Summary) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the title and the figures, by field name, of each line of the table."""
    for seed, several in itertools.groupby(summary.results, lambda result: result[0].seed):
        for trial, evaluation in several:
            fold = f", fold {trial.fold.index + 1}" if trial.fold else ""
            yield f"seed {seed}{fold}", dataclasses.asdict(evaluation.rows[0])
        if seed in summary.over_folds:
            yield from two_lines(f"seed {seed}, {{}} over folds", summary.over_folds[seed])
    yield from two_lines("{} over seeds", summary.over_seeds)


def two_lines(title: str, spreads: Mapping[str, Spread]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the lines of means and of deviations."""
    yield title.format("mean"), {name: one.mean for name, one in spreads.items()}
    yield title.format("deviation"), {name: one.deviation for name, one in spreads.items()}


def write_json(summary: Summary, path: Path, options: Mapping[str, Any]) -> None:
    """Write every trial's figures, their means and deviations, and what was asked for.

    options: those of `run`. What is not defined is null; folds count from 1.
    """
    record = {
        "options": dict(options),
        "trials": [trial_record(trial, evaluation) for trial, evaluation in summary.results],
        "over_folds": [
            {"seed": seed, "metrics": {name: dataclasses.asdict(one) for name, one in spreads.items()}}
            for seed, spreads in summary.over_folds.items()
        ],
        "over_seeds": {name: dataclasses.asdict(one) for name, one in summary.over_seeds.items()},
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    # A file name need not be UTF-8; Python holds such bytes as lone surrogates, which become \udc.. here.
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def trial_record(trial: Trial, evaluation: Evaluation) -> dict[str, Any]:
    """Write a trial down: which it was, what it came to, and what its model file says of itself."""
    fold = trial.fold
    return {
        "out": trial.out,
        "seed": trial.seed,
        "fold": fold
        and {"number": fold.index + 1, "count": fold.count, "seed": fold.seed, "file": fold.file},
        "data": evaluation.data,
        "rows": [dataclasses.asdict(row) for row in evaluation.rows],
        "skipped": evaluation.skipped,
        "provenance": evaluation.provenance,
    }
