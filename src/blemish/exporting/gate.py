"""The gate that every export must pass: how much it differs from the trained model, and how much it may.

Both run on the same images: the held-out good ones, and a labelled set if one is given. The comparison covers
what a user would notice: the order of the scores, the maps, the verdicts and, with labels, the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import spearmanr

from blemish.detectors.base import Detector
from blemish.errors import ExportError
from blemish.inference.engines import Engine
from blemish.types import Calibration, Evaluation, FloatArray

RANKED = 20
"""Number of images from which the full limit of the rank correlation applies; below, half of it does, since
good images differ little from one another, and the order of five of them changes easily."""


@dataclass(frozen=True)
class Limits:
    """How much an export may differ from its model."""

    rank_correlation: float
    """Smallest rank correlation (Spearman) of the image scores."""
    map_error: float
    """Largest root mean square difference of the maps, in standard deviations of the model's maps."""
    flips: float = 0.0
    """Largest share of the images that may change their label."""
    auroc_loss: float = 0.002
    aupro_loss: float = 0.005


LIMITS = {
    "fp32": Limits(0.999, 0.001),
    "fp16": Limits(0.98, 0.05),
    "bf16": Limits(0.9, 0.4),
    "int8": Limits(0.9, 0.4, flips=0.01),
}


@dataclass(frozen=True)
class Agreement:
    """How an export compares with its model on a set of images."""

    images: int
    rank_correlation: float
    map_error: float
    flips: int
    """Number of images that the export, at its own thresholds, labels differently."""
    auroc: tuple[float, float] | None = None
    """Image AUROC of the model, then of the export; None without labels."""
    aupro: tuple[float, float] | None = None


class DetectorEngine:
    """The trained detector itself as an engine, in float32 and not fused."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector.eval()
        self.outputs: tuple[str, ...] = detector.outputs

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Run (B, 3, H, W) images."""
        with torch.inference_mode():
            found = self.detector(torch.from_numpy(inputs))
        return {name: x.numpy() for name, x in zip(self.outputs, found, strict=True)}


class RecordedOutputs:
    """An engine that returns recorded outputs and computes nothing."""

    def __init__(self, known: Mapping[bytes, dict[str, FloatArray]], outputs: tuple[str, ...]) -> None:
        self.known, self.outputs = known, outputs

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Return the outputs recorded for one image's inputs."""
        return self.known[inputs.tobytes()]


class ComparedEngine:
    """An engine that runs a reference alongside, and measures how much their maps differ."""

    def __init__(self, engine: Engine, reference: Engine) -> None:
        self.engine, self.reference = engine, reference
        self.outputs = engine.outputs
        self.finite = True
        """Whether the engine's outputs have all been finite."""
        self.count, self.squares, self.sum, self.sum_of_squares = 0, 0.0, 0.0, 0.0
        self.expected: list[dict[str, FloatArray]] = []
        """Outputs of the reference, with each map replaced by its largest value."""

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Run both on (B, 3, H, W) images; return the engine's outputs."""
        found, expected = self.engine.run(inputs), self.reference.run(inputs)
        self.finite &= all(bool(np.isfinite(found[name]).all()) for name in ("map", "statistics"))
        peaks = {name: expected[name].max((1, 2), keepdims=True) for name in ("map", *self.outputs[2:])}
        self.expected.append({"statistics": expected["statistics"]} | peaks)
        wanted = expected["map"].astype(np.float64)
        self.count += wanted.size
        self.squares += float(np.square(found["map"] - wanted).sum())
        self.sum += float(wanted.sum())
        self.sum_of_squares += float(np.square(wanted).sum())
        return found

    @property
    def map_error(self) -> float:
        """Root mean square difference of the maps, in standard deviations of the reference's maps."""
        variance = self.sum_of_squares / self.count - (self.sum / self.count) ** 2
        if variance <= 0:
            return 0.0 if self.squares == 0 else float("inf")
        return float(np.sqrt(self.squares / self.count / variance))


