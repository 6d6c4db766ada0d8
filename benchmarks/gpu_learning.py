"""What `gpu.py` trains: models as `blemish train` makes them, and the times of their steps or their fit."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from gpu_job import SIDES, Job
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

import blemish
from blemish import images
from blemish.data.loading.batches import Batches
from blemish.data.loading.stores import ImageStore
from blemish.data.loading.textures import Textures
from blemish.detectors import registry
from blemish.detectors.base import Detector
from blemish.images import Preprocessing
from blemish.inference import bundle
from blemish.progress import Event
from blemish.training import loop, run
from blemish.training.distillation.run import distill
from blemish.training.loop import Run
from blemish.types import Batch

# --- the same random numbers on every device ---


class SameDraws(TorchFunctionMode):
    """Let a device's generators return what a processor's generators of the same seeds return."""

    def __init__(self) -> None:
        super().__init__()
        self.twins: dict[torch.Generator, torch.Generator] = {}

    def twin(self, generator: torch.Generator) -> torch.Generator:
        """Return the processor's generator that stands in for another one."""
        if generator not in self.twins:
            self.twins[generator] = torch.Generator().manual_seed(generator.initial_seed())
        return self.twins[generator]

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Make a call that has a generator on the processor, and move its result to where it was wanted."""
        given = dict(kwargs or {})
        generator = given.get("generator")
        if generator is None:
            return func(*args, **given)
        tensors = [each for each in (*args, *given.values()) if isinstance(each, Tensor)]
        device = torch.device(given.get("device") or (tensors[0].device if tensors else "cpu"))
        if device.type != generator.device.type:
            return func(*args, **given)  # refused, as without this mode
        named = {name: on_processor(each) for name, each in given.items()} | {
            "generator": self.twin(generator)
        }
        if "device" in named:
            named["device"] = "cpu"
        found = func(*map(on_processor, args), **named)
        in_place = getattr(func, "__name__", "").endswith("_")
        return args[0].copy_(found) if in_place else found.to(device)


def on_processor(value: Any) -> Any:
    """Return a tensor on the processor, or anything else as it is."""
    return value.cpu() if isinstance(value, Tensor) else value


# --- training without a model file ---


@dataclass
class Learned:
    """A detector, on the processor, and what was seen while it learned."""

    detector: Detector
    preprocessing: Preprocessing
    losses: list[Mapping[str, float]] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)
    """The trained parameters before the first step; empty for a method without steps."""
    optimizer: str = ""
    """The name of the optimiser's class."""

    def changes(self) -> Tensor:
        """Return by how much training changed all trained parameters, in one row."""
        after = dict(self.detector.named_parameters())
        return torch.cat(
            [(after[name].detach().double() - old.double()).flatten() for name, old in self.before.items()]
        )


class TakenError(Exception):
    """Ends a training once its detector has learned."""


def learn(
    job: Job, method: str, device: str, *, data: Path | None = None, same_draws: bool = True, **options: Any
) -> Learned:
    """Train or fit a method as `blemish.train` does, in float32, but write no model file.

    data: instead of `job.few`. same_draws: take the random numbers from the processor's generators. options:
    more of `blemish.train`'s.
    """
    losses: list[Mapping[str, float]] = []
    before: dict[str, Tensor] = {}
    optimisers: list[str] = []
    taken: list[tuple[Detector, Preprocessing]] = []
    whole_loop, whole_fit = loop.loop, run.fit

    def watched(session: Run) -> None:
        optimisers.append(type(session.optimizer).__name__)
        for name, parameter in session.detector.named_parameters():
            if parameter.requires_grad:
                before[name] = parameter.detach().cpu().clone()
        with SameDraws() if same_draws else contextlib.nullcontext():
            whole_loop(session)

    def fitted(*given: Any) -> dict[str, Any]:
        with SameDraws() if same_draws else contextlib.nullcontext():
            return whole_fit(*given)

    def take(path: Path, detector: Detector, held_out: ImageStore, *rest: Any, **named: Any) -> None:
        taken.append((detector.eval().to("cpu"), held_out.preprocessing))
        raise TakenError

    def note(event: Event) -> None:
        if event.losses:
            losses.append(event.losses)

    out = job.folder / f"{method}.{device}.learned.blemish"
    with (
        mock.patch.object(loop, "loop", watched),
        mock.patch.object(run, "fit", fitted),
        mock.patch.object(run, "finalise", take),
        contextlib.suppress(TakenError),
    ):
        usual: dict[str, Any] = {
            "layout": "mvtec",
            "supervision": "none",
            "settings": job.settings(method, options.get("preset", "default")),
            "steps": job.compared if registry.method(method).has_steps else None,
            "precision": "fp32",
            "natural_images": job.natural_for(method),
            "cache": "off",
        }
        given = usual | options
        blemish.train(
            data or job.few, out=out, report=note, model=method, device=device, seed=job.seed, **given
        )
    for left in job.folder.glob(f"{out.name}*"):
        left.unlink()
    return Learned(*taken[0], losses, before, *optimisers)


