"""The methods. One dictionary lists them all; `build` makes a detector from names and settings."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from blemish.bundle import Bundle
from blemish.detectors import efficientad, simplenet, supersimplenet
from blemish.detectors.base import SCHEDULES, Config, Detector
from blemish.errors import ConfigError, ModelFileError
from blemish.ops import STATISTICS, generator
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


GOOD_ONLY: Mapping[Supervision, Mapping[str, Any]] = {"none": {}}
EFFICIENTAD = {"default": Preset({}, GOOD_ONLY), "paper": Preset(efficientad.PAPER, GOOD_ONLY)}
METHODS = {
    "efficientad-s": Method(
        efficientad.EfficientAD, efficientad.EfficientADConfig(size="small"), EFFICIENTAD
    ),
    "efficientad-m": Method(
        efficientad.EfficientAD, efficientad.EfficientADConfig(size="medium"), EFFICIENTAD
    ),
    "supersimplenet": Method(
        supersimplenet.SuperSimpleNet,
        supersimplenet.SuperSimpleNetConfig(),
        {
            "default": Preset({}, supersimplenet.DEFAULT_REGIMES),
            "paper": Preset(supersimplenet.PAPER, supersimplenet.REGIMES),
            "journal": Preset(supersimplenet.JOURNAL, supersimplenet.JOURNAL_REGIMES),
        },
    ),
    "simplenet": Method(
        supersimplenet.SuperSimpleNet,
        simplenet.DEFAULT,
        {
            "default": Preset({}, simplenet.DEFAULT_REGIMES),
            "paper": Preset(simplenet.PAPER, simplenet.REGIMES),
        },
    ),
}


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


def method(name: str) -> Method:
    """Look a method up; raise ConfigError with the nearest name."""
    if name not in METHODS:
        raise ConfigError(f"unknown model {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def preset(name: str, wanted: str) -> Preset:
    """Look a method's preset up; raise ConfigError with the nearest name."""
    presets = method(name).presets
    if wanted not in presets:
        raise ConfigError(f"{name} has no preset {wanted!r}; {nearest(wanted, presets)}")
    return presets[wanted]


def with_schedule(name: str, wanted: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Put a method's schedule, the paper's to the letter or none, under the settings that are given.

    Raises ConfigError for a schedule that is neither default nor paper.
    """
    if wanted not in ("default", "paper"):
        raise ConfigError(f"unknown schedule {wanted!r}; expected default or paper")
    if wanted == "default":
        return dict(given)
    # All of them, not only where the paper differs: labels change rates, too, and so did an earlier model.
    paper = {key: value for key, value in vars(configure(name, "paper")).items() if key in SCHEDULE}
    if "steps" in given and "epochs" not in given:
        del paper["epochs"]
    return paper | dict(given)


def configure(
    name: str,
    wanted: str = "default",
    settings: Mapping[str, Any] | None = None,
    supervision: Supervision = "none",
) -> Config:
    """Make a method's config from a preset, the supervision, and settings by field name; raise ConfigError.

    A setting may be a string, as it comes from a command line, or a value of the field's type.
    """
    chosen = preset(name, wanted)
    given = dict(settings or {})
    changes = read_settings(
        name, method(name).config, {**chosen.changes, **chosen.regimes[supervision], **given}
    )
    if changes.get("steps") and "steps" in given and "epochs" not in given:
        changes["epochs"] = 0
    headless = "statistics" not in given and not changes.get("classification_head")
    if headless and "head" in changes.get("statistics", ()):
        changes["statistics"] = method(name).config.statistics
    config = dataclasses.replace(method(name).config, **changes)
    check(config)
    return config


def read_settings(name: str, config: Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """Turn settings into values of a config's fields; raise ConfigError that names whose they are."""
    hints = typing.get_type_hints(type(config))
    for key in given:
        if key not in hints:
            raise ConfigError(f"{name} has no setting {key!r}; {nearest(key, hints)}")
    return {key: convert(key, value, hints[key]) for key, value in given.items()}


def own_settings(
    name: str, wanted: str, supervision: Supervision, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Give the settings by which a model's config, as JSON has it, differs from its preset and supervision.

    Fields that this version does not know are passed over.
    """
    usual = as_json(configure(name, wanted, supervision=supervision))
    return {key: value for key, value in config.items() if key in usual and value != usual[key]}


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


def build(name: str, config: Config, seed: int) -> Detector:
    """Make a detector with weights drawn from the seed; its pretrained part is still empty."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        return method(name).detector(config)


def as_json(config: Config) -> dict[str, Any]:
    """Write a config as what JSON would make of it: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def restore(opened: Bundle) -> Detector:
    """Build the detector of a model file with its weights, in evaluation mode; raise ModelFileError.

    A buffer that an older file lacks, for it came later, keeps the value that it starts with.
    """
    name = opened.manifest["method"]
    detector = build(name, configure(name, settings=opened.manifest["config"]), seed=0)
    started = dict(detector.named_buffers())
    try:
        detector.load_state_dict(started | load_tensors(opened.weights))
    except RuntimeError as error:
        raise ModelFileError(
            f"the weights in {opened.path} do not fit its method: {str(error).splitlines()[-1].strip()}"
        ) from error
    return detector.eval()
