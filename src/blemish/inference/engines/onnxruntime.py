"""ONNX Runtime: the engine included in every installation."""

from __future__ import annotations

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

from blemish.errors import ConfigError, ModelFileError
from blemish.inference.choice import Choice
from blemish.types import FloatArray

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""Execution providers for each device; later ones take the nodes that the first cannot."""


class OnnxRuntime:
    """A graph in ONNX Runtime."""

    def __init__(self, graph: bytes, outputs: tuple[str, ...], choice: Choice, threads: int = 0) -> None:
        providers = PROVIDERS[choice.device]
        available = onnxruntime.get_available_providers()
        if providers[0] not in available:
            raise ConfigError(
                f"device {choice.device}: this ONNX Runtime has {', '.join(available)}; "
                f"expected {providers[0]}, which comes with the package onnxruntime-gpu"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors only, which are raised below
        try:
            self.session = onnxruntime.InferenceSession(graph, options, providers=list(providers))
        except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
            raise ModelFileError(
                f"ONNX Runtime cannot run the graph: {str(error).splitlines()[0]}"
            ) from error
        found = [node.name for node in self.session.get_outputs()]
        if found != list(outputs):
            raise ModelFileError(
                f"the graph has the outputs {', '.join(found)}; expected {', '.join(outputs)}"
            )
        self.outputs = outputs

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Run (B, 3, H, W) images."""
        return dict(zip(self.outputs, self.session.run(None, {"images": inputs}), strict=True))
