"""A benchmark as tables and as JSON, with the published figures beside it: pure but for writing the file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from blemish.benchmark.machine import Machine
from blemish.benchmark.run import Benchmark, Row
from blemish.files import write_whole

PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "EfficientAD-S": (2.2, 614, None, None),
    "EfficientAD-M": (4.5, 269, 6.0, 204),
    "SuperSimpleNet": (None, None, 9.3, 269),
    "SimpleNet": (12, 194, 22.4, 95),
    "PatchCore": (32, 76, 54.1, 25),
    "FastFlow": (17, 120, 21.3, 320),
    "DSR": (17, 104, 18.4, 105),
    "AST": (53, 41, 57.9, 257),
    "S-T": (75, 16, None, None),
    "GCAD": (11, 121, None, None),
    "SegDecNet": (None, None, 4.4, 898),
    "DRA": (None, None, 8.3, 1814),
    "BGAD": (None, None, 46.7, 141),
    "PRN": (None, None, 25.4, 128),
    "DRAEM": (None, None, 12.4, 107),
}
"""By method: milliseconds and images a second on an RTX A6000, then on a Tesla V100S."""

MILLISECONDS = ("mean_ms", "deviation_ms", "median_ms", "p99_ms")

COLUMNS = ("A6000 ms", "A6000 images/s", "V100S ms", "V100S images/s")

SOURCES = (
    "PUBLISHED by others, on OTHER MACHINES: GPUs, half precision, latency at batch 1, throughput at 16.\n"
    "A6000: EfficientAD, WACV 2024. V100S: SuperSimpleNet, ICPR 2024. What is above was not measured there."
)

STREAM = "With decoding, resizing and the verdict, the next files being read meanwhile:"

WORK = "Work, and the shortest time in which the fastest matrix product of this machine could do it:"


def table(found: Benchmark) -> str:
    """Lay a benchmark out for a terminal: machine, times, what was computed, and the published figures."""
    parts = [machine_lines(found.machine, found.plan.threads), protocol(found), aligned(times(found))]
    if any(row.timings.stream for row in found.rows):
        parts.append(f"{STREAM}\n{aligned(streams(found))}")
    fastest = {row.contender.choice.precision: row.rate for row in found.rows if row.rate}
    by = [f"Fastest in {name}: {rate.by}, measured in each round." for name, rate in fastest.items()]
    parts.append("\n".join([WORK, aligned(work(found)), *by]))
    lines = [[name, *(shown(value, "g") for value in values)] for name, values in PUBLISHED.items()]
    parts.append(f"{SOURCES}\n{aligned([['method', *COLUMNS], *lines])}")
    return "\n\n".join(parts)


def machine_lines(machine: Machine, threads: int) -> str:
    """Describe the machine in three lines."""
    memory = f"{machine.memory / 2**30:.0f} GB memory" if machine.memory else "memory unknown"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return (
        f"{machine.processor}: {' '.join(machine.instructions) or 'instructions unknown'}\n"
        f"{machine.cores} cores, {threads} threads used, {memory}, GPU: {', '.join(machine.gpus) or 'none'}\n"
        f"{machine.system}, {versions}"
    )


def protocol(found: Benchmark) -> str:
    """Say how often what was run."""
    plan = found.plan
    limit = "" if plan.seconds == math.inf else f", within {plan.seconds:g} s a row"
    turns = "rows taking turns, each in a process of its own; " if len(found.rows) > 1 else ""
    return (
        f"Input ({found.images}) resized and on the host; copied, computed, map and score copied back.\n"
        f"{plan.rounds} rounds, {turns}at most {plan.warm_up} runs to warm up and {plan.runs} timed"
        f" in each{limit}.\n"
        "ms: mean of each round, their mean and deviation; median and 99th percentile of all runs."
    )


def times(found: Benchmark) -> list[list[str]]:
    """Give the lines of latency and throughput, and of ratios to the first row."""
    against = len(found.rows) > 1
    head = ["row", "input", "ms", "+-", "median", "p99", "runs"]
    throughput = [f"images/s at {found.plan.batch}"] * (found.plan.batch > 1)
    lines = [head + throughput + ["times as fast (over rounds)"] * against]
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
    """Give the lines of files judged from the disk."""
    lines = [["row", "ms", "median", "p99", "files", "images/s"]]
    for row in found.rows:
        seconds = row.timings.stream
        mean, median, high = statistics.fmean(seconds), np.median(seconds), np.percentile(seconds, 99)
        values = [f"{1000 * value:.2f}" for value in (mean, median, high)]
        lines.append([row.contender.name, *values, str(len(seconds)), f"{1 / mean:.1f}"])
    return lines


def work(found: Benchmark) -> list[list[str]]:
    """Give the lines of parameters, FLOPs, memory and roofline."""
    head = ["row", "M parameters", "GFLOP", "unfused", "MB", "GFLOP/s", "fastest"]
    lines = [[*head, "shortest ms", "reached"]]
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
    """Sum a row up; None for what was not measured."""
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
    """Say how many times as fast as the first a row was: median, least and greatest over the rounds."""
    each = [
        statistics.median(one) / statistics.median(other)
        for one, other in zip(first.timings.latency, row.timings.latency, strict=True)
    ]
    return statistics.median(each), min(each), max(each)


def shown(value: float | None, form: str, scale: float = 1) -> str:
    """Write a number in units of a scale, or "-" where there is none."""
    return "-" if value is None else format(value / scale, form)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Align columns, the first to the left and the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
    )


def write_json(found: Benchmark, path: Path) -> None:
    """Write everything: the machine, the plan, each row's figures and every run's seconds."""
    plan = asdict(found.plan)
    plan["seconds"] = None if found.plan.seconds == math.inf else found.plan.seconds
    record = {
        "machine": asdict(found.machine),
        "plan": plan,
        "images": found.images,
        "rows": [row_record(found, row) for row in found.rows],
        "published": {name: dict(zip(COLUMNS, values, strict=True)) for name, values in PUBLISHED.items()},
    }
    write_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def row_record(found: Benchmark, row: Row) -> dict[str, Any]:
    """Write a row down."""
    middle, least, greatest = ratio(found.rows[0], row)
    contender, timings = row.contender, row.timings
    return {
        "name": contender.name,
        "method": contender.opened.manifest["method"],
        "config": contender.opened.manifest["config"],
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
