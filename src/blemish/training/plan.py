"""What is asked for before a run begins, refused while refusing is cheap, and summed up."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blemish import data, images
from blemish.data.folds import Fold, assign
from blemish.data.labels import choose_defects, keep_masks, supervise
from blemish.data.loading.batches import NaturalImages, Photographs
from blemish.data.loading.cache import Memory
from blemish.data.loading.stores import ImageStore
from blemish.data.loading.textures import Textures
from blemish.data.split import Split, split
from blemish.detectors import registry, settings
from blemish.detectors.base import Config, Detector
from blemish.detectors.registry import configure, own_settings
from blemish.detectors.registry import preset as find_preset
from blemish.errors import ConfigError, DataError
from blemish.files import digest, short_digest
from blemish.inference import bundle
from blemish.inference.bundle import Bundle
from blemish.progress import say
from blemish.training.fingerprint import digest_names
from blemish.training.length import Length
from blemish.types import Sample, Supervision

WARM_SHARE = 0.3
"""Of a method's usual length, for a run that goes on from an earlier model."""

FIXED = {"backbone", "layers", "size", "padding", "edges", "autoencoder", "noise_ratio"}
"""Settings that a run which goes on from an earlier model cannot change."""


@dataclass(frozen=True)
class Labels:
    """What is to be learned of the labels."""

    supervision: str = "auto"
    train_defects: str | float | None = None
    """How many defective images train, a number or a share; None: as the data set's split says."""
    train_masks: str | float | None = None
    """How many of those keep their masks; None: all."""
    fold: Fold | None = None
    """The part of a cross-validation that is for testing; None: as the data set's split says."""


@dataclass(frozen=True)
class Settled:
    """What a run will be, known without reading an image."""

    model: str
    preset: str
    config: Config
    supervision: Supervision
    sentence: str
    """What is learned from, for the person at the terminal."""
    parts: Split
    length: Length
    start: Bundle | None
    """The model that the run goes on from."""

    @property
    def samples(self) -> list[Sample]:
        """List what is trained on."""
        return [*self.parts.train, *self.parts.train_defects]


def settle(
    root: Path,
    *,
    model: str | None,
    preset: str = "default",
    settings: Mapping[str, Any] | None = None,
    schedule: str = "default",
    layout: str = "auto",
    labels: Labels = Labels(),
    length: Length = Length(),
    seed: int = 0,
    start: str | Path | None = None,
) -> Settled:
    """Settle images, supervision, config and length of a run.

    Raises a BlemishError for what does not exist or does not go together.
    """
    opened = None if start is None else bundle.read(Path(start))
    if model is None and opened is not None:
        model = opened.manifest["training"]["run"]["model"]
    if model is None:
        raise ConfigError("no model was named; expected --model, or --from a model file")
    given = registry.with_schedule(model, schedule, settings or {})
    if opened is not None:
        model, preset, given = inherit(opened, model, preset, given)
    configure(model, preset, given)
    trained = learned_from(opened)
    parts = without_empty_masks(without_copies(choose_images(root, layout, labels, trained)))
    parts = choose_defects(parts, root, labels.train_defects, seed)
    parts = keep_masks(parts, root, labels.train_masks, seed)
    able = tuple(find_preset(model, preset).regimes)
    parts, supervision, sentence = supervise(parts, labels.supervision, able, model)
    config = configure(model, preset, given, supervision)
    refuse_idle(config, supervision)
    if opened is not None:
        if length == Length():
            whole = {"epochs": config.epochs} if config.epochs else {"steps": config.steps}
            length = Length(**{name: math.ceil(WARM_SHARE * count) for name, count in whole.items()})
        tell_missing(opened, [*parts.train, *parts.train_defects])
    return Settled(model, preset, config, supervision, sentence, parts, length, opened)


