"""The training loop, with checkpoints, a time budget, and stopping on request.

All random numbers depend on (seed, purpose, step) only, so a run that is killed and resumed ends with the
same bytes as one that was not.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from blemish import seeding
from blemish.data.loading.stores import EncodedStore
from blemish.detectors.base import Detector
from blemish.detectors.schedules import SCHEDULES
from blemish.errors import ConfigError, ModelFileError, StoppedError
from blemish.progress import Event, Report, Stop, never, silent, tell
from blemish.training import checkpoint, distributed
from blemish.training.length import Length
from blemish.types import Batch

HISTORY = 100
"""Points of the loss curve that a model file keeps."""

CHECKPOINT_SECONDS = 60.0

PROBE_SECONDS = 10.0

SETTLED = 100
"""Steps before which a detector's state on held-out images is not yet meaningful."""

CHECKPOINT_FIELDS = ("step", "steps", "seconds", "history", "pending", "notes")
"""Fields of a run that a checkpoint stores besides the parameters and the optimiser's state."""


class Steps(Protocol):
    """The batches of a run, by step."""

    per_epoch: int

    def at(self, step: int) -> Batch:
        """Return the batch of a step, on the device."""


@dataclass
class Run:
    """A training run in progress."""

    detector: Detector
    optimizer: torch.optim.Optimizer
    batches: Steps
    held_out: EncodedStore
    seed: int
    device: str
    dtype: torch.dtype
    path: Path
    """The checkpoint's path."""
    fingerprint: dict[str, Any]
    """What a run must have in common with an interrupted one in order to resume it."""
    report: Report = silent
    stop: Stop = never
    clock: float = dataclasses.field(default_factory=time.monotonic)
    """When `seconds` was last updated."""
    seconds: float = 0.0
    """Wall time spent, including that of earlier parts of an interrupted run."""
    step: int = 0
    steps: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    pending: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Losses since the last point of the history."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def save(self) -> None:
        """Write a checkpoint."""
        self.seconds, self.clock = self.seconds + time.monotonic() - self.clock, time.monotonic()
        if distributed.rank() > 0:
            return
        header = {name: getattr(self, name) for name in CHECKPOINT_FIELDS} | {"run": self.fingerprint}
        checkpoint.save(self.path, self.detector, self.optimizer, header)

    def restore(self, header: Mapping[str, Any]) -> None:
        """Restore the run from its checkpoint, whose header has been read."""
        for name in CHECKPOINT_FIELDS:
            setattr(self, name, header[name])
        checkpoint.load(self.path, self.detector, self.optimizer)


def one_step(run: Run, step: int) -> dict[str, float]:
    """Take one optimiser step and return its losses; raise ConfigError if the loss is not finite."""
    batch = dataclasses.replace(run.batches.at(step), progress=step / run.steps)
    factor = SCHEDULES[run.detector.config.schedule](batch.progress)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    draw = seeding.generator(run.seed, "step", step, device=run.device)
    with torch.autocast(run.device, run.dtype, enabled=run.dtype != torch.float32):
        terms = run.detector.loss(batch, draw)
    total = torch.stack(list(terms.values())).sum()
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    if limit := run.detector.config.clip_norm:
        parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, limit)
    run.optimizer.step()
    losses = {name: float(term.detach()) for name, term in terms.items()} | {"loss": float(total.detach())}
    if not np.isfinite(losses["loss"]):
        raise ConfigError(f"the loss became {losses['loss']} at step {step + 1}: lower the learning rate")
    return losses


