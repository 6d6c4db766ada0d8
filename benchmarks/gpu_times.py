"""What `gpu.py` times: inference by the papers' protocol, in every form and precision.

One image that lies resized on the host; a run copies it to the device, computes, and copies map and
statistics back, which waits for the device (EfficientAD's supplement). The throughput is that of batches.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_job import REFUSED, Job, arithmetic, blueprint, in_a_line, random_weights
from gpu_learning import learn
from safetensors.torch import save

from blemish.benchmark.run import LATENCY_SHARE, Burst, burst
from blemish.detectors import registry
from blemish.detectors.base import Detector
from blemish.detectors.fusing import Lowered
from blemish.detectors.settings import as_json
from blemish.images import FULL_SCALE, Preprocessing
from blemish.inference import bundle
from blemish.inference.bundle import Bundle
from blemish.inference.choice import Choice
from blemish.inference.engines import Engine, open_engine
from blemish.inference.engines.plain import PlainTorch
from blemish.inference.engines.pytorch import DTYPES, PyTorch, restored
from blemish.inference.manifest import Manifest
from blemish.types import FloatArray

FORMS = {
    "plain": "the method's own network, as a peer ships it, each operation launched by itself",
    "fused": "the network that a model file runs, launched operation by operation",
    "graph": 'that, as one recorded CUDA graph: what `blemish.load(..., device="cuda")` runs',
    "searched": "that graph, recorded with the fastest of cuDNN's algorithms",
    "compiled": "that graph, with kernels made by torch.compile",
}
"""The forms in which a network runs."""
USUAL = ("plain", "fused", "graph")
Figures = dict[str, Any]


@functools.cache
def networks(method: str) -> tuple[str, ...]:
    """Return the method's presets whose networks differ from one another, the default first.

    Networks are the same where all tensors have the same shapes and the images the same size.
    """
    found: dict[tuple[Any, ...], str] = {}
    presets = registry.method(method).presets
    for preset in sorted(presets, key=lambda name: name != "default"):
        detector = blueprint(method, registry.configure(method, preset))
        shapes = tuple((name, tuple(value.shape)) for name, value in detector.state_dict().items())
        found.setdefault((detector.config.image_size, shapes), preset)
    return tuple(found.values())


def opened(job: Job, method: str, preset: str) -> Bundle:
    """Return a method's model file or, for another preset or without one, a model of random frozen weights.

    The time does not depend on the weights; that of a fitted method depends on how many images it was fitted
    to.
    """
    if preset == "default" and job.model(method).is_file():
        return bundle.read(job.model(method))
    with random_weights():
        detector = learn(
            *(job, method, job.device),
            data=job.few if registry.method(method).has_steps else job.parts,
            preset=preset,
            same_draws=False,
            steps=1 if registry.method(method).has_steps else None,
        ).detector
    return unfinished(method, detector)


def unfinished(method: str, detector: Detector) -> Bundle:
    """Return what a model file of a detector would hold, without graph and thresholds."""
    size = detector.config.image_size
    manifest = Manifest.untrained(
        method, as_json(detector.config), Preprocessing(size, FULL_SCALE), detector.outputs
    )
    state = {key: value.contiguous() for key, value in detector.state_dict().items()}
    return Bundle(Path(method), manifest, save(state), b"")


def engine(model: Bundle, detector: Detector, device: str, name: str) -> Engine:
    """Return what runs a model as a variant, FORM:PRECISION."""
    form, precision = name.split(":")
    known = "fp32" if precision == "tf32" else precision
    if form in ("plain", "fused"):
        network = detector if form == "plain" else detector.fused()
        lowered = Lowered(network, DTYPES[known])
        choice = Choice("torch", "fp32", device)  # the layers' own type is that of the weights
        return PlainTorch(lowered, detector.outputs, choice, channels_last=form == "fused")
    return open_engine(model, Choice("torch", known, device, compiled=form == "compiled"))


def inference(
    job: Job,
    method: str,
    preset: str,
    found: Figures,
    seconds: float,
    forms: Sequence[str] = USUAL,
    precisions: Sequence[str] = (),
) -> Figures:
    """Time one network of a method within so many seconds, in every form and precision, into `found`.

    The latency is measured in rounds in which all take turns, the throughput of one after the other: recorded
    graphs of large batches need not fit on the card together. precisions: empty for all of the job's.
    """
    start = time.monotonic()
    model = opened(job, method, preset)
    detector = restored(model)
    height, width = model.manifest.preprocessing.image_size
    images = np.random.default_rng(0).random((max(job.batches), 3, height, width), np.float32)
    ready: dict[str, Engine] = {}
    variants: dict[str, Figures] = {}
    found |= {"preset": preset, "input": [height, width], "variants": variants}
    found["numbers"] = sum(value.numel() for value in detector.state_dict().values())
    for name in (f"{form}:{precision}" for form in forms for precision in precisions or job.precisions):
        variants[name] = {}
        try:
            with switches(name):
                opened_engine = engine(model, detector, job.device, name)
                opened_engine.run(images[:1])
                ready[name] = opened_engine
        except REFUSED as error:
            variants[name]["error"] = in_a_line(error)
    found["prepared_seconds"] = time.monotonic() - start
    share = max(0.0, seconds - found["prepared_seconds"]) / max(1, len(ready))
    rounds: dict[str, list[list[float]]] = {name: [] for name in ready}
    with uncollected():
        try:
            latencies(job, ready, images[:1], LATENCY_SHARE * share, rounds)
        finally:  # also where time is up
            for name, taken in rounds.items():
                variants[name] |= latency_figures(taken) if taken else {}
        for name in list(ready):
            variants[name] |= throughput(job, name, ready.pop(name), images, (1 - LATENCY_SHARE) * share)
    return found


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Let Python look for unused objects before what is timed, and not meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def switches(name: str) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a variant is opened and run."""
    form, precision = name.split(":")
    return arithmetic(precision, searched=form == "searched")


