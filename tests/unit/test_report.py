"""Reports agree with their evaluation, and the page is self-contained."""

import csv
import json
import math
import re
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from blemish.evaluation import charts, report
from blemish.evaluation.metric_table import METRICS
from blemish.evaluation.run import table
from blemish.inference.calibration import fit, verdict_label
from blemish.types import Calibration, Evaluation, Exhibit, ImageResult, MetricRow

NASTY = "<b>\"scratch\" & 'dent'</b>"


def calibration() -> Calibration:
    scores = np.linspace(0.2, 1.2, 60)
    return fit(scores[:, None], scores, ("max",))


def results() -> tuple[ImageResult, ...]:
    scores = {"good": (0.4, 0.8, 1.19, 1.6), NASTY: (0.7, 5.0, 60.0), "dent": (1.18, 3.0)}
    limits = calibration()
    return tuple(
        ImageResult(
            f"test/{kind}/{i:03}.png", kind, int(kind != "good"), verdict_label(score, limits), score, 0.25
        )
        for kind, ofkind in scores.items()
        for i, score in enumerate(ofkind)
    )


def row(kind: str, **changes: Any) -> MetricRow:
    metrics = dict.fromkeys(METRICS, 0.875) | {"saturated_pro": None}
    values: dict[str, Any] = {"good": 4, "defective": 3, "masked": 3} | metrics | changes
    return MetricRow(kind, **values)


def evaluation() -> Evaluation:
    images, rng = results(), np.random.default_rng(0)
    pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
    heat, mask = rng.random((20, 30)).astype(np.float32), np.zeros((20, 30), bool)
    mask[3:9, 4:12] = True
    return Evaluation(
        data="flanges <script>alert(1)</script>",
        rows=(row("all"), row(NASTY), row("dent", masked=0, pixel_auroc=None, aupro=math.nan)),
        intervals={"image_auroc": (0.75, 1.0)},
        images=images,
        skipped=("test/<i>.png is empty, expected an image.",),
        calibration=calibration(),
        provenance={
            "method": "efficientad-s",
            "size": (256, 256),
            "loss": np.float32(0.5),
            NASTY: "</table>",
        },
        exhibits=(
            Exhibit("Escape", images[4], pixels, heat, mask),
            Exhibit("False reject", images[3], pixels, heat, None),
        ),
    )


