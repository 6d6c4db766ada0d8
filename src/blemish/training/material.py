"""What a run learns from: images read once, their features, and batches of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blemish import __version__, images
from blemish.data.loading.batches import Batches, NaturalImages, Photographs
from blemish.data.loading.cache import FeatureCache, Memory, open_cache
from blemish.data.loading.masks import read_masks
from blemish.data.loading.sampling import FLIPS
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.data.loading.textures import Textures
from blemish.detectors.base import Detector
from blemish.errors import ConfigError
from blemish.images import Preprocessing
from blemish.images.light import Light, measure
from blemish.progress import Report, Stop, never, silent, tell, tracked
from blemish.training import fingerprint
from blemish.training.plan import Plan, drop_copies, find_copies, find_repeated, warn_of_missing
from blemish.training.request import TrainingRequest


@dataclass(frozen=True)
class Material:
    """The images, features and batches of a run."""

    store: ImageStore
    """Training images, in the order of the plan's samples."""
    held: ImageStore
    """Held-out good images."""
    encoded_held: EncodedStore
    features: FeatureCache
    batches: Batches


def read_images(
    planned: Plan, memory: Memory, report: Report, stop: Stop = never
) -> tuple[Plan, ImageStore, ImageStore]:
    """Read every training and held-out image once, to decode and digest it at the same time.

    Returns the plan without training images that are copies of held-out ones or, where each is scored without
    itself, of one another; and the stores of training and held-out images.
    """
    samples, held_out = planned.samples, planned.parts.held_out
    preprocessing = Preprocessing(planned.config.image_size, images.FULL_SCALE)
    for reason in (planned.reason, planned.size_reason):
        if reason:
            tell(report, reason)
    tell(report, f"reading {len(samples)} training and {len(held_out)} held-out good images")
    store = ImageStore([sample.path for sample in samples], preprocessing, memory).fill(stop)
    held = ImageStore([sample.path for sample in held_out], preprocessing, memory).fill(stop)
    digests = digests_of(store) | digests_of(held)
    left_out = find_copies(planned.parts, digests.__getitem__)
    planned, store = drop_copies(planned, left_out), store.without(left_out) if left_out else store
    if planned.method.leaves_one_out:  # each of two copies would be scored with the other
        repeated = find_repeated(planned.parts, digests.__getitem__)
        planned, store = drop_copies(planned, repeated, "others"), store.without(repeated)
    tell(report, planned.description)
    if planned.start is not None and planned.method.has_steps:
        warn_of_missing(planned.start, digests_of(store).values())
    deepest = max([*store.maxima.values(), *held.maxima.values()], default=0)
    white = images.white_level(deepest) if deepest else images.FULL_SCALE
    # What is remembered was seen with the earlier model's white level and light.
    earlier = None if planned.grown_from is None else planned.grown_from.manifest.preprocessing
    for each in (store, held):
        each.set_white(white if earlier is None else earlier.white)
    if planned.light != "off":
        known = None if earlier is None else earlier.light
        light = known or measure_light(store, len(planned.parts.train), stop)
        for each in (store, held):
            each.set_light(light)
    return planned, store, held


def measure_light(store: ImageStore, good: int, stop: Stop) -> Light:
    """Measure the light of the training images, of which the first are good."""
    inputs = (store.inputs(index)[0] for index in range(good))
    return measure(tracked(inputs, good, silent, "measuring light", stop=stop))


def digests_of(store: ImageStore) -> dict[Path, str]:
    """Return the digests of a store's files, by path."""
    return {path: store.digest(index) for index, path in enumerate(store.paths)}


def assemble(
    request: TrainingRequest,
    planned: Plan,
    detector: Detector,
    store: ImageStore,
    held: ImageStore,
    natural: NaturalImages | None,
    pretrained: str,
    device: str,
) -> Material:
    """Assemble what the run learns from; pretrained: the digest of the frozen part's weights."""
    config, rules = planned.config, detector.label_rules
    made_of: list[Any] = [str(torch.__version__), __version__, pretrained, *detector.encoding_key]
    made_of += [*config.image_size, held.preprocessing.white, device]
    if (light := held.preprocessing.light) is not None:
        made_of += [light.mean, light.deviation, light.gain_limits, light.offset_limit]
    features = open_cache(request.cache, request.out, request.memory, made_of)
    encode = detector.encode if detector.frozen else None
    batches = Batches(
        planned.samples,
        store,
        EncodedStore(encode, store, features, device),
        batch_size=config.batch_size,
        seed=request.seed,
        with_images=detector.wants_images,
        natural=natural,
        masks=read_masks(planned.samples, config.image_size, rules),
        flips=FLIPS if rules.flips else 1,
    )
    return Material(store, held, EncodedStore(encode, held, features, device), features, batches)


def open_natural(
    request: TrainingRequest, detector: Detector, memory: Memory, report: Report
) -> NaturalImages | None:
    """Open the natural images for the pretraining penalty, or report that the penalty is off.

    Raises ConfigError for a folder without images, and for a choice of images where there is no penalty.
    """
    chosen, size = request.natural_images, detector.config.image_size
    if not detector.config.reads_natural_images:
        if chosen != "drawn":
            raise ConfigError(f"natural images {chosen}: this run has no pretraining penalty; leave it out")
        return None
    if chosen == "none":
        tell(report, "natural images none: the pretraining penalty is off")
        return None
    if chosen == "drawn":
        return Textures(size, request.seed)
    folder = Path(chosen)
    if not folder.is_dir():
        raise ConfigError(
            f"found no folder at {folder}; expected a folder of photographs for the pretraining penalty"
        )
    paths = images.list_images(folder, recursive=True)
    if not paths:
        raise ConfigError(f"no images in {folder}; expected photographs for the pretraining penalty")
    store = ImageStore(paths, Preprocessing(size, images.FULL_SCALE), memory, crop=True)
    return Photographs(store, request.seed, fingerprint.digest_names(paths))


def encode_all(material: Material, report: Report, stop: Stop) -> Iterator[tuple[Tensor, ...]]:
    """Run the frozen part over every entry of an epoch; yield those of good images, as batches of one."""
    batches = material.batches
    chosen = [
        (index, flip)
        for index, label in enumerate(batches.labels)
        for flip in range(batches.flips if label else 1)
    ]
    for index, flip in tracked(chosen, len(chosen), report, "encoding", stop=stop):
        entry = batches.encoded.batch([(index, flip)])
        if not batches.labels[index]:
            yield entry
    tell(report, f"feature cache: {material.features.describe()}")
