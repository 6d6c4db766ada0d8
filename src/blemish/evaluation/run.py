"""A model and a labelled data set to a table of metrics. The only room that opens a test set; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from blemish import data, images
from blemish.data.folds import assign, recall
from blemish.data.layouts.saturation import Regions, regions
from blemish.data.split import choose_test, relative_path
from blemish.errors import BlemishError, DataError, ImageError, MetricError
from blemish.evaluation import metrics
from blemish.files import short_digest
from blemish.images import overlays
from blemish.inference.predictor import Predictor
from blemish.progress import Progress, say
from blemish.types import BoolArray, Evaluation, Exhibit, ImageResult, MetricRow, Sample, Verdict

ALL = "all"

IMAGE_METRICS: dict[str, Callable[[npt.ArrayLike, npt.ArrayLike], float]] = {
    "image_auroc": metrics.auroc,
    "image_ap": metrics.average_precision,
    "image_f1_max": metrics.f1_max,
}

PIXEL_METRICS: dict[str, Callable[[metrics.PixelScores], float]] = {
    "pixel_auroc": metrics.PixelScores.auroc,
    "pixel_ap": metrics.PixelScores.average_precision,
    "pixel_f1_max": metrics.PixelScores.f1_max,
    "aupro": metrics.PixelScores.aupro,
}

SATURATED_LIMIT = 0.05
"""False-positive rate up to which saturated PRO is taken: that of the published figures."""

COLUMNS = {
    "image_auroc": "AUROC",
    "image_ap": "AP",
    "image_f1_max": "F1",
    "pixel_auroc": "pix AUROC",
    "pixel_ap": "pix AP",
    "pixel_f1_max": "pix F1",
    "aupro": "AUPRO",
    "saturated_pro": "saturated PRO",
}
"""What the table calls the fields of MetricRow."""


@dataclass(frozen=True)
class Truth:
    """What the mask files of a defective image say."""

    mask: BoolArray
    """(H, W): the union."""
    regions: Regions | None
    """The files one by one, where the data set says from which areas on they saturate."""


@dataclass(frozen=True)
class Pixels:
    """Pixel scores of the same images, gathered for the metrics with plain and with saturating regions."""

    plain: metrics.PixelScores
    saturated: metrics.PixelScores | None
    """None where the data set has no regions that saturate."""

    def add(self, verdict: Verdict, truth: Truth | None) -> None:
        """Take in one image, all good without a truth."""
        self.plain.update(verdict.map, truth.mask if truth else None)
        if self.saturated is not None:
            found = truth.regions if truth else None
            masks, areas = (found.masks, found.areas) if found else (None, ())
            self.saturated.update(verdict.map, masks, saturation_areas=areas)


@dataclass
class Group:
    """What is gathered for one row of the table."""

    kind: str
    pixels: Pixels
    """Those of its kind of defect; those of good images, which all rows share, count as well."""
    scores: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    masked: int = 0

    def add(self, sample: Sample, verdict: Verdict, truth: Truth | None) -> None:
        """Take in one image, without its pixels."""
        self.scores.append(verdict.score)
        self.labels.append(sample.label)
        self.masked += sample.label == 1 and truth is not None

    def row(self) -> MetricRow:
        """Compute the row."""
        image = {name: defined(metric, self.scores, self.labels) for name, metric in IMAGE_METRICS.items()}
        pixel = {name: defined(metric, self.pixels.plain) for name, metric in PIXEL_METRICS.items()}
        saturating = self.pixels.saturated
        saturated = defined(saturating.aupro, SATURATED_LIMIT) if saturating else None
        defective = sum(self.labels)
        good = len(self.labels) - defective
        return MetricRow(self.kind, good, defective, self.masked, **image, **pixel, saturated_pro=saturated)


def defined(metric: Callable[..., float], *inputs: Any) -> float | None:
    """Compute a metric, or give None where it is not defined."""
    try:
        return metric(*inputs)
    except MetricError:
        return None


def evaluate(
    model: Predictor, root: str | Path, *, layout: str = "auto", memory: int = 2 << 30, exhibits: int = 4
) -> Evaluation:
    """Judge the test images of a labelled data set and measure how well.

    Maps are compared with masks at each image's own size. memory: bytes for the pixels' scores, beyond which
    metrics come from a fine histogram. exhibits: images of each sort that the report shows. An image that
    cannot be read is skipped and listed; one that the model was trained or calibrated on is left out,
    whatever the data set says of it. Raises DataError for a data set without test images.
    """
    root = Path(root)
    test = unseen(choose_test(dealt(data.scan(root, layout), root, model), root), model)
    if not test:
        raise DataError(f"{root} holds no test images; expected good and defective ones to evaluate on")
    good, overall, groups = empty_groups(test, memory)
    results: list[tuple[Sample, ImageResult]] = []
    skipped: list[str] = []
    for sample, outcome in judged(model, test):
        truth = None if isinstance(outcome, ImageError) else truth_of(sample, outcome)
        for failure in (outcome, truth):
            if isinstance(failure, BlemishError):
                skipped.append(str(failure))
                say(f"skipped: {failure}")
        if isinstance(outcome, BlemishError) or isinstance(truth, BlemishError):
            continue
        for group in (overall, *(groups.values() if sample.label == 0 else (groups[sample.kind],))):
            group.add(sample, outcome, truth)
        if sample.label == 0:
            good.add(outcome, truth)
        elif truth is not None:  # a defect without a mask counts for the image-level metrics alone
            groups[sample.kind].pixels.add(outcome, truth)
        name = relative_path(sample.path, root)
        result = ImageResult(name, sample.kind, sample.label, outcome.label, outcome.score, outcome.p_value)
        results.append((sample, result))
    return Evaluation(
        data=root.resolve().name,
        rows=tuple(group.row() for group in (overall, *groups.values())),
        intervals={
            name: metrics.bootstrap_interval(metric, overall.scores, overall.labels)
            for name, metric in IMAGE_METRICS.items()
            if 0 < sum(overall.labels) < len(overall.labels)
        },
        images=tuple(result for _, result in results),
        skipped=tuple(skipped),
        calibration=model.calibration,
        provenance=provenance(model),
        exhibits=tuple(exhibit(model, *chosen) for chosen in choose_exhibits(results, exhibits)),
    )


def dealt(samples: list[Sample], root: Path, model: Predictor) -> list[Sample]:
    """Split a data set as the model's cross-validation did, if it came from one on these images."""
    recorded = model.manifest["training"].get("fold")
    if recorded is None:
        return samples
    try:
        return assign(samples, root, recall(recorded, samples, root))
    except DataError as error:
        say(f"testing on what {root} itself gives for it: {error}")
        return samples


def unseen(test: Sequence[Sample], model: Predictor) -> list[Sample]:
    """Leave out what the model was trained or calibrated on, known by the files' content."""
    files = model.manifest["training"].get("files", {})
    used = {name for names in files.values() for name in names}
    kept = [sample for sample in test if not used or short_digest(sample.path) not in used]
    if len(kept) < len(test):
        say(f"{len(test) - len(kept)} test images are left out: the model was trained or calibrated on them")
    return kept


def empty_groups(test: Sequence[Sample], memory: int) -> tuple[Pixels, Group, dict[str, Group]]:
    """Give what gathers good images' pixels, and the rows of the table: all, and each kind of defect.

    Pixels are held once: rows answer with those of others. `memory` is shared out evenly among them.
    """
    kinds = sorted({sample.kind for sample in test if sample.label == 1})
    saturating = any(sample.saturations for sample in test)
    share = max(memory // ((2 + len(kinds)) * (1 + saturating)), metrics.SMALLEST_BUDGET)

    def empty(*also: Pixels) -> Pixels:
        plain = [each.plain for each in also]
        saturated = [each.saturated for each in also if each.saturated]
        return Pixels(
            metrics.PixelScores(share, also=plain),
            metrics.PixelScores(share, also=saturated) if saturating else None,
        )

    good = empty()
    groups = {kind: Group(kind, empty(good)) for kind in kinds}
    return good, Group(ALL, empty(good, *(group.pixels for group in groups.values()))), groups


def judged(model: Predictor, test: Sequence[Sample]) -> Iterator[tuple[Sample, Verdict | ImageError]]:
    """Judge samples in order, with progress."""
    progress = Progress("evaluating", len(test), unit="image")
    outcomes = model.predict_stream((sample.path for sample in test), full_size=True)
    for number, outcome in enumerate(outcomes):
        progress.show(number + 1)
        yield test[number], outcome


def truth_of(sample: Sample, verdict: Verdict) -> Truth | BlemishError | None:
    """Read a sample's masks, if it has any; give the error of one that does not do."""
    if not sample.masks:
        return None
    try:
        mask = images.read_mask(sample.masks, shape(verdict))
        return Truth(mask, regions(sample, shape(verdict)) if sample.saturations else None)
    except (ImageError, DataError) as error:
        return error


def shape(verdict: Verdict) -> tuple[int, int]:
    """Give the image's height and width, which are its map's."""
    return verdict.map.shape[0], verdict.map.shape[1]


def provenance(model: Predictor) -> dict[str, Any]:
    """Say flatly what a model file says of itself."""
    manifest, training = model.manifest, model.manifest["training"]
    height, width = model.image_size
    return {
        "model file": model.path.name,
        "method": manifest["method"],
        "pretrained network": training["pretrained"],
        "image size": f"{height} x {width}",
        "trained on": f"{training['data']}, {training['good_images']} good images{labelled(training)}",
        "calibrated on": f"{len(model.calibration.scores)} good images",
        "steps": training["steps"],
        "seed": training["run"]["seed"],
        "preset": training["run"]["preset"],
        "precision": training["run"]["precision"],
        "training time": f"{training['seconds']:.0f} s on {training['device']}",
        "training images SHA-256": training["run"]["images"],
        "image score": ", ".join(model.calibration.statistics),
        **{f"{name} version": version for name, version in manifest["versions"].items()},
    }


def labelled(training: dict[str, Any]) -> str:
    """Say how many defects were learned from."""
    count, masked = training.get("defective_images", 0), training.get("masked_images", 0)
    return f" and {count} defective ones, {masked} with masks" if count else ""


def choose_exhibits(
    results: Sequence[tuple[Sample, ImageResult]], count: int
) -> Iterator[tuple[str, Sample, ImageResult]]:
    """Choose escapes and false rejects, the worst first, then the clearest find of each kind."""
    by_score = sorted(results, key=lambda pair: pair[1].score)
    escapes = [pair for pair in by_score if pair[1].truth == 1 and pair[1].label == "ok"]
    good = [pair for pair in reversed(by_score) if pair[1].truth == 0]
    rejects = [pair for pair in good if pair[1].label == "defect"]
    reviews = [pair for pair in good if pair[1].label == "review"]
    for title, chosen in (("Escape", escapes), ("False reject", rejects), ("Needless review", reviews)):
        for sample, result in chosen[:count]:
            yield title, sample, result
    seen: set[str] = set()
    for sample, result in reversed(by_score):
        if result.truth == 1 and result.label != "ok" and sample.kind not in seen and len(seen) < 2 * count:
            seen.add(sample.kind)
            yield "Best find", sample, result


def exhibit(model: Predictor, title: str, sample: Sample, result: ImageResult) -> Exhibit:
    """Judge an image once more and keep what the report shows of it."""
    image = images.read(sample.path)
    verdict = model.predict(image, full_size=True)
    mask = images.read_mask(sample.masks, shape(verdict)) if sample.masks else None
    return Exhibit(title, result, overlays.to_display(image, model.white), verdict.map, mask)


def table(evaluation: Evaluation) -> str:
    """Lay the metrics out for a terminal; saturated PRO only where the data set has it."""
    saturating = any(row.saturated_pro is not None for row in evaluation.rows)
    columns = {name: head for name, head in COLUMNS.items() if saturating or name != "saturated_pro"}
    lines = [["kind", "good", "bad", *columns.values()]]
    for row in evaluation.rows:
        values = (getattr(row, name) for name in columns)
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        lines.append([row.kind, str(row.good), str(row.defective), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    widths[0] = -widths[0]  # the first column is aligned to the left
    layout = "  ".join(f"%{width}s" for width in widths)
    return "\n".join(layout % tuple(line) for line in lines)