# --- training into a model file, and its times ---


def train(job: Job, method: str) -> dict[str, Any]:
    """Train or fit a method into its model file; return the time of a step, or of the fit."""
    found: dict[str, Any] = {}
    marks: list[float] = []
    whole_loop, whole_fit = loop.loop, run.fit

    def timed_loop(session: Run) -> None:
        whole_loop(session)
        found.update(step_times(session, marks))

    def timed_fit(*given: Any) -> dict[str, Any]:
        start = time.perf_counter()
        facts = whole_fit(*given)
        wait(job.device)
        found["fit_seconds"] = time.perf_counter() - start
        return facts

    def note(event: Event) -> None:
        if event.phase == "training":
            marks.append(time.perf_counter())  # a step has waited for the device: its losses are numbers

    start = time.perf_counter()
    has_steps = registry.method(method).has_steps
    with mock.patch.object(loop, "loop", timed_loop), mock.patch.object(run, "fit", timed_fit):
        blemish.train(
            job.parts,
            model=method,
            out=job.model(method),
            report=note,
            layout="mvtec",
            supervision="none",
            settings=job.settings(method),
            steps=job.steps if has_steps else None,
            device=job.device,
            seed=job.seed,
            natural_images=job.natural_for(method),
        )
    manifest = bundle.read(job.model(method)).manifest
    facts = manifest.training
    found |= {
        "has_steps": has_steps,
        "seconds": time.perf_counter() - start,
        "images": facts.good_images,
        "held_out_images": facts.held_out_images,
        "input": manifest.config["image_size"],
        "batch_size": manifest.config["batch_size"],
        "precision": facts.run.precision,
    }
    if has_steps:
        losses = [point["loss"] for point in facts.history]
        tenth = max(1, len(losses) // 10)
        found["loss_first"] = float(np.mean(losses[:tenth]))
        found["loss_last"] = float(np.mean(losses[-tenth:]))
    return found


class Ready:
    """Batches that lie on the device already, over and over."""

    def __init__(self, made: Sequence[Batch]) -> None:
        self.made, self.per_epoch = list(made), len(made)

    def at(self, step: int) -> Batch:
        """Return one of them."""
        return self.made[step % len(self.made)]


def step_times(session: Run, marks: Sequence[float]) -> dict[str, Any]:
    """Return the milliseconds of a step, of the same step without loading, and of what is loaded.

    marks: when each step of the finished run ended. Weights are afterwards as before. A batch is loaded on
    one thread, during the step before it.
    """
    steps, batches = session.steps, session.batches
    seconds = [after - before for before, after in pairwise(marks)]
    found = {"step_ms": middle(seconds[len(seconds) // 4 :]), "first_step_ms": 1e3 * seconds[0]}
    ready = Ready([batches.at(number) for number in range(min(4, steps))])
    if isinstance(batches, Batches):
        places = range(steps, steps + min(8, steps))
        found["load_ms"] = middle([clocked(partial(batches.read, at)) for at in places])
        if batches.natural is not None:
            natural, count = batches.natural, len(batches.entries(0))
            found["natural_ms"] = middle([clocked(partial(natural.batch, at, count)) for at in places])
    state = copy.deepcopy(session.detector.state_dict())
    session.batches = ready
    session.detector.train()
    alone = [clocked(partial(loop.one_step, session, at)) for at in range(steps)]
    session.detector.load_state_dict(state)
    session.detector.eval()
    session.batches = batches
    return found | {"step_alone_ms": middle(alone[len(alone) // 4 :]), "steps": steps}


def clocked(work: Callable[[], Any]) -> float:
    """Return the seconds that something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def middle(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return 1e3 * statistics.median(seconds)


def wait(device: str) -> None:
    """Wait until a device has done what it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()


# --- teachers ---


def distillation(job: Job, size: str) -> dict[str, Any]:
    """Distil a teacher for a few steps from EfficientNet-Lite0; return the time of a step."""
    found: dict[str, Any] = {}
    marks: list[float] = []
    whole_loop = loop.loop

    def timed_loop(session: Run) -> None:
        whole_loop(session)
        found.update(step_times(session, marks), batch_size=session.detector.config.batch_size)

    def note(event: Event) -> None:
        if event.phase == "training":
            marks.append(time.perf_counter())

    folder = job.folder / "natural"
    if not folder.is_dir():
        textures = Textures((SIDES[0],) * 2 if job.dry else (2 * SIDES[-1],) * 2, job.seed)
        for number in range(24):
            pixels = 255 * textures.batch(number, 1)[0].permute(1, 2, 0).numpy()
            images.write_png(folder / f"{number:02}.png", pixels.round().astype(np.uint8))
    with mock.patch.object(loop, "loop", timed_loop):
        distill(
            folder,
            out=job.folder / f"{size}.safetensors",
            report=note,
            size=size,
            source="efficientnet_lite0",
            settings={"image_size": (SIDES[0],) * 2, "crop": 36} if job.dry else {},
            steps=job.steps,
            device=job.device,
            seed=job.seed,
        )
    return found
