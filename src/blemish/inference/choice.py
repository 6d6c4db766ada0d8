"""How a model is run: backend, precision and device, and which of them can be combined."""

from __future__ import annotations

from dataclasses import dataclass

from blemish.errors import ConfigError

BACKENDS = ("onnxruntime", "openvino", "torch")
DEVICES = ("cpu", "cuda", "tensorrt")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Choice:
    """How a model is run. A model file records the choice with which its thresholds were set."""

    backend: str = "onnxruntime"
    precision: str = "fp32"
    """Type that the layers compute in. int8 is a property of the graph, not of the engine."""
    device: str = "cpu"
    compiled: bool = False
    """Whether torch.compile generates kernels, which takes about a minute on the first image."""

    def __post_init__(self) -> None:
        """Raise ConfigError for unknown values and for combinations that do not exist."""
        for name, value, known in (
            ("backend", self.backend, BACKENDS),
            ("precision", self.precision, PRECISIONS),
            ("device", self.device, DEVICES),
        ):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; expected {', '.join(known)}")
        self.refuse_pairs()

    def refuse_pairs(self) -> None:
        """Raise ConfigError for a device or a precision that the backend does not support."""
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
                "precision bf16 with onnxruntime: it has no bf16 convolutions; expected fp32, fp16 or int8, "
                "or backend openvino or torch"
            )


def refuse_precision(choice: Choice, start: Choice, name: str) -> None:
    """Raise ConfigError for a precision that the graph in the file `name`, made for `start`, lacks."""
    quantised = start.precision == "int8"
    held = start.precision if quantised or start.backend == "onnxruntime" else "fp32"
    fixed = choice.backend == "onnxruntime" and choice.precision != held
    if (choice.precision == "int8") != quantised or fixed:
        raise ConfigError(
            f"precision {choice.precision} for {name}: its graph is {held}, which {choice.backend} cannot "
            f"run in {choice.precision}; expected {held}, or a file exported in {choice.precision}"
        )
