"""The registry of methods: a single dictionary, and no other module names a method. Imports no torch."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blemish.detectors import sizing
from blemish.detectors.settings import (
    FROM_IMAGES,
    GOOD_ONLY,
    OF_STEPS,
    Config,
    Method,
    Preset,
    as_json,
    check,
    field_types,
    nearest,
    read_settings,
)
from blemish.errors import ConfigError, ModelFileError
from blemish.seeding import initial_seed

if TYPE_CHECKING:
    from blemish.detectors.base import Detector
    from blemish.detectors.joined.config import JoinedConfig
    from blemish.types import Supervision

METHODS: dict[str, str | Method] = {
    "efficientad-s": "blemish.detectors.efficientad:SMALL",
    "efficientad-m": "blemish.detectors.efficientad:MEDIUM",
    "supersimplenet": "blemish.detectors.supersimplenet:SUPERSIMPLENET",
    "simplenet": "blemish.detectors.supersimplenet:SIMPLENET",
    "patchcore": "blemish.detectors.patchcore:PATCHCORE",
    "padim": "blemish.detectors.padim:PADIM",
}
"""All methods by the name a user gives: a Method, or its location as MODULE:NAME, imported on first use."""
FIRST = "patchcore"
"""The method for good images alone, by as much of the battery as was run (docs/accuracy.md)."""
LABELLED = "supersimplenet"
"""The method that learns from defects, too, and the one for a run whose steps or epochs are given."""
JOIN = "+"
"""What stands between the names of joined methods."""


def method(name: str) -> Method:
    """Return a method by name, or joined methods; raise ConfigError with the nearest known name."""
    if is_joined(name):
        return joined(name)
    if name not in METHODS:
        raise ConfigError(f"unknown model {name!r}; {nearest(name, METHODS)}")
    found = METHODS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = METHODS[name] = getattr(importlib.import_module(module), attribute)
    return found


def preset(name: str, wanted: str) -> Preset:
    """Return a method's preset by name; raise ConfigError with the nearest known name if there is none."""
    presets = method(name).presets
    if wanted not in presets:
        raise ConfigError(f"{name} has no preset {wanted!r}; {nearest(wanted, presets)}")
    return presets[wanted]


def parts_of(name: str) -> list[str]:
    """Return the names of joined methods, or the one name."""
    return name.split(JOIN)


def is_joined(name: str | None) -> bool:
    """Return whether a name is that of joined methods."""
    return name is not None and JOIN in name


def joined(name: str) -> Method:
    """Return the methods joined by JOIN in a name, as one."""
    from blemish.detectors.joined.config import JoinedConfig

    methods = [method(part) for part in parts_of(name)]

    def make(config: JoinedConfig) -> Detector:
        from blemish.detectors.joined.detector import Joined

        names = [part.get("method", "") for part in config.parts]
        configs = [
            stored_config(one, part.get("config", {})) for one, part in zip(names, config.parts, strict=True)
        ]
        return Joined(config, [method(one).build(own) for one, own in zip(names, configs, strict=True)])

    return Method(
        make,
        JoinedConfig(),
        {"default": Preset({}, GOOD_ONLY)},
        has_steps=False,  # its parts may have some
        leaves_one_out=all(each.leaves_one_out for each in methods),
    )


