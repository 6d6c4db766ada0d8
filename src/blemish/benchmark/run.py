"""Time models by the papers' protocol, several of them side by side.

The protocol (EfficientAD's supplement, followed by SuperSimpleNet): the input is already resized and on the
host; a run copies it to the device, computes, and copies the map and the score back. On a GPU, 1,000 warm-up
runs and 1,000 timed runs are made, five times; on a CPU, as many as fit a time limit.

Each row runs in a process of its own, so that no row has another's threads, memory or environment, and the
rows take turns: every round has a short burst of each. What slows the machine down thus slows all of them,
and ratios are computed within a round.
"""

from __future__ import annotations

import importlib
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from blemish.benchmark import machine, roofline
from blemish.benchmark.entries import Contender, open_contender
from blemish.benchmark.machine import Machine
from blemish.benchmark.roofline import Rate
from blemish.errors import BlemishError, ConfigError, StoppedError
from blemish.inference.choice import Choice
from blemish.inference.engines import Engine
from blemish.inference.predictor import Predictor
from blemish.progress import Report, silent, tell
from blemish.types import FloatArray

WARM_UP_SHARE = 0.1
"""Share of a burst's time for warming up."""

LATENCY_SHARE = 0.6
"""Share of a row's time for the latency; the rest is for the throughput."""

ENGINE_MODULES = {"torch": "pytorch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
"""Module of each backend's engine."""

KILLED = -9
"""Exit status of a process that the system killed."""


@dataclass(frozen=True)
class Plan:
    """How many runs are made, and of what."""

    threads: int
    rounds: int = 5
    warm_up: int = 1000
    """Runs before the timed ones in each round, within a tenth of its time."""
    runs: int = 1000
    """Timed runs in each round, within its time."""
    seconds: float = math.inf
    """Time limit for each row over all rounds; at least one warm-up run and one timed run are always made."""
    batch: int = 16
    """Images in each run that measures the throughput; 1: it is not measured."""


@dataclass(frozen=True)
class Burst:
    """A number of runs of one row, within a time limit."""

    batch: int
    warm_up: int
    runs: int
    seconds: float


@dataclass(frozen=True)
class Stream:
    """Judging files, with decoding and resizing, within a time limit."""

    seconds: float


@dataclass
class Timings:
    """The timings of one row: seconds of every run, round by round."""

    latency: list[list[float]] = field(default_factory=list)
    throughput: list[list[float]] = field(default_factory=list)
    """Those of runs on a whole batch; fewer rounds if they take long."""
    stream: list[float] = field(default_factory=list)
    """Seconds between one verdict on a file and the next."""
    memory: int | None = None
    """Largest number of bytes reserved by the framework during one run; on a CPU, bytes that the process
    gained since before the model was opened; None if unknown."""


@dataclass(frozen=True)
class Row:
    """One contender and its timings."""

    contender: Contender
    timings: Timings
    rate: Rate | None
    """The fastest matrix product in its precision, or None."""


@dataclass(frozen=True)
class Benchmark:
    """All rows of one benchmark; ratios are relative to the first."""

    machine: Machine
    plan: Plan
    rows: tuple[Row, ...]
    images: str
    """Where the images came from."""


Ask = Callable[[Burst | Stream], list[float]]
"""Makes one row run, and returns the seconds of each run."""


def run(
    contenders: Sequence[Contender], plan: Plan, paths: Sequence[Path] = (), *, report: Report = silent
) -> Benchmark:
    """Measure contenders side by side; raise what opening one of them raises.

    paths: images whose decoding and resizing is measured as well; without them, random numbers are the
    images.
    """
    if paths:
        for each in contenders:
            if not each.trained or each.network is not None:
                raise ConfigError(
                    f"--images with {each.name}, which cannot judge images; expected a model file"
                )
    timings = [Timings() for _ in contenders]
    rates: list[Rates] = []
    with ExitStack() as stack:
        asks: list[Ask] = []
        for contender, one in zip(contenders, timings, strict=True):
            tell(report, f"opening {contender.name}")
            ask, one.memory = stack.enter_context(worker(contender, plan, paths))
            asks.append(ask)
        pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), ignore_interrupts))
        for number in range(plan.rounds):
            tell(report, f"round {number + 1} of {plan.rounds}")
            take_turns(number, asks, timings, plan)
            rates.append(measure_rates(pool, [each.choice for each in contenders], plan.threads))
        for ask, one in zip(asks, timings, strict=True) if paths else ():
            one.stream = ask(Stream(plan.seconds))
    rows = [
        Row(contender, one, highest([each[rate_key(contender.choice)] for each in rates]))
        for contender, one in zip(contenders, timings, strict=True)
    ]
    source = f"{len(paths)} files" if paths else "random numbers"
    return Benchmark(machine.describe(), plan, tuple(rows), source)


def take_turns(number: int, asks: Sequence[Ask], timings: Sequence[Timings], plan: Plan) -> None:
    """Run a burst of every row in one round; the throughput is skipped while a row has used up its time."""
    each = plan.seconds / plan.rounds
    for ask, one in zip(asks, timings, strict=True):
        one.latency.append(ask(Burst(1, plan.warm_up, plan.runs, LATENCY_SHARE * each)))
    share = (1 - LATENCY_SHARE) * each
    for ask, one in zip(asks, timings, strict=True):
        spent = sum(map(sum, one.throughput))
        if plan.batch > 1 and (not one.throughput or spent < number * share):
            one.throughput.append(ask(Burst(plan.batch, plan.warm_up, plan.runs, share)))


