"""Run trials in parallel on this machine, in processes of their own."""

from __future__ import annotations

import logging
import logging.handlers
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context, parent_process
from typing import TYPE_CHECKING, Any

from blemish.devices import choose_device, cores
from blemish.errors import StoppedError
from blemish.progress import Event, Report, Stop
from blemish.sweeps.trial import Trial, run_trial
from blemish.types import Evaluation

if TYPE_CHECKING:
    from blemish.training.request import TrainingRequest

CORES_EACH = 4
"""CPU cores for each trial when several run in parallel."""
POLL_SECONDS = 0.2
"""Interval at which trials' reports and requests to stop are checked."""
GRACE_SECONDS = 60.0
"""Time that a trial has to write its checkpoint once it is asked to stop."""
KILLED = (
    "a process with a trial was killed, probably for lack of memory; "
    "run the same command again with fewer jobs to continue"
)


def default_jobs(device: str) -> int:
    """Return the default number of trials in parallel: one on a GPU, else one for every four cores."""
    return 1 if choose_device(device) == "cuda" else max(1, cores() // CORES_EACH)


def in_parallel(
    trials: Sequence[Trial], base: TrainingRequest, jobs: int, report: Report, stop: Stop
) -> list[tuple[Trial, Evaluation]]:
    """Run trials in spawned processes, which are asked to stop if one fails or `stop` returns true.

    Their events are reported here, with the trial's name as the source, and their warnings are logged. Raises
    StoppedError if trials are left to run, or the error of the trial that failed.
    """
    threads, spawn = max(1, cores() // jobs), get_context("spawn")
    said, stopping = spawn.SimpleQueue(), spawn.Event()
    pool = ProcessPoolExecutor(jobs, spawn, start_worker, (threads, said, stopping))
    workers: set[int] = set()
    futures: list[Future[Evaluation]] = []
    ended: list[Future[Evaluation]] = []
    failure: BaseException | None = None
    with pool:
        try:
            while len(ended) < len(trials) and failure is None and not stop():
                # Only as many are submitted as can run: what waits inside the pool cannot be cancelled.
                for trial in trials[len(futures) : len(ended) + jobs]:
                    futures.append(pool.submit(run_in_worker, trial, base))
                wait([future for future in futures if not future.done()], POLL_SECONDS, FIRST_COMPLETED)
                workers |= pass_on(said, report)
                ended = [future for future in futures if future.done()]
                failure = next(filter(None, (future.exception() for future in ended)), None)
            stopping.set()
            deadline = time.monotonic() + GRACE_SECONDS
            while not all(future.done() for future in futures) and time.monotonic() < deadline:
                wait(futures, POLL_SECONDS)
                workers |= pass_on(said, report)
        finally:  # of what is left after the grace, and at once after an exception, such as a second Ctrl-C
            if not all(future.done() for future in futures):
                for process in active_children():
                    if process.pid in workers:
                        process.terminate()
    pass_on(said, report)
    if isinstance(failure, BrokenProcessPool):
        raise StoppedError(KILLED) from failure
    if failure is not None:
        raise failure
    done = sum(future.exception() is None for future in futures)  # some may have ended after the request
    if done < len(trials):
        raise StoppedError(
            f"stopped after {done} of {len(trials)} trials; run the same command again to continue"
        )
    return [(trial, future.result()) for trial, future in zip(trials, futures, strict=True)]


def pass_on(said: Any, report: Report) -> set[int]:
    """Report the events and log the records that trials have sent; return the workers that have begun."""
    begun = set()
    while not said.empty():
        item = said.get()
        if isinstance(item, Event):
            report(item)
        elif isinstance(item, int):
            begun.add(item)
        else:
            logging.getLogger(item.name).handle(item)
    return begun


# --- in the process of a trial ---


@dataclass
class Worker:
    """The connection of a trial's process to its parent."""

    threads: int
    said: Any
    """Queue of events and log records."""
    stopping: Any
    """Set when the trial is to stop."""


_workers: list[Worker] = []
"""This process's own worker, if it is one: a pool passes its initialiser's arguments on in no other way."""


def start_worker(threads: int, said: Any, stopping: Any) -> None:
    """Prepare a process for trials: limit its threads, ignore Ctrl-C, and end with the parent."""
    import torch

    torch.set_num_threads(threads)
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches only the parent, which asks its trials to stop
    _workers.append(Worker(threads, said, stopping))
    said.put(os.getpid())
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Exit once the parent has ended: a pool's processes would otherwise wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_in_worker(trial: Trial, base: TrainingRequest) -> Evaluation:
    """Run one trial in this worker's process, until it ends or is asked to stop."""
    (worker,) = _workers
    name = trial.out.stem

    def report(event: Event) -> None:
        worker.said.put(replace(event, source=name))

    handler = PrefixedQueueHandler(worker.said, name)
    logger = logging.getLogger("blemish")
    logger.addHandler(handler)
    try:
        return run_trial(trial, base, threads=worker.threads, report=report, stop=worker.stopping.is_set)
    finally:
        logger.removeHandler(handler)


class PrefixedQueueHandler(logging.handlers.QueueHandler):
    """Puts log records into a queue, each message prefixed with a trial's name."""

    def __init__(self, queue: Any, name: str) -> None:
        super().__init__(queue)
        self.said, self.trial = queue, name

    def enqueue(self, record: logging.LogRecord) -> None:  # type: ignore[explicit-override]  # 3.12 on
        """Put a record into the queue."""
        record.msg = f"{self.trial}: {record.msg}"
        self.said.put(record)
