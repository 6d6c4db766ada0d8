"""Start a run, or resume it from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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


def begun(out: Path) -> bool:
    """Return whether an unfinished run that writes `out` has left something to go on from."""
    remains = (out.name + ".checkpoint", out.name + ".part")
    return any(path.name.startswith(remains) for path in out.parent.glob("*"))


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
