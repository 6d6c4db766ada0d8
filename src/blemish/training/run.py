"""From a data set to a model file: assemble what the training loop needs, and finalise the result."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from blemish import __version__, data, images, seeding
from blemish.backbones import weights
from blemish.data.folds import record
from blemish.data.loading.batches import Batches, Epoch, NaturalImages, Photographs
from blemish.data.loading.cache import FeatureCache, Memory, check_cache, open_cache
from blemish.data.loading.masks import read_masks
from blemish.data.loading.sampling import FLIPS
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.data.loading.textures import Textures
from blemish.detectors import registry
from blemish.detectors.base import Detector
from blemish.detectors.settings import as_json
from blemish.devices import choose_device, choose_precision, keep_freed_memory
from blemish.errors import ConfigError, ModelFileError
from blemish.files import SHORT_DIGEST, check_writable, digest, to_json_types
from blemish.images import Preprocessing
from blemish.inference.bundle import Bundle
from blemish.inference.predictor import Predictor
from blemish.progress import Report, Stop, never, silent, tell, tracked
from blemish.training import fingerprint, loop
from blemish.training.finalise import finalise
from blemish.training.loop import Run
from blemish.training.plan import Plan, drop_copies, find_copies, plan, warn_of_missing
from blemish.training.request import TrainingRequest
from blemish.training.session import checkpoint_path, start_or_resume


def train(
    data: str | Path, *, out: str | Path, report: Report = silent, stop: Stop = never, **options: Any
) -> Predictor:
    """Train a detector on a data set, calibrate it on held-out good images, and write the model file `out`.

    options: the other fields of `TrainingRequest`, such as model, settings, steps, seed or resume. report:
    receives an Event for each step and message. stop: is called before each image that is read or encoded,
    and after each step; once it returns true, the run raises StoppedError. From the first step on, it writes
    a checkpoint before, from which `resume` continues to the same weights. Both are called on the thread
    that trains. Raises a BlemishError for anything that a user can fix, as
    early as possible.
    """
    return run(TrainingRequest(data=Path(data), out=Path(out), **options), report=report, stop=stop)


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


def run(request: TrainingRequest, *, report: Report = silent, stop: Stop = never) -> Predictor:
    """Carry out a training request; see `train`."""
    started = time.monotonic()
    device = choose_device(request.device)
    check_writable(request.out)
    checkpoint = checkpoint_path(request.out, request.resume)
    check_cache(request.cache)
    keep_freed_memory()
    planned = plan(request)
    dtype = training_precision(request.precision, planned.preset, device)
    detector = registry.build(planned.model, planned.config, request.seed)
    pretrained = load_weights(detector, planned.start, request.weights)
    detector.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward_seconds = time_one_image(detector, device)
    memory = Memory(request.memory)
    natural = open_natural(request, detector, memory, report)
    planned, store, held = read_images(planned, memory, report, stop)
    material = assemble(request, planned, detector, store, held, natural, pretrained, device)
    identity = fingerprint_of(planned, material, natural) | {
        "seed": request.seed,
        "precision": str(dtype).removeprefix("torch."),
        "white": held.preprocessing.white,
        "device": device,
        "pretrained": pretrained,
    }
    facts = training_facts(request, planned, material)
    if planned.method.has_steps:
        session = Run(
            detector=detector,
            optimizer=detector.optimizer(),
            batches=material.batches,
            held_out=material.encoded_held,
            seed=request.seed,
            device=device,
            dtype=dtype,
            path=checkpoint,
            clock=started,
            fingerprint=identity,
            report=report,
            stop=stop,
        )
        # Every held-out image is scored for the quantiles, the graph's check (twice) and the thresholds;
        # the rest is for the export.
        reserve = 15.0 + forward_seconds * (6 * len(held.paths) + detector.settles_on)
        learned = take_steps(session, material, planned, request.resume, reserve)
    else:
        learned = fit(detector, material, request.seed, device, identity, started, report, stop)
    opened = finalise(request.out, detector, held, learned | facts, request.false_reject_rate, report)
    checkpoint.unlink(missing_ok=True)
    material.features.clear()
    return opened


def training_precision(precision: str, preset: str, device: str) -> torch.dtype:
    """Return the type that training computes in."""
    # The papers trained in float32, and their noise is close to bfloat16's rounding errors.
    faithful = preset != "default" and precision == "auto"
    return choose_precision("fp32" if faithful else precision, device)


def read_images(
    planned: Plan, memory: Memory, report: Report, stop: Stop = never
) -> tuple[Plan, ImageStore, ImageStore]:
    """Read every training and held-out image once, to decode and digest it at the same time.

    Returns the plan without training images that are copies of held-out ones, and the stores of training and
    held-out images.
    """
    samples, held_out = planned.samples, planned.parts.held_out
    preprocessing = Preprocessing(planned.config.image_size, images.FULL_SCALE)
    tell(report, f"reading {len(samples)} training and {len(held_out)} held-out good images")
    store = ImageStore([sample.path for sample in samples], preprocessing, memory).fill(stop)
    held = ImageStore([sample.path for sample in held_out], preprocessing, memory).fill(stop)
    digests = digests_of(store) | digests_of(held)
    left_out = find_copies(planned.parts, digests.__getitem__)
    planned, store = drop_copies(planned, left_out), store.without(left_out) if left_out else store
    tell(report, planned.description)
    if planned.start is not None:
        warn_of_missing(planned.start, digests_of(store).values())
    deepest = max([*store.maxima.values(), *held.maxima.values()], default=0)
    for each in (store, held):
        each.set_white(images.white_level(deepest) if deepest else images.FULL_SCALE)
    return planned, store, held


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
    made_of = [str(torch.__version__), __version__, pretrained, *detector.encoding_key, *config.image_size]
    features = open_cache(
        request.cache, request.out, request.memory, [*made_of, held.preprocessing.white, device]
    )
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


def fingerprint_of(planned: Plan, material: Material, natural: NaturalImages | None) -> dict[str, Any]:
    """Return what identifies a run: its settings, its images with their labels, and the versions."""
    return {
        "model": planned.model,
        "preset": planned.preset,
        "supervision": planned.supervision,
        "config": as_json(planned.config),
        "images": fingerprint.digest_samples(planned.samples, digests_of(material.store).__getitem__),
        "held_out": fingerprint.digest_all(digests_of(material.held).values()),
        "natural_images": natural.digest if natural else "none",
        "from": fingerprint.digest_start(planned.start),
        "torch": str(torch.__version__),
        "blemish": __version__,
    }


def training_facts(request: TrainingRequest, planned: Plan, material: Material) -> dict[str, Any]:
    """Return what the model file records about the images that it was trained on."""
    fold, labels = request.fold, material.batches.labels
    dealt = None if fold is None else record(fold, data.scan(request.data, request.layout), request.data)
    return {
        "data": request.data.resolve().name,
        "good_images": labels.count(0),
        "defective_images": labels.count(1),
        "masked_images": len(material.batches.masks),
        "held_out_images": len(material.held.paths),
        "fold": to_json_types(dealt),
        "files": {
            "train": [each[:SHORT_DIGEST] for each in digests_of(material.store).values()],
            "held_out": [each[:SHORT_DIGEST] for each in digests_of(material.held).values()],
            "before": sorted(planned.seen),
        },
    }


def load_weights(detector: Detector, start: Bundle | None, given: Path | None) -> str:
    """Load a detector's pretrained weights or, for a warm start, all that an earlier model shares with it.

    What the earlier model lacks, such as a classification head, keeps its initial weights. Returns the digest
    of the pretrained weights. Raises WeightsError for weights that are missing or do not fit, ModelFileError
    for a model that does not fit, and ConfigError for weights that would not be used.
    """
    if start is not None:
        if given is not None:
            raise ConfigError(
                f"found --weights {given} with --from: pretrained weights come from {start.path}"
            )
        take_earlier(detector, start)
        return start.manifest.training.run.pretrained
    if not detector.frozen:
        if given is not None:
            raise ConfigError(f"found --weights {given} for a method without pretrained weights")
        return ""
    source = weights.find(detector.pretrained_name, given)
    detector.load_pretrained(source)
    return fingerprint.digest_all([digest(source)])


def take_earlier(detector: Detector, start: Bundle) -> None:
    """Load all that a detector shares with an earlier model; raise ModelFileError if it does not fit."""
    stored = load_tensors(start.weights)
    registry.resize_fitted_buffers(detector, stored)
    state = detector.state_dict()
    earlier = {name: stored[name] for name in stored.keys() & state.keys() - detector.config_buffers}
    for name, value in earlier.items():
        if state[name].shape != value.shape:
            raise ModelFileError(
                f"{name} in {start.path} is {tuple(value.shape)}; with these settings it would be "
                f"{tuple(state[name].shape)}"
            )
    detector.load_state_dict({name: earlier.get(name, value) for name, value in state.items()})


def time_one_image(detector: Detector, device: str) -> float:
    """Score one empty image and return the seconds taken; raise ConfigError for incompatible settings."""
    height, width = detector.config.image_size
    begun = time.monotonic()
    try:
        with torch.no_grad():
            detector.eval()(torch.zeros(1, 3, height, width, device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"these settings cannot be combined at {height}x{width}: {reason}") from error
    return time.monotonic() - begun


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


def take_steps(run: Run, material: Material, planned: Plan, resume: bool, reserve: float) -> dict[str, Any]:
    """Train in steps, from the start or the checkpoint; return the facts about it that the file records.

    reserve: seconds of a budget to keep for what follows the steps.
    """
    warm = planned.start is not None
    start_or_resume(run, planned.length, resume, lambda: reserve, partial(prepare, run, material, warm))
    loop.loop(run)
    settle(run, material)
    return loop.provenance(run)


def prepare(run: Run, material: Material, warm: bool) -> None:
    """Encode all images, and let the detector measure what it needs on the good ones.

    warm: whether that is already known from an earlier model.
    """
    if not run.detector.frozen:
        return
    entries = encode_all(material, run.report, run.stop)
    if warm:
        collections.deque(entries, 0)  # only to fill the cache
    elif note := run.detector.prepare(entries):
        run.notes.append(note)
        tell(run.report, note)


def settle(run: Run, material: Material) -> None:
    """Let the trained detector measure what scoring needs on good training images, evenly spaced."""
    good = [index for index, label in enumerate(material.batches.labels) if not label]
    count = min(len(good), run.detector.settles_on)
    if not count:
        return
    chosen = [good[place * len(good) // count] for place in range(count)]
    entries = (material.batches.encoded.batch([(index, 0)]) for index in chosen)
    run.detector.settle(tracked(entries, count, run.report, "settling"))


def fit(
    detector: Detector,
    material: Material,
    seed: int,
    device: str,
    identity: dict[str, Any],
    started: float,
    report: Report,
    stop: Stop,
) -> dict[str, Any]:
    """Fit a detector in one pass, without steps; return the facts about it that the model file records."""
    with torch.no_grad():
        note = detector.fit(
            Epoch(material.batches, report, stop), seeding.generator(seed, "fit", device=device)
        )
    if note:
        tell(report, note)
    return {
        "pretrained": detector.pretrained_name,
        "steps": 0,
        "epochs": 1.0,
        "seconds": round(time.monotonic() - started, 1),
        "device": device,
        "threads": torch.get_num_threads(),
        "notes": [note] if note else [],
        "history": [],
        "run": identity,
    }
