"""The results of a sweep: means and deviations over folds and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blemish.evaluation.run import COLUMNS
from blemish.files import write_whole
from blemish.sweeps.trial import Trial
from blemish.types import Evaluation, MetricRow


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
