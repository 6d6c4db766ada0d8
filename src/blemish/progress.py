"""How a long task reports on itself and is asked to stop.

The library prints nothing and handles no signals. A task calls `report` with events and asks `stop` between
two steps; what they do is up to the caller, who may be on another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar


@dataclass(frozen=True)
class Event:
    """One report of a running task: progress, a message, or both."""

    phase: str = ""
    """What is being done, such as "encoding" or "training"; empty for a message alone."""
    step: int = 0
    """Steps done so far."""
    steps: int = 0
    """Steps of the whole phase; 0 where there is no progress to show."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """The loss terms of the last training step, by name, and their sum as "loss"."""
    message: str = ""
    """One sentence for the user."""
    unit: str = "step"
    """What a step is: a step, an image, a layer."""
    source: str = ""
    """Which of several parallel tasks reports; empty for a single one."""


Report = Callable[[Event], None]
Stop = Callable[[], bool]
Item = TypeVar("Item")


def silent(event: Event) -> None:
    """Ignore an event."""


def never() -> bool:
    """Never ask to stop."""
    return False


def tell(report: Report, message: str) -> None:
    """Report a message."""
    report(Event(message=message))


def tracked(
    items: Iterable[Item], total: int, report: Report, phase: str, *, unit: str = "image"
) -> Iterator[Item]:
    """Yield items, reporting the phase's progress before the first and after each of them."""
    report(Event(phase, 0, total, unit=unit))
    for number, item in enumerate(items, 1):
        yield item
        report(Event(phase, number, total, unit=unit))
