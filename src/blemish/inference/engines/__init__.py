"""The engines that run a model's graph: ONNX Runtime, OpenVINO or PyTorch, on a CPU or a GPU.

All engines take and return the same arrays, so that a caller need not know which one it has. Only the chosen
one is imported: ONNX Runtime is always installed, OpenVINO comes with `blemish[openvino]`, PyTorch with
`blemish[train]`.
"""

from __future__ import annotations

from typing import Protocol

from blemish.errors import ConfigError
from blemish.inference.bundle import Bundle
from blemish.inference.choice import Choice, refuse_precision
from blemish.types import FloatArray


class Engine(Protocol):
    """A graph that is ready to run. Safe to call from several threads at once."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs: "map", "statistics", then the maps that the map was combined from."""

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Run (B, 3, H, W) float32 images in [0, 1]; return (B, ...) float32 arrays by output name."""


def open_engine(opened: Bundle, choice: Choice, threads: int = 0) -> Engine:
    """Prepare the graph of a model file for running. threads: 0 lets the engine choose.

    Raises ConfigError for what is not available on this machine, ModelFileError for a graph that cannot run.
    """
    if threads < 0:
        raise ConfigError(f"{threads} threads: expected 0 or more")
    manifest = opened.manifest
    if choice.backend == "torch":
        if manifest.export is not None:
            raise ConfigError(
                f"backend torch for {opened.path}: an export can only run as a graph; expected onnxruntime "
                "or openvino, or the model file that it was made from"
            )
        from blemish.inference.engines.pytorch import PyTorch

        return PyTorch(opened, choice, threads)
    refuse_precision(choice, manifest.engine, str(opened.path))
    return open_graph(opened.graph, manifest.outputs, choice, threads)


def open_graph(graph: bytes, outputs: tuple[str, ...], choice: Choice, threads: int = 0) -> Engine:
    """Prepare an ONNX graph for running, as `open_engine` does."""
    if choice.backend == "openvino":
        from blemish.inference.engines.openvino import OpenVino

        return OpenVino(graph, outputs, choice, threads)
    from blemish.inference.engines.onnxruntime import OnnxRuntime

    return OnnxRuntime(graph, outputs, choice, threads)
