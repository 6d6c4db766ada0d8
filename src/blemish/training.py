"""The one training loop: from a folder of good images to a model file.

Every random draw comes from (seed, purpose, step), so a run that is killed and resumed ends in the same bytes
as one that was not.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from blemish import checkpoint, data, images, ops
from blemish._version import __version__
from blemish.backbones import weights
from blemish.bundle import Bundle
from blemish.calibrate import check_shares
from blemish.data.cache import FeatureCache, Memory
from blemish.data.folds import Fold, record
from blemish.data.loading import Batches, EncodedStore, ImageStore
from blemish.data.masks import read_masks
from blemish.data.sampling import FLIPS
from blemish.detectors import as_json, build
from blemish.detectors.base import SCHEDULES, Detector
from blemish.errors import ConfigError, ModelFileError, StoppedError
from blemish.files import check_folder, check_writable, short_digest
from blemish.hardware import choose_device, choose_precision, keep_freed_memory
from blemish.preflight import (
    Labels,
    Length,
    check_length,
    digest_all,
    digest_names,
    open_natural,
    seconds,
    settle,
    try_out,
)
from blemish.progress import Progress, say
from blemish.runtime import Predictor
from blemish.seal import seal

HISTORY = 100
"""Points of the loss curve that a model file keeps."""
CHECKPOINT_SECONDS = 60.0
PROBE_SECONDS = 10.0
SETTLED = 100
"""Steps before which a detector's state on held-out images says nothing yet."""
CARRIED = ("step", "steps", "seconds", "history", "pending", "notes")
"""Fields of a run that a checkpoint carries beside parameters and the optimiser's state."""


