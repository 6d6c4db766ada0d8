"""The files that an export is written to: a model file, or a bare graph for another program.

A bare graph takes (B, 3, H, W) float32 images in [0, 1], resized and brought to the light of training by its
caller. Its metadata repeat what the manifest of a model file says: preprocessing, statistics, thresholds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blemish.files import write_atomically
from blemish.inference import bundle
from blemish.inference.bundle import Bundle

METADATA_FIELDS = (
    *("method", "preprocessing", "outputs", "calibration", "light_calibration"),
    *("engine", "export", "versions"),
)
"""Fields of the manifest that a bare graph repeats, under the key "blemish"."""


@dataclass(frozen=True)
class Format:
    """A kind of graph: the engine that runs it, and the suffix and the writer of a bare one."""

    backend: str
    suffix: str
    write: Callable[[Path, Bundle], None]


def write(path: Path, made: Bundle, name: str) -> None:
    """Write a model file if the path ends in .blemish, else a bare graph of the named format."""
    if path.suffix == ".blemish":
        bundle.write(path, made.manifest, made.weights, made.graph)
    else:
        FORMATS[name].write(path, made)


def metadata(made: Bundle) -> str:
    """Return, as JSON, the part of the manifest that a bare graph repeats."""
    record = made.manifest.to_json()
    return json.dumps({key: record[key] for key in METADATA_FIELDS if key in record})


def write_onnx(path: Path, made: Bundle) -> None:
    """Write NAME.onnx, with part of the manifest as metadata."""
    import onnx

    model = onnx.load_model_from_string(made.graph)
    onnx.helper.set_model_props(model, {"blemish": metadata(made)})
    write_atomically(path, model.SerializeToString())


def write_openvino(path: Path, made: Bundle) -> None:
    """Write NAME.xml and NAME.bin, with part of the manifest as runtime information.

    Weights are stored in half precision if the layers compute in it. The old .xml is deleted first, so that
    it never stands beside the weights of another model.
    """
    import openvino

    model = openvino.Core().read_model(made.graph)
    model.set_rt_info(metadata(made), "blemish")
    halved = made.manifest.engine.precision == "fp16"
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / path.name
        openvino.save_model(model, written, compress_to_fp16=halved)
        path.unlink(missing_ok=True)
        write_atomically(path.with_suffix(".bin"), written.with_suffix(".bin").read_bytes())
        write_atomically(path, written.read_bytes())


FORMATS = {
    "onnx": Format("onnxruntime", ".onnx", write_onnx),
    "openvino": Format("openvino", ".xml", write_openvino),
}
