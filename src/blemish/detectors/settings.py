"""The settings of methods: configs, presets, and how settings are parsed and checked. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from blemish.detectors.schedules import SCHEDULES
from blemish.errors import ConfigError

if TYPE_CHECKING:
    from blemish.detectors.base import Detector
    from blemish.types import Supervision

STATISTICS = ("maximum", "smoothed_maximum", "top_mean")
"""Statistics of an anomaly map that every method can be scored by; `ops.map_statistics` computes them."""
FROM_IMAGES = (0, 0)
"""The image size of a config that leaves it open: a run derives it from the training images."""
OF_STEPS = ("steps", "epochs", "schedule", "clip_norm")
"""Settings that mean nothing to a method without optimiser steps."""

Edges = Literal["none", "rings", "cells", "blind"]
"""What can be done about places of a map where good parts score high; the module `edges` does it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings that all methods share. A method's own config adds fields."""

    SCHEDULE: ClassVar[frozenset[str]] = frozenset({"steps", "epochs", "batch_size", "schedule"})
    """Names of the settings that determine how long, how fast and in what batches a method learns."""
    FIXED: ClassVar[frozenset[str]] = frozenset()
    """Names of the settings that trained weights depend on, so that a warm start cannot change them."""
    LEAST: ClassVar[int] = 32
    """Least height and width of the network's input."""
    NEED: ClassVar[int] = 12
    """Pixels of the network's input that the shorter side of a defect should cover, as a rule of thumb."""

    image_size: tuple[int, int] = FROM_IMAGES
    """Height and width of the network's input; 0 x 0: derived from the images, as `side` describes."""
    side: int = 256
    """Square root of the number of pixels of the network's input if its size is derived from the images."""
    statistics: tuple[str, ...] = STATISTICS
    """Statistics combined into the image score by robust z-scores on held-out images; one alone is used as
    is."""
    batch_size: int
    steps: int = 0
    """Optimiser steps, unless a run is given another length; 0: see epochs."""
    epochs: int = 0
    schedule: str = "one-cycle"
    """A key of SCHEDULES."""
    clip_norm: float = 0.0
    """Largest norm of a step's gradient; 0: no limit."""

    @property
    def known_statistics(self) -> tuple[str, ...]:
        """Names of the statistics that the method computes."""
        return STATISTICS

    @property
    def reads_natural_images(self) -> bool:
        """Whether training reads natural images, which show anything but the product."""
        return False

    @property
    def altered_copies(self) -> int:
        """How many altered copies of each good image a method without steps is fitted to as well."""
        return 0

    def reconciled(self, changes: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the changes to this default config, with contradictions within a preset resolved.

        given: those of the changes that the user asked for.
        """
        return changes

    def refuse_supervision(self, supervision: Supervision) -> None:
        """Raise ConfigError if these settings leave nothing to learn from under this supervision."""


@dataclass(frozen=True)
class Preset:
    """What a preset changes in a method's default config, in general and for each supported supervision."""

    changes: Mapping[str, Any]
    regimes: Mapping[Supervision, Mapping[str, Any]]


GOOD_ONLY: Mapping[Supervision, Mapping[str, Any]] = {"none": {}}
"""The regimes of a method that learns from good images only."""


@dataclass(frozen=True)
class Method:
    """A method: how to build it, its default config and its presets, one of which is "default"."""

    build: Callable[[Any], Detector]
    """Builds an untrained detector from a config."""
    config: Config
    presets: Mapping[str, Preset]
    has_steps: bool = True
    """Whether it is trained by optimiser steps; if not, it is fitted in one pass (`Detector.fit`)."""
    leaves_one_out: bool = False
    """Whether thresholds are set from the training images, each scored without itself (`leave_out`)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error message: the known name that was probably meant, or all known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"


def field_types(config: Config) -> dict[str, Any]:
    """Return the type of each setting of a config, by name."""
    hints = typing.get_type_hints(type(config))
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def read_settings(name: str, config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to the types of a config's fields; raise ConfigError, with `name` for the config."""
    types = field_types(config)
    for key in given:
        if key not in types:
            raise ConfigError(f"{name} has no setting {key!r}; {nearest(key, types)}")
    return {key: convert(key, value, types[key]) for key, value in given.items()}


def convert(key: str, value: Any, kind: Any) -> Any:
    """Convert a setting, text or a value, to its field's type; raise ConfigError if it does not fit."""
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
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        wanted = (
            " or ".join(map(repr, choices))
            if origin is typing.Literal
            else str(getattr(kind, "__name__", kind))
        )
        raise ConfigError(f"setting {key}={value} does not fit; expected {wanted}") from error


def check(config: Config, *, has_steps: bool = True) -> None:
    """Raise ConfigError for values that cannot work; has_steps: whether the method is trained by steps."""
    if config.schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {config.schedule!r}; {nearest(config.schedule, SCHEDULES)}")
    check_size(config)
    if has_steps and (config.steps < 0 or config.epochs < 0 or not config.steps + config.epochs):
        raise ConfigError(f"steps {config.steps} and epochs {config.epochs}: expected one of them above 0")
    if config.batch_size < 1:
        raise ConfigError(f"batch size {config.batch_size}: expected at least 1")
    for key, value in vars(config).items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ConfigError(f"{key}={value}: expected 0 or more, and finite")
    known = config.known_statistics
    for name in config.statistics:
        if name not in known:
            raise ConfigError(f"unknown statistic {name!r}; {nearest(name, known)}")
    if not config.statistics:
        raise ConfigError(f"no statistics; expected some of {', '.join(known)}")


def check_size(config: Config) -> None:
    """Raise ConfigError for an image size, or a side to derive one from, that cannot work."""
    size, least = config.image_size, Config.LEAST
    if size != FROM_IMAGES and (len(size) != 2 or min(size) < least):
        raise ConfigError(f"image size {size}: expected height and width of at least {least}")
    if config.side < least:
        raise ConfigError(f"side {config.side}: expected at least {least}")


def refuse_numbers(rules: Iterable[tuple[str, float, bool, str]]) -> None:
    """Raise ConfigError for the first setting that does not fit; rules: name, value, fits, expectation."""
    for name, value, fits, expected in rules:
        if not fits:
            raise ConfigError(f"setting {name}={value} does not fit; expected {expected}")


def as_json(config: Config) -> dict[str, Any]:
    """Return a config as JSON values: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain
