"""Evaluate a model on a labelled data set. Only this package opens test images; it needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blemish import images
from blemish.data import scan
from blemish.data.folds import assign_fold, fold_from_record
from blemish.data.layouts.saturation import regions
from blemish.data.split import choose_test, relative_path
from blemish.errors import DataError, ImageError
from blemish.evaluation import metrics
from blemish.evaluation.exhibits import Gallery
from blemish.evaluation.groups import Truth, empty_groups
from blemish.evaluation.metric_table import METRICS, shown
from blemish.files import short_digest
from blemish.inference.manifest import TrainingRecord
from blemish.inference.predictor import Outcome, Predictor, load
from blemish.progress import Report, Stop, never, silent, tell, tracked
from blemish.tables import aligned
from blemish.types import Evaluation, ImageResult, Sample, Verdict

LOG = logging.getLogger(__name__)


def evaluate(
    model: Predictor | str | Path,
    data: str | Path,
    *,
    layout: str = "auto",
    memory: int = 2 << 30,
    exhibits: int = 4,
    report: Report = silent,
    stop: Stop = never,
) -> Evaluation:
    """Judge the test images of a labelled data set and compute metrics.

    model: an open model, or a model file. Maps are compared with masks at each image's own size. memory:
    bytes for the pixel scores, beyond which metrics are computed from a fine histogram. exhibits: images per
    type of mistake to keep for the report. Unreadable images are skipped and listed. Images that the model
    was trained or calibrated on are left out, even if the data set assigns them to the test split. Raises
    DataError for a data set without test images, StoppedError when asked to stop.
    """
    model = model if isinstance(model, Predictor) else load(model)
    root = Path(data)
    samples = with_recorded_fold(scan(root, layout), root, model)
    test = without_training_images(choose_test(samples, root), model, report)
    if not test:
        raise DataError(f"{root} holds no test images; expected good and defective ones to evaluate on")
    good, overall, groups = empty_groups(test, memory)
    gallery = Gallery(exhibits, model.preprocessing.white)
    results: list[ImageResult] = []
    skipped: list[str] = []
    for sample, outcome in judge_all(model, test, report, stop):
        truth = read_truth(sample, outcome)
        failure = outcome.error or (truth if isinstance(truth, ImageError | DataError) else None)
        if failure is not None:
            skipped.append(str(failure))
            LOG.warning("skipped: %s", failure)
        verdict, image = outcome.verdict, outcome.image
        if verdict is None or image is None or isinstance(truth, ImageError | DataError):
            continue
        for group in (overall, *(groups.values() if sample.label == 0 else (groups[sample.kind],))):
            group.add(sample, verdict, truth)
        if sample.label == 0:
            good.add(verdict, truth)
        elif truth is not None:  # a defect without a mask counts only for image-level metrics
            groups[sample.kind].pixels.add(verdict, truth)
        results.append(result_of(sample, root, verdict))
        gallery.offer(results[-1], image, verdict.map, truth.mask if truth else None)
    return Evaluation(
        data=root.resolve().name,
        rows=tuple(group.row() for group in (overall, *groups.values())),
        intervals={
            field: metrics.bootstrap_interval(metric.of_images, overall.scores, overall.labels)
            for field, metric in METRICS.items()
            if metric.of_images is not None and 0 < sum(overall.labels) < len(overall.labels)
        },
        images=tuple(results),
        skipped=tuple(skipped),
        calibration=model.calibration,
        provenance=provenance(model),
        exhibits=gallery.exhibits(),
    )


def result_of(sample: Sample, root: Path, verdict: Verdict) -> ImageResult:
    """Return what a verdict says of a sample of the data set at `root`."""
    name = relative_path(sample.path, root)
    return ImageResult(
        path=name,
        kind=sample.kind,
        truth=sample.label,
        label=verdict.label,
        score=verdict.score,
        p_value=verdict.p_value,
        light_p=verdict.light_p,
        reason=verdict.reason,
    )


def with_recorded_fold(samples: list[Sample], root: Path, model: Predictor) -> list[Sample]:
    """Assign the samples to the model's cross-validation fold, if it was trained in one on these images."""
    recorded = model.manifest.training.fold
    if recorded is None:
        return samples
    try:
        return assign_fold(samples, root, fold_from_record(recorded, samples, root))
    except DataError as error:
        LOG.warning("the recorded fold cannot be restored, so the test split of %s is used: %s", root, error)
        return samples


def without_training_images(test: Sequence[Sample], model: Predictor, report: Report) -> list[Sample]:
    """Return the samples that the model was not trained or calibrated on, judging by file content."""
    used = model.manifest.used
    kept = [sample for sample in test if not used or short_digest(sample.path) not in used]
    if len(kept) < len(test):
        left_out = len(test) - len(kept)
        tell(
            report, f"{left_out} test images are excluded because the model was trained or calibrated on them"
        )
    return kept


def judge_all(
    model: Predictor, test: Sequence[Sample], report: Report, stop: Stop
) -> Iterator[tuple[Sample, Outcome]]:
    """Judge samples in order, reporting progress; raises StoppedError when asked to stop."""
    outcomes = model.stream((sample.path for sample in test), full_size=True)
    tracked_outcomes = tracked(outcomes, len(test), report, "evaluating", stop=stop)
    return zip(test, tracked_outcomes, strict=True)


def read_truth(sample: Sample, outcome: Outcome) -> Truth | ImageError | DataError | None:
    """Read the masks of a judged sample; return None if it has none, or the error if they are unusable."""
    if not sample.masks or outcome.image is None:
        return None
    size = outcome.image.shape[0], outcome.image.shape[1]
    try:
        mask = images.read_mask(sample.masks, size)
        return Truth(mask, regions(sample, size) if sample.saturations else None)
    except (ImageError, DataError) as error:
        return error


def provenance(model: Predictor) -> dict[str, Any]:
    """Return the origin of a model from its manifest, as a flat dictionary for the report."""
    manifest, training = model.manifest, model.manifest.training
    height, width = model.image_size
    return {
        "model file": model.path.name,
        "method": manifest.method,
        "pretrained network": training.pretrained,
        "image size": f"{height} x {width}",
        "trained on": f"{training.data}, {training.good_images} good images{defects_phrase(training)}",
        "calibrated on": f"{len(model.calibration.scores)} good images",
        "steps": training.steps,
        "seed": training.run.seed,
        "preset": training.run.preset,
        "precision": training.run.precision,
        "light": training.run.light,
        "training time": f"{training.seconds:.0f} s on {training.device}",
        "training images SHA-256": training.run.images,
        "image score": ", ".join(model.calibration.statistics),
        **{f"{name} version": version for name, version in manifest.versions.items()},
    }


def defects_phrase(training: TrainingRecord) -> str:
    """Return the number of training defects as the end of a phrase, or "" if there were none."""
    count, masked = training.defective_images, training.masked_images
    return f" and {count} defective ones, {masked} with masks" if count else ""


def table(evaluation: Evaluation) -> str:
    """Format the metrics as a table for a terminal; saturated PRO only if the data set defines it."""
    columns = shown(evaluation.rows)
    lines = [["kind", "good", "bad", *(metric.column for metric in columns.values())]]
    for row in evaluation.rows:
        values = (getattr(row, field) for field in columns)
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        lines.append([row.kind, str(row.good), str(row.defective), *cells])
    return aligned(lines)
