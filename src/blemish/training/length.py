"""The length of a training run."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from blemish.errors import ConfigError


@dataclass(frozen=True)
class Length:
    """The length of a training run: one of the three, or none for the method's default."""

    steps: int | None = None
    epochs: int | None = None
    budget: float | None = None
    """Seconds of wall time for the whole run, from reading the images to the finished model file."""

    @property
    def given(self) -> dict[str, float]:
        """The lengths that are set, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def check(self) -> None:
        """Raise ConfigError if more than one length is set, or one that is not positive."""
        if len(self.given) > 1:
            raise ConfigError(f"{' and '.join(self.given)} were both given; expected one of them")
        for name, value in self.given.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} {value}: expected more than 0")


def seconds(text: str) -> float:
    """Return the seconds in a duration such as 90s, 10m or 1.5h; raise ConfigError if it does not fit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not match or float(match[1]) == 0:
        raise ConfigError(f"budget {text!r}: expected a duration such as 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
