"""PyTorch: the engine of a machine that trains, and of a GPU without another runtime."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from blemish.detectors.fusing import Lowered
from blemish.detectors.registry import fuse, restore
from blemish.devices import choose_device
from blemish.inference.bundle import Bundle
from blemish.inference.engines import Choice
from blemish.types import FloatArray

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PyTorch:
    """A model file's fused network in PyTorch; on CUDA each batch size is one recorded CUDA graph."""

    def __init__(self, opened: Bundle, choice: Choice, threads: int = 0) -> None:
        self.device = choose_device(choice.device)
        if threads:
            torch.set_num_threads(threads)
        detector = restore(opened)
        self.outputs: tuple[str, ...] = detector.outputs
        network = Lowered(fuse(detector), DTYPES[choice.precision]).eval().to(self.device)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward = torch.compile(self.network) if choice.compiled else self.network
        self.recorded: dict[int, Recorded] = {}

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Run (B, 3, H, W) images."""
        with torch.no_grad():  # not inference_mode: torch.compile stumbles over its tensors (2.13)
            images = torch.from_numpy(inputs)
            found = self.compute(images) if self.device == "cpu" else self.replay(images)
            return {name: np.asarray(tensor.cpu()) for name, tensor in zip(self.outputs, found, strict=True)}

    def compute(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run images that are on the device."""
        found: tuple[Tensor, ...] = self.forward(images.contiguous(memory_format=torch.channels_last))
        return found

    def replay(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run images through the CUDA graph of their batch size: one launch instead of a hundred."""
        if len(images) not in self.recorded:
            self.recorded[len(images)] = Recorded(self, images)
        return self.recorded[len(images)].replay(images)


class Recorded:
    """One CUDA graph with the memory that it reads and writes."""

    def __init__(self, engine: PyTorch, images: Tensor) -> None:
        self.inputs = images.to(engine.device)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is chosen or allocated at first use must not be recorded
            for _ in range(3):
                engine.compute(self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = engine.compute(self.inputs)

    def replay(self, images: Tensor) -> tuple[Tensor, ...]:
        """Copy images in, run; what comes is overwritten by the next run."""
        self.inputs.copy_(images, non_blocking=True)
        self.graph.replay()
        return self.found