def burst(
    engine: Engine, inputs: FloatArray, wanted: Burst, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Warm up, then return the seconds of each run, up to the number of runs or the time limit."""
    start = clock()
    for _ in range(wanted.warm_up):
        engine.run(inputs)
        if clock() - start >= WARM_UP_SHARE * wanted.seconds:
            break
    seconds: list[float] = []
    start = clock()
    for _ in range(wanted.runs):
        before = clock()
        engine.run(inputs)
        after = clock()
        seconds.append(after - before)
        if after - start >= (1 - WARM_UP_SHARE) * wanted.seconds:
            break
    return seconds


def judge(
    model: Predictor,
    paths: Sequence[Path],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Judge files over and over until the time limit; return the seconds from each verdict to the next.

    Raises ImageError for an unreadable file, which would take less time than a judged one.
    """
    start = clock()

    def again() -> Iterator[Path]:
        yield from paths
        while clock() - start < seconds < math.inf:
            yield from paths

    marks = [start]
    for outcome in model.stream(again()):
        if outcome.error is not None:
            raise outcome.error
        marks.append(clock())
    return [after - before for before, after in itertools.pairwise(marks)]


# --- a row in a process of its own ---


@contextmanager
def worker(contender: Contender, plan: Plan, paths: Sequence[Path]) -> Iterator[tuple[Ask, int | None]]:
    """Open a contender in a process of its own; yield a function that makes it run, and its bytes."""
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, contender, plan, paths), daemon=True)
    process.start()
    there.close()

    def exchange(wanted: Burst | Stream | None = None) -> Any:
        try:
            if wanted is not None:
                here.send(wanted)
            found = here.recv()
        except (EOFError, ConnectionError) as error:
            process.join()
            raise exit_error(contender.name, process.exitcode) from error
        if isinstance(found, BlemishError):
            raise found
        return found

    try:
        yield exchange, exchange()
    finally:
        here.close()
        process.join(5)
        process.terminate()
        process.join()


def exit_error(name: str, status: int | None) -> Exception:
    """Return the exception that explains why a row's process has ended."""
    if status != KILLED:
        return RuntimeError(f"the process of {name} ended with status {status}")
    return StoppedError(
        f"the process of {name} was killed, probably for lack of memory; try fewer rows or a smaller batch"
    )


def serve(connection: Connection, contender: Contender, plan: Plan, paths: Sequence[Path]) -> None:
    """Open one contender in this process and run it on request, until the parent closes the connection."""
    ignore_interrupts()
    try:
        importlib.import_module(f"blemish.inference.engines.{ENGINE_MODULES[contender.choice.backend]}")
        before = machine.resident()
        model = Predictor(contender.opened, contender.choice, plan.threads) if paths else None
        engine = model.engine if model else open_contender(contender, plan.threads)
        inputs = images(contender, plan.batch, model, paths)
        connection.send(memory(engine, inputs[:1], contender.choice, before))
        while True:
            wanted = connection.recv()
            if isinstance(wanted, Burst):
                connection.send(burst(engine, inputs[: wanted.batch], wanted))
            elif model is not None:
                connection.send(judge(model, paths, wanted.seconds))
    except BlemishError as error:
        connection.send(error)
    except (EOFError, ConnectionError):
        return


def ignore_interrupts() -> None:
    """Ignore Ctrl-C, which the parent handles by ending this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def images(contender: Contender, count: int, model: Predictor | None, paths: Sequence[Path]) -> FloatArray:
    """Return (count, 3, H, W) inputs: the files, repeated as needed, or random numbers in [0, 1)."""
    if model is not None:
        chosen = [paths[number % len(paths)] for number in range(count)]
        return np.concatenate([model.prepare(path).inputs for path in chosen])
    shape = (count, 3, *contender.image_size)
    return np.random.default_rng(0).random(shape, np.float32)


def memory(engine: Engine, inputs: FloatArray, choice: Choice, before: int | None) -> int | None:
    """Return the peak number of bytes of one run; before: the process's bytes before the model was opened."""
    engine.run(inputs)
    if choice.device == "cpu":
        if before is None or machine.resident() is None:
            return None
        engine.run(inputs)
        return max(0, machine.peak_resident() - before)
    if choice.backend != "torch":
        return None
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine.run(inputs)
    return int(torch.cuda.max_memory_reserved())


# --- the fastest matrix products ---

Rates = dict[tuple[str, str], Rate | None]
"""The fastest products by precision and device."""


def rate_key(choice: Choice) -> tuple[str, str]:
    """Return the parts of a choice that the speed of a matrix product depends on."""
    return choice.precision, choice.device


def measure_rates(pool: Executor, choices: Sequence[Choice], threads: int) -> Rates:
    """Measure the fastest matrix product for each precision and device, in another process."""
    each = {rate_key(choice): choice for choice in choices}
    return {name: pool.submit(roofline.fastest, choice, threads).result() for name, choice in each.items()}


def highest(rates: Sequence[Rate | None]) -> Rate | None:
    """Return the fastest of several rounds; the others were slowed down by something else on the machine."""
    return max((rate for rate in rates if rate), key=lambda rate: rate.flops, default=None)