def inherit(
    opened: Bundle, model: str, preset: str, given: Mapping[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    """Take method, preset and own settings from an earlier model, but for what is given anew.

    Raises ConfigError for another method, and for a setting that trained weights stand on.
    """
    run, config = opened.manifest["training"]["run"], opened.manifest["config"]
    if model != run["model"]:
        raise ConfigError(f"{opened.path} is a model of {run['model']}, not {model}; expected the same")
    usual = registry.method(model).config
    for key in FIXED & given.keys() & config.keys():
        # Not by a config of this setting alone, which might contradict itself where all that is given do not.
        asked = settings.read_settings(model, usual, {key: given[key]})[key]
        if asked != (tuple(config[key]) if isinstance(config[key], list) else config[key]):
            raise ConfigError(f"{key}={given[key]}: the weights in {opened.path} stand on {config[key]}")
    own = own_settings(run["model"], run["preset"], run.get("supervision", "none"), config)
    return run["model"], run["preset"] if preset == "default" else preset, own | dict(given)


def learned_from(opened: Bundle | None) -> set[str]:
    """Give short digests of what an earlier model was trained on, and those before it."""
    if opened is None:
        return set()
    files = opened.manifest["training"].get("files")
    if files is None:
        say(f"{opened.path} does not say which images it was trained on: they cannot be kept out of a test")
        return set()
    return {*files["train"], *files.get("before", [])}


def refuse_idle(config: Config, supervision: Supervision) -> None:
    """Refuse settings under which nothing would be learned."""
    values = vars(config)
    if supervision == "none" and values.get("anomalies") == "none":
        raise ConfigError("with good images alone and anomalies=none there is nothing to learn from")
    if supervision == "weak" and not values.get("classification_head"):
        raise ConfigError("supervision weak is learned by the classification head; expected it, or masks")


def tell_missing(opened: Bundle, samples: Sequence[Sample]) -> None:
    """Say how many of the images that an earlier model learned from are not among these."""
    here = {short_digest(sample.path) for sample in samples}
    trained = opened.manifest["training"].get("files", {}).get("train", [])
    missing = sum(name not in here for name in trained)
    if missing:
        say(
            f"{missing} of the {len(trained)} images that {opened.path} learned from are not among the "
            "training images: what they taught may fade, so give them, too"
        )


def without_copies(parts: Split) -> Split:
    """Leave training images out that are copies, byte for byte, of held-out ones, and say so."""
    held_out = {digest(sample.path) for sample in parts.held_out}
    train = tuple(sample for sample in parts.train if digest(sample.path) not in held_out)
    if len(train) == len(parts.train):
        return parts
    say(f"{len(parts.train) - len(train)} training images are copies of held-out ones and left out")
    return dataclasses.replace(parts, train=train)


def without_empty_masks(parts: Split) -> Split:
    """Take masks without a marked pixel off training defects: they say nothing of where the defect is."""
    defects = tuple(
        dataclasses.replace(sample, masks=()) if all(map(images.mask_is_empty, sample.masks)) else sample
        for sample in parts.train_defects
    )
    emptied = [old for old, new in zip(parts.train_defects, defects, strict=True) if old.masks != new.masks]
    if emptied:
        say(f"empty masks of training defects, not counted: {len(emptied)}; first {emptied[0].path}")
    return dataclasses.replace(parts, train_defects=defects)


def choose_images(root: Path, layout: str, labels: Labels, trained: Collection[str]) -> Split:
    """Scan and split a data set.

    trained: short digests of what an earlier model trained on, which gives no threshold now. Raises
    DataError for too few good images to hold any out.
    """
    samples = data.scan(root, layout)
    if labels.fold is not None:
        samples = assign(samples, root, labels.fold)
    seen = {sample.path for sample in samples if trained and short_digest(sample.path) in trained}
    parts = split(samples, root, trained=seen)
    if len(parts.held_out) < 2:
        good = len(parts.train) + len(parts.held_out)
        raise DataError(
            f"found {good} good images in {root}, {len(parts.held_out)} of them held out for the thresholds; "
            "expected at least 4, of which 2 are held out"
        )
    return parts


def open_natural(chosen: str | Path, detector: Detector, memory: Memory, seed: int) -> NaturalImages | None:
    """Open the images for the pretraining penalty, or say that it is off.

    chosen: "drawn", "none" or a folder of photographs. Raises ConfigError for a folder without any, and for a
    choice where there is no penalty.
    """
    if not detector.wants_natural_images:
        if chosen != "drawn":
            raise ConfigError(
                f"natural images {chosen} are chosen for a run without EfficientAD's pretraining penalty; "
                "expected no choice"
            )
        return None
    if chosen == "none":
        say("natural images none: the pretraining penalty is off")
        return None
    size = detector.config.image_size
    if chosen == "drawn":
        return Textures(size, seed)
    folder = Path(chosen)
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; expected photographs for the pretraining penalty")
    paths = images.list_images(folder, recursive=True)
    if not paths:
        raise ConfigError(f"no images in {folder}, the folder of photographs for the pretraining penalty")
    return Photographs(ImageStore(paths, size, memory, crop=True), seed, digest_names(paths))


def try_out(detector: Detector, device: str) -> float:
    """Score one empty image, so that settings that do not go together are refused now; give its seconds."""
    height, width = detector.config.image_size
    begin = time.monotonic()
    try:
        with torch.no_grad():
            detector.eval()(torch.zeros(1, 3, height, width, device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"these settings do not go together at {height}x{width}: {reason}") from error
    return time.monotonic() - begin