def latencies(
    job: Job,
    ready: Mapping[str, Engine],
    image: FloatArray,
    seconds: float,
    found: Mapping[str, list[list[float]]],
) -> None:
    """Add the seconds of every run of one image to `found`, by variant and round.

    seconds: for each variant over all rounds.
    """
    wanted = Burst(1, job.warm_up, job.runs, seconds / job.rounds)
    for _ in range(job.rounds):
        for name, each in ready.items():
            with switches(name):
                found[name].append(burst(each, image, wanted))


def latency_figures(rounds: Sequence[Sequence[float]]) -> Figures:
    """Return the latency in milliseconds: over all runs, and the mean and deviation of the rounds' means."""
    every = 1e3 * np.array([second for one in rounds for second in one])
    means = [1e3 * statistics.fmean(one) for one in rounds]
    return {
        "median_ms": float(np.median(every)),
        "p95_ms": float(np.quantile(every, 0.95)),
        "mean_ms": statistics.fmean(means),
        "deviation_ms": statistics.stdev(means) if len(means) > 1 else 0.0,
        "runs": len(every),
    }


def throughput(job: Job, name: str, engine: Engine, images: FloatArray, seconds: float) -> Figures:
    """Return the images a second at each batch size, and the most; seconds: for all sizes."""
    rates: dict[str, float] = {}
    found: Figures = {"images_a_second": rates}
    for size in job.batches:
        wanted = Burst(size, job.warm_up, job.runs, seconds / len(job.batches))
        try:
            with switches(name):
                engine.run(images[:size])  # records the graph of this size
                runs = burst(engine, images[:size], wanted)
        except REFUSED as error:
            found[f"error_at_{size}"] = in_a_line(error)
        else:
            rates[str(size)] = size * len(runs) / sum(runs)
        if isinstance(engine, PyTorch):
            engine.recorded.pop(size, None)
        if job.device == "cuda":
            torch.cuda.empty_cache()
    return found | {"best": max(rates.values(), default=None)}


def release(device: str) -> None:
    """Give the memory of what is no longer used back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
