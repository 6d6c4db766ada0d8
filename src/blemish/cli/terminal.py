"""Show progress, messages and warnings of a running command, and handle requests to stop it."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from blemish.progress import Event

FORMAT = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
LIVE_SECONDS, LOG_SECONDS = 0.2, 30.0
"""Seconds between updates of a progress line on a terminal, and between lines in a log."""


class Line:
    """The progress of one phase: a line updated in place on a terminal, or a new line every half minute."""

    def __init__(self, title: str, first: Event, *, live: bool) -> None:
        self.title, self.live, self.initial = title, live, first.step
        self.every = LIVE_SECONDS if live else LOG_SECONDS
        self.start = self.shown = time.monotonic()

    def show(self, event: Event) -> None:
        """Show the progress of an event if an update is due or the phase has ended."""
        now, ended = time.monotonic(), event.step >= event.steps
        if now - self.shown < self.every and not ended:
            return
        self.shown = now
        line = tqdm.format_meter(
            event.step,
            event.steps,
            now - self.start,
            prefix=self.title,
            unit=event.unit,
            initial=self.initial,
            ncols=100 if self.live else None,
            bar_format=FORMAT,
            postfix=", ".join(f"{name} {value:.3f}" for name, value in event.losses.items()) or None,
        )
        end = "\n" if ended or not self.live else ""
        print(f"\r\x1b[K{line}" if self.live else line, end=end, file=sys.stderr, flush=True)


class Terminal:
    """Shows events on standard error, so that standard output holds only results."""

    def __init__(self, *, progress: bool = True) -> None:
        """Show messages and, unless `progress` is false, progress."""
        self.progress = progress
        self.lines: dict[tuple[str, str], Line] = {}

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if event.message:
            clear = cleared() if any(line.live for line in self.lines.values()) else ""
            message = f"{event.source}: {event.message}" if event.source else event.message
            print(f"{clear}{message}", file=sys.stderr)
        if not (self.progress and event.steps):
            return
        name = event.source, event.phase
        if name not in self.lines:
            title = f"{event.source}: {event.phase}" if event.source else event.phase
            self.lines[name] = Line(title, event, live=not event.source and sys.stderr.isatty())
            if event.step < event.steps:
                return
        self.lines[name].show(event)
        if event.step >= event.steps:
            del self.lines[name]


def cleared() -> str:
    """Return what clears an unfinished line of progress, before something else is printed; "" in a log."""
    return "\r\x1b[K" if sys.stderr.isatty() else ""


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Show the library's warnings and errors from its log on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{cleared()}blemish: %(message)s"))
    logger = logging.getLogger("blemish")
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C or SIGTERM has come; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def request(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
