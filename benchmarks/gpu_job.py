"""What all parts of `gpu.py` share: how much is done, and on what."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from blemish.backbones import BACKBONES
from blemish.backbones.pdn import PDNS
from blemish.demo import dataset
from blemish.detectors import registry
from blemish.detectors.base import Detector
from blemish.detectors.settings import Config
from blemish.errors import BlemishError, ConfigError
from blemish.testing.slim import slimmer
from blemish.training import run

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
"""What layers compute in. "tf32" is float32 that allows TF32 in convolutions and in products of matrices;
PyTorch's own default, in convolutions alone, is what model files run in at precision fp32."""
REFUSED = (RuntimeError, TypeError, BlemishError)
"""What a form or precision that a network does not support raises, or a batch that does not fit."""
SIDES = (64, 128, 256)
"""Sides of the images of a dry run: each method has the smallest that it accepts."""


@dataclass(frozen=True)
class Job:
    """What all parts share: the device, the files, and how much is done."""

    device: str
    folder: Path
    """Holds the rendered parts and the model files."""
    dry: bool = False
    seed: int = 0
    natural: str = "drawn"
    """Natural images for a pretraining penalty, as for `blemish train`."""
    steps: int = 40
    """Optimiser steps that are timed."""
    compared: int = 4
    """Optimiser steps that are compared with the processor's."""
    judged: int = 24
    """Images that both devices judge."""
    rounds: int = 5
    warm_up: int = 1000
    runs: int = 1000
    """The papers' protocol: runs to warm up, and timed runs, in each round."""
    batches: tuple[int, ...] = (16, 32)
    """Images in a run for the throughput."""
    precisions: tuple[str, ...] = PRECISIONS

    @classmethod
    def smallest(cls, folder: Path, seed: int) -> Job:
        """Return a job that does everything at its smallest, on the processor."""
        return cls(
            *("cpu", folder),
            dry=True,
            seed=seed,
            steps=2,
            compared=2,
            judged=4,
            rounds=1,
            warm_up=1,
            runs=1,
            batches=(1, 2),
            precisions=("fp32", "bf16"),  # float16 is slow on a processor, and TF32 is unknown
        )

    @property
    def half(self) -> str:
        """The precision of the published figures, or in a dry run what stands in for it."""
        return "bf16" if self.dry else "fp16"

    @property
    def parts(self) -> Path:
        """The data set that models are trained on."""
        return self.folder / "parts"

    @property
    def few(self) -> Path:
        """A smaller one, for what the processor trains as well."""
        return self.folder / "few"

    def model(self, method: str) -> Path:
        """Return a method's model file."""
        return self.folder / f"{method}.blemish"

    def files(self) -> list[Path]:
        """Return the test images that both devices judge, of all kinds."""
        every = sorted((self.parts / "test").glob("*/*.png"))
        return every[:: max(1, len(every) // self.judged)][: self.judged]

    def settings(self, method: str, preset: str = "default") -> dict[str, Any]:
        """Return what differs from the preset: nothing, or in a dry run the smallest size that works."""
        if not self.dry:
            return {}
        for side in SIDES:
            given = {"image_size": (side, side)}
            with contextlib.suppress(ConfigError):
                blueprint(method, registry.configure(method, preset, given))
                return given
        return {}

    def natural_for(self, method: str) -> str:
        """Return where a method's natural images come from, if it reads any."""
        return self.natural if registry.configure(method).reads_natural_images else "drawn"


def lay_out(job: Job) -> None:
    """Render the data sets."""
    side = SIDES[0] if job.dry else SIDES[-1]
    train, good, kind = (8, 2, 1) if job.dry else (60, 12, 4)
    dataset.draw(job.parts, job.seed, train=train, test_good=good, per_kind=kind, size=side)
    dataset.draw(job.few, job.seed + 1, train=8 if job.dry else 10, test_good=2, per_kind=1, size=side)


def blueprint(method: str, config: Config) -> Detector:
    """Return an untrained detector, of which only names and shapes are to be used."""
    try:
        with torch.device("meta"):
            return registry.build(method, config, 0)
    except (RuntimeError, NotImplementedError):  # it computes something as it is built
        return registry.build(method, config, 0)


# --- networks of a dry run ---


@contextlib.contextmanager
def random_weights(networks: Collection[str] | None = None) -> Iterator[None]:
    """Leave frozen parts as they were initialised: all of them, or those that are one of these networks."""
    usual = run.load_weights

    def load(detector: Detector, *rest: Any) -> str:
        if networks is None or detector.pretrained_name in networks:
            return "random"
        return usual(detector, *rest)

    with mock.patch.object(run, "load_weights", load):
        yield


@contextlib.contextmanager
def narrow() -> Iterator[None]:
    """Let large frozen networks be narrow and random: every ResNet is the smallest."""
    least = BACKBONES["resnet18"]
    resnets = {name: least for name, entry in BACKBONES.items() if entry.layers == least.layers}
    pdns = {name: slimmer(pdn, 32) for name, pdn in PDNS.items()}
    with mock.patch.dict(PDNS, pdns), mock.patch.dict(BACKBONES, resnets), random_weights({*pdns, *resnets}):
        yield


@contextlib.contextmanager
def arithmetic(precision: str, *, searched: bool = False) -> Iterator[None]:
    """Let float32 compute in TF32 or not, and cuDNN search for its fastest algorithms or not."""
    convolutions, matrices = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, matrices.allow_tf32, convolutions.benchmark
    convolutions.allow_tf32 = matrices.allow_tf32 = precision != "fp32"
    convolutions.benchmark = searched
    try:
        yield
    finally:
        convolutions.allow_tf32, matrices.allow_tf32, convolutions.benchmark = before


def in_a_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
