"""The parser, and options and conversions that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from blemish.errors import ConfigError

Command = Callable[[argparse.Namespace], int]


BUSY = 0.5
"""Cores that others keep busy, from which on threads of a training sleep while they wait."""
RATE_HELP = "accepted share of good parts that are called defective (0.01)"
DEFECT_HELP = "shorter side of the smallest defect that must be found, in pixels of the image"


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:  # type: ignore[explicit-override]  # in Python from 3.12 on
        """Exit with status 2 and a message that refers to --help."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def gigabytes(count: float) -> int:
    """Convert gigabytes to bytes; raise ConfigError for an invalid number."""
    if not 0 <= count < 2**20:
        raise ConfigError(f"memory {count:g}: expected gigabytes, 0 or more")
    return int(count * 2**30)


def check_outputs(*files: Path | None, folders: Sequence[Path | None] = ()) -> None:
    """Check before any work starts that outputs can be written; raise OutputError."""
    from blemish.files import check_folder, check_writable

    for file in files:
        if file is not None:
            check_writable(file)
    for folder in folders:
        if folder is not None:
            check_folder(folder)


def settings(texts: Sequence[str]) -> dict[str, str]:
    """Parse settings written as KEY=VALUE; raise ConfigError for any other form."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE")
        found[key] = value
    return found


def chosen_settings(texts: Sequence[str], image_size: str | None) -> dict[str, str]:
    """Return the settings given by --set, and by --image-size, which counts more."""
    return settings(texts) | ({"image_size": image_size} if image_size else {})


def add_length(sub: argparse.ArgumentParser, *, epochs_help: str) -> None:
    """Declare the options for the length of a training run."""
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="number of optimiser steps")
    length.add_argument("--epochs", type=int, metavar="N", help=epochs_help)
    length.add_argument(
        "--budget", metavar="TIME", help="wall-clock time for the whole run, such as 90s, 10m or 2h"
    )


def add_machine(sub: argparse.ArgumentParser) -> None:
    """Declare the options for the seed, the device, memory and resuming."""
    sub.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed; the same seed gives the same weights (0)",
    )
    sub.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    sub.add_argument("--precision", default="auto", help="auto (default), fp32 or bf16")
    sub.add_argument(
        "--memory",
        type=float,
        default=4.0,
        metavar="GB",
        help="memory for decoded images, and as much again for features (4)",
    )
    sub.add_argument(
        "--cache",
        default="auto",
        metavar="DIR",
        help="feature cache: auto (default), off, or a folder to share among runs",
    )
    sub.add_argument("--resume", action="store_true", help="continue from the checkpoint beside --out")


def share_cores() -> None:
    """Let waiting OpenMP threads sleep if other processes keep cores busy, unless the user has chosen.

    Alone, threads that spin while they wait are faster. In company they take cores from others, for which
    they then have to wait. Must be called before torch is loaded.
    """
    from blemish.devices import busy_elsewhere

    if "OMP_WAIT_POLICY" not in os.environ and busy_elsewhere() >= BUSY:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def add_light_limit(sub: argparse.ArgumentParser, default: float | None) -> None:
    """Declare the option for the light p-value that is reviewed."""
    sub.add_argument(
        "--light-limit",
        type=float,
        default=default,
        metavar="P",
        help="review parts with a light p-value of P or less (with --light standardise only; 0: off)",
    )


def add_layout(sub: argparse.ArgumentParser) -> None:
    """Declare the option for the layout of a data set."""
    sub.add_argument(
        "--layout", default="auto", help="auto (default), csv, folder, mvtec, loco, visa, ksdd2 or sensum"
    )
