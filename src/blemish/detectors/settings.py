"""Settings of a method: presets, and how they are read and checked."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blemish.detectors.base import SCHEDULES, Config, Detector
from blemish.detectors.ops import STATISTICS
from blemish.errors import ConfigError
from blemish.types import Supervision


@dataclass(frozen=True)
class Preset:
    """What a preset changes in a method's default config, and what each supervision that it knows changes."""

    changes: Mapping[str, Any]
    regimes: Mapping[Supervision, Mapping[str, Any]]


@dataclass(frozen=True)
class Method:
    """One method: how it is built, its default config, and its presets, of which one is "default"."""

    detector: Callable[[Any], Detector]
    config: Config
    presets: Mapping[str, Preset]


SCHEDULE = {
    *("steps", "epochs", "batch_size", "schedule", "optimiser", "crop"),
    *("learning_rate", "adaptor_learning_rate", "head_learning_rate"),
}
"""Settings that say how long and how fast is learned, and from how much at a time."""


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Say which known name was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def read_settings(name: str, config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """Turn settings into values of a config's fields; raise ConfigError that names whose they are."""
    hints = typing.get_type_hints(type(config))
    for key in given:
        if key not in hints:
            raise ConfigError(f"{name} has no setting {key!r}; {nearest(key, hints)}")
    return {key: convert(key, value, hints[key]) for key, value in given.items()}


def convert(key: str, value: Any, kind: Any) -> Any:
    """Turn a setting into its field's type; raise ConfigError."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    try:
        if origin is typing.Literal:
            if value not in choices:
                raise ValueError
            return value
        if origin is tuple:
            parts = (
                value.replace("x", ",").split(",") if isinstance(value, str) and choices[0] is int else value
            )
            parts = parts.split(",") if isinstance(parts, str) else parts
            return tuple(choices[0](part) for part in parts if part != "")
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False, "1": True, "0": False, "on": True, "off": False}[
                value.lower()
            ]
        if kind is int and int(value) != float(value):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError) as error:
        wanted = (
            " or ".join(map(repr, choices))
            if origin is typing.Literal
            else str(getattr(kind, "__name__", kind))
        )
        raise ConfigError(f"setting {key}={value} does not fit; expected {wanted}") from error


def check(config: Config) -> None:
    """Refuse numbers that cannot work."""
    if config.schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {config.schedule!r}; {nearest(config.schedule, SCHEDULES)}")
    if len(config.image_size) != 2 or min(config.image_size) < 32:
        raise ConfigError(f"image size {config.image_size}: expected height and width of at least 32")
    if config.steps < 0 or config.epochs < 0 or not config.steps + config.epochs:
        raise ConfigError(f"steps {config.steps} and epochs {config.epochs}: expected one of them above 0")
    if config.batch_size < 1:
        raise ConfigError(f"batch size {config.batch_size}: expected at least 1")
    for key, value in vars(config).items():
        if isinstance(value, int | float) and value < 0:
            raise ConfigError(f"{key}={value}: expected 0 or more")
    known = (*STATISTICS, "head") if hasattr(config, "classification_head") else STATISTICS
    for name in config.statistics:
        if name not in known:
            raise ConfigError(f"unknown statistic {name!r}; {nearest(name, known)}")
    if not config.statistics:
        raise ConfigError(f"no statistics; expected some of {', '.join(known)}")


def as_json(config: Config) -> dict[str, Any]:
    """Write a config as what JSON would make of it: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
