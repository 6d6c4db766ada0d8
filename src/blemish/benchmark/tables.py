"""A benchmark as tables and as JSON, beside the published figures. Pure except for writing the file."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from blemish import files
from blemish.benchmark.machine import Machine
from blemish.benchmark.run import Benchmark, Row
from blemish.tables import aligned

MILLISECONDS = ("mean_ms", "deviation_ms", "median_ms", "p99_ms")

STREAM = "Including decoding, resizing and the verdict, with the next files read ahead:"

WORK = "Work, and the shortest possible time at the speed of this machine's fastest matrix product:"


def table(found: Benchmark) -> str:
    """Format a benchmark for a terminal: machine, times, what was computed, and the published figures."""
    parts = [machine_lines(found.machine, found.plan.threads), protocol(found), aligned(times(found))]
    if any(row.timings.stream for row in found.rows):
        parts.append(f"{STREAM}\n{aligned(streams(found))}")
    fastest = {row.contender.choice.precision: row.rate for row in found.rows if row.rate}
    by = [f"Peak in {name}: {rate.by}, measured in each round." for name, rate in fastest.items()]
    parts.append("\n".join([WORK, aligned(work(found)), *by]))
    sources, (columns, *lines) = published()
    parts.append(f"{sources}\n{aligned([columns, *([cell or '-' for cell in line] for line in lines)])}")
    return "\n\n".join(parts)


def machine_lines(machine: Machine, threads: int) -> str:
    """Describe the machine in three lines."""
    memory = f"{machine.memory / 2**30:.0f} GiB memory" if machine.memory else "memory unknown"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return (
        f"{machine.processor}: {' '.join(machine.instructions) or 'instructions unknown'}\n"
        f"{machine.cores} cores, {threads} threads used, {memory}, GPU: {', '.join(machine.gpus) or 'none'}\n"
        f"{machine.system}, {versions}"
    )


def protocol(found: Benchmark) -> str:
    """Describe what was timed, and in how many runs."""
    plan = found.plan
    limit = "" if plan.seconds == math.inf else f", within {plan.seconds:g} s per row"
    turns = "The rows take turns, each in its own process.\n" if len(found.rows) > 1 else ""
    return (
        f"Inputs ({found.images}) are resized and on the host; a run copies them in, computes, and copies "
        "map and score back.\n"
        f"{plan.rounds} rounds, up to {plan.warm_up} warm-up and {plan.runs} timed runs per round"
        f"{limit}.\n{turns}"
        "ms and sd: mean and standard deviation of the rounds' means; median and p99: of all runs."
    )


def times(found: Benchmark) -> list[list[str]]:
    """Return the table of latency and throughput, and of ratios to the first row."""
    against = len(found.rows) > 1
    head = ["row", "input", "ms", "sd", "median", "p99", "runs"]
    throughput = [f"images/s at {found.plan.batch}"] * (found.plan.batch > 1)
    lines = [head + throughput + ["speed-up (min to max)"] * against]
    for row in found.rows:
        one = figures(row, found.plan.batch)
        height, width = row.contender.image_size
        line = [row.contender.name, f"{height}x{width}", *(f"{one[name]:.2f}" for name in MILLISECONDS)]
        line += [str(one["runs"]), *(shown(one["images_per_second"], ".1f") for _ in throughput)]
        if against:
            line.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio(found.rows[0], row)))
        lines.append(line)
    return lines


def streams(found: Benchmark) -> list[list[str]]:
    """Return the table of files judged from disk."""
    lines = [["row", "ms", "median", "p99", "files", "images/s"]]
    for row in found.rows:
        seconds = row.timings.stream
        mean, median, high = statistics.fmean(seconds), np.median(seconds), np.percentile(seconds, 99)
        values = [f"{1000 * value:.2f}" for value in (mean, median, high)]
        lines.append([row.contender.name, *values, str(len(seconds)), f"{1 / mean:.1f}"])
    return lines


def work(found: Benchmark) -> list[list[str]]:
    """Return the table of parameters, FLOPs, memory and roofline."""
    head = ["row", "M parameters", "GFLOP", "GFLOP unfused", "MB", "GFLOP/s", "peak GFLOP/s"]
    lines = [[*head, "ms at peak", "of peak"]]
    for row in found.rows:
        one = figures(row, found.plan.batch)
        line = [row.contender.name]
        for name, scale, form in (
            ("parameters", 1e6, ".2f"),
            ("flops", 1e9, ".1f"),
            ("plain_flops", 1e9, ".1f"),
            ("memory", 1e6, ".0f"),
            ("flops_per_second", 1e9, ".0f"),
            ("fastest_flops_per_second", 1e9, ".0f"),
            ("shortest_ms", 1, ".2f"),
            ("reached", 0.01, ".0f"),
        ):
            line.append(shown(one[name], form, scale) + (" %" if name == "reached" and one[name] else ""))
        lines.append(line)
    return lines


def figures(row: Row, batch: int) -> dict[str, Any]:
    """Return the figures of a row; None for what was not measured."""
    rounds, every = row.timings.latency, [second for one in row.timings.latency for second in one]
    means = [1000 * statistics.fmean(one) for one in rounds]
    median = float(np.median(every))
    batches = [second for one in row.timings.throughput for second in one]
    done, rate = row.contender.work, row.rate
    return {
        "mean_ms": statistics.fmean(means),
        "deviation_ms": statistics.stdev(means) if len(means) > 1 else 0.0,
        "median_ms": 1000 * median,
        "p99_ms": 1000 * float(np.percentile(every, 99)),
        "runs": len(every),
        "images_per_second": batch * len(batches) / sum(batches) if batches else None,
        "batch_runs": len(batches),
        "parameters": done and done.parameters,
        "flops": done and done.flops,
        "plain_flops": done and done.plain_flops,
        "memory": row.timings.memory,
        "flops_per_second": done and done.flops / median,
        "fastest_flops_per_second": rate and rate.flops,
        "fastest_product": rate and rate.by,
        "shortest_ms": 1000 * done.flops / rate.flops if done and rate else None,
        "reached": done.flops / rate.flops / median if done and rate else None,
    }


def ratio(first: Row, row: Row) -> tuple[float, float, float]:
    """Return how many times as fast as the first a row was: median, minimum and maximum over the rounds."""
    each = [
        statistics.median(one) / statistics.median(other)
        for one, other in zip(first.timings.latency, row.timings.latency, strict=True)
    ]
    return statistics.median(each), min(each), max(each)


def shown(value: float | None, form: str, scale: float = 1) -> str:
    """Format a number in units of a scale, or "-" if there is none."""
    return "-" if value is None else format(value / scale, form)


def published() -> tuple[str, list[list[str]]]:
    """Return the sources of the published figures, and the figures: a header, then a row for each method."""
    lines = (resources.files("blemish.benchmark") / "published.csv").read_text("utf-8").splitlines()
    sources = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    return "\n".join(sources), list(csv.reader(line for line in lines if not line.startswith("#")))


def write_json(found: Benchmark, path: Path) -> None:
    """Write everything: the machine, the plan, and the figures and all timings of each row."""
    _, ((_, *columns), *lines) = published()
    record = {
        "machine": found.machine,
        "plan": found.plan,
        "images": found.images,
        "rows": [row_record(found, row) for row in found.rows],
        "published": {
            name: {column: float(cell) if cell else None for column, cell in zip(columns, cells, strict=True)}
            for name, *cells in lines
        },
    }
    files.write_json(path, record)


def row_record(found: Benchmark, row: Row) -> dict[str, Any]:
    """Return everything about a row, as JSON values."""
    middle, least, greatest = ratio(found.rows[0], row)
    contender, timings = row.contender, row.timings
    return {
        "name": contender.name,
        "method": contender.opened.manifest.method,
        "config": contender.opened.manifest.config,
        "trained": contender.trained,
        "plain": contender.network is not None,
        "image_size": list(contender.image_size),
        **asdict(contender.choice),
        "figures": figures(row, found.plan.batch),
        "times_as_fast": {"median": middle, "least": least, "greatest": greatest},
        "latency_seconds": timings.latency,
        "throughput_seconds": timings.throughput,
        "stream_seconds": timings.stream,
    }
