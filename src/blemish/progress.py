"""Progress events of long tasks, and requests to stop them.

The library prints nothing and handles no signals. A task passes events to `report` and polls `stop` between
steps; what these callables do is up to the caller, who may be on another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar


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
    items: Iterable[Item], total: int, report: Report, phase: str, *, unit: str = "image"
) -> Iterator[Item]:
    """Yield the items, reporting progress before the first and after each one."""
    report(Event(phase, 0, total, unit=unit))
    for number, item in enumerate(items, 1):
        yield item
        report(Event(phase, number, total, unit=unit))
