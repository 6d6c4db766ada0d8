"""The methods. One dictionary lists them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import nn

from blemish.detectors import efficientad, supersimplenet
from blemish.detectors.base import Config, Detector
from blemish.detectors.efficientad import EfficientAD
from blemish.detectors.efficientad.fused import FusedEfficientAD
from blemish.detectors.settings import SCHEDULE, Method, Preset, as_json, check, nearest, read_settings
from blemish.detectors.supersimplenet import SuperSimpleNet, simplenet
from blemish.detectors.supersimplenet.fused import FusedSuperSimpleNet
from blemish.errors import ConfigError, ModelFileError
from blemish.inference.bundle import Bundle
from blemish.seeding import generator
from blemish.types import Supervision


def fuse(detector: Detector) -> nn.Module:
    """Make the fused network of a trained detector, in float32: (B, 3, H, W) to the detector's outputs.

    It has copies of the weights. A detector that has no fused form is given back itself.
    """
    if isinstance(detector, EfficientAD):
        return FusedEfficientAD(detector).eval()
    if isinstance(detector, SuperSimpleNet):
        return FusedSuperSimpleNet(detector).eval()
    return detector.eval()


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


def own_settings(
    name: str, wanted: str, supervision: Supervision, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Give the settings by which a model's config, as JSON has it, differs from its preset and supervision.

    Fields that this version does not know are passed over.
    """
    usual = as_json(configure(name, wanted, supervision=supervision))
    return {key: value for key, value in config.items() if key in usual and value != usual[key]}


def build(name: str, config: Config, seed: int) -> Detector:
    """Make a detector with weights drawn from the seed; its pretrained part is still empty."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        return method(name).detector(config)


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
