"""What to compute on: device, precision, cores, and how memory is kept."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

from blemish.errors import ConfigError

if TYPE_CHECKING:
    import torch

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
"""What training computes in, by our name, and torch's name for it."""


def cores() -> int:
    """Count the processor's cores that this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_device(name: str) -> str:
    """Resolve "auto" to cuda or cpu; raise ConfigError for a device that this machine lacks."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this torch sees no CUDA device; use --device cpu")
    return name


def choose_precision(name: str, device: str) -> torch.dtype:
    """Resolve "auto" to bfloat16 where the device multiplies it faster than float32, else to float32."""
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


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed buffers: returning them at every step costs a third of the time.

    Does nothing on systems without glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        for parameter, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 256 << 20)):
            mallopt(parameter, value)
