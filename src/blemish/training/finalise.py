"""From a trained detector to a model file: graph, comparison, thresholds, manifest."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
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
from blemish.types import Batch, Calibration, LightCalibration

TOLERANCE = 1e-4
"""Largest relative difference allowed between the graph and the detector."""


COMPARED = 32
"""Training images on which the graph is compared with the detector if none are held out."""


def finalise(
    path: Path,
    detector: Detector,
    good: ImageStore,
    facts: dict[str, Any],
    calibrate: Callable[[Engine], Calibration],
    light: LightCalibration | None = None,
    report: Report = silent,
) -> Predictor:
    """Finalise a trained detector on good images and write its model file.

    good: held-out images or, where there are none, some that it was fitted to. facts: the fields of
    TrainingRecord that are known so far. calibrate: sets the thresholds, given the graph. light: the light of
    good images, if it is standardised. Before anything is written, the graph is compared with the detector on
    the images, turned by 180 degrees if the detector remembers them; raises ExportError if they differ.
    """
    detector.eval().to("cpu")  # where float32 has its full precision, as in the runtime
    with torch.no_grad():
        detector.finish(good.batches())
    exported = onnx_graph.export_detector(detector)
    graph = open_graph(exported, detector.outputs, Choice())
    found = calibrate(graph)
    batches = good.batches()
    if found.left_out:  # a map of what is remembered is next to nothing, and so would a difference be
        batches = (batch.flip(2, 3) for batch in batches)
    difference = compare(detector, graph, batches)
    tell(report, calibration.describe(found))
    manifest = Manifest(
        method=facts["run"]["model"],
        config=as_json(detector.config),
        preprocessing=good.preprocessing,
        outputs=tuple(detector.outputs),
        calibration=found,
        light_calibration=light,
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


def from_held_out(
    graph: Engine, held_out: ImageStore, statistics: tuple[str, ...], false_reject_rate: float
) -> Calibration:
    """Set thresholds from held-out good images."""
    inputs = map(held_out.inputs, range(len(held_out.paths)))
    measured = measure(graph, held_out.preprocessing, inputs)
    return calibration.fit(*measured, statistics, false_reject_rate=false_reject_rate)


def from_left_out(
    detector: Detector, batches: Iterable[Batch], false_reject_rate: float, earlier: Calibration | None
) -> Calibration:
    """Set thresholds from good images that the detector was fitted to, each scored without itself.

    earlier: thresholds of the model that this one goes on from, whose images need not be among these: more
    remembered cells only lower their scores.
    """
    statistics, maxima = [], []
    detector.eval()
    with torch.no_grad():
        for batch in batches:
            maps, found, *_ = detector.leave_out(batch.encoded, batch.names)
            statistics.append(found.cpu().numpy())
            maxima.append(maps.amax((1, 2)).cpu().numpy())
    measured = np.concatenate(statistics), np.concatenate(maxima)
    if earlier is not None:
        return calibration.recalibrated(
            calibration.extended(earlier, *measured),
            false_reject_rate=false_reject_rate,
            review_rate=max(earlier.review_rate, false_reject_rate),
        )
    return calibration.fit(
        *measured, detector.config.statistics, false_reject_rate=false_reject_rate, left_out=True
    )


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
