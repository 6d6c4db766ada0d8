"""How long a run trains."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from blemish.errors import ConfigError


@dataclass(frozen=True)
class Length:
    """How long to train: one of the three, or none for the method's own default."""

    steps: int | None = None
    epochs: int | None = None
    budget: float | None = None
    """Seconds of wall time for everything from reading the images to the finished model file."""


def seconds(text: str) -> float:
    """Read a duration such as 90s, 10m or 1.5h; raise ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not match or float(match[1]) == 0:
        raise ConfigError(f"budget {text!r}: expected a duration such as 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def check_length(length: Length) -> None:
    """Refuse more than one length, and none that is not positive."""
    given = {name: value for name, value in dataclasses.asdict(length).items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} were both given; expected one of them")
    for name, value in given.items():
        if value <= 0:
            raise ConfigError(f"{name} {value}: expected more than 0")
