"""From a trained detector to a model file: graph, comparison, thresholds, manifest."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.torch import save
from torch import Tensor

from blemish._version import __version__
from blemish.data.loading.stores import ImageStore
from blemish.detectors import onnx_graph
from blemish.detectors.base import Detector
from blemish.detectors.settings import as_json
from blemish.errors import ExportError
from blemish.inference import bundle
from blemish.inference.calibration import calibrate, describe
from blemish.inference.engines import Choice, Engine, open_graph
from blemish.inference.predictor import Predictor
from blemish.progress import say
from blemish.types import Calibration

TOLERANCE = 1e-4


def compare(detector: Detector, exported: Engine, batches: Iterable[Tensor]) -> float:
    """Run both on images; give the largest difference of any output, relative to that output's largest value.

    Raises ExportError beyond TOLERANCE.
    """
    worst = 0.0
    for batch in batches:
        with torch.no_grad():
            expected = detector(batch)
        found = exported.run(batch.cpu().numpy())
        for name, tensor in zip(detector.outputs, expected, strict=True):
            reference = tensor.float().cpu().numpy()
            scale = float(np.abs(reference).max()) or 1.0
            difference = float(np.abs(found[name] - reference).max()) / scale
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"the exported graph differs from the trained model: {name} by {difference:.1e} "
                    f"relative, at most {TOLERANCE:.0e} allowed"
                )
            worst = max(worst, difference)
    return worst


def seal(
    path: Path,
    detector: Detector,
    held_out: ImageStore,
    white: float,
    provenance: dict[str, Any],
    false_reject_rate: float,
) -> Predictor:
    """Finish a trained detector on held-out good images and write its model file.

    The graph is compared with the detector on those images before anything is written; raises ExportError.
    """
    detector.eval().to("cpu")  # where float32 is float32, as it is in the runtime
    with torch.no_grad():
        detector.finish(held_out.batches(white))
    exported = onnx_graph.graph(detector)
    graph = open_graph(exported, detector.outputs, Choice())
    difference = compare(detector, graph, held_out.batches(white))
    calibration = calibrate_graph(graph, held_out, white, detector.config.statistics, false_reject_rate)
    say(describe(calibration))
    manifest = {
        "method": provenance["run"]["model"],
        "config": as_json(detector.config),
        "preprocessing": {"image_size": list(detector.config.image_size), "white": white, "color": "RGB"},
        "outputs": list(detector.outputs),
        "calibration": dataclasses.asdict(calibration),
        "training": provenance | {"graph_difference": difference},
        "versions": {
            "blemish": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
    state = {key: value.contiguous().cpu() for key, value in detector.state_dict().items()}
    bundle.write(path, manifest, save(state), exported)
    return Predictor(bundle.read(path))


def calibrate_graph(
    graph: Engine, held_out: ImageStore, white: float, names: tuple[str, ...], false_reject_rate: float
) -> Calibration:
    """Score the held-out good images as prediction will, and set the thresholds by them."""
    found = [graph.run(batch.numpy()) for batch in held_out.batches(white, size=1)]
    statistics = np.concatenate([each["statistics"] for each in found])
    maxima = np.array([each["map"].max() for each in found])
    return calibrate(statistics, maxima, names, false_reject_rate=false_reject_rate)
