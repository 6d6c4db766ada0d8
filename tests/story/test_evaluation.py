"""An evaluation against scikit-learn on the same verdicts, and predictions in bulk."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_format1 import FILES
from sklearn.metrics import average_precision_score, roc_auc_score

import blemish
import drawn
from blemish import images
from blemish.errors import DataError, ImageError
from blemish.evaluation.run import choose_exhibits, evaluate, table
from blemish.inference import bulk
from blemish.inference.bulk import Outputs, gather, run
from blemish.inference.measure import measure
from blemish.inference.predictor import Predictor
from blemish.types import BoolArray, Evaluation, FloatArray, ImageResult, Sample, Verdict


@pytest.fixture(scope="module")
def model() -> Predictor:
    return blemish.load(FILES / "format1.blemish", threads=1)


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
    """Judge the good parts and some kinds by hand: truth, verdict, and mask or None."""
    for path in sorted((data / "test").rglob("*.png")):
        kind = path.parent.name
        if kind in ("good", *kinds):
            verdict = model.predict(path, full_size=True)
            file = data / "ground_truth" / kind / f"{path.stem}_mask.png"
            mask = images.read_mask((file,), verdict.map.shape) if file.is_file() else None
            yield int(kind != "good"), verdict, mask


@pytest.mark.parametrize(
    ("place", "kind", "kinds", "counts"),
    [
        (0, "all", ("spot", "stain", "crack"), (6, 12, 8)),
        (1, "crack", ("crack",), (6, 4, 0)),
        (2, "spot", ("spot",), (6, 4, 4)),
        (3, "stain", ("stain",), (6, 4, 4)),
    ],
)
def test_rows_are_what_scikit_learn_says(
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
    known = [
        (v.map, np.zeros(v.map.shape, bool) if m is None else m)
        for t, v, m in images_
        if not t or m is not None
    ]
    pixels, marked = (np.concatenate([pair[n].ravel() for pair in known]) for n in (0, 1))
    if marked.any():
        assert row.pixel_auroc == pytest.approx(roc_auc_score(marked, pixels))
        assert row.pixel_ap == pytest.approx(average_precision_score(marked, pixels))
        assert row.aupro is not None
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


def test_intervals_hold_what_was_measured(found: Evaluation) -> None:
    assert set(found.intervals) == {"image_auroc", "image_ap", "image_f1_max"}
    for name, (low, high) in found.intervals.items():
        assert 0 <= low <= getattr(found.rows[0], name) <= high <= 1
    assert any(low < high for low, high in found.intervals.values())


def test_an_evaluation_repeats(model: Predictor, data: Path, found: Evaluation) -> None:
    again = evaluate(model, data)
    for field in fields(Evaluation):
        if field.name != "exhibits":
            assert getattr(again, field.name) == getattr(found, field.name)


def test_little_memory_changes_little(model: Predictor, data: Path, found: Evaluation) -> None:
    for row, other in zip(found.rows, evaluate(model, data, memory=0).rows, strict=True):
        for name in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"):
            exact, rough = getattr(row, name), getattr(other, name)
            assert rough == (None if exact is None else pytest.approx(exact, abs=1e-3))


def test_provenance_says_where_the_model_comes_from(found: Evaluation) -> None:
    said = found.provenance
    assert (said["model file"], said["method"]) == ("format1.blemish", "supersimplenet")
    assert (said["image size"], said["trained on"]) == ("64 x 64", "drawn, 11 good images")
    assert (said["steps"], said["seed"]) == (200, 0)
    assert said["torch version"].startswith("2.")


def test_images_and_masks_that_cannot_be_read_are_listed(model: Predictor, tmp_path: Path) -> None:
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
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[0] for line in lines] == ["kind", "all", "crack", "spot", "stain"]
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
    """Count pixels at every threshold there is."""
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
    all_normal = np.concatenate(normal)
    thresholds = np.unique(np.concatenate([all_normal, *(scores for scores, _ in regions)]))[::-1]

    def over(scores: FloatArray) -> Any:
        return scores.size - np.searchsorted(np.sort(scores), thresholds)

    rates = np.append(0, over(all_normal) / all_normal.size)
    overlaps = np.append(0, np.mean([np.minimum(over(s) / area, 1) for s, area in regions], axis=0))
    inside = rates <= 0.05
    rates, overlaps = (
        np.append(rates[inside], 0.05),
        np.append(overlaps[inside], np.interp(0.05, rates, overlaps)),
    )
    return float(np.diff(rates) @ (overlaps[1:] + overlaps[:-1]) / 2 / 0.05)


def test_saturated_pro_is_what_counting_by_hand_says(model: Predictor, loco: Path) -> None:
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


def test_exhibits_are_the_worst_mistakes_then_the_best_finds() -> None:
    def one(kind: str, label: str, score: float) -> tuple[Sample, ImageResult]:
        truth = int(kind != "good")
        path = Path(f"{kind}{score}")
        return Sample(path, truth, kind), ImageResult(str(path), kind, truth, label, score, 0.5)

    results = [
        *(one("good", "ok", 0), one("good", "review", 5), one("good", "defect", 9), one("good", "defect", 8)),
        *(one("dent", "ok", 1), one("dent", "ok", 2), one("dent", "defect", 20), one("dent", "defect", 30)),
        *(one("rust", "review", 6), one("rust", "ok", 3)),
    ]
    chosen = [(title, result.path) for title, _, result in choose_exhibits(results, 2)]
    assert chosen == [
        ("Escape", "dent1"),
        ("Escape", "dent2"),
        ("False reject", "good9"),
        ("False reject", "good8"),
        ("Needless review", "good5"),
        ("Best find", "dent30"),
        ("Best find", "rust6"),
    ]
    assert list(choose_exhibits(results, 0)) == []


def test_an_exhibit_is_the_image_its_map_and_its_mask(
    model: Predictor, data: Path, found: Evaluation
) -> None:
    assert found.exhibits
    for exhibit in found.exhibits:
        path = data / exhibit.result.path
        assert np.array_equal(exhibit.image, images.read(path))
        assert np.array_equal(exhibit.map, model.predict(path, full_size=True).map)
        assert (exhibit.mask is not None) == (exhibit.result.kind in ("spot", "stain"))


# --- predictions in bulk ---


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
    with pytest.raises(DataError, match="would share the name"):
        gather([tmp_path / "d"])


def test_a_run_that_fails_leaves_no_half_file(
    model: Predictor, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(3))

    def fail_at_last(*arguments: Any) -> None:
        if next(calls) == 2:
            raise ZeroDivisionError

    monkeypatch.setattr(bulk, "write_pictures", fail_at_last)
    with pytest.raises(ZeroDivisionError):
        run(model, gather([data / "test"]), Outputs(tmp_path / "lines.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_counts_labels(model: Predictor, data: Path, tmp_path: Path) -> None:
    files = gather([data / "test"])
    counts = run(model, files, Outputs(tmp_path / "lines.jsonl"))
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


def test_measuring_gives_what_calibration_wants(model: Predictor, data: Path, tmp_path: Path) -> None:
    paths = images.list_images(data / "test" / "good")
    statistics, maxima = measure(model, paths)
    assert statistics.shape == (6, 3)
    for path, row, peak in zip(paths, statistics, maxima, strict=True):
        found = model.engine.run(model.prepare(path).inputs[None])
        assert np.array_equal(row, found["statistics"][0])
        assert peak == found["map"].max()
    assert measure(model, [])[0].shape == (0, 3)
    (tmp_path / "none.png").write_bytes(b"none")
    with pytest.raises(ImageError, match=r"none\.png"):
        measure(model, [*paths, tmp_path / "none.png"])


def test_a_model_that_scores_by_one_statistic_is_evaluated_raw(model: Predictor, data: Path) -> None:
    calibration = replace(model.calibration, centers=(0.0,) * 3, scales=(1.0, 1e9, 1e9))
    raw = blemish.load(FILES / "format1.blemish", threads=1)
    raw.calibration = calibration
    result = evaluate(raw, data).images[0]
    assert result.score == pytest.approx(float(raw.predict(data / result.path).map.max()), abs=2e-2)