@dataclass
class Run:
    """A training run in progress."""

    detector: Detector
    optimizer: torch.optim.Optimizer
    batches: Batches
    held_out: EncodedStore
    seed: int
    device: str
    dtype: torch.dtype
    path: Path
    """Where checkpoints go."""
    fingerprint: dict[str, Any]
    """What two runs must have in common for one to go on where the other stopped."""
    clock: float = dataclasses.field(default_factory=time.monotonic)
    """When time was last added to `seconds`."""
    seconds: float = 0.0
    """Wall time spent, that of earlier parts of an interrupted run included."""
    step: int = 0
    steps: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    pending: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Losses since the last point of the history."""
    notes: list[str] = dataclasses.field(default_factory=list)

    def save(self) -> None:
        """Write a checkpoint."""
        self.seconds, self.clock = self.seconds + time.monotonic() - self.clock, time.monotonic()
        header = {name: getattr(self, name) for name in CARRIED} | {"run": self.fingerprint}
        checkpoint.save(self.path, self.detector, self.optimizer, header)

    def restore(self, header: Mapping[str, Any]) -> None:
        """Go back to a checkpoint whose header was read."""
        for name in CARRIED:
            setattr(self, name, header[name])
        checkpoint.load(self.path, self.detector, self.optimizer)


def encode_all(batches: Batches) -> Iterator[tuple[Tensor, ...]]:
    """Run the frozen part over every entry of an epoch, and give those of good images as batches of one."""
    chosen = [
        (index, flip)
        for index, label in enumerate(batches.labels)
        for flip in range(batches.flips if label else 1)
    ]
    progress = Progress("encoding", len(chosen), unit="image")
    for number, (index, flip) in enumerate(chosen):
        entry = batches.encoded.batch([(index, flip)])
        progress.show(number + 1)
        if not batches.labels[index]:
            yield entry
    say(f"features kept: {batches.encoded.cache.describe()}")


def one_step(run: Run, step: int) -> dict[str, float]:
    """Take one optimiser step; give its losses."""
    batch = run.batches.at(step)
    factor = SCHEDULES[run.detector.config.schedule](step / run.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    draw = ops.generator(run.seed, "step", step, device=run.device)
    with torch.autocast(run.device, run.dtype, enabled=run.dtype != torch.float32):
        terms = run.detector.loss(batch, draw)
    total = torch.stack(list(terms.values())).sum()
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    if limit := run.detector.config.clip_norm:
        parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, limit)
    run.optimizer.step()
    losses = {name: float(term.detach()) for name, term in terms.items()} | {"loss": float(total.detach())}
    if not np.isfinite(losses["loss"]):
        raise ConfigError(f"the loss became {losses['loss']} at step {step + 1}: lower the learning rate")
    return losses


def count_steps(run: Run, length: Length, reserve: float) -> int:
    """Turn a length into optimiser steps; a budget is measured on steps that are then undone.

    reserve: seconds of a budget that are kept for what follows training.
    """
    config = run.detector.config
    if length.budget is None:
        epochs = length.epochs or (0 if length.steps else config.epochs)
        return length.steps or (epochs * run.batches.per_epoch if epochs else config.steps)
    network, optimizer = copy.deepcopy(run.detector.state_dict()), copy.deepcopy(run.optimizer.state_dict())
    run.steps = 1 << 30  # the share done stays 0, the schedule's start
    one_step(run, 0)
    begin, taken = time.monotonic(), 0
    while taken < 2 or time.monotonic() - begin < min(PROBE_SECONDS, 0.03 * length.budget):
        taken += 1
        one_step(run, taken)
    pace = (time.monotonic() - begin) / taken
    run.detector.load_state_dict(network)
    run.optimizer.load_state_dict(optimizer)
    left = length.budget - (time.monotonic() - run.clock) - reserve
    steps = int(left / pace)
    if steps < 20:
        raise ConfigError(
            f"a budget of {length.budget:g} s leaves {max(left, 0):.0f} s to train in, and one step takes "
            f"{pace:.2f} s here: give at least {length.budget - left + 20 * pace:.0f} s"
        )
    say(f"one step takes {pace:.2f} s: {steps} steps fit the budget (the same run again: --steps {steps})")
    return steps


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question asked between steps; a second Ctrl-C stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def request(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def inspect(run: Run) -> None:
    """Let the detector look at how it does on held-out images, and pass on what it says."""
    draw = ops.generator(run.seed, "inspect", run.step, device=run.device)
    if note := run.detector.inspect(run.held_out.entries(), draw):
        run.notes.append(f"at step {run.step}: {note}")
        say(run.notes[-1])


def loop(run: Run) -> None:
    """Train from the run's step to its last, with checkpoints; raise StoppedError when asked to stop."""
    run.detector.train()
    progress = Progress("training", run.steps, done=run.step)
    point, twentieth = max(1, run.steps // HISTORY), max(1, run.steps // 20)
    saved = time.monotonic()
    with stop_requests() as stopping:
        while run.step < run.steps:
            losses = one_step(run, run.step)
            run.step += 1
            run.pending.append(losses)
            progress.show(run.step, ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
            if run.step % twentieth == 0 and run.step >= SETTLED:
                inspect(run)
            if run.step % point == 0 or run.step == run.steps:
                means = {name: float(np.mean([item[name] for item in run.pending])) for name in losses}
                run.history.append({"step": float(run.step)} | means)
                run.pending = []
            if stopping() and run.step < run.steps:
                run.save()
                raise StoppedError(
                    f"stopped after step {run.step} of {run.steps}, kept in {run.path}; "
                    "the same command with --resume goes on from there"
                )
            if time.monotonic() - saved > CHECKPOINT_SECONDS or run.step == run.steps:
                run.save()
                saved = time.monotonic()
    run.detector.eval()


def train(
    root: str | Path,
    *,
    out: str | Path,
    model: str | None = None,
    start: str | Path | None = None,
    layout: str = "auto",
    supervision: str = "auto",
    train_defects: str | float | None = None,
    train_masks: str | float | None = None,
    fold: Fold | None = None,
    weights_file: str | Path | None = None,
    natural_images: str | Path | None = None,
    preset: str = "default",
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    budget: float | str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    false_reject_rate: float = 0.01,
    memory: int = 4 << 30,
    cache: str | Path = "auto",
    resume: bool = False,
) -> Predictor:
    """Train a detector on a data set, calibrate it on held-out good images, and write the model file `out`.

    start: a model file to go on from, with its method and config, in a shorter run. supervision: what is
    learned of defects; auto takes what the training images tell. train_defects, a number or a share: how many
    defective images train, drawn by the seed, where the data set's own split should not say; train_masks: how
    many of them keep their masks. fold: the part of a cross-validation that does not train. weights_file: of
    the teacher or backbone, where the weights room should not choose. natural_images: folder of photographs
    for EfficientAD's pretraining penalty; without one the penalty is off. settings: fields of the method's
    config. Give at most one of steps, epochs and budget (seconds, or text such as "10m"). memory: bytes for
    all decoded images, and as many for all encoded ones. cache: auto keeps encoded images beyond that in
    files beside `out` until the end, a folder keeps all of them for later runs, too, off keeps none. Raises a
    BlemishError that a user can fix, as early as it can be known.
    """
    started = time.monotonic()
    length = Length(steps, epochs, seconds(budget) if isinstance(budget, str) else budget)
    check_length(length)
    check_shares(false_reject_rate=false_reject_rate)
    device, out = choose_device(device), Path(out)
    check_writable(out)
    # The paper trained in float32, and its noise is close to bfloat16's rounding.
    dtype = choose_precision("fp32" if (preset, precision) == ("paper", "auto") else precision, device)
    keep_freed_memory()
    settled = settle(
        Path(root),
        model=model,
        preset=preset,
        settings=settings,
        layout=layout,
        labels=Labels(supervision, train_defects, train_masks, fold),
        length=length,
        seed=seed,
        start=start,
    )
    config, parts, samples = settled.config, settled.parts, settled.samples
    detector = build(settled.model, config, seed)
    pretrained = fill(detector, settled.start, Path(weights_file) if weights_file else None)
    detector.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward_seconds = try_out(detector, device)
    decoded = Memory(memory)
    natural = open_natural(natural_images, detector, config, decoded)

    say(f"reading {len(samples)} training and {len(parts.held_out)} held-out good images")
    store = ImageStore([sample.path for sample in samples], config.image_size, decoded).fill()
    held = ImageStore([sample.path for sample in parts.held_out], config.image_size, decoded).fill()
    masks = read_masks(samples, config.image_size, detector.label_rules)
    deepest = max([*store.maxima.values(), *held.maxima.values()], default=0)
    white = images.white_level(deepest) if deepest else images.FULL_SCALE
    features = open_cache(
        cache, out, memory, [pretrained, *detector.encoding, *config.image_size, white, device]
    )
    encoded = EncodedStore(detector.encode, store, white, features, device)
    run = Run(
        detector=detector,
        optimizer=detector.optimizer(),
        batches=Batches(
            samples,
            store,
            encoded,
            batch_size=config.batch_size,
            seed=seed,
            with_images=detector.wants_images,
            natural=natural,
            masks=masks,
            flips=FLIPS if detector.label_rules.flips else 1,
        ),
        held_out=EncodedStore(detector.encode, held, white, features, device),
        seed=seed,
        device=device,
        dtype=dtype,
        path=out.with_name(out.name + ".checkpoint"),
        clock=started,
        fingerprint={
            "model": settled.model,
            "preset": settled.preset,
            "supervision": settled.supervision,
            "config": as_json(config),
            "seed": seed,
            "precision": str(dtype).removeprefix("torch."),
            "images": digest_all(store.paths),
            "held_out": digest_all(held.paths),
            "masks": digest_all([file for index in masks for file in samples[index].masks]),
            "natural_images": digest_names(natural.paths) if natural else "",
            "white": white,
            "device": device,
            "torch": torch.__version__,
            "blemish": __version__,
            "pretrained": pretrained,
            "from": hashlib.sha256(settled.start.weights).hexdigest() if settled.start else "",
        },
    )
    # Quantiles, the export's check and the thresholds read every held-out image; so do inspections.
    reserve = 10.0 + 10 * forward_seconds * len(held.paths)
    begin(run, settled.length, resume, reserve, prepared=settled.start is not None)
    loop(run)
    facts = provenance(run) | {
        "data": Path(root).resolve().name,
        "held_out_images": len(held.paths),
        "fold": None if fold is None else record(fold, data.scan(Path(root), layout), Path(root)),
        "files": {
            "train": [short_digest(path) for path in store.paths],
            "held_out": [short_digest(path) for path in held.paths],
        },
    }
    opened = seal(out, detector, held, white, facts, false_reject_rate)
    run.path.unlink(missing_ok=True)
    features.clear()
    return opened


def open_cache(cache: str | Path, out: Path, memory: int, made_of: Sequence[Any]) -> FeatureCache:
    """Open the cache of encoded images; what entries are made of, besides the images, names their folder."""
    if cache == "off":
        return FeatureCache(Memory(0))
    own = cache == "auto"
    folder = out.with_name(out.name + ".features") if own else Path(cache)
    check_folder(folder)
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return FeatureCache(Memory(memory), folder / key[:16], shared=not own)


def provenance(run: Run) -> dict[str, Any]:
    """Say how a run that has ended went, for the model file."""
    return {
        "good_images": run.batches.labels.count(0),
        "defective_images": run.batches.labels.count(1),
        "masked_images": len(run.batches.masks),
        "pretrained": run.detector.pretrained_name,
        "steps": run.steps,
        "epochs": round(run.steps / run.batches.per_epoch, 2),
        "seconds": round(run.seconds, 1),
        "device": run.device,
        "threads": torch.get_num_threads(),
        "notes": run.notes,
        "history": run.history,
        "run": run.fingerprint,
    }


def fill(detector: Detector, start: Bundle | None, given: Path | None) -> str:
    """Fill a detector's pretrained part, or with an earlier model all that they share; give a digest.

    What the earlier model lacks, such as a classification head, stays as it was drawn. Raises WeightsError
    for weights that are missing or do not fit, ModelFileError for a model that does not.
    """
    if start is None:
        source = weights.find(detector.pretrained_name, given)
        detector.load_pretrained(source)
        return digest_all([source])
    state, earlier = detector.state_dict(), load_tensors(start.weights)
    for name, value in earlier.items():
        if name in state and state[name].shape != value.shape:
            raise ModelFileError(
                f"{name} in {start.path} is {tuple(value.shape)}; with these settings it would be "
                f"{tuple(state[name].shape)}"
            )
    detector.load_state_dict({name: earlier.get(name, value) for name, value in state.items()})
    return str(start.manifest["training"]["run"]["pretrained"])


def begin(run: Run, length: Length, resume: bool, reserve: float, *, prepared: bool) -> None:
    """Prepare a new run, or go back to a checkpoint.

    prepared: the detector knows already what it learns before the first step.
    """
    for group in run.optimizer.param_groups:
        group["base_lr"] = group["lr"]
    if resume and run.path.is_file():
        go_on(run, length)
    elif run.path.exists():
        raise ConfigError(f"{run.path} is of a run that has not ended: go on with --resume, or delete it")
    else:
        if resume:
            say(f"nothing to resume at {run.path}: starting anew")
        prepare(run, prepared)
        run.steps = count_steps(run, length, reserve)


def prepare(run: Run, prepared: bool) -> None:
    """Encode all images, and let the detector learn what it must know of the good ones."""
    entries = encode_all(run.batches)
    if prepared:
        collections.deque(entries, 0)  # for the cache alone
    elif note := run.detector.prepare(entries):
        run.notes.append(note)
        say(note)


def go_on(run: Run, length: Length) -> None:
    """Go back to a run's checkpoint; raise ModelFileError if that is another run's."""
    header = checkpoint.header(run.path)
    for key, value in run.fingerprint.items():
        if header["run"].get(key) != value:
            raise ModelFileError(
                f"{run.path} was made by another run: its {key} is {header['run'].get(key)}, not {value}"
            )
    run.restore(header)
    epochs = None if length.epochs is None else length.epochs * run.batches.per_epoch
    for asked in (length.steps, epochs):
        if asked not in (None, run.steps):
            raise ModelFileError(f"{run.path} is of a run of {run.steps} steps, not {asked}")
    say(f"going on from step {run.step} of {run.steps}")
