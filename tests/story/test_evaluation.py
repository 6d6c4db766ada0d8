"""Evaluations, compared with scikit-learn on the same verdicts, and predictions in bulk."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from make_format1 import FILES
from PIL.PngImagePlugin import PngImageFile
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

import blemish
import drawn
from blemish import images
from blemish.errors import DataError, StoppedError
from blemish.evaluation.exhibits import Gallery
from blemish.evaluation.run import evaluate, table
from blemish.images import overlays
from blemish.inference import bundle
from blemish.inference.bulk import Outputs, gather, run
from blemish.inference.engines import Engine
from blemish.inference.measure import measure
from blemish.inference.predictor import Predictor
from blemish.progress import Event
from blemish.types import BoolArray, Evaluation, FloatArray, ImageResult, Label, Verdict

MODEL = FILES / "format1.blemish"


@pytest.fixture(scope="module")
def model() -> Predictor:
    return blemish.load(MODEL, threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw parts of two sizes: spots, faint stains that partly escape, and cracks without masks."""
    root = drawn.data_set(tmp_path_factory.mktemp("evaluation") / "parts", train=1, good=6, bad=4)
    for number in range(4):
        image, mask = drawn.spotted(3000 + number, (48, 80))
        faint = np.where(mask[..., None], drawn.part(3000 + number, (48, 80)) + 3 * number, image)
        images.write_png(root / f"test/stain/{number}.png", faint.astype(np.uint8))
        images.write_png(root / f"ground_truth/stain/{number}_mask.png", (255 * mask).astype(np.uint8))
        images.write_png(root / f"test/crack/{number}.png", drawn.spotted(4000 + number)[0])
    return root


@pytest.fixture(scope="module")
def found(model: Predictor, data: Path) -> Evaluation:
    return evaluate(model, data)


def judged(model: Predictor, data: Path, kinds: Sequence[str]) -> Iterator[tuple[int, Verdict, Any]]:
    """Judge the good parts and some kinds one by one; yield truth, verdict, and mask or None."""
    for path in sorted((data / "test").rglob("*.png")):
        kind = path.parent.name
        if kind in ("good", *kinds):
            verdict = model.predict(path, full_size=True)
            file = data / "ground_truth" / kind / f"{path.stem}_mask.png"
            mask = images.read_mask((file,), verdict.map.shape) if file.is_file() else None
            yield int(kind != "good"), verdict, mask


