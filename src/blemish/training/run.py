"""From a data set to a model file: assemble what the training loop needs, and finalise the result."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from blemish import __version__, data, seeding
from blemish.backbones import weights
from blemish.data.folds import record
from blemish.data.loading.batches import NaturalImages, Pass
from blemish.data.loading.cache import Memory, check_cache
from blemish.data.loading.stores import ImageStore
from blemish.data.split import relative_path
from blemish.detectors import registry
from blemish.detectors.base import Detector
from blemish.detectors.settings import as_json
from blemish.devices import choose_device, choose_precision, keep_freed_memory
from blemish.errors import ConfigError, ModelFileError
from blemish.files import SHORT_DIGEST, check_writable, digest, to_json_types
from blemish.inference import calibration
from blemish.inference.bundle import Bundle
from blemish.inference.engines import Engine
from blemish.inference.predictor import Predictor
from blemish.progress import Report, Stop, never, silent, tell, tracked
from blemish.training import fingerprint, joining, loop
from blemish.training.finalise import COMPARED, finalise, from_held_out, from_left_out
from blemish.training.loop import Run
from blemish.training.material import Material, assemble, digests_of, encode_all, open_natural, read_images
from blemish.training.plan import Plan, plan
from blemish.training.request import TrainingRequest
from blemish.training.session import checkpoint_path, start_or_resume
from blemish.types import Calibration, LightCalibration


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


LEFT_OUT = 1000
"""Training images, at most, from which thresholds are set by scoring each without itself."""


def run(request: TrainingRequest, *, report: Report = silent, stop: Stop = never) -> Predictor:
    """Carry out a training request; see `train`."""
    if registry.is_joined(request.model):
        return joining.run(request, run, report=report, stop=stop)
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
        settled = min(detector.settles_on, material.batches.labels.count(0))
        reserve = 15.0 + forward_seconds * (6 * len(held.paths) + settled)
        learned = take_steps(session, material, planned, request.resume, reserve)
    else:
        learned = fit(detector, material, request.seed, device, identity, started, report, stop)
    good, calibrate = thresholds(request, planned, detector, material, report, stop)
    light = light_thresholds(request, planned, material)
    opened = finalise(request.out, detector, good, learned | facts, calibrate, light, report)
    checkpoint.unlink(missing_ok=True)
    material.features.clear()
    return opened


def thresholds(
    request: TrainingRequest,
    planned: Plan,
    detector: Detector,
    material: Material,
    report: Report,
    stop: Stop,
) -> tuple[ImageStore, Callable[[Engine], Calibration]]:
    """Return good images to finish and compare the detector on, and how its thresholds are set."""
    rate, held, store = request.false_reject_rate, material.held, material.store
    if held.paths:
        return held, lambda graph: from_held_out(graph, held, detector.config.statistics, rate)
    scored = Pass(material.batches, report, stop, "scoring each without itself", LEFT_OUT)
    earlier = None if planned.grown_from is None else planned.grown_from.manifest.calibration
    found = from_left_out(detector, scored, rate, earlier)
    return store.without(frozenset(range(COMPARED, len(store.paths)))), lambda graph: found


def light_thresholds(request: TrainingRequest, planned: Plan, material: Material) -> LightCalibration | None:
    """Return the light of the good images behind the thresholds, if light is standardised."""
    scores = (material.held if material.held.paths else material.store).light_scores()
    if planned.grown_from is not None and (earlier := planned.grown_from.manifest.light_calibration):
        scores += earlier.scores
    return calibration.fit_light(scores, request.light_limit) if scores else None


def training_precision(precision: str, preset: str, device: str) -> torch.dtype:
    """Return the type that training computes in."""
    # The papers trained in float32, and their noise is close to bfloat16's rounding errors.
    faithful = preset != "default" and precision == "auto"
    return choose_precision("fp32" if faithful else precision, device)


def fingerprint_of(planned: Plan, material: Material, natural: NaturalImages | None) -> dict[str, Any]:
    """Return what identifies a run: its settings, its images with their labels, and the versions."""
    return {
        "model": planned.model,
        "preset": planned.preset,
        "supervision": planned.supervision,
        "light": planned.light,
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
            "names": names_of(request, planned, material) if planned.method.leaves_one_out else {},
        },
    }


def names_of(request: TrainingRequest, planned: Plan, material: Material) -> dict[str, str]:
    """Return the paths of the training images, relative to their data set, by short digest."""
    earlier = planned.start.manifest.training.files if planned.start is not None else None
    return (earlier.names if earlier else {}) | {
        digest[:SHORT_DIGEST]: relative_path(path, request.data)
        for path, digest in digests_of(material.store).items()
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


def take_steps(run: Run, material: Material, planned: Plan, resume: bool, reserve: float) -> dict[str, Any]:
    """Train in steps, from the start or the checkpoint; return the facts about it that the file records.

    reserve: seconds of a budget to keep for what follows the steps.
    """
    warm = planned.start is not None
    start_or_resume(run, planned.length, resume, lambda: reserve, partial(prepare, run, material, warm=warm))
    loop.loop(run)
    settle(run, material)
    return loop.provenance(run)


def prepare(run: Run, material: Material, *, warm: bool) -> None:
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
    entries = ([(index, 0)] for index in chosen)
    batches = (material.batches.of(each, material.batches.images(each)) for each in entries)
    run.detector.settle(tracked(batches, count, run.report, "settling", stop=run.stop))


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
        copies = detector.config.altered_copies
        note = detector.fit(
            Pass(material.batches, report, stop, copies=copies), seeding.generator(seed, "fit", device=device)
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
