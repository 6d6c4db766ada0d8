"""Progress events of long tasks, and requests to stop them.

The library prints nothing and handles no signals. A task passes events to `report` and polls `stop` between
steps; what these callables do is up to the caller, who may be on another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from blemish.errors import StoppedError


@dataclass(frozen=True)
class Event:
    """One event of a running task: progress, a message, or both."""

    phase: str = ""
    """Name of the current phase, such as "encoding" or "training"; empty for a message alone."""
    step: int = 0
    """Number of steps completed."""
    steps: int = 0
    """Number of steps in the phase; 0 if there is no progress to show."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Loss terms of the latest training step by name, and their sum as "loss"."""
    message: str = ""
    """One sentence for the user."""
    unit: str = "step"
    """What one step processes, such as an image or a layer."""
    source: str = ""
    """Name of the task if several run in parallel, otherwise empty."""


Report = Callable[[Event], None]
Stop = Callable[[], bool]
Item = TypeVar("Item")


def silent(event: Event) -> None:
    """Ignore the event: the default for `report`."""


def never() -> bool:
    """Return False: the default for `stop`."""
    return False


def tell(report: Report, message: str) -> None:
    """Report an event that consists of a message alone."""
    report(Event(message=message))


def tracked(
    items: Iterable[Item],
    total: int,
    report: Report,
    phase: str,
    *,
    unit: str = "image",
    stop: Stop = never,
) -> Iterator[Item]:
    """Yield items, and report the phase's progress before the first item and after each one.

    Raises StoppedError before an item once `stop` returns true.
    """
    report(Event(phase, 0, total, unit=unit))
    for number, item in enumerate(items, 1):
        if stop():
            raise StoppedError(
                f"stopped while {phase} ({unit} {number} of {total}); run the same command again"
            )
        yield item
        report(Event(phase, number, total, unit=unit))
