"""How long a run trains."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from blemish.errors import ConfigError


@dataclass(frozen=True)
class Length:
    """How long to train: one of the three, or none of them for the method's own default."""

    steps: int | None = None
    epochs: int | None = None
    budget: float | None = None
    """Seconds of wall time for everything from reading the images to the finished model file."""

    @property
    def given(self) -> dict[str, float]:
        """What was asked for, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def check(self) -> None:
        """Raise ConfigError for more than one length, and for one that is not positive."""
        if len(self.given) > 1:
            raise ConfigError(f"{' and '.join(self.given)} were both given; expected one of them")
        for name, value in self.given.items():
            if value <= 0:
                raise ConfigError(f"{name} {value}: expected more than 0")


def seconds(text: str) -> float:
    """Read a duration such as 90s, 10m or 1.5h; raise ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not match or float(match[1]) == 0:
        raise ConfigError(f"budget {text!r}: expected a duration such as 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
