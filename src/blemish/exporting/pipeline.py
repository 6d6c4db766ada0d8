"""A trained model to one that runs faster elsewhere: rewrite, quantise, compare, calibrate, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from blemish import data, images
from blemish.data.loading import textures
from blemish.detectors import fusing, onnx_graph
from blemish.detectors.base import Detector
from blemish.detectors.efficientad.channels import Kept, reduce
from blemish.detectors.efficientad.fused import FusedEfficientAD
from blemish.detectors.efficientad.integers import first_convolution, ready_for_integers, round_evenly
from blemish.detectors.registry import fuse, restore
from blemish.errors import ConfigError, DataError, ExportError
from blemish.evaluation.run import evaluate
from blemish.exporting import formats, gate, quantise
from blemish.exporting.formats import FORMATS
from blemish.files import check_writable, short_digest
from blemish.inference import bundle
from blemish.inference.bundle import Bundle
from blemish.inference.calibration import calibrate, image_scores, verdict_label
from blemish.inference.engines import Choice, open_graph
from blemish.inference.predictor import Predictor
from blemish.progress import say
from blemish.types import Calibration, FloatArray

LOOKED_AT = 12
"""Good images, and drawn ones, that reduced channels are found by."""


@dataclass(frozen=True)
class Request:
    """What to make."""

    format: str
    precision: str
    out: Path
    reduced: float = 0.0
    """Map error that fewer channels may make; 0: all channels stay."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made; raise ConfigError."""
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
        """Give the engine that runs it; raises ConfigError for a precision that it does not have."""
        return Choice(FORMATS[self.format].backend, self.precision)

    @property
    def bounds(self) -> gate.Limits:
        """Give the limits that hold."""
        usual = gate.LIMITS[self.precision]
        return dataclasses.replace(usual, map_error=usual.map_error + 2 * self.reduced)


@dataclass(frozen=True)
class Draft:
    """A graph that has not been compared yet."""

    graph: bytes
    kept: list[Kept]
    flops: int
    """Of one image, as `benchmark` counts them."""
    left: list[str]
    """Layers that stayed in floating point."""


def export(
    model: str | Path, root: str | Path, request: Request, *, labelled: str | Path | None = None
) -> dict[str, gate.Agreement]:
    """Export a model file and write it, if it agrees with the trained model.

    root: the data set that the model was trained on, where its held-out good images are found by content.
    labelled: a data set whose test images are compared, too. Returns how the two agree, by set of images.
    Raises ExportError where they differ beyond the limits; nothing is written then.
    """
    opened = bundle.read(Path(model))
    if request.out.resolve() == opened.path.resolve():
        raise ConfigError(f"--out {request.out} is the model itself; expected another name")
    if "export" in opened.manifest:
        raise ConfigError(f"{opened.path} is an export itself; expected the model file that it was made from")
    good = held_out(opened, Path(root))
    detector = restore(opened)
    trained = gate.Trained(detector)
    draft = drafted(detector, trained, good, request)
    engine = open_graph(draft.graph, detector.outputs, request.choice)
    calibration, found = compared(gate.Watched(engine, trained), good, opened.calibration)
    agreements = {"held-out good images": found}
    facts: dict[str, Any] = {"engine": asdict(request.choice), "calibration": asdict(calibration)}
    if labelled is not None:
        made = formats.exported(opened, draft.graph, facts)
        agreements["labelled images"] = judged(opened, made, gate.Watched(engine, trained), Path(labelled))
    for name, each in agreements.items():
        say(gate.describe(name, each))
    for name, each in agreements.items():
        gate.refuse(name, each, request.bounds)
    facts["export"] = {
        "limits": asdict(request.bounds),
        "agreement": {name: asdict(each) for name, each in agreements.items()},
        "flops": draft.flops,
        "reduced": [asdict(each) for each in draft.kept],
        "in floating point": draft.left,
        "thresholds": "as trained" if calibration == opened.calibration else "set anew on the same images",
    }
    formats.write(request.out, formats.exported(opened, draft.graph, facts), request.format)
    return agreements


def drafted(detector: Detector, trained: gate.Trained, good: Sequence[FloatArray], request: Request) -> Draft:
    """Rewrite, trace and quantise, as asked for."""
    network, kept = rewritten(fuse(detector), good, request)
    size, half = detector.config.image_size, request.precision == "fp16"
    flops = fusing.flops(network, size)
    graph = onnx_graph.traced(network, size, detector.outputs, half=half)
    if request.precision != "int8":
        return Draft(graph, kept, flops, [])
    error = map_error(trained, good[:LOOKED_AT], request.choice)
    graph, left = quantise.quantise(graph, good, error, request.bounds.map_error)
    say(f"in floating point: {', '.join(left) or 'no layer'}")
    return Draft(graph, kept, flops, left)


