"""From a trained model to one that runs faster elsewhere: rewrite, quantise, compare, calibrate, write."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from blemish import data as data_sets
from blemish import images
from blemish.data.loading import textures
from blemish.detectors import onnx_graph
from blemish.detectors.base import Detector
from blemish.detectors.fusing import Kept, flops
from blemish.errors import ConfigError, DataError, ExportError, ModelFileError
from blemish.evaluation import run as evaluation
from blemish.exporting import formats, gate, quantise
from blemish.exporting.formats import FORMATS
from blemish.files import SHORT_DIGEST, check_writable, to_json_types
from blemish.inference import bundle, calibration
from blemish.inference.bundle import Bundle
from blemish.inference.choice import Choice
from blemish.inference.engines import open_graph
from blemish.inference.engines.pytorch import restored
from blemish.inference.manifest import ExportRecord, Manifest
from blemish.inference.measure import measure
from blemish.inference.predictor import Predictor
from blemish.inference.transfer import transferred
from blemish.progress import Report, silent, tell
from blemish.types import Calibration, FloatArray

LOG = logging.getLogger(__name__)

LEARNED_FROM = 64
"""Good images of a model that holds none out."""

SEARCHED_ON = 40
"""Good images on which the search for layers to leave in floating point compares."""

REDUCTION_IMAGES = 12
"""Good images, and rendered ones, on which reduced channels are determined."""


@dataclass(frozen=True)
class Request:
    """What to export, and where."""

    format: str
    precision: str
    out: Path
    reduced: float = 0.0
    """Map error that each reduction of channels may cause; 0: all channels are kept."""

    def __post_init__(self) -> None:
        """Raise a BlemishError for what cannot be exported or written."""
        if self.format not in FORMATS:
            raise ConfigError(f"unknown format {self.format!r}; expected {' or '.join(FORMATS)}")
        endings = (".blemish", FORMATS[self.format].suffix)
        if self.out.suffix not in endings:
            raise ConfigError(f"--out {self.out}: expected a name that ends in {' or '.join(endings)}")
        if not 0 <= self.reduced < 1:
            raise ConfigError(f"a map error of {self.reduced} for reduced channels: expected 0 to below 1")
        _ = self.choice  # refuses a precision that the engine lacks
        check_writable(self.out)
        if self.out.suffix == ".xml":
            check_writable(self.out.with_suffix(".bin"))

    @property
    def choice(self) -> Choice:
        """How the export is run; raises ConfigError for a precision that its engine does not support."""
        return Choice(FORMATS[self.format].backend, self.precision)

    @property
    def bounds(self) -> gate.Limits:
        """The limits of the gate, relaxed if channels are reduced."""
        usual = gate.LIMITS[self.precision]
        return dataclasses.replace(usual, map_error=usual.map_error + 2 * self.reduced)


@dataclass(frozen=True)
class Draft:
    """A graph that has not been compared with the model yet."""

    graph: bytes
    kept: list[Kept]
    flops: int
    """FLOPs for one image, counted as in `benchmark`."""
    float_layers: list[str]
    """Layers that stayed in floating point."""


def export(
    model: str | Path,
    data: str | Path,
    *,
    out: str | Path,
    format: str,
    precision: str = "fp32",
    reduced: float = 0.0,
    evaluation: str | Path | None = None,
    layout: str = "auto",
    report: Report = silent,
) -> dict[str, gate.Agreement]:
    """Export a model file to `out`, provided that the result agrees with the trained model.

    data: the data set that the model was trained on, where its held-out good images are found by content.
    format: onnx or openvino. precision: fp32, fp16, bf16 or int8. reduced: the map error that each reduction
    of channels may cause; 0 keeps all channels. evaluation: a labelled data set whose test images are
    compared as well. Returns how well the two agree, by set of images. Raises ExportError, and writes
    nothing, if they differ beyond the limits.
    """
    request = Request(format, precision, Path(out), reduced)
    labelled = None if evaluation is None else Path(evaluation)
    return run(request, Path(model), Path(data), labelled, layout=layout, report=report)


def run(
    request: Request,
    model: Path,
    root: Path,
    labelled: Path | None = None,
    *,
    layout: str = "auto",
    report: Report = silent,
) -> dict[str, gate.Agreement]:
    """Carry out an export; see `export`."""
    opened = bundle.read(model)
    if request.out.resolve() == opened.path.resolve():
        raise ConfigError(f"--out {request.out} is the model itself; expected another name")
    if opened.manifest.export is not None:
        raise ConfigError(f"{opened.path} is an export itself; expected the model file that it was made from")
    good = held_out(opened, root, layout)
    detector = restored(opened)
    trained = gate.DetectorEngine(detector)
    before = opened.manifest.calibration
    draft = make_graph(detector, trained, good, request, opened.manifest, report)
    engine = open_graph(draft.graph, detector.outputs, request.choice)
    after, found = compare_on_good(gate.ComparedEngine(engine, trained), good, opened.manifest)
    known = opened.manifest.calibration
    agreements = {"good images" if known.left_out else "held-out good images": found}
    manifest = dataclasses.replace(opened.manifest, engine=request.choice, calibration=after)
    if labelled is not None:
        made = Bundle(opened.path, manifest, opened.weights, draft.graph)
        agreements["labelled images"] = compare_on_labelled(
            opened, made, gate.ComparedEngine(engine, trained), labelled, report
        )
    for name, each in agreements.items():
        tell(report, gate.describe(name, each))
    for name, each in agreements.items():
        gate.refuse(name, each, request.bounds)
    thresholds = "as trained" if after == before else "set anew on the same images"
    if before.left_out:
        thresholds = "carried over by how the statistics of good images changed"
    record = ExportRecord(
        limits=asdict(request.bounds),
        agreement={name: to_json_types(each) for name, each in agreements.items()},
        flops=draft.flops,
        reduced=tuple(asdict(each) for each in draft.kept),
        in_floating_point=tuple(draft.float_layers),
        thresholds=thresholds,
    )
    manifest = dataclasses.replace(manifest, export=record)
    formats.write(request.out, Bundle(opened.path, manifest, opened.weights, draft.graph), request.format)
    return agreements


def make_graph(
    detector: Detector,
    trained: gate.DetectorEngine,
    good: Sequence[FloatArray],
    request: Request,
    manifest: Manifest,
    report: Report,
) -> Draft:
    """Rewrite a detector, trace it and, for int8, quantise it."""
    network, kept = rewritten(detector, good, request, report)
    size, half = detector.config.image_size, request.precision == "fp16"
    count = flops(network, size)
    graph = onnx_graph.export_network(network, size, detector.outputs, half=half)
    if request.precision != "int8":
        return Draft(graph, kept, count, [])
    used = limits_used(trained, good[:SEARCHED_ON], request, manifest)
    graph, left = quantise.quantise(graph, good, used, report, detector.integer_layers)
    tell(report, f"layers left in floating point: {', '.join(left) or 'none'}")
    return Draft(graph, kept, count, left)


def held_out(opened: Bundle, root: Path, layout: str = "auto") -> list[FloatArray]:
    """Find in a data set, by content, the good images on which an export is measured.

    They are the held-out images or, for a model that holds none out, some that it was fitted to, turned by
    180 degrees, since its map of what it remembers is next to nothing. Returns the inputs (N, 3, h, w) of
    each. Raises DataError if the data set has none of them.
    """
    files = opened.manifest.training.files
    known = frozenset(files.held_out or files.train[:LEARNED_FROM]) if files else frozenset()
    if not known:
        raise DataError(f"{opened.path} does not record the good images it was calibrated on; train it again")
    inputs: dict[str, FloatArray] = {}
    for sample in data_sets.scan(root, layout):
        if sample.label == 0:
            content = sample.path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:SHORT_DIGEST]
            if digest in known:
                inputs[digest] = opened.manifest.preprocessing.inputs(images.read(sample.path, content))
    if not inputs:
        raise DataError(
            f"found none of the {len(known)} good images in {root} that {opened.path} was calibrated on; "
            "expected the data set that it was trained on"
        )
    if len(inputs) < len(known):
        left_out = opened.manifest.calibration.left_out
        LOG.warning(
            "%s has only %d of the %d good images that an export of this model is measured on%s",
            *(root, len(inputs), len(known), "" if left_out else ", so the thresholds are kept"),
        )
    found = [inputs[digest] for digest in sorted(inputs)]
    if opened.manifest.calibration.left_out:
        found = [np.ascontiguousarray(each[:, :, ::-1, ::-1]) for each in found]
    return found


def rewritten(
    detector: Detector, good: Sequence[FloatArray], request: Request, report: Report
) -> tuple[nn.Module, list[Kept]]:
    """Fuse a detector and rewrite it as requested; also return how many channels each layer keeps."""
    network = detector.fused()
    batches = [torch.from_numpy(inputs) for inputs in good]
    kept: list[Kept] = []
    if request.reduced:
        height, width = detector.config.image_size
        rendered = [
            torch.from_numpy(images.to_input(textures.draw((height, width), seed))[None])
            for seed in range(REDUCTION_IMAGES)
        ]
        network, kept = detector.with_fewer_channels(
            network, batches[:REDUCTION_IMAGES], rendered, request.reduced
        )
        for each in kept:
            tell(
                report,
                f"{each.layer}: {each.kept} of {each.of} channels, map error {each.error:.3f}",
            )
    if request.precision == "int8":
        network = detector.for_integers(network, batches[: quantise.MAX_RANGE_IMAGES])
    return network, kept


def limits_used(
    trained: gate.DetectorEngine, good: Sequence[FloatArray], request: Request, manifest: Manifest
) -> quantise.Used:
    """Return a function that measures a graph as the gate will; the trained model runs on the images once.

    A graph that the engine cannot run here uses up more than anything allows.
    """
    replay = gate.RecordedOutputs({inputs.tobytes(): trained.run(inputs) for inputs in good}, trained.outputs)

    def used(graph: bytes) -> float:
        try:
            engine = open_graph(graph, trained.outputs, request.choice)
            _, found = compare_on_good(gate.ComparedEngine(engine, replay), good, manifest)
        except (ModelFileError, ExportError):
            return math.inf
        return gate.used(found, request.bounds)

    return used


def compare_on_good(
    watched: gate.ComparedEngine, good: Sequence[FloatArray], manifest: Manifest
) -> tuple[Calibration, gate.Agreement]:
    """Run export and model on good images; set new thresholds if the old ones came from these images.

    Thresholds that came from scoring each image without itself, which no export can do, are carried over.
    Labels are compared by thresholds that each sets from its own scores: some image lies on every threshold,
    and rounding alone could flip its label. Raises ExportError for an export whose outputs are not finite.
    """
    preprocessing, before = manifest.preprocessing, manifest.calibration
    exported = measure(watched, preprocessing, good)
    if not watched.finite:
        raise ExportError("the export's outputs are not finite")
    replay = gate.RecordedOutputs(
        {inputs.tobytes(): known for inputs, known in zip(good, watched.expected, strict=True)},
        watched.outputs,
    )
    both = [measure(replay, preprocessing, good), exported]
    anew = [refitted(*measured, before) for measured in both]
    scores = [
        calibration.image_scores(measured[0], fitted).tolist()
        for measured, fitted in zip(both, anew, strict=True)
    ]
    labels = [
        [calibration.verdict_label(score, fitted) for score in row]
        for row, fitted in zip(scores, anew, strict=True)
    ]
    found = gate.agreement(watched, scores, labels)
    if before.left_out:
        return transferred(before, *both), found
    same = gate.same_images(calibration.image_scores(both[0][0], before).tolist(), before)
    return anew[1] if same else before, found


def refitted(statistics: FloatArray, maxima: FloatArray, before: Calibration) -> Calibration:
    """Set thresholds from new measurements, with the same rates and confidence."""
    return calibration.fit(
        statistics,
        maxima,
        before.statistics,
        false_reject_rate=before.false_reject_rate,
        review_rate=before.review_rate,
        confidence=before.confidence,
        left_out=before.left_out,
    )


def compare_on_labelled(
    opened: Bundle, made: Bundle, watched: gate.ComparedEngine, root: Path, report: Report
) -> gate.Agreement:
    """Compare model and export on the test images of a labelled data set."""
    model, exported = Predictor(opened), Predictor(made, engine=watched)
    results = [
        evaluation.evaluate(predictor, root, exhibits=0, report=report) for predictor in (model, exported)
    ]
    scores = [[image.score for image in result.images] for result in results]
    labels = [[image.label for image in result.images] for result in results]
    return gate.with_metrics(gate.agreement(watched, scores, labels), *results)
