"""Write an evaluation as a self-contained HTML page, a CSV file or a JSON file, without model or data set.

The page loads nothing from the network: pictures are data: URIs, charts are inline SVG, styles are inline.
Text from file names and model files is escaped.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections import Counter
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from blemish import files, images
from blemish.evaluation import charts
from blemish.evaluation.metric_table import METRICS, shown
from blemish.images import overlays
from blemish.inference.calibration import describe, scored_images
from blemish.types import AnyArray, BoolArray, Calibration, Evaluation, Exhibit, ImageResult

PICTURE_SIDE = 448
"""Longest side in pixels of a picture on the page; larger ones are reduced."""

UNUSUAL = 0.05
"""Light p-value up to which the page shows it beside a picture."""

NORMAL_QUANTILE = 1.959964
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Rate:
    """A share of the good or of the defective test images, with its 95 % Wilson score interval."""

    count: int
    total: int
    share: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """An exhibit for the page; its pictures are data: URIs."""

    title: str
    result: ImageResult
    image: str
    overlay: str
    outline: str | None
    """None if there is no mask."""


def write_html(evaluation: Evaluation, path: Path) -> None:
    """Write the evaluation as one self-contained HTML page, atomically."""
    files.write_text(path, _page(evaluation))


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """Write a CSV file with one row per test image and the field names of ImageResult as header."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(ImageResult)]
    table.writerow(names)
    table.writerows([getattr(result, name) for name in names] for result in evaluation.images)
    files.write_text(path, text.getvalue())


def write_json(evaluation: Evaluation, path: Path) -> None:
    """Write a JSON file with everything but the pixels, under the field names of the records.

    Undefined and non-finite values are null; saturated PRO is included only if the data set defines it. An
    exhibit is reduced to its title and the path of its image.
    """
    record = {field.name: getattr(evaluation, field.name) for field in fields(Evaluation)}
    hidden = METRICS.keys() - shown(evaluation.rows).keys()
    record["rows"] = [
        {name: value for name, value in asdict(row).items() if name not in hidden} for row in evaluation.rows
    ]
    record["exhibits"] = [{"title": one.title, "path": one.result.path} for one in evaluation.exhibits]
    files.write_json(path, record)


# --- the page ---


def _page(evaluation: Evaluation) -> str:
    calibration, rates = evaluation.calibration, _rates(evaluation)
    return _template().render(
        evaluation=evaluation,
        headline=_headline(rates),
        counts=Counter((result.truth, result.label) for result in evaluation.images),
        rates=rates,
        for_light=sum(result.reason == "light" for result in evaluation.images),
        unusual=UNUSUAL,
        metrics={field: metric.title for field, metric in shown(evaluation.rows).items()},
        box=(charts.ROC_WIDTH, charts.ROC_HEIGHT),
        roc=charts.lay_out_roc(evaluation.images),
        strip=(charts.STRIP_WIDTH, charts.STRIP_HEIGHT),
        bar=charts.STRIP_WIDTH / charts.BINS,
        histogram=charts.lay_out_histogram(evaluation.images, calibration),
        pictures=[_picture(exhibit, calibration) for exhibit in evaluation.exhibits],
        scale=_scale(calibration),
        legend=overlays.legend(),
        promise=_promise(calibration, rates.get("False rejects")),
        calibration=describe(calibration),
        source=scored_images(calibration),
        provenance={name: _listed(value) for name, value in evaluation.provenance.items()},
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"metric": _metric, "percent": _percent, "short": _short}
    return environment.from_string(
        (resources.files("blemish.evaluation") / "report.html.jinja").read_text("utf-8")
    )


def _metric(value: float | None) -> str:
    """Format a metric from 0 to 1; an undefined one is empty."""
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _percent(share: float) -> str:
    """Format a share as a percentage with one decimal, or with two significant digits below 1 %."""
    digits = f"{100 * share:.1f}" if share == 0 or share >= 0.01 else f"{100 * share:.2g}"
    return f"{digits.removesuffix('.0')}\N{NARROW NO-BREAK SPACE}%"


def _short(value: float) -> str:
    """Format a score or threshold."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _rates(evaluation: Evaluation) -> dict[str, Rate]:
    """Return the rates of escapes among defective images and of false rejects among good ones, if any."""
    rates = {}
    for name, truth, label in (("Escapes", 1, "ok"), ("False rejects", 0, "defect")):
        wrong = [result.label == label for result in evaluation.images if result.truth == truth]
        if wrong:
            count, total = sum(wrong), len(wrong)
            rates[name] = Rate(count, total, count / total, _wilson(count, total))
    return rates


def _wilson(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share, which is sound even for 0 of few images."""
    share, z2 = count / total, NORMAL_QUANTILE**2 / total
    centre, half = share + z2 / 2, math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


def _headline(rates: dict[str, Rate]) -> str:
    """Return the outcome as one sentence."""
    escapes, rejects = rates.get("Escapes"), rates.get("False rejects")
    first = "No defective part in the test set" if not escapes else _outcome(escapes, "defective", "escaped")
    second = "No good part in the test set" if not rejects else _outcome(rejects, "good", "rejected")
    return f"{first}, {second[0].lower()}{second[1:]}"


def _outcome(rate: Rate, which: str, what: str) -> str:
    count = {0: "None", rate.total: "All"}.get(rate.count, str(rate.count))
    return f"{count} of {rate.total} {which} part{'s' * (rate.total != 1)} {what}"


def _promise(calibration: Calibration, rejects: Rate | None) -> str:
    """Return sentences that compare the promised rate with the test set."""
    promised = (
        f"Promised with {_percent(calibration.confidence)} confidence: "
        f"at most {_percent(calibration.promised_rate)} of good parts rejected."
    )
    if not rejects:
        return promised
    if rejects.share <= calibration.promised_rate:
        return f"{promised} The rate on this test set is within it."
    if rejects.interval[0] <= calibration.promised_rate:
        return f"{promised} The rate on this test set is higher, but within chance."
    return (
        f"{promised} The rate on this test set is higher than chance explains: its good parts differ from "
        "those that set the thresholds."
    )


def _scale(calibration: Calibration) -> tuple[float, float, float]:
    """Return the map values at display levels 0, 0.5 and 1."""
    low, threshold = overlays.low_point(calibration), calibration.pixel_threshold
    return low, threshold, threshold + max(threshold - low, 0.0)


def _picture(exhibit: Exhibit, calibration: Calibration) -> Picture:
    size = _fitted(exhibit.image.shape[:2])
    image = images.resize(exhibit.image, size)
    coloured = overlays.overlay(image, images.resize_map(exhibit.map, size), calibration)
    outlined = None if exhibit.mask is None else overlays.outline(image, _resized_mask(exhibit.mask, size))
    return Picture(
        exhibit.title,
        exhibit.result,
        _data_uri(image),
        _data_uri(coloured),
        None if outlined is None else _data_uri(outlined),
    )


def _fitted(size: tuple[int, ...]) -> tuple[int, int]:
    shrink = min(1.0, PICTURE_SIDE / max(size))
    return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))


def _resized_mask(mask: BoolArray, size: tuple[int, int]) -> BoolArray:
    # A fifth of a pixel suffices: otherwise a hairline would vanish when a large image is reduced.
    return images.resize_map(mask.astype(np.float32), size) > 0.2


def _data_uri(picture: AnyArray) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(images.jpeg_bytes(picture, 88)).decode()
