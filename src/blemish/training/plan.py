"""Validate a training request before any work starts, and determine what the run will be."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blemish import data, images
from blemish.data.folds import assign_fold
from blemish.data.labels import choose_defects, describe, keep_masks, supervise
from blemish.data.shapes import most_frequent
from blemish.data.split import Split, split
from blemish.detectors import registry, sizing
from blemish.detectors.settings import FROM_IMAGES, OF_STEPS, Config, Method, read_settings
from blemish.errors import ConfigError, DataError
from blemish.files import SHORT_DIGEST, digest, short_digest
from blemish.inference import bundle, calibration
from blemish.inference.bundle import Bundle
from blemish.training.choosing import choose
from blemish.training.length import Length
from blemish.training.request import TrainingRequest
from blemish.types import Sample, Supervision

LOG = logging.getLogger(__name__)

WARM_SHARE = 0.3
"""Share of a method's usual length that a warm start trains for."""


@dataclass(frozen=True)
class Plan:
    """What a run will be, determined without decoding an image."""

    model: str
    preset: str
    method: Method
    reason: str
    """For the user: why it is this method; empty if the user named it."""
    config: Config
    """With a concrete image size."""
    size_reason: str
    """For the user: the size of the network's input, and why; empty unless it follows from the images."""
    supervision: Supervision
    unused_labels: str
    """For the user: what the method does not learn from; empty if nothing."""
    parts: Split
    length: Length
    seen: frozenset[str]
    """Short digests of the images that earlier models were trained on."""
    start: Bundle | None
    """The model that a warm start begins with."""
    light: str = "off"
    """off or standardise."""

    @property
    def samples(self) -> list[Sample]:
        """The training images: good ones, then defective ones."""
        return [*self.parts.train, *self.parts.train_defects]

    @property
    def grown_from(self) -> Bundle | None:
        """The earlier model whose memory the run adds to; None without one, and where weights are trained."""
        return None if self.method.has_steps else self.start

    @property
    def description(self) -> str:
        """For the user: what the run learns from."""
        return describe(self.parts, self.supervision) + self.unused_labels


def plan(request: TrainingRequest) -> Plan:
    """Determine the images, supervision, config and length of a run.

    Raises a BlemishError for what does not exist or cannot be combined.
    """
    start = None if request.start is None else bundle.read(request.start)
    if start is not None and registry.is_joined(start.manifest.training.run.model):
        raise ConfigError(f"{start.path} is a model of joined methods, which cannot be continued")
    request, why = with_model(request, start)
    model, preset, given = settle_settings(request, start)
    method = registry.method(model)
    refuse_length(request, model, method)
    registry.configure(model, preset, given)  # refuses wrong settings before the data set is read
    seen = seen_images(start)
    parts = without_empty_masks(choose_images(request, seen, method))
    parts = choose_defects(parts, request.data, request.train_defects, request.seed)
    parts = keep_masks(parts, request.data, request.train_masks, request.seed)
    able = tuple(registry.preset(model, preset).regimes)
    parts, supervision, unused = supervise(parts, request.supervision, able, model)
    config = registry.configure(model, preset, given, supervision)
    config.refuse_supervision(supervision)
    config, reason = with_size(config, request, [*parts.train, *parts.train_defects])
    refuse_another_size(start, config)
    length = request.length
    if start is not None and length == Length() and method.has_steps:
        length = warm_length(config)
    light = settle_light(request, start, method, len(parts.held_out or parts.train))
    return Plan(
        model, preset, method, why, config, reason, supervision, unused, parts, length, seen, start, light
    )


def settle_light(request: TrainingRequest, start: Bundle | None, method: Method, scored: int) -> str:
    """Return what to do about the light of images; raise ConfigError for what does not fit.

    scored: number of good images of this run that the thresholds are set from.
    """
    earlier = "off" if start is None else start.manifest.training.run.light
    light = request.light or earlier
    if start is not None and not method.has_steps:
        if light != earlier:
            raise ConfigError(
                f"light {light}: what {start.path} remembers was seen with light {earlier}, "
                "which cannot be changed"
            )
        known = start.manifest.light_calibration
        scored += 0 if known is None else len(known.scores)
    if light == "off" and request.light_limit:
        raise ConfigError(f"light limit {request.light_limit:g}: expected it with light standardise only")
    calibration.check_light_limit(request.light_limit, scored)
    return light