def count_steps(run: Run, length: Length, reserve: float) -> int:
    """Convert a length to optimiser steps; a budget is measured on steps that are then undone.

    reserve: seconds of the budget to keep for what follows training. Raises ConfigError for a budget that is
    too small.
    """
    config = run.detector.config
    if length.budget is None:
        epochs = length.epochs or (0 if length.steps else config.epochs)
        return length.steps or (epochs * run.batches.per_epoch if epochs else config.steps)
    network, optimizer = copy.deepcopy(run.detector.state_dict()), copy.deepcopy(run.optimizer.state_dict())
    run.steps = 1 << 30  # progress stays near 0, at the schedule's start
    one_step(run, 0)
    begin, taken = time.monotonic(), 0
    probe = min(PROBE_SECONDS, 0.03 * length.budget)
    while taken < 2 or distributed.any_of(time.monotonic() - begin < probe, run.device):
        taken += 1
        one_step(run, taken)
    pace = (time.monotonic() - begin) / taken
    run.detector.load_state_dict(network)
    run.optimizer.load_state_dict(optimizer)
    left = length.budget - (time.monotonic() - run.clock) - reserve
    steps = distributed.first_of(int(left / pace), run.device)
    if steps < 20:
        raise ConfigError(
            f"a budget of {length.budget:g} s leaves {max(left, 0):.0f} s for training, and one step takes "
            f"{pace:.2f} s here; expected a budget of at least {length.budget - left + 20 * pace:.0f} s"
        )
    tell(
        run.report,
        f"one step takes {pace:.2f} s: {steps} steps fit the budget (to repeat this run: --steps {steps})",
    )
    return steps


def inspect(run: Run) -> None:
    """Let the detector inspect held-out images, and report its note."""
    draw = seeding.generator(run.seed, "inspect", run.step, device=run.device)
    if note := run.detector.inspect(run.held_out.entries(), draw):
        run.notes.append(f"at step {run.step}: {note}")
        tell(run.report, run.notes[-1])


def loop(run: Run) -> None:
    """Train from the run's step to its last, with checkpoints; raise StoppedError if asked to stop."""
    run.detector.train()
    run.report(Event("training", run.step, run.steps))
    point, twentieth = max(1, run.steps // HISTORY), max(1, run.steps // 20)
    saved = time.monotonic()
    while run.step < run.steps:
        losses = one_step(run, run.step)
        run.step += 1
        run.pending.append(losses)
        run.report(Event("training", run.step, run.steps, losses))
        if run.step % twentieth == 0 and run.step >= SETTLED:
            inspect(run)
        if run.step % point == 0 or run.step == run.steps:
            means = {name: float(np.mean([item[name] for item in run.pending])) for name in losses}
            run.history.append({"step": float(run.step)} | means)
            run.pending = []
        if distributed.any_of(run.stop(), run.device) and run.step < run.steps:
            run.save()
            raise StoppedError(
                f"stopped after step {run.step} of {run.steps}; checkpoint written to {run.path}; "
                "run the same command with --resume to continue"
            )
        if time.monotonic() - saved > CHECKPOINT_SECONDS or run.step == run.steps:
            run.save()
            saved = time.monotonic()
    run.detector.eval()


def resume(run: Run, length: Length) -> None:
    """Resume a run from its checkpoint; raise ModelFileError if that belongs to another run."""
    header = checkpoint.header(run.path)
    for key, value in run.fingerprint.items():
        if header["run"].get(key) != value:
            raise ModelFileError(
                f"{run.path} belongs to another run: its {key} is {header['run'].get(key)}, not {value}"
            )
    run.restore(header)
    epochs = None if length.epochs is None else length.epochs * run.batches.per_epoch
    for asked in (length.steps, epochs):
        if asked not in (None, run.steps):
            raise ModelFileError(f"{run.path} belongs to a run of {run.steps} steps; {asked} were asked for")
    tell(run.report, f"resuming from step {run.step} of {run.steps}")


def provenance(run: Run) -> dict[str, Any]:
    """Return the facts about a finished run that the model file records."""
    return {
        "pretrained": run.detector.pretrained_name,
        "steps": run.steps,
        "epochs": round(run.steps / run.batches.per_epoch, 2),
        "seconds": round(run.seconds, 1),
        "device": run.device,
        "threads": torch.get_num_threads(),
        "notes": run.notes,
        "history": run.history,
        "run": run.fingerprint,
    }
