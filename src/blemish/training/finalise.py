"""From a trained detector to a model file: graph, comparison, thresholds, manifest."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import torch
from safetensors.torch import save
from torch import Tensor

from blemish import __version__
from blemish.data.loading.stores import ImageStore
from blemish.detectors import onnx_graph
from blemish.detectors.base import Detector
from blemish.detectors.settings import as_json
from blemish.errors import ExportError
from blemish.inference import bundle, calibration
from blemish.inference.choice import Choice
from blemish.inference.engines import Engine, open_graph
from blemish.inference.manifest import Manifest, TrainingRecord
from blemish.inference.measure import measure
from blemish.inference.predictor import Predictor
from blemish.progress import Report, silent, tell

TOLERANCE = 1e-4
"""Largest relative difference allowed between the graph and the detector."""


def finalise(
    path: Path,
    detector: Detector,
    held_out: ImageStore,
    facts: dict[str, Any],
    false_reject_rate: float,
    light_limit: float = 0.0,
    report: Report = silent,
) -> Predictor:
    """Finalise a trained detector on held-out good images and write its model file.

    facts: the fields of TrainingRecord that are known so far. light_limit: see `calibration.fit_light`.
    Before anything is written, the graph is compared with the detector on the held-out images; raises
    ExportError if they differ.
    """
    detector.eval().to("cpu")  # where float32 has its full precision, as in the runtime
    with torch.no_grad():
        detector.finish(held_out.batches())
    exported = onnx_graph.export_detector(detector)
    graph = open_graph(exported, detector.outputs, Choice())
    difference = compare(detector, graph, held_out.batches())
    inputs = map(held_out.inputs, range(len(held_out.paths)))
    found = calibration.fit(
        *measure(graph, held_out.preprocessing, inputs),
        detector.config.statistics,
        false_reject_rate=false_reject_rate,
    )
    tell(report, calibration.describe(found))
    lights = held_out.light_scores()
    manifest = Manifest(
        method=facts["run"]["model"],
        config=as_json(detector.config),
        preprocessing=held_out.preprocessing,
        outputs=tuple(detector.outputs),
        calibration=found,
        light_calibration=calibration.fit_light(lights, light_limit) if lights else None,
        training=msgspec.convert(facts | {"graph_difference": difference}, TrainingRecord),
        versions={
            "blemish": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    )
    state = {key: value.contiguous().cpu() for key, value in detector.state_dict().items()}
    bundle.write(path, manifest, save(state), exported)
    return Predictor(bundle.read(path), engine=graph)


def compare(detector: Detector, exported: Engine, batches: Iterable[Tensor]) -> float:
    """Return the largest difference between the outputs of both, relative to each output's largest value.

    Raises ExportError if it exceeds TOLERANCE.
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
                    f"relative; expected at most {TOLERANCE:.0e}"
                )
            worst = max(worst, difference)
    return worst