def agreement(
    watched: ComparedEngine,
    scores: Sequence[Sequence[float]],
    labels: Sequence[Sequence[str]],
) -> Agreement:
    """Compare scores and labels of the model and the export, in this order, on a watched engine's images."""
    flips = sum(one != other for one, other in zip(*labels, strict=True))
    return Agreement(len(scores[0]), rank_correlation(*scores), watched.map_error, flips)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 1 if both are constant, 0 if only one is."""
    constant = [len(set(values)) < 2 for values in (one, other)]
    if any(constant):
        return float(all(constant))
    return float(spearmanr(one, other).statistic)


def with_metrics(found: Agreement, model: Evaluation, export: Evaluation) -> Agreement:
    """Add the metrics, which need labelled images, to an agreement."""
    before, after = model.rows[0], export.rows[0]
    if before.image_auroc is not None and after.image_auroc is not None:
        found = replace(found, auroc=(before.image_auroc, after.image_auroc))
    if before.aupro is not None and after.aupro is not None:
        found = replace(found, aupro=(before.aupro, after.aupro))
    return found


def least_correlation(limits: Limits, images: int) -> float:
    """Return the smallest rank correlation allowed over so many images."""
    return limits.rank_correlation / (1 if images >= RANKED else 2)


def used(found: Agreement, limits: Limits) -> float:
    """Return how much of its limits an export uses up on good images; above 1 it would be refused."""
    disorder = (1 - found.rank_correlation) / (1 - least_correlation(limits, found.images))
    shares = [found.map_error / limits.map_error, disorder]
    if found.flips:
        shares.append(found.flips / (limits.flips * found.images) if limits.flips else math.inf)
    return math.inf if any(math.isnan(share) for share in shares) else max(shares)


def refuse(name: str, found: Agreement, limits: Limits) -> None:
    """Raise ExportError with every limit that is exceeded on the images called `name`."""
    broken = []
    least = least_correlation(limits, found.images)
    if not found.rank_correlation >= least:
        broken.append(f"rank correlation {found.rank_correlation:.4f}, at least {least:g}")
    if not found.map_error <= limits.map_error:
        broken.append(f"map error {found.map_error:.4f}, at most {limits.map_error:g}")
    if found.flips > limits.flips * found.images:
        allowed = int(limits.flips * found.images)
        broken.append(f"{found.flips} of {found.images} verdicts flipped, at most {allowed}")
    for metric, pair, loss in (
        ("image AUROC", found.auroc, limits.auroc_loss),
        ("AUPRO", found.aupro, limits.aupro_loss),
    ):
        if pair is not None and not pair[0] - pair[1] <= loss:
            broken.append(f"{metric} {pair[1]:.4f} (model: {pair[0]:.4f}), allowed loss {loss:g}")
    if broken:
        raise ExportError(
            f"the export differs too much from the trained model on {name}: {'; '.join(broken)}"
        )


def describe(name: str, found: Agreement) -> str:
    """Describe an agreement in one line."""
    parts = [
        f"{name}, {found.images} images: rank correlation {found.rank_correlation:.4f}",
        f"map error {found.map_error:.4f}",
        f"{found.flips} verdicts flipped",
    ]
    for metric, pair in (("image AUROC", found.auroc), ("AUPRO", found.aupro)):
        if pair is not None:
            parts.append(f"{metric} {pair[1]:.4f} (model: {pair[0]:.4f})")
    return ", ".join(parts)


def same_images(scores: Sequence[float], calibration: Calibration) -> bool:
    """Return whether scores of good images are those from which the thresholds were set."""
    if len(scores) != len(calibration.scores):
        return False
    expected = np.array(calibration.scores)
    return bool(np.allclose(np.sort(scores), expected, rtol=1e-2, atol=1e-2 * float(np.ptp(expected))))
