"""PyTorch: the engine of a machine used for training, and of a GPU without another runtime."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from blemish.detectors import registry
from blemish.detectors.base import Detector
from blemish.detectors.fusing import Lowered
from blemish.devices import choose_device
from blemish.inference.bundle import Bundle
from blemish.inference.choice import Choice
from blemish.types import AnyArray, FloatArray, Nearest

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def restored(opened: Bundle) -> Detector:
    """Return the detector of a model file with its weights; raise ModelFileError if they do not fit."""
    manifest = opened.manifest
    return registry.restore(manifest.method, manifest.config, opened.weights, str(opened.path))


class Explainer:
    """Names the good image, and the place in it, that the most anomalous place of an image is most like.

    Raises ConfigError, when it is made, for a model that does not remember good images.
    """

    def __init__(self, opened: Bundle) -> None:
        self.detector, self.manifest = restored(opened), opened.manifest
        self.detector.matches(torch.zeros(1, 3, *opened.manifest.preprocessing.image_size))

    def __call__(self, image: AnyArray) -> Nearest:
        """Explain an (H, W, 3) RGB image."""
        preprocessing, files = self.manifest.preprocessing, self.manifest.training.files
        with torch.no_grad():
            matches = self.detector.matches(torch.from_numpy(preprocessing.inputs(image)))
        found, size = max(matches, key=lambda match: match.distance), (image.shape[0], image.shape[1])
        names = files.names if files else {}
        known = (name for digest, name in names.items() if digest.startswith(found.digest))
        there, here = (
            preprocessing.point_to_image((column, row), found.size, size)
            for row, column in (found.cell, found.worst)
        )
        return Nearest(next(known, found.digest), there, here, found.distance)


class PyTorch:
    """A model file's fused network in PyTorch; on CUDA, each batch size is recorded as a CUDA graph."""

    def __init__(self, opened: Bundle, choice: Choice, threads: int = 0) -> None:
        self.device = choose_device(choice.device)
        if threads:
            torch.set_num_threads(threads)
        detector = restored(opened)
        self.outputs: tuple[str, ...] = detector.outputs
        network = Lowered(detector.fused(), DTYPES[choice.precision]).eval().to(self.device)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward = torch.compile(self.network) if choice.compiled else self.network
        self.recorded: dict[int, Recorded] = {}
        self.lock = threading.Lock()
        """A CUDA graph has a single buffer for its inputs and one for its outputs."""

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Run (B, 3, H, W) images."""
        with torch.no_grad():  # not inference_mode: torch.compile fails on its tensors (2.13)
            images = torch.from_numpy(inputs)
            if self.device == "cpu":
                return self.named(self.compute(images))
            with self.lock:
                return self.named(self.replay(images))

    def named(self, found: tuple[Tensor, ...]) -> dict[str, FloatArray]:
        """Return the outputs as arrays by name."""
        return {name: np.asarray(tensor.cpu()) for name, tensor in zip(self.outputs, found, strict=True)}

    def compute(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run images that are on the device already."""
        found: tuple[Tensor, ...] = self.forward(images.contiguous(memory_format=torch.channels_last))
        return found

    def replay(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run images through the CUDA graph of their batch size: one launch instead of about a hundred."""
        if len(images) not in self.recorded:
            self.recorded[len(images)] = Recorded(self, images)
        return self.recorded[len(images)].replay(images)


class Recorded:
    """One CUDA graph and the memory that it reads and writes."""

    def __init__(self, engine: PyTorch, images: Tensor) -> None:
        self.inputs = images.to(engine.device)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # choices and allocations on first use must not be recorded
            for _ in range(3):
                engine.compute(self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = engine.compute(self.inputs)

    def replay(self, images: Tensor) -> tuple[Tensor, ...]:
        """Copy the images in and run the graph; the next run overwrites the outputs returned."""
        self.inputs.copy_(images, non_blocking=True)
        self.graph.replay()
        return self.found
