"""Start a run, or resume it from its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from blemish.detectors import registry
from blemish.errors import ConfigError
from blemish.progress import tell
from blemish.training import loop
from blemish.training.length import Length
from blemish.training.loop import Run


def checkpoint_path(out: Path, resume: bool) -> Path:
    """Return the checkpoint path of a run that writes `out`.

    Raises ConfigError if a checkpoint exists there, unless it is a file and `resume` is true.
    """
    path = out.with_name(out.name + ".checkpoint")
    if path.exists() and not (resume and path.is_file()):
        raise ConfigError(
            f"{path} belongs to an unfinished run: continue it with --resume, or delete the file"
        )
    return path


def part_path(out: Path, number: int) -> Path:
    """Return where part `number` of joined methods is kept until the run that writes `out` ends."""
    return out.with_name(f"{out.name}.part{number}")


def remains(out: Path, model: str | None) -> list[Path]:
    """Return what an unfinished run of a method that writes `out` has left to go on from.

    Of joined methods these are parts and their checkpoints, otherwise the checkpoint.
    """
    if not registry.is_joined(model):
        return [path for path in [checkpoint_path(out, resume=True)] if path.exists()]
    wanted = re.compile(re.escape(out.name) + r"\.part\d+(\.checkpoint)?")
    return sorted(path for path in out.parent.glob("*") if wanted.fullmatch(path.name))


def start_or_resume(
    run: Run,
    length: Length,
    resume: bool,
    reserve: Callable[[], float],
    prepare: Callable[[], None],
) -> None:
    """Prepare a new run, or resume it from its checkpoint.

    reserve: returns the seconds of a budget to keep for what follows training. prepare: measures what the
    first step needs.
    """
    for group in run.optimizer.param_groups:
        group["base_lr"] = group["lr"]
    if resume and run.path.is_file():
        loop.resume(run, length)
    else:
        if resume:
            tell(run.report, f"no checkpoint at {run.path}: starting a new run")
        prepare()
        run.steps = loop.count_steps(run, length, reserve() if length.budget else 0.0)