class Page(HTMLParser):
    """Collects the elements of a page, and fails on tags that do not nest."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.starts: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    @override
    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """Return the last table row of that name."""
        return [cells for cells in self.cells if cells[0] == name][-1]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for one, attributes in self.starts if one == tag]


def written(what: Evaluation, folder: Path) -> str:
    report.write_html(what, folder / "report.html")
    return (folder / "report.html").read_text("utf-8")


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(written(evaluation(), tmp_path))


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text = written(evaluation(), tmp_path)
    page = Page(text)
    assert not re.search(r"https?://|url\(|@import", text)
    names = {name for _, attributes in page.starts for name in attributes}
    assert not names & {"href", "xlink:href", "srcset", "action", "data", "onload", "onclick"}
    pictures = page.all("img")
    assert len(pictures) == 3 + 2
    assert all(str(picture["src"]).startswith("data:image/jpeg;base64,") for picture in pictures)
    assert sum(text.count(f" {name}=") for name in ("src", "background", "poster")) == len(pictures)


def test_names_are_shown_and_never_run(page: Page) -> None:
    assert {tag for tag, _ in page.starts}.isdisjoint({"script", "i", "iframe", "object"})
    assert sum(tag == "b" for tag, _ in page.starts) == 1
    assert "flanges <script>alert(1)</script>" in page.text
    assert "test/<i>.png is empty" in page.text
    assert page.row(NASTY) == [NASTY, "</table>"]
    assert any(NASTY in str(picture["alt"]) for picture in page.all("img"))


def test_every_picture_and_chart_has_a_text_alternative(page: Page) -> None:
    assert all(picture["alt"] for picture in page.all("img"))
    ids = {attributes["id"] for _, attributes in page.starts if "id" in attributes}
    labelled = [
        attributes["aria-labelledby"] for _, attributes in page.starts if "aria-labelledby" in attributes
    ]
    assert len(page.all("svg")) == 2
    assert set(labelled) <= ids
    assert len(ids) == sum("id" in attributes for _, attributes in page.starts)


def test_the_outcome_is_stated_and_counted(page: Page) -> None:
    assert "1 of 5 defective parts escaped, 1 of 4 good parts rejected" in page.text
    assert "Set aside for review: 1 defective and 1 good." in page.text
    assert page.row("good") == ["good", "2", "1", "1 false reject", "4"]
    assert page.row("defective") == ["defective", "1 escape", "1", "3", "5"]
    assert page.row("Escapes")[1] == "20\u202f%"
    assert page.row("Image AUROC") == ["Image AUROC", "0.875", "0.750 to 1.000"]


@pytest.mark.parametrize(
    ("count", "total", "interval"),
    # The published Wilson intervals, e.g. R's prop.test(count, total, correct=FALSE).
    [(0, 10, (0.0, 0.2775)), (1, 29, (0.0061, 0.1718)), (15, 148, (0.0624, 0.1605)), (10, 10, (0.7225, 1.0))],
)
def test_wilson_interval(count: int, total: int, interval: tuple[float, float]) -> None:
    assert report._wilson(count, total) == pytest.approx(interval, abs=6e-5)


def test_unusual_light_is_shown_beside_its_picture(tmp_path: Path) -> None:
    plain = evaluation()
    for word in ("unusual light", "for its light", "for their light"):
        assert word not in written(plain, tmp_path)
    exhibits = [
        replace(exhibit, result=replace(exhibit.result, label="review", light_p=light_p, reason="light"))
        for exhibit, light_p in zip(plain.exhibits, (0.03, 0.06), strict=True)
    ]
    what = replace(
        plain,
        exhibits=tuple(exhibits),
        images=(*plain.images[:2], replace(plain.images[2], label="review", light_p=0.03, reason="light")),
    )
    text = written(what, tmp_path)
    assert text.count("unusual light, p-value 0.03") == 1
    assert "0.06" not in text
    assert text.count("labelled review for its light") == 2
    assert "Set aside for review: 0 defective and 1 good, 1 of them only for their light." in text


def test_an_undefined_metric_is_an_empty_cell(page: Page) -> None:
    assert page.row("dent") == ["dent", "4", "3", "0", "0.875", "0.875", "0.875", "", "0.875", "0.875", ""]
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_saturated_pro_is_shown_where_the_data_set_has_it(tmp_path: Path) -> None:
    assert "Saturated PRO" not in written(evaluation(), tmp_path)
    report.write_json(evaluation(), tmp_path / "evaluation.json")
    assert "saturated_pro" not in (tmp_path / "evaluation.json").read_text("utf-8")
    with_it = replace(evaluation(), rows=(row("all", saturated_pro=0.625), row("dent")))
    page = Page(written(with_it, tmp_path))
    assert page.row("Saturated PRO") == ["Saturated PRO", "0.625", ""]
    assert page.row("Kind")[-2:] == ["AUPRO", "Saturated PRO"]
    assert page.row("all")[-2:] == ["0.875", "0.625"]
    assert page.row("dent")[-2:] == ["0.875", ""]
    report.write_json(with_it, tmp_path / "evaluation.json")
    rows = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["rows"]
    assert [one["saturated_pro"] for one in rows] == [0.625, None]


def test_every_metric_is_in_the_table_the_report_and_the_json(tmp_path: Path) -> None:
    """Each has its own value, which must appear under its name everywhere."""
    counts = {"kind", "good", "defective", "masked"}
    assert list(METRICS) == [field.name for field in fields(MetricRow) if field.name not in counts]
    values = {field: 0.125 + number / 100 for number, field in enumerate(METRICS)}
    what = replace(evaluation(), rows=(row("all", **values), row("dent")))
    titles, columns = ([getattr(each, name) for each in METRICS.values()] for name in ("title", "column"))
    assert len(set(titles)) == len(set(columns)) == len(METRICS)

    head, first, _ = (re.split(" {2,}", line) for line in table(what).splitlines())
    assert head == ["kind", "good", "bad", *columns]
    assert first == ["all", "4", "3", *(f"{value:.4f}" for value in values.values())]

    page = Page(written(what, tmp_path))
    assert page.row("Kind") == ["Kind", "Good", "Defective", "Masked", *titles]
    assert page.row("all") == ["all", "4", "3", "3", *(f"{value:.3f}" for value in values.values())]
    for title, value in zip(titles, values.values(), strict=True):
        assert page.row(title)[1] == f"{value:.3f}"

    report.write_json(what, tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["rows"][0] == asdict(what.rows[0])


def test_one_class_alone_has_a_report(tmp_path: Path) -> None:
    good = tuple(result for result in results() if not result.truth)
    whole = row("all", defective=0, masked=0, image_auroc=None)
    page = Page(
        written(replace(evaluation(), images=good, rows=(whole,), intervals={}, exhibits=()), tmp_path)
    )
    assert "No defective part in the test set, 1 of 4 good parts rejected" in page.text
    assert "A curve needs good and defective images" in page.text
    assert len(page.all("svg")) == 1
    bad = tuple(result for result in results() if result.truth)
    page = Page(
        written(replace(evaluation(), images=bad, rows=(whole,), intervals={}, exhibits=()), tmp_path)
    )
    assert "1 of 5 defective parts escaped, no good part in the test set" in page.text


def test_the_promise_is_compared_with_the_test_set(tmp_path: Path) -> None:
    limits = calibration()
    for scores, words in (
        ((0.5,) * 40, "The rate on this test set is within it."),
        ((0.5,) * 30 + (2.0,) * 3, "is higher, but within chance."),
        ((0.5,) * 20 + (2.0,) * 20, "higher than chance explains: its good parts differ"),
    ):
        images = tuple(ImageResult("a", "good", 0, verdict_label(x, limits), x, 0.5) for x in scores)
        assert words in Page(written(replace(evaluation(), images=images), tmp_path)).text


def test_a_large_exhibit_is_made_smaller_and_its_hairline_mask_kept() -> None:
    mask = np.zeros((900, 1800), bool)
    mask[400, 300:1500] = True
    size = report._fitted(mask.shape)
    assert size == (224, 448)
    assert report._fitted((30, 20)) == (30, 20)
    kept = report._resized_mask(mask, size)
    assert kept.any(0).sum() == pytest.approx(1200 * 448 / 1800, abs=2)


def test_roc_meets_the_corners_and_the_thresholds() -> None:
    roc = charts.lay_out_roc(results())
    assert roc is not None
    points = roc.curve.split()
    assert points[0] == f"0.0,{charts.ROC_HEIGHT}"
    assert points[-1] == f"{charts.ROC_WIDTH},0.0"
    assert roc.points == ((0.5, 0.8, "review"), (0.25, 0.6, "defect"))
    assert f"{0.5 * charts.ROC_WIDTH},{0.2 * charts.ROC_HEIGHT}" in roc.curve
    assert charts.lay_out_roc(results()[:2]) is None


def test_histogram_keeps_the_order_of_scores_and_stays_within_its_frame() -> None:
    limits = calibration()
    histogram = charts.lay_out_histogram(results(), limits)
    strips = [(strip.name, strip.role, strip.count) for strip in histogram.strips]
    assert strips == [
        ("held-out good", "held-out", 60),
        ("good", "good", 4),
        (NASTY, "defective", 3),
        ("dent", "defective", 2),
    ]
    for strip in histogram.strips:
        assert all(
            0 <= x < charts.STRIP_WIDTH and 0 < height < charts.STRIP_HEIGHT for x, height in strip.bars
        )
    places = [place for place, _ in histogram.ticks]
    values = [float(label) for _, label in histogram.ticks]
    assert len(places) >= 3
    assert values == sorted(values)
    assert min(np.diff(places)) >= charts.TICK_GAP
    assert 0 < histogram.review < histogram.defect < charts.STRIP_WIDTH
    nasty = histogram.strips[2].bars
    assert len(nasty) == 3  # the long tail leaves the rest apart
    assert nasty[0][0] < histogram.review < nasty[1][0] < nasty[2][0]


@pytest.mark.parametrize("scores", [(5.0, 5.0), (1000.1, 1000.3), (-3e-7, 2e-7), (-40.0, 9e6)])
def test_histogram_of_awkward_scores(scores: tuple[float, float]) -> None:
    limits = fit(np.array(scores)[:, None], np.array(scores), ("max",))
    images = [ImageResult("a", "good", 0, "ok", score, 0.5) for score in scores]
    histogram = charts.lay_out_histogram(images, limits)
    labels = [label for _, label in histogram.ticks]
    assert sum(len(strip.bars) for strip in histogram.strips) >= 2
    assert len(labels) == len(set(labels)) >= 2
    assert all(0 <= place <= charts.STRIP_WIDTH for place, _ in histogram.ticks)


def test_csv_has_a_row_for_each_image(tmp_path: Path) -> None:
    report.write_csv(evaluation(), tmp_path / "images.csv")
    with (tmp_path / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    written = [asdict(result) | {"light_p": ""} for result in results()]  # None is an empty cell
    assert rows == [{name: str(value) for name, value in row.items()} for row in written]


def test_json_holds_everything_but_pixels(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    what = evaluation()
    report.write_json(what, tmp_path / "evaluation.json")
    record = json.loads((tmp_path / "evaluation.json").read_text("utf-8"), parse_constant=refuse)
    assert list(record) == [field.name for field in fields(Evaluation)]
    assert [ImageResult(**one) for one in record["images"]] == list(what.images)
    assert MetricRow(**record["rows"][1]) == what.rows[1]
    assert (record["rows"][2]["pixel_auroc"], record["rows"][2]["aupro"]) == (None, None)
    assert record["calibration"] == json.loads(json.dumps(asdict(what.calibration)))
    assert record["intervals"] == {"image_auroc": [0.75, 1.0]}
    assert record["provenance"] == {
        "method": "efficientad-s",
        "size": [256, 256],
        "loss": 0.5,
        NASTY: "</table>",
    }
    assert record["exhibits"][0] == {"title": "Escape", "path": what.images[4].path}
    assert record["skipped"] == list(what.skipped)
    assert record["data"] == what.data


def test_a_file_name_that_is_no_text_is_still_written(tmp_path: Path) -> None:
    odd = replace(results()[0], path="test/\udcff.png")
    what = replace(
        evaluation(), images=(odd, *results()[1:]), exhibits=(replace(evaluation().exhibits[0], result=odd),)
    )
    assert "test/\\udcff.png" in written(what, tmp_path)
    report.write_csv(what, tmp_path / "images.csv")
    report.write_json(what, tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_bytes())["images"][0]["path"] == "test/\udcff.png"


def test_reports_repeat(tmp_path: Path) -> None:
    assert written(evaluation(), tmp_path / "a") == written(evaluation(), tmp_path / "b")


def test_a_page_says_where_the_thresholds_came_from(tmp_path: Path) -> None:
    found = evaluation()
    report.write_html(found, tmp_path / "held.html")
    text = (tmp_path / "held.html").read_text(encoding="utf-8")
    assert "60 held-out good images, none of them in the test set" in text
    limits = replace(found.calibration, left_out=True)
    report.write_html(replace(found, calibration=limits), tmp_path / "left.html")
    text = (tmp_path / "left.html").read_text(encoding="utf-8")
    assert "60 good images, each scored without itself, none of them in the test set" in text
    assert "held-out good" not in text
    assert charts.lay_out_histogram(results(), limits).strips[0].name == "training good"
