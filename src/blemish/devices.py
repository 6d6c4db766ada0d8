"""Choose the device and the precision, count the cores, and tune memory allocation."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from blemish.errors import ConfigError

if TYPE_CHECKING:
    import torch

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
"""The precisions of training: Blemish's name to torch's name."""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_device(name: str) -> str:
    """Resolve "auto" to cuda or cpu; raise ConfigError for an unknown or unavailable device."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this torch sees no CUDA device; use --device cpu")
    return name


def choose_precision(name: str, device: str) -> torch.dtype:
    """Resolve "auto" to bfloat16 where the hardware accelerates it, otherwise to float32.

    Raises ConfigError for an unknown precision.
    """
    import torch

    if name in PRECISIONS:
        found: torch.dtype = getattr(torch, PRECISIONS[name])
        return found
    if name != "auto":
        raise ConfigError(f"unknown precision {name!r}; expected auto, {' or '.join(PRECISIONS)}")
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def busy_elsewhere(seconds: float = 0.1) -> float:
    """Measure how many of this process's cores other processes keep busy; 0.0 if the system does not say.

    seconds: how long to look.
    """
    if sys.platform != "linux":
        return 0.0
    before = _idle_ticks()
    time.sleep(seconds)
    after = _idle_ticks()
    shares = [
        1 - (after[core][0] - before[core][0]) / max(1, after[core][1] - before[core][1])
        for core in before.keys() & after.keys()
    ]
    return sum(shares)


def _idle_ticks() -> dict[int, tuple[int, int]]:
    """Return, for each core of this process, the ticks that it was idle, and all ticks."""
    found = {}
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        core = name.removeprefix("cpu")
        if name.startswith("cpu") and core.isdigit() and int(core) in os.sched_getaffinity(0):
            ticks = [int(field) for field in fields[:8]]
            found[int(core)] = ticks[3] + ticks[4], sum(ticks)
    return found


def keep_freed_memory() -> None:
    """Make glibc keep large freed buffers: returning them to the system takes a third of each step's time.

    Does nothing on systems without glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        for parameter, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 256 << 20)):
            mallopt(parameter, value)
