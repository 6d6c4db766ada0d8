"""OpenVINO: the fastest engine on a CPU, with support for bfloat16."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import openvino

from blemish.errors import ModelFileError
from blemish.inference.choice import Choice
from blemish.types import FloatArray

HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}
"""Type, for each precision, of the layers that the graph itself does not quantise."""


class SignalStack(ctypes.Structure):
    """The C library's stack_t, on Linux."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Restore the stack on which this thread's signals are handled.

    OpenVINO 2026.4 moves it when it compiles a model, into memory that is freed with the model: a later
    Ctrl-C then ends the process with a segmentation fault. On systems other than Linux this does nothing.
    """
    set_stack = getattr(ctypes.CDLL(None), "sigaltstack", None) if sys.platform == "linux" else None
    before = SignalStack()
    if set_stack is not None:
        set_stack(None, ctypes.byref(before))
    try:
        yield
    finally:
        if set_stack is not None:
            set_stack(ctypes.byref(before), None)


def reason(error: RuntimeError) -> str:
    """Return the last line of an error, the only one that does not say where in OpenVINO it was raised."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), "no reason was given")


class OpenVino:
    """A graph in OpenVINO, compiled for each batch size on first use."""

    def __init__(self, graph: bytes, outputs: tuple[str, ...], choice: Choice, threads: int = 0) -> None:
        self.core = openvino.Core()
        self.settings = {
            "INFERENCE_PRECISION_HINT": HINTS[choice.precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            self.model = self.core.read_model(graph)
        except RuntimeError as error:
            raise ModelFileError(f"OpenVINO cannot read the graph: {reason(error)}") from error
        found = [output.any_name for output in self.model.outputs]
        if found != list(outputs):
            raise ModelFileError(
                f"the graph has the outputs {', '.join(found)}; expected {', '.join(outputs)}"
            )
        self.outputs = outputs
        self.lock = threading.Lock()
        """A request runs one batch at a time."""
        self.requests: dict[tuple[int, ...], openvino.InferRequest] = {}

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Run (B, 3, H, W) images."""
        with self.lock:
            request = self.requests.get(inputs.shape) or self.compile(inputs.shape)
            request.infer([openvino.Tensor(inputs, shared_memory=True)])
            found = [request.get_output_tensor(number).data.copy() for number in range(len(self.outputs))]
        return dict(zip(self.outputs, found, strict=True))

    def compile(self, shape: tuple[int, ...]) -> openvino.InferRequest:
        """Compile the graph for one shape: fixed shapes run faster than dynamic ones.

        Raises ModelFileError for a graph that OpenVINO cannot run on this processor.
        """
        fixed = self.model.clone()
        fixed.reshape(list(shape))
        try:
            with same_signal_stack():
                request = self.core.compile_model(fixed, "CPU", self.settings).create_infer_request()
        except RuntimeError as error:
            raise ModelFileError(
                f"OpenVINO cannot run the graph on this processor: {reason(error)}"
            ) from error
        self.requests[shape] = request
        return request
