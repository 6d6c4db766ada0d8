"""The files that an export is written as: a model file, or a bare graph for another program.

A bare graph takes images (B, 3, H, W) in [0, 1], float32, resized by whoever calls it, and says of itself
what the manifest of a model file says: preprocessing, statistics, thresholds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blemish.files import write_whole
from blemish.inference import bundle
from blemish.inference.bundle import Bundle

TOLD = ("method", "preprocessing", "outputs", "calibration", "engine", "export", "versions")
"""What a bare graph repeats of the manifest, under the key "blemish"."""


@dataclass(frozen=True)
class Format:
    """A kind of graph: the engine that runs it, the ending of a bare one, and what writes that."""

    backend: str
    suffix: str
    write: Callable[[Path, Bundle], None]


def write(path: Path, made: Bundle, name: str) -> None:
    """Write an export as a model file if the path says so, else as a bare graph of the named format."""
    if path.suffix == ".blemish":
        bundle.write(path, made.manifest, made.weights, made.graph)
    else:
        FORMATS[name].write(path, made)


def told(made: Bundle) -> str:
    """Return the part of the manifest that a bare graph repeats."""
    record = made.manifest.to_json()
    return json.dumps({key: record[key] for key in TOLD if key in record})


def write_onnx(path: Path, made: Bundle) -> None:
    """Write NAME.onnx, what it says of itself among its metadata."""
    import onnx

    model = onnx.load_model_from_string(made.graph)
    onnx.helper.set_model_props(model, {"blemish": told(made)})
    write_whole(path, model.SerializeToString())


def write_openvino(path: Path, made: Bundle) -> None:
    """Write NAME.xml and NAME.bin, what it says of itself among its runtime information.

    Weights are stored in half precision where layers compute in it. The old .xml goes first, so that at no
    moment it stands beside the weights of another.
    """
    import openvino

    model = openvino.Core().read_model(made.graph)
    model.set_rt_info(told(made), "blemish")
    halved = made.manifest.engine.precision == "fp16"
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / path.name
        openvino.save_model(model, written, compress_to_fp16=halved)
        path.unlink(missing_ok=True)
        write_whole(path.with_suffix(".bin"), written.with_suffix(".bin").read_bytes())
        write_whole(path, written.read_bytes())


FORMATS = {
    "onnx": Format("onnxruntime", ".onnx", write_onnx),
    "openvino": Format("openvino", ".xml", write_openvino),
}