def settings_of_parts(name: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Divide settings among joined methods.

    A setting goes to every part that has it or, as PART.SETTING, to those of that name or number, counted
    from 1. A number precedes a name, and a name what all parts are given. Raises ConfigError for a setting
    that no part has.
    """
    names = parts_of(name)
    types = [settings_of(method(part)) for part in names]
    found: list[dict[str, Any]] = [{} for _ in names]
    for key in sorted(given, key=lambda key: ("." in key, key.partition(".")[0].isdigit())):
        place, _, setting = key.rpartition(".")
        parts = [number for number, part in enumerate(names) if place in ("", part, str(number + 1))]
        if not parts:
            raise ConfigError(f"setting {key}: {name} has no part {place!r}; {nearest(place, names)}")
        able = [number for number in parts if setting in types[number]]
        if not able:
            known = {each for number in parts for each in types[number]}
            raise ConfigError(f"no part of {name} has a setting {setting!r}; {nearest(setting, known)}")
        for number in able:
            found[number][setting] = given[key]
    return found


def settings_of(found: Method) -> set[str]:
    """Return the names of the settings that mean something to a method."""
    return field_types(found.config).keys() - (set() if found.has_steps else set(OF_STEPS))


def methods_with_setting(setting: str) -> list[str]:
    """Return the names of the methods that have this setting."""
    return [name for name in METHODS if setting in field_types(method(name).config)]


def with_schedule(name: str, wanted: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Add the schedule of a method's paper, if that is wanted, to the settings given, which take precedence.

    Raises ConfigError for a schedule that is neither default nor paper.
    """
    if wanted not in ("default", "paper"):
        raise ConfigError(f"unknown schedule {wanted!r}; expected default or paper")
    if wanted == "default":
        return dict(given)
    # All of them, even those equal to the defaults: supervision and an earlier model change rates, too.
    config = configure(name, "paper")
    paper = {key: value for key, value in vars(config).items() if key in config.SCHEDULE}
    if "steps" in given and "epochs" not in given:
        del paper["epochs"]
    return paper | dict(given)


def configure(
    name: str,
    wanted: str = "default",
    settings: Mapping[str, Any] | None = None,
    supervision: Supervision = "none",
) -> Config:
    """Return a method's config from a preset, the supervision, and settings by field name.

    A setting is a string, as on a command line, or a value of the field's type. The image size may be left
    open. Raises ConfigError for a name or a value that does not fit.
    """
    if is_joined(name) and "parts" not in (settings or {}):
        return configure_parts(name, wanted, settings or {}, supervision)
    chosen, found, given = preset(name, wanted), method(name), dict(settings or {})
    changes = read_settings(name, found.config, {**chosen.changes, **chosen.regimes[supervision], **given})
    if changes.get("steps") and "steps" in given and "epochs" not in given:
        changes["epochs"] = 0
    if "side" in given and "image_size" not in given:
        changes["image_size"] = FROM_IMAGES
    config = dataclasses.replace(found.config, **found.config.reconciled(changes, given))
    check(config, has_steps=found.has_steps)
    return config


def configure_parts(
    name: str, wanted: str, settings: Mapping[str, Any], supervision: Supervision
) -> JoinedConfig:
    """Return the config of joined methods; a size that is left open becomes a square."""
    from blemish.detectors.joined.config import JoinedConfig

    names = parts_of(name)
    configs = [
        configure(part, wanted, given, supervision)
        for part, given in zip(names, settings_of_parts(name, settings), strict=True)
    ]
    configs = [
        dataclasses.replace(each, image_size=sizing.square(each)) if each.image_size == FROM_IMAGES else each
        for each in configs
    ]
    size = max((each.image_size for each in configs), key=math.prod)
    parts = ({"method": one, "config": as_json(own)} for one, own in zip(names, configs, strict=True))
    return JoinedConfig(image_size=size, parts=tuple(parts))


def own_settings(
    name: str, wanted: str, supervision: Supervision, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings in which a model's config, as JSON values, differs from its preset and supervision.

    Fields that this version does not know are left out; one that the model lacks is as it was before it was
    a setting, which is how the method's own config has it.
    """
    usual = as_json(configure(name, wanted, supervision=supervision))
    known = {**as_json(method(name).config), **config}
    return {key: value for key, value in known.items() if key in usual and value != usual[key]}


def stored_config(name: str, config: Mapping[str, Any]) -> Config:
    """Return the config of a model file; a field that an older file lacks has the method's own default.

    Raises ConfigError for a name or a value that does not fit.
    """
    found = method(name)
    made = dataclasses.replace(found.config, **read_settings(name, found.config, config))
    check(made, has_steps=found.has_steps)
    return made


def build(name: str, config: Config, seed: int) -> Detector:
    """Return a detector initialised at random from the seed; its pretrained weights are not loaded yet.

    An image size that the config leaves open becomes a square, for there are no images here to derive it
    from.
    """
    import torch

    if config.image_size == FROM_IMAGES:
        config = dataclasses.replace(config, image_size=sizing.square(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(initial_seed(seed, "weights"))
        return method(name).build(config)


def restore(name: str, config: Mapping[str, Any], weights: bytes, source: str) -> Detector:
    """Return the detector of a model file with its weights, in evaluation mode.

    config, weights: as stored in the file; source: the file's name, for messages. A buffer that an older file
    lacks keeps its initial value. Raises ModelFileError if the weights do not fit.
    """
    from safetensors.torch import load

    detector, stored = build(name, stored_config(name, config), seed=0), load(weights)
    resize_fitted_buffers(detector, stored)
    kept = detector.state_dict().keys()
    started = {name: value for name, value in detector.named_buffers() if name in kept}
    try:
        detector.load_state_dict(started | stored)
    except RuntimeError as error:
        raise ModelFileError(
            f"the weights in {source} do not match its method: {str(error).splitlines()[-1].strip()}"
        ) from error
    return detector.eval()


def resize_fitted_buffers(detector: Detector, stored: Mapping[str, Any]) -> None:
    """Resize the buffers whose size is determined by fitting to the sizes of the stored tensors."""
    for name in detector.fitted_buffers:
        if name in stored:
            owner, _, own = name.rpartition(".")
            empty = detector.get_buffer(name).new_empty(stored[name].shape)
            detector.get_submodule(owner).register_buffer(own, empty)
