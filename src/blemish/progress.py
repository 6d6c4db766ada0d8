"""What a person sees while something long runs: one line that says how far, how fast, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

FORMAT = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


_silent = False


@contextmanager
def muted(really: bool) -> Iterator[None]:
    """Say nothing for a while: of several processes on one run, one speaks."""
    global _silent
    before, _silent = _silent, _silent or really
    try:
        yield
    finally:
        _silent = before


def say(text: str) -> None:
    """Tell the person at the terminal, on standard error, which is not the result."""
    if _silent:
        return
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A line that renews itself on a terminal, and a line every half minute in a log."""

    def __init__(self, title: str, total: int, *, done: int = 0, unit: str = "step") -> None:
        self.title, self.total, self.first, self.unit = title, total, done, unit
        self.live = sys.stderr.isatty()
        self.every = 0.2 if self.live else 30.0
        self.start = self.shown = time.monotonic()

    def show(self, done: int, note: str = "") -> None:
        """Say that `done` of the total are done, if it is time to say something."""
        now = time.monotonic()
        if _silent or (now - self.shown < self.every and done < self.total):
            return
        self.shown = now
        line = tqdm.format_meter(
            done,
            self.total,
            now - self.start,
            prefix=self.title,
            unit=self.unit,
            initial=self.first,
            ncols=100 if self.live else None,
            bar_format=FORMAT,
            postfix=note or None,
        )
        end = "\n" if done >= self.total or not self.live else ""
        print(f"\r\x1b[K{line}" if self.live else line, end=end, file=sys.stderr, flush=True)