def f1_max(truths: Any, scores: Any) -> float:
    """Return the largest F1 of any threshold."""
    precision, recall, _ = precision_recall_curve(truths, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def pro_by_hand(regions: Sequence[tuple[FloatArray, float]], normal: FloatArray, limit: float) -> float:
    """Integrate the mean overlap of regions over the false-positive rate from 0 to `limit`, as a share of it.

    regions: the scores of each region's pixels, and the area that counts as all of it. normal: the scores of
    the pixels outside all regions.
    """
    thresholds = np.unique(np.concatenate([normal, *(scores for scores, _ in regions)]))[::-1]

    def over(scores: FloatArray) -> Any:
        return scores.size - np.searchsorted(np.sort(scores), thresholds)

    rates = np.append(0, over(normal) / normal.size)
    overlaps = np.append(0, np.mean([np.minimum(over(s) / area, 1) for s, area in regions], axis=0))
    inside = rates <= limit
    rates, overlaps = (
        np.append(rates[inside], limit),
        np.append(overlaps[inside], np.interp(limit, rates, overlaps)),
    )
    return float(np.diff(rates) @ (overlaps[1:] + overlaps[:-1]) / 2 / limit)


@pytest.mark.parametrize(
    ("place", "kind", "kinds", "counts"),
    [
        (0, "all", ("spot", "stain", "crack"), (6, 12, 8)),
        (1, "crack", ("crack",), (6, 4, 0)),
        (2, "spot", ("spot",), (6, 4, 4)),
        (3, "stain", ("stain",), (6, 4, 4)),
    ],
)
def test_rows_agree_with_scikit_learn(
    place: int,
    kind: str,
    kinds: tuple[str, ...],
    counts: tuple[int, ...],
    model: Predictor,
    data: Path,
    found: Evaluation,
) -> None:
    row = found.rows[place]
    assert (row.kind, row.good, row.defective, row.masked) == (kind, *counts)
    images_ = list(judged(model, data, kinds))
    truths, scores = [truth for truth, _, _ in images_], [verdict.score for _, verdict, _ in images_]
    assert row.image_auroc == pytest.approx(roc_auc_score(truths, scores))
    assert row.image_ap == pytest.approx(average_precision_score(truths, scores))
    assert row.image_f1_max == pytest.approx(f1_max(truths, scores))
    known = [
        (v.map, np.zeros(v.map.shape, bool) if m is None else m)
        for t, v, m in images_
        if not t or m is not None
    ]
    pixels, marked = (np.concatenate([pair[n].ravel() for pair in known]) for n in (0, 1))
    if marked.any():
        assert row.pixel_auroc == pytest.approx(roc_auc_score(marked, pixels))
        assert row.pixel_ap == pytest.approx(average_precision_score(marked, pixels))
        assert row.pixel_f1_max == pytest.approx(f1_max(marked, pixels))
        regions = [(v.map[m], float(m.sum())) for _, v, m in images_ if m is not None]
        assert row.aupro == pytest.approx(pro_by_hand(regions, pixels[~marked], 0.3))
    else:
        assert (row.pixel_auroc, row.pixel_ap, row.pixel_f1_max, row.aupro) == (None,) * 4


def test_results_are_those_of_the_model(model: Predictor, data: Path, found: Evaluation) -> None:
    assert len(found.rows) == 4
    assert [result.path for result in found.images] == sorted(result.path for result in found.images)
    assert len(found.images) == 18
    for result in found.images:
        verdict = model.predict(data / result.path)
        expected = (verdict.label, verdict.score, verdict.p_value)
        assert (result.label, result.score, result.p_value) == expected
        assert result.kind == Path(result.path).parent.name
        assert result.truth == (result.kind != "good")
    assert found.data == "parts"
    assert found.skipped == ()
    assert found.calibration == model.calibration


def test_intervals_contain_the_measured_value(found: Evaluation) -> None:
    assert set(found.intervals) == {"image_auroc", "image_ap", "image_f1_max"}
    for name, (low, high) in found.intervals.items():
        assert 0 <= low <= getattr(found.rows[0], name) <= high <= 1
    assert any(low < high for low, high in found.intervals.values())


def test_an_evaluation_repeats(model: Predictor, data: Path, found: Evaluation) -> None:
    again = evaluate(model, data)
    for field in fields(Evaluation):
        if field.name != "exhibits":
            assert getattr(again, field.name) == getattr(found, field.name)


def test_an_evaluation_reports_its_progress_prints_nothing_and_stops_when_asked(
    model: Predictor, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    evaluate(model, data, report=events.append)
    assert events == [Event("evaluating", step, 18, unit="image") for step in range(19)]
    assert capfd.readouterr() == ("", "")
    events.clear()
    with pytest.raises(StoppedError, match="stopped while evaluating"):
        evaluate(model, data, report=events.append, stop=lambda: len(events) > 5)
    assert [event.step for event in events] == [0, 1, 2, 3, 4, 5]


def test_little_memory_changes_little(model: Predictor, data: Path, found: Evaluation) -> None:
    for row, other in zip(found.rows, evaluate(model, data, memory=0).rows, strict=True):
        for name in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"):
            exact, rough = getattr(row, name), getattr(other, name)
            assert rough == (None if exact is None else pytest.approx(exact, abs=1e-3))


def test_provenance_describes_the_model(found: Evaluation) -> None:
    said = found.provenance
    assert (said["model file"], said["method"]) == ("format1.blemish", "supersimplenet")
    assert (said["image size"], said["trained on"]) == ("64 x 64", "drawn, 11 good images")
    assert (said["steps"], said["seed"]) == (200, 0)
    assert said["torch version"].startswith("2.")


def test_images_and_masks_that_cannot_be_read_are_listed(
    model: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = drawn.data_set(tmp_path / "parts", train=1, good=3, bad=3)
    (root / "test/good/000.png").write_bytes(b"none")
    (root / "ground_truth/spot/001_mask.png").write_bytes(b"none")
    images.write_png(root / "ground_truth/spot/002_mask.png", np.zeros((9, 9), np.uint8))
    found = evaluate(model, root)
    assert (found.rows[0].good, found.rows[0].defective, found.rows[0].masked) == (2, 1, 1)
    assert [
        "000.png" in found.skipped[0],
        "001_mask" in found.skipped[1],
        "002_mask" in found.skipped[2],
    ] == [True] * 3
    assert len(found.images) == 3
    assert caplog.messages == [f"skipped: {sentence}" for sentence in found.skipped]


def test_one_class_alone_leaves_cells_empty(model: Predictor, tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", train=1, good=3, bad=0)
    found = evaluate(model, root)
    (row,) = found.rows
    assert (row.good, row.defective, row.image_auroc, row.image_ap, row.aupro) == (3, 0, None, None, None)
    assert found.intervals == {}
    assert "None" not in table(found)


def test_the_table_lines_up(found: Evaluation) -> None:
    lines = table(found).splitlines()
    assert len(lines) == 5
    cells = [list(re.finditer(r"\S+( \S+)*", line)) for line in lines]
    assert [each[0].group() for each in cells] == ["kind", "all", "crack", "spot", "stain"]
    assert [each[0].start() for each in cells] == [0] * 5
    ends = [cell.end() for cell in cells[0][1:]]
    for line in cells[1:]:  # undefined metrics are empty cells at the end of a line
        assert [cell.end() for cell in line[1:]] == ends[: len(line) - 1]
    assert [len(line) for line in cells] == [10, 10, 6, 10, 10]
    assert f"{found.rows[0].image_auroc:.4f}" in lines[1].split()


# --- saturated PRO ---


@pytest.fixture(scope="module")
def loco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw parts whose logical defects have two masks: a spot, and a spot with an unseen strip."""
    root = drawn.data_set(tmp_path_factory.mktemp("loco") / "parts", train=1, good=3, bad=0)
    for number in range(3):
        size = (48, 80 + 16 * number)
        image, spot = drawn.spotted(5000 + number, size)
        images.write_png(root / f"test/structural_anomalies/{number:03}.png", image)
        write_region(root / f"ground_truth/structural_anomalies/{number:03}/000.png", spot, 255)
        other, second = drawn.spotted(6000 + number, size)
        both = np.where(second[..., None], other, image)
        images.write_png(root / f"test/logical_anomalies/{number:03}.png", both)
        second[:4, :30] = True
        write_region(root / f"ground_truth/logical_anomalies/{number:03}/000.png", spot, 255)
        write_region(root / f"ground_truth/logical_anomalies/{number:03}/001.png", second, 254)
    entries = [
        {
            "defect_name": "spot",
            "pixel_value": 255,
            "saturation_threshold": 150,
            "relative_saturation": False,
        },
        {"defect_name": "lost", "pixel_value": 254, "saturation_threshold": 0.7, "relative_saturation": True},
    ]
    (root / "defects_config.json").write_text(json.dumps(entries))
    return root


def write_region(path: Path, region: BoolArray, value: int) -> None:
    images.write_png(path, (value * region).astype(np.uint8))


def saturated_pro_by_hand(model: Predictor, root: Path, kinds: Sequence[str]) -> float:
    """Compute saturated PRO by counting pixels at every threshold."""
    normal: list[FloatArray] = []
    regions: list[tuple[FloatArray, float]] = []
    for path in sorted((root / "test").rglob("*.png")):
        if path.parent.name not in ("good", *kinds):
            continue
        anomaly_map = model.predict(path, full_size=True).map
        outside = np.ones(anomaly_map.shape, bool)
        for file in sorted((root / "ground_truth" / path.parent.name / path.stem).glob("*.png")):
            values = images.read(file)[..., 0]
            area = 150 if values.max() == 255 else int(0.7 * (values > 0).sum())
            regions.append((anomaly_map[values > 0], min(area, (values > 0).sum())))
            outside &= values == 0
        normal.append(anomaly_map[outside])
    return pro_by_hand(regions, np.concatenate(normal), 0.05)


def test_saturated_pro_agrees_with_counting_pixels(model: Predictor, loco: Path) -> None:
    found = evaluate(model, loco)
    assert [row.kind for row in found.rows] == ["all", "logical_anomalies", "structural_anomalies"]
    for row, kinds in zip(
        found.rows,
        [("logical_anomalies", "structural_anomalies"), ("logical_anomalies",), ("structural_anomalies",)],
        strict=True,
    ):
        assert row.saturated_pro == pytest.approx(saturated_pro_by_hand(model, loco, kinds), abs=1e-9)
        assert row.saturated_pro is not None
        assert 0.1 < row.saturated_pro < 1
    assert len({row.saturated_pro for row in found.rows}) == 3
    lines = table(found).splitlines()
    assert lines[0].endswith("AUPRO  saturated PRO")
    assert lines[1].endswith(f" {found.rows[0].saturated_pro:.4f}")
    assert len({len(line) for line in lines}) == 1


def test_saturated_pro_with_little_memory_is_nearly_the_same(model: Predictor, loco: Path) -> None:
    for row, rough in zip(evaluate(model, loco).rows, evaluate(model, loco, memory=0).rows, strict=True):
        assert rough.saturated_pro == pytest.approx(row.saturated_pro, abs=1e-3)


def test_without_a_configuration_there_is_no_saturated_pro(found: Evaluation) -> None:
    assert {row.saturated_pro for row in found.rows} == {None}
    assert "saturated" not in table(found)


def test_a_mask_that_the_configuration_does_not_name_is_skipped(
    model: Predictor, loco: Path, tmp_path: Path
) -> None:
    root = tmp_path / "parts"
    shutil.copytree(loco, root)
    mask = root / "ground_truth/structural_anomalies/001/000.png"
    write_region(mask, images.read(mask)[..., 0] > 0, 99)
    (root / "ground_truth/structural_anomalies/002/000.png").unlink()
    found = evaluate(model, root)
    expected = "has the value 99; expected one that defects_config.json names"
    assert found.skipped == (f"the mask {mask} {expected}",)
    assert (found.rows[2].defective, found.rows[2].masked) == (2, 1)
    assert found.rows[2].saturated_pro is not None
    (root / "defects_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"defects_config\.json holds no list"):
        evaluate(model, root)


# --- exhibits ---


def result(kind: str, label: Label, score: float) -> ImageResult:
    return ImageResult(f"{kind}{score:g}", kind, int(kind != "good"), label, score, 0.5)


def exhibited(results: Sequence[ImageResult], count: int) -> list[tuple[str, ImageResult]]:
    """Offer results to a gallery one by one, and return what it shows."""
    gallery = Gallery(count, 255)
    for number, each in enumerate(results):
        pixels = np.full((1, 2, 3), number, np.uint8)
        gallery.offer(each, pixels, pixels[..., 0].astype(np.float32), pixels[..., 0] > 0)
    for exhibit in gallery.exhibits():
        number = results.index(exhibit.result)
        assert (exhibit.image == number).all()
        assert (exhibit.map == number).all()
        assert exhibit.mask is not None
        assert (exhibit.mask == (number > 0)).all()
    return [(exhibit.title, exhibit.result) for exhibit in gallery.exhibits()]


def chosen_afterwards(results: Sequence[ImageResult], count: int) -> Iterator[tuple[str, ImageResult]]:
    """Choose exhibits from all results at once, sorted: the rule, stated independently."""
    by_score = sorted(results, key=lambda each: each.score)
    escapes = [each for each in by_score if each.truth == 1 and each.label == "ok"]
    good = [each for each in reversed(by_score) if each.truth == 0]
    rejects = [each for each in good if each.label == "defect"]
    reviews = [each for each in good if each.label == "review"]
    for title, chosen in (("Escape", escapes), ("False reject", rejects), ("Unnecessary review", reviews)):
        yield from ((title, each) for each in chosen[:count])
    seen: set[str] = set()
    for each in reversed(by_score):
        if each.truth == 1 and each.label != "ok" and each.kind not in seen and len(seen) < 2 * count:
            seen.add(each.kind)
            yield "Clearest detection", each


def test_exhibits_are_the_worst_mistakes_then_the_best_finds() -> None:
    results = [
        *(result("good", "ok", 0), result("good", "review", 5), result("good", "defect", 9)),
        *(result("good", "defect", 8), result("dent", "ok", 1), result("dent", "ok", 2)),
        *(result("dent", "defect", 20), result("dent", "defect", 30)),
        *(result("rust", "review", 6), result("rust", "ok", 3)),
    ]
    assert [(title, each.path) for title, each in exhibited(results, 2)] == [
        ("Escape", "dent1"),
        ("Escape", "dent2"),
        ("False reject", "good9"),
        ("False reject", "good8"),
        ("Unnecessary review", "good5"),
        ("Clearest detection", "dent30"),
        ("Clearest detection", "rust6"),
    ]
    assert exhibited(results, 0) == []


@pytest.mark.parametrize("seed", range(20))
def test_exhibits_chosen_one_by_one_are_those_chosen_from_all_results(seed: int) -> None:
    """There are few distinct scores, hence many ties, and more kinds of defect than there is room for."""
    rng = np.random.default_rng(seed)
    kinds, labels = ("good", "good", "good", *"abcdefghi"), get_args(Label)
    results = [
        replace(result(rng.choice(kinds), rng.choice(labels), float(rng.integers(8))), path=str(number))
        for number in range(rng.integers(150))
    ]
    for count in (0, 1, 2, 4, 200):
        assert exhibited(results, count) == list(chosen_afterwards(results, count))


def test_an_exhibit_is_the_image_its_map_and_its_mask(
    model: Predictor, data: Path, found: Evaluation
) -> None:
    assert found.exhibits
    for exhibit in found.exhibits:
        path = data / exhibit.result.path
        assert np.array_equal(exhibit.image, images.read(path))
        assert np.array_equal(exhibit.map, model.predict(path, full_size=True).map)
        masked = exhibit.result.kind in ("spot", "stain")
        assert (exhibit.mask is not None) == masked
        if exhibit.mask is not None:
            file = data / f"ground_truth/{exhibit.result.kind}/{path.stem}_mask.png"
            assert np.array_equal(exhibit.mask, images.read(file)[..., 0] > 0)


# --- each image is judged and decoded once ---


class Counting:
    """An engine that counts the images that it runs."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.outputs, self.images = engine, engine.outputs, 0

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        self.images += len(inputs)
        return self.engine.run(inputs)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that receives a file's path each time its pixels are decoded."""
    found: list[Path] = []
    prepare = PngImageFile.load_prepare

    def load_prepare(image: PngImageFile) -> None:
        assert image.fp is not None
        found.append(Path(image.fp.name))
        prepare(image)

    monkeypatch.setattr(PngImageFile, "load_prepare", load_prepare)
    return found


def test_an_evaluation_with_exhibits_judges_and_decodes_each_image_once(
    model: Predictor, data: Path, decoded: list[Path]
) -> None:
    engine = Counting(model.engine)
    found = evaluate(Predictor(bundle.read(MODEL), engine=engine), data, exhibits=4)
    assert len(found.exhibits) > 4
    assert engine.images == 18
    files = [*data.glob("test/*/*.png"), *data.glob("ground_truth/*/*.png")]
    assert Counter(decoded) == dict.fromkeys(files, 1)


def test_a_prediction_with_overlays_judges_and_decodes_each_image_once(
    model: Predictor, data: Path, tmp_path: Path, decoded: list[Path]
) -> None:
    engine = Counting(model.engine)
    counted, files = Predictor(bundle.read(MODEL), engine=engine), gather([data / "test"])
    outputs = Outputs(maps=tmp_path / "maps", overlays=tmp_path / "overlays")
    run(counted, files, outputs, write=ignore)
    assert engine.images == 18
    assert Counter(decoded) == {file.path: 1 for file in files}
    for file in files:
        shown = images.read((tmp_path / "overlays" / file.name).with_suffix(".png"))
        anomaly_map = model.predict(file.path, full_size=True).map
        expected = overlays.overlay(images.read(file.path), anomaly_map, model.calibration)
        assert np.array_equal(shown, expected)


# --- predictions in bulk ---


def ignore(line: str) -> None:
    """Discard a JSON line."""


def test_images_are_gathered_with_the_names_of_their_results(tmp_path: Path) -> None:
    for name in ("d/b.png", "d/sub/a.PNG", "d/.hidden.png", "single.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "d/notes.txt").write_text("none")
    files = gather([tmp_path / "single.png", tmp_path / "d"])
    assert [(file.path.name, file.name.as_posix()) for file in files] == [
        ("single.png", "single.png"),
        ("b.png", "b.png"),
        ("a.PNG", "sub/a.PNG"),
    ]
    # One image twice is one result; two images of one name are not.
    assert len(gather([tmp_path / "single.png"] * 2)) == 2
    (tmp_path / "d/b.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"the results of .* and .* would have the same name"):
        gather([tmp_path / "d"])


def test_a_run_that_fails_leaves_no_half_file(model: Predictor, data: Path, tmp_path: Path) -> None:
    def fail_at_third(event: Event) -> None:
        if event.step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(
            model,
            gather([data / "test"]),
            Outputs(tmp_path / "lines.jsonl"),
            write=ignore,
            report=fail_at_third,
        )
    assert list(tmp_path.iterdir()) == []


def test_without_a_file_lines_go_to_the_caller(
    model: Predictor, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files, said, events = gather([data / "test"]), list[str](), list[Event]()
    run(model, files, Outputs(), write=said.append, report=events.append)
    assert events == [Event("predicting", step, 18, unit="image") for step in range(19)]
    run(model, files, Outputs(tmp_path / "lines.jsonl"), write=ignore)
    assert (tmp_path / "lines.jsonl").read_text().splitlines() == said
    assert capfd.readouterr() == ("", "")


def test_a_run_counts_labels(model: Predictor, data: Path, tmp_path: Path) -> None:
    files = gather([data / "test"])
    counts = run(model, files, Outputs(tmp_path / "lines.jsonl"), write=ignore)
    labels = [model.predict(file.path).label for file in files]
    assert counts == {name: labels.count(name) for name in ("ok", "review", "defect")} | {"unreadable": 0}
    records = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [record["path"] for record in records] == [str(file.path) for file in files]
    for record in records:
        verdict = model.predict(record["path"])
        assert (record["score"], record["label"], record["p_value"]) == (
            verdict.score,
            verdict.label,
            verdict.p_value,
        )
        assert [tuple(region["box"]) for region in record["regions"]] == [
            region.box for region in verdict.regions
        ]


def test_measuring_gives_what_calibration_wants(model: Predictor, data: Path) -> None:
    inputs = [model.prepare(path).inputs for path in images.list_images(data / "test" / "good")]
    statistics, maxima = measure(model.engine, model.preprocessing, iter(inputs))
    assert statistics.shape == (6, 3)
    for each, row, peak in zip(inputs, statistics, maxima, strict=True):
        found = model.engine.run(each)
        assert np.array_equal(row, found["statistics"][0])
        assert peak == found["map"].max()


def test_a_model_that_scores_by_one_statistic_is_evaluated_raw(model: Predictor, data: Path) -> None:
    calibration = replace(model.calibration, centers=(0.0,) * 3, scales=(1.0, 1e9, 1e9))
    raw = blemish.load(MODEL, threads=1)
    raw.calibration = calibration
    first = evaluate(raw, data).images[0]
    assert first.score == pytest.approx(float(raw.predict(data / first.path).map.max()), abs=2e-2)
