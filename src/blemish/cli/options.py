"""What several commands share: the methods' names, options that recur, and how values are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from blemish.errors import ConfigError

Command = Callable[[argparse.Namespace], int]


RATE_HELP = "share of good parts that may be called defect (0.01)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:  # type: ignore[explicit-override]  # in Python from 3.12 on
        """Say what is wrong with the arguments, and where the right ones are listed."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def gigabytes(count: float) -> int:
    """Give bytes; raise ConfigError for a number that is none of memory."""
    if not 0 <= count < 2**20:
        raise ConfigError(f"memory {count:g}: expected gigabytes, 0 or more")
    return int(count * 2**30)


def refuse_outputs(*files: Path | None, folders: Sequence[Path | None] = ()) -> None:
    """Refuse places that could not be written, before work goes into what is to be written there."""
    from blemish.files import check_folder, check_writable

    for file in files:
        if file is not None:
            check_writable(file)
    for folder in folders:
        if folder is not None:
            check_folder(folder)


def settings(texts: Sequence[str]) -> dict[str, str]:
    """Read settings written as KEY=VALUE; raise ConfigError for what is not."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE")
        found[key] = value
    return found


def add_length(sub: argparse.ArgumentParser, *, epochs_help: str) -> None:
    """Declare how long a run trains."""
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    length.add_argument("--epochs", type=int, metavar="N", help=epochs_help)
    length.add_argument("--budget", metavar="TIME", help="wall time for everything, such as 90s, 10m or 2h")


def add_machine(sub: argparse.ArgumentParser) -> None:
    """Declare what a training run asks of the machine."""
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same weights (0)")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    sub.add_argument(
        "--memory", type=float, default=4.0, metavar="GB", help="for decoded and encoded images (4)"
    )
    sub.add_argument(
        "--cache", default="auto", metavar="DIR", help="keep encoded images there, or auto, or off"
    )
    sub.add_argument("--resume", action="store_true", help="go on from the checkpoint beside --out")


def add_layout(sub: argparse.ArgumentParser) -> None:
    """Declare the layout of a data set."""
    sub.add_argument("--layout", default="auto", help="auto, csv, folder, mvtec, loco, visa, ksdd2 or sensum")
