"""The card that `gpu.py` runs on: its name, driver and software, and whether it is free."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from blemish.benchmark import machine

FIELDS = {
    "driver_version": "driver",
    "memory.total": "memory",
    "power.limit": "power_limit",
    "clocks.max.sm": "highest_clock",
    "utilization.gpu": "busy_before",
}
"""What is asked of nvidia-smi, and its name here."""


def describe(*, dry: bool) -> dict[str, Any]:
    """Describe the card, and its software; dry: there is none."""
    cudnn = None if dry else torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    about: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "card": "none: a dry run on the processor",
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "torch": str(torch.__version__),
        "machine": asdict(machine.describe()),
    }
    if dry:
        return about
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    others = smi("--query-compute-apps=pid", f"--id={number}")
    about["others_on_the_card"] = len([line for line in others if line.strip() != str(os.getpid())])
    told = smi(f"--query-gpu={','.join(FIELDS)}", f"--id={number}")
    values = [value.strip() for value in told[0].split(",")] if told else []
    about |= dict(zip(FIELDS.values(), values, strict=False))
    properties = torch.cuda.get_device_properties(0)
    about["card"] = properties.name
    about["capability"] = f"{properties.major}.{properties.minor}"
    about["memory_bytes"] = properties.total_memory
    return about


def smi(*asked: str) -> list[str]:
    """Return the lines that nvidia-smi answers; none where it is missing or fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--format=csv,noheader", *asked],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def command(out: Path) -> str:
    """Return the command line, with only the last part of the folder's name."""
    words = [out.name if word == str(out) else word for word in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/gpu.py", *words])
