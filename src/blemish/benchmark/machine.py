"""The machine of a measurement: processor, memory, GPU, versions. Imports nothing heavy."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from blemish import __version__
from blemish.devices import cores

INSTRUCTIONS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimddp", "bf16", "i8mm", "sve"),
)
"""Instruction sets that make matrix products fast, on x86 and on ARM, as named in /proc/cpuinfo."""

PACKAGES = ("torch", "onnxruntime", "openvino", "numpy")


@dataclass(frozen=True)
class Machine:
    """A machine and its software."""

    processor: str
    instructions: tuple[str, ...]
    """Those of INSTRUCTIONS that it has, if the system reports them."""
    cores: int
    """Number that this process may use."""
    memory: int
    """Bytes; 0 if the system does not report them."""
    gpus: tuple[str, ...]
    system: str
    versions: dict[str, str]
    """Those of Blemish, Python and the installed PACKAGES."""


def describe() -> Machine:
    """Describe this machine."""
    facts = read("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", facts, re.M)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*: (.+)$", facts, re.M)).split())
    gpus = re.findall(
        r"^Model:\s*(.+)$", "\n".join(map(read, Path("/proc/driver/nvidia/gpus").glob("*/information"))), re.M
    )
    return Machine(
        processor=names[0].strip() if names else platform.processor() or platform.machine(),
        instructions=tuple(name for name in INSTRUCTIONS if name in flags),
        cores=cores(),
        memory=1024 * number(r"^MemTotal:\s*(\d+) kB", read("/proc/meminfo")),
        gpus=tuple(gpus),
        system=f"{platform.system()} {platform.machine()}",
        versions={"blemish": __version__, "python": platform.python_version()} | installed(),
    )


def installed() -> dict[str, str]:
    """Return the versions of those of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def resident() -> int | None:
    """Return this process's resident memory in bytes, and reset its peak; None except on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return 1024 * number(r"^VmRSS:\s*(\d+) kB", read("/proc/self/status"))


def peak_resident() -> int:
    """Return the peak of this process's resident memory in bytes since the last call of `resident`."""
    return 1024 * number(r"^VmHWM:\s*(\d+) kB", read("/proc/self/status"))


def read(path: str | Path) -> str:
    """Return the text of a system file; empty where the system has none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def number(pattern: str, text: str) -> int:
    """Return the number that a pattern finds on a line, or 0."""
    found = re.search(pattern, text, re.M)
    return int(found[1]) if found else 0