def with_model(request: TrainingRequest, start: Bundle | None) -> tuple[TrainingRequest, str]:
    """Return a request that names a method, and why it is that one if the user left it open.

    A budget is dropped for a chosen method without steps, which is done as soon as it can be.
    """
    if request.model is not None:
        return request, ""
    if start is not None:
        return dataclasses.replace(request, model=start.manifest.training.run.model), ""
    model, why = choose(request)
    if request.budget is not None and not registry.method(model).has_steps:
        request, why = dataclasses.replace(request, budget=None), f"{why}, so the budget is not needed"
    return dataclasses.replace(request, model=model), why


def settle_settings(request: TrainingRequest, start: Bundle | None) -> tuple[str, str, dict[str, Any]]:
    """Return method, preset and settings of a run; raise ConfigError if they cannot be combined."""
    model = str(request.model)
    given = registry.with_schedule(model, request.schedule, request.settings)
    if start is None:
        return model, request.preset, given
    return inherit(start, model, request.preset, given)


def inherit(
    start: Bundle, model: str, preset: str, given: Mapping[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    """Take method, preset and own settings from an earlier model, except those given for this run.

    Raises ConfigError for another method, and for changing a setting that trained weights depend on.
    """
    run, config = start.manifest.training.run, start.manifest.config
    if model != run.model:
        raise ConfigError(f"{start.path} is a model of {run.model}; expected {model}, or leave out --model")
    usual = registry.method(model).config
    for key in usual.FIXED & given.keys() & config.keys():
        # Converted without building a config, which with this setting alone might contradict itself.
        asked = read_settings(model, usual, {key: given[key]})[key]
        if asked != (tuple(config[key]) if isinstance(config[key], list) else config[key]):
            raise ConfigError(
                f"{key}={given[key]}: the weights in {start.path} were trained with {key}={config[key]}, "
                "which cannot be changed"
            )
    supervision: Any = run.supervision
    own = registry.own_settings(run.model, run.preset, supervision, config)
    own |= {key: config[key] for key in usual.FIXED & config.keys()}  # another supervision may have others
    if "side" in given:
        own.pop("image_size", None)
    return run.model, run.preset if preset == "default" else preset, own | dict(given)


def with_size(config: Config, request: TrainingRequest, samples: Sequence[Sample]) -> tuple[Config, str]:
    """Return a config with a concrete image size, and the reason for it if it follows from the images.

    Only the headers of the samples' images are read. Warns if they have several shapes.
    """
    if config.image_size != FROM_IMAGES and request.scale is None and request.defect_size is None:
        return config, ""
    shape = most_frequent([images.describe(sample.path).size for sample in samples])
    if shape.others:
        LOG.warning(
            "the training images have several shapes: the network's input has that of %s, the most frequent; "
            "the others are stretched (%d of %d)",
            *(sizing.written(shape.size), shape.others, len(samples)),
        )
    if request.scale is not None:
        scale = sizing.read_scale(request.scale)
        chosen = sizing.at_scale(shape.size, scale)
        reason = f"scale {' x '.join(f'{each:g}' for each in dict.fromkeys(scale))}"
    elif request.defect_size is not None:
        defect = sizing.read_defect_size(request.defect_size)
        chosen = sizing.for_defect(config, shape.size, defect)
        covered = sizing.coverage(shape.size, chosen, defect)
        reason = f"a defect of {defect:g} pixels covers {covered:g}, of {config.NEED} needed"
    else:
        chosen = sizing.for_shape(config, shape.size)
        reason = sizing.comparison(shape.size, chosen)
    seen = f"images are {sizing.written(shape.size)}: the network sees {sizing.written(chosen)}"
    return dataclasses.replace(config, image_size=chosen), f"{seen} ({reason})"


def refuse_another_size(start: Bundle | None, config: Config) -> None:
    """Raise ConfigError if an earlier model's weights depend on its image size and the run has another."""
    if start is None or "image_size" not in config.FIXED:
        return
    earlier = start.manifest.preprocessing.image_size
    if config.image_size != earlier:
        raise ConfigError(
            f"image size {sizing.written(config.image_size)}: the weights in {start.path} were trained with "
            f"{sizing.written(earlier)}, which cannot be changed"
        )


def refuse_length(request: TrainingRequest, model: str, method: Method) -> None:
    """Raise ConfigError for a length, schedule or checkpoint if the method is fitted without steps."""
    if method.has_steps:
        return
    asked = list(request.length.given)
    unused = {name: getattr(method.config, name) for name in OF_STEPS}
    given = request.settings
    asked += [name for name in unused if name in given and str(given[name]) != str(unused[name])]
    asked += ["schedule"] * (request.schedule != "default") + ["resume"] * request.resume
    if asked:
        raise ConfigError(f"{' and '.join(asked)}: {model} is fitted in one pass; expected none of them")


def warm_length(config: Config) -> Length:
    """Return the length of a warm start."""
    whole = {"epochs": config.epochs} if config.epochs else {"steps": config.steps}
    return Length(**{name: math.ceil(WARM_SHARE * count) for name, count in whole.items() if count})


def seen_images(start: Bundle | None) -> frozenset[str]:
    """Return short digests of the images that an earlier model was trained on, and of those before it."""
    if start is None:
        return frozenset()
    files = start.manifest.training.files
    if files is None:
        LOG.warning(
            "%s does not record its training images: the test set may contain some of them", start.path
        )
        return frozenset()
    return frozenset((*files.train, *files.before))


def warn_of_missing(start: Bundle, digests: Collection[str]) -> None:
    """Warn if images that an earlier model learned from are missing from these digests."""
    here = {each[:SHORT_DIGEST] for each in digests}
    trained = start.manifest.training.files.train if start.manifest.training.files else ()
    missing = sum(name not in here for name in trained)
    if missing:
        LOG.warning(
            "%d of the %d images that %s learned from are missing from the training images: include them, "
            "or the model may forget what it learned from them",
            *(missing, len(trained), start.path),
        )


def find_copies(parts: Split, of: Callable[[Path], str] = digest) -> frozenset[int]:
    """Return the indices of good training images that are byte-for-byte copies of held-out ones.

    of: returns the digest of an image file.
    """
    held_out = {of(sample.path) for sample in parts.held_out}
    return frozenset(number for number, sample in enumerate(parts.train) if of(sample.path) in held_out)


def find_repeated(parts: Split, of: Callable[[Path], str] = digest) -> frozenset[int]:
    """Return the indices of good training images that are byte-for-byte copies of one before them."""
    first: dict[str, int] = {}
    for number, sample in enumerate(parts.train):
        first.setdefault(of(sample.path), number)
    return frozenset(range(len(parts.train))) - frozenset(first.values())


def drop_copies(planned: Plan, left_out: frozenset[int], of: str = "held-out ones") -> Plan:
    """Return a plan without the good training images at these indices, and warn what they are copies of.

    Raises DataError where that leaves none.
    """
    if not left_out:
        return planned
    if len(left_out) == len(planned.parts.train):
        raise DataError(
            f"all {len(left_out)} good training images are copies of held-out ones; expected others to learn "
            "from"
        )
    LOG.warning("%d training images are copies of %s and are left out", len(left_out), of)
    train = tuple(sample for number, sample in enumerate(planned.parts.train) if number not in left_out)
    return dataclasses.replace(planned, parts=dataclasses.replace(planned.parts, train=train))


def without_empty_masks(parts: Split) -> Split:
    """Drop masks without a marked pixel from training defects: they do not show where the defect is."""
    defects = tuple(
        dataclasses.replace(sample, masks=()) if all(map(images.mask_is_empty, sample.masks)) else sample
        for sample in parts.train_defects
    )
    emptied = [old for old, new in zip(parts.train_defects, defects, strict=True) if old.masks != new.masks]
    if emptied:
        LOG.warning(
            "ignoring the empty masks of %d training defects; the first is %s", len(emptied), emptied[0].path
        )
    return dataclasses.replace(parts, train_defects=defects)


def choose_images(request: TrainingRequest, trained: Collection[str], method: Method) -> Split:
    """Scan and split a data set.

    trained: short digests of the images that an earlier model was trained on. They must not be held out now,
    and a method without steps, which remembers what it was fitted to, is not fitted to them again. Raises
    DataError if there are too few good images to hold any out, or no new ones.
    """
    root = request.data
    samples: Sequence[Sample] = data.scan(root, request.layout)
    if request.fold is not None:
        samples = assign_fold(samples, root, request.fold)
    seen = {sample.path for sample in samples if trained and short_digest(sample.path) in trained}
    parts = split(samples, root, trained=seen, hold_out=not method.leaves_one_out)
    if seen and not method.has_steps:
        new = tuple(sample for sample in parts.train if sample.path not in seen)
        if not new:
            count = len(parts.train)
            raise DataError(
                f"{request.start} was fitted to all {count} good images in {root} already; expected new ones"
            )
        parts = dataclasses.replace(parts, train=new)
    if len(parts.held_out) < 2 and not (method.leaves_one_out and not parts.held_out):
        good = len(parts.train) + len(parts.held_out)
        raise DataError(
            f"found {good} good images in {root}, {len(parts.held_out)} of them held out for the thresholds; "
            "expected at least 4, of which 2 are held out"
        )
    return parts
