"""The results of a sweep: means and standard deviations over folds and seeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blemish import files
from blemish.evaluation.metric_table import METRICS
from blemish.sweeps.trial import Trial, record
from blemish.tables import aligned
from blemish.types import Evaluation, MetricRow

if TYPE_CHECKING:
    from blemish.training.request import TrainingRequest


@dataclass(frozen=True)
class Spread:
    """Mean and deviation of a metric over several trials."""

    mean: float | None
    """None if it is undefined in one of them."""
    deviation: float | None
    """Sample standard deviation, with the divisor n - 1. None without a mean, or with a single trial."""
    count: int


@dataclass(frozen=True)
class Summary:
    """The trials of a sweep, with their means and deviations."""

    results: tuple[tuple[Trial, Evaluation], ...]
    over_folds: dict[int, dict[str, Spread]]
    """By seed and field name of MetricRow; empty without folds."""
    over_seeds: dict[str, Spread]
    """By field name of MetricRow; with folds, over the seeds' means over folds."""


# --- summarising ---


def summarise(results: Sequence[tuple[Trial, Evaluation]]) -> Summary:
    """Return mean and deviation of every metric on the whole test set, over folds and then over seeds."""
    rows: dict[int, list[MetricRow]] = {}
    for trial, evaluation in results:
        rows.setdefault(trial.seed, []).append(evaluation.rows[0])
    over_folds = {
        seed: {name: spread([getattr(row, name) for row in several]) for name in METRICS}
        for seed, several in rows.items()
    }
    over_seeds = {name: spread([one[name].mean for one in over_folds.values()]) for name in METRICS}
    folded = any(trial.fold is not None for trial, _ in results)
    return Summary(tuple(results), over_folds if folded else {}, over_seeds)


def spread(values: Sequence[float | None]) -> Spread:
    """Return mean and sample standard deviation, if every value is defined."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Spread(None, None, len(values))
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), deviation, len(known))


def table(summary: Summary) -> str:
    """Format the trials as a table for a terminal, with means and deviations below.

    A metric that is undefined in all trials gets no column; "-" stands for an undefined figure.
    """
    entries = list(lines_of(summary))
    columns = {
        field: metric.column
        for field, metric in METRICS.items()
        if any(figures[field] is not None for _, figures in entries)
    }
    lines = [["trial", *columns.values()]]
    for title, figures in entries:
        values = (figures[field] for field in columns)
        lines.append([title, *("-" if value is None else f"{value:.4f}" for value in values)])
    return aligned(lines)


def lines_of(summary: Summary) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the title and the figures, by field name, of each row of the table."""
    for seed, several in itertools.groupby(summary.results, lambda result: result[0].seed):
        for trial, evaluation in several:
            fold = f", fold {trial.fold.index + 1}" if trial.fold else ""
            yield f"seed {seed}{fold}", asdict(evaluation.rows[0])
        if seed in summary.over_folds:
            yield from two_lines(f"seed {seed}, {{}} over folds", summary.over_folds[seed])
    yield from two_lines("{} over seeds", summary.over_seeds)


def two_lines(title: str, spreads: Mapping[str, Spread]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the row of means and the row of deviations."""
    yield title.format("mean"), {name: one.mean for name, one in spreads.items()}
    yield title.format("deviation"), {name: one.deviation for name, one in spreads.items()}


def write_json(summary: Summary, path: Path, request: TrainingRequest) -> None:
    """Write the figures of every trial, their means and deviations, and the options common to all trials.

    Undefined figures are null; folds are numbered from 1.
    """
    own = ("data", "out", "seed", "fold", "layout", "resume")
    options = {name: value for name, value in request.to_json().items() if name not in own}
    over_folds = [
        {"seed": seed, "metrics": {name: asdict(one) for name, one in spreads.items()}}
        for seed, spreads in summary.over_folds.items()
    ]
    files.write_json(
        path,
        {
            "options": options,
            "trials": [record(trial, evaluation) for trial, evaluation in summary.results],
            "over_folds": over_folds,
            "over_seeds": {name: asdict(one) for name, one in summary.over_seeds.items()},
        },
    )
