"""What a measurement was made on: processor, memory, GPU, versions. Imports nothing heavy."""

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
"""Names in /proc/cpuinfo of what makes products fast, on x86 and on ARM."""

PACKAGES = ("torch", "onnxruntime", "openvino", "numpy")


@dataclass(frozen=True)
class Machine:
    """A machine, and what computes on it."""

    processor: str
    instructions: tuple[str, ...]
    """Those of INSTRUCTIONS that it has, where the system says."""
    cores: int
    """That this process may use."""
    memory: int
    """Bytes; 0 where the system does not say."""
    gpus: tuple[str, ...]
    system: str
    versions: dict[str, str]
    """Of Blemish, Python and those of PACKAGES that are installed."""


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
    """Give the versions of those of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def resident() -> int | None:
    """Give the bytes that this process has in memory, and forget its peak; None where Linux is not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return 1024 * number(r"^VmRSS:\s*(\d+) kB", read("/proc/self/status"))


def peak_resident() -> int:
    """Give the most bytes that this process had in memory since `resident` was asked."""
    return 1024 * number(r"^VmHWM:\s*(\d+) kB", read("/proc/self/status"))


def read(path: str | Path) -> str:
    """Read a file of the system, which other systems do not have."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def number(pattern: str, text: str) -> int:
    """Give the number that a pattern finds on a line, or 0."""
    found = re.search(pattern, text, re.M)
    return int(found[1]) if found else 0