def held_out(opened: Bundle, root: Path) -> list[FloatArray]:
    """Find the good images that a model's thresholds stand on in a data set, by content; (3, H, W) each.

    Raises DataError where the data set has none of them.
    """
    known = set(opened.manifest["training"].get("files", {}).get("held_out", ()))
    if not known:
        raise DataError(f"{opened.path} does not say which good images it was calibrated on; train it anew")
    good = {short_digest(each.path): each.path for each in data.scan(root, "auto") if each.label == 0}
    paths = [good[digest] for digest in sorted(known & good.keys())]
    if not paths:
        raise DataError(
            f"found none of the {len(known)} good images in {root} that {opened.path} was calibrated on; "
            "expected the data set that it was trained on"
        )
    if len(paths) < len(known):
        say(f"{root} has {len(paths)} of {len(known)} good images behind the thresholds, which stay")
    size, white = opened.manifest["preprocessing"]["image_size"], opened.manifest["preprocessing"]["white"]
    return [images.prepare(images.read(path), tuple(size), white) for path in paths]


def rewritten(
    network: nn.Module, good: Sequence[FloatArray], request: Request
) -> tuple[nn.Module, list[Kept]]:
    """Rewrite a fused network for what was asked for; say what was kept of which layer."""
    if not isinstance(network, FusedEfficientAD):
        if request.reduced:
            raise ConfigError("reduced channels: only EfficientAD has them; expected no --reduced")
        if request.precision == "int8" and (entrance := first_convolution(network)) is not None:
            round_evenly(entrance)
        return network, []
    batches = [torch.from_numpy(image[None]) for image in good]
    kept: list[Kept] = []
    if request.reduced:
        height, width = network.config.image_size
        drawn = [
            torch.from_numpy(images.to_input(textures.draw((height, width), seed))[None])
            for seed in range(LOOKED_AT)
        ]
        network, kept = reduce(network, batches[:LOOKED_AT], drawn, request.reduced)
        for each in kept:
            say(f"{each.layer}: {each.kept} of {each.of} channels, map error {each.error:.3f}")
    if request.precision == "int8":
        network = ready_for_integers(network, batches[: quantise.MOST_RANGED])
    return network, kept


def map_error(trained: gate.Trained, good: Sequence[FloatArray], choice: Choice) -> Callable[[bytes], float]:
    """Give what measures a graph's map error on images, the trained model being run on them once."""
    replay = gate.Replay({image.tobytes(): trained.run(image[None]) for image in good}, trained.outputs)

    def error(graph: bytes) -> float:
        watched = gate.Watched(open_graph(graph, trained.outputs, choice), replay)
        for image in good:
            watched.run(image[None])
        return watched.map_error

    return error


def compared(
    watched: gate.Watched, good: Sequence[FloatArray], calibration: Calibration
) -> tuple[Calibration, gate.Agreement]:
    """Run export and model on good images; set the thresholds anew if those are the images they came from.

    Labels are compared by thresholds that each sets from its own scores: an image lies on every threshold,
    and rounding alone would flip it. Raises ExportError for an export that gives no finite numbers.
    """
    found = [watched.run(image[None]) for image in good]
    if not all(np.isfinite(each[name]).all() for each in found for name in ("map", "statistics")):
        raise ExportError("the export gives numbers that are not finite")
    both = [[*watched.expected], found]
    statistics = [np.concatenate([each["statistics"] for each in runs]) for runs in both]
    maxima = [np.array([each["map"].max() for each in runs]) for runs in both]
    anew = [recalibrated(*measured, calibration) for measured in zip(statistics, maxima, strict=True)]
    scores = [image_scores(*pair).tolist() for pair in zip(statistics, anew, strict=True)]
    labels = [
        [verdict_label(score, chosen) for score in row] for row, chosen in zip(scores, anew, strict=True)
    ]
    same = gate.same_images(image_scores(statistics[0], calibration).tolist(), calibration)
    return anew[1] if same else calibration, gate.agreement(watched, scores, labels)


def recalibrated(statistics: FloatArray, maxima: FloatArray, calibration: Calibration) -> Calibration:
    """Set thresholds from other numbers with the same rates and confidence."""
    return calibrate(
        statistics,
        maxima,
        calibration.statistics,
        false_reject_rate=calibration.false_reject_rate,
        review_rate=calibration.review_rate,
        confidence=calibration.confidence,
    )


def judged(opened: Bundle, made: Bundle, watched: gate.Watched, root: Path) -> gate.Agreement:
    """Compare model file and export on the test images of a labelled data set."""
    model, export = Predictor(opened), Predictor(made, engine=watched)
    results = [evaluate(predictor, root, exhibits=0) for predictor in (model, export)]
    scores = [[image.score for image in result.images] for result in results]
    labels = [[image.label for image in result.images] for result in results]
    return gate.with_metrics(gate.agreement(watched, scores, labels), *results)
