"""Trials in parallel on this machine, each in a process of its own."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, TextIO

from blemish.devices import cores
from blemish.errors import StoppedError
from blemish.sweeps.trial import Trial, one
from blemish.types import Evaluation

CORES_EACH = 4
"""Of a processor, for one trial among several."""

POLL_SECONDS = 0.5
"""Between questions whether the person asked to stop."""

KILLED = (
    "a process with a trial was killed, often for want of memory; the same command goes on, with fewer jobs"
)


# --- several beside each other ---


def room(device: str) -> int:
    """Say how many trials run beside each other by default: one on a GPU, else one for every four cores."""
    from blemish.devices import choose_device

    return 1 if choose_device(device) == "cuda" else max(1, cores() // CORES_EACH)


def beside(
    trials: Sequence[Trial], root: Path, options: Mapping[str, Any], layout: str, jobs: int
) -> list[tuple[Trial, Evaluation]]:
    """Run trials in spawned processes, which are told to stop when one fails or when the person asks."""
    from blemish.training.loop import stop_requests

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
