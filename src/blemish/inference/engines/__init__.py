"""What runs a model's graph: ONNX Runtime, OpenVINO or PyTorch, on a processor or a GPU.

All take and give the same arrays, so that whoever holds an engine need not know which one it is. Only what is
chosen is imported: ONNX Runtime is always installed, OpenVINO comes with `blemish[openvino]`, PyTorch with
`blemish[train]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from blemish.errors import ConfigError, ModelFileError
from blemish.inference.bundle import Bundle
from blemish.types import FloatArray

BACKENDS = ("onnxruntime", "openvino", "torch")

DEVICES = ("cpu", "cuda", "tensorrt")

PRECISIONS = ("fp32", "fp16", "bf16", "int8")


class Engine(Protocol):
    """A graph, ready to run."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it gives."""

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Run (B, 3, H, W) float32 images in [0, 1]; give (B, ...) float32 arrays by the names of outputs."""


@dataclass(frozen=True)
class Choice:
    """How a model is to run. A model file records one, which its thresholds stand on."""

    backend: str = "onnxruntime"
    precision: str = "fp32"
    """What the layers compute in. In int8 it is a property of the graph, not of the engine."""
    device: str = "cpu"
    compiled: bool = False
    """Whether torch.compile makes kernels of its own, which takes a minute at the first image."""

    def __post_init__(self) -> None:
        """Refuse what no engine has; raise ConfigError."""
        for name, value, known in (
            ("backend", self.backend, BACKENDS),
            ("precision", self.precision, PRECISIONS),
            ("device", self.device, DEVICES),
        ):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; expected {', '.join(known)}")
        self.refuse_pairs()

    def refuse_pairs(self) -> None:
        """Refuse a backend on a device, or in a precision, that it does not have."""
        if self.device != "cpu" and self.backend == "openvino":
            raise ConfigError(f"device {self.device} with openvino: expected cpu")
        if self.device == "tensorrt" and self.backend == "torch":
            raise ConfigError("device tensorrt with torch: expected cpu or cuda")
        if self.compiled and self.backend != "torch":
            raise ConfigError(f"compiled with {self.backend}: expected backend torch")
        if self.precision == "int8" and self.backend == "torch":
            raise ConfigError("precision int8 with torch: expected fp32, fp16 or bf16")
        if self.precision == "bf16" and self.backend == "onnxruntime":
            raise ConfigError(
                "precision bf16 with onnxruntime: it has no such convolutions; expected fp32, fp16 or int8, "
                "or backend openvino or torch"
            )


def recorded(manifest: Mapping[str, Any]) -> Choice:
    """Read the choice that a model file records; one that records none runs on ONNX Runtime as it is.

    Raises ModelFileError for one that this version does not know.
    """
    try:
        return Choice(**manifest.get("engine", asdict(Choice())))
    except (TypeError, ConfigError) as error:
        raise ModelFileError(f"the model file asks for an engine that is not known here: {error}") from error


def refuse_precision(choice: Choice, start: Choice, name: str) -> None:
    """Refuse a precision that the graph of the file `name`, made for `start`, does not have."""
    quantised = start.precision == "int8"
    held = start.precision if quantised or start.backend == "onnxruntime" else "fp32"
    fixed = choice.backend == "onnxruntime" and choice.precision != held
    if (choice.precision == "int8") != quantised or fixed:
        raise ConfigError(
            f"precision {choice.precision} of {name}, whose graph is {held}: for {choice.backend} that is "
            f"the graph's; expected {held}, or a file that was exported in {choice.precision}"
        )


def open_engine(opened: Bundle, choice: Choice, threads: int = 0) -> Engine:
    """Make a model file's graph ready to run. threads: 0 lets the engine choose.

    Raises ConfigError for what this machine does not have, ModelFileError for a graph that cannot run.
    """
    if threads < 0:
        raise ConfigError(f"{threads} threads: expected 0 or more")
    outputs = tuple(opened.manifest["outputs"])
    if choice.backend == "torch":
        if "export" in opened.manifest:
            raise ConfigError(
                f"backend torch for {opened.path}: an export is its graph; expected onnxruntime or openvino, "
                "or the model file that it was made from"
            )
        from blemish.inference.engines.pytorch import PyTorch

        return PyTorch(opened, choice, threads)
    refuse_precision(choice, recorded(opened.manifest), str(opened.path))
    return open_graph(opened.graph, outputs, choice, threads)


def open_graph(graph: bytes, outputs: tuple[str, ...], choice: Choice, threads: int = 0) -> Engine:
    """Make an ONNX graph ready to run, as `open_engine` does."""
    if choice.backend == "openvino":
        from blemish.inference.engines.openvino import OpenVino

        return OpenVino(graph, outputs, choice, threads)
    from blemish.inference.engines.onnxruntime import OnnxRuntime

    return OnnxRuntime(graph, outputs, choice, threads)
