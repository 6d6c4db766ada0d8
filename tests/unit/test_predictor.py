"""From a model file and an image to a verdict, where torch may not even be installed."""

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_format1 import BAD, FILES, GOOD
from PIL import Image
from typing_extensions import override

import blemish
import drawn
from base_install import COMMAND_LINE, run_base_only
from blemish import images
from blemish.cli.main import main
from blemish.errors import ConfigError, ImageError
from blemish.images import Preprocessing
from blemish.inference import bundle, predictor
from blemish.inference.bulk import as_record
from blemish.inference.calibration import image_scores, p_value
from blemish.inference.predictor import Outcome, Predictor, regions
from blemish.types import AnyArray, Calibration, FloatArray, LightCalibration, Region, Verdict

MODEL = FILES / "format1.blemish"


@pytest.fixture(scope="module")
def model() -> Predictor:
    return blemish.load(MODEL, threads=1)


@pytest.fixture
def spot(tmp_path: Path) -> Path:
    path = tmp_path / "spot.png"
    images.write_png(path, drawn.spotted(1, (96, 70))[0])
    return path


def same(one: Verdict, other: Verdict) -> bool:
    """Compare verdicts but for the path, the maps bit for bit."""
    return replace(one, path="") == replace(other, path="") and np.array_equal(one.map, other.map)


def judged(outcome: Outcome) -> Verdict:
    """Return the verdict of an image that could be read."""
    assert outcome.verdict is not None
    assert outcome.error is None
    return outcome.verdict


def calibrated(model: Predictor, calibration: Calibration) -> Predictor:
    """Return a predictor with another calibration that runs on the same engine."""
    opened = bundle.read(MODEL)
    return Predictor(
        replace(opened, manifest=replace(opened.manifest, calibration=calibration)), engine=model.engine
    )


# --- images ---


def test_however_an_image_comes_the_verdict_is_the_same(model: Predictor, spot: Path) -> None:
    expected = model.predict(spot)
    array = images.read(spot)
    assert expected.path == str(spot)
    assert same(model.predict(str(spot)), expected)
    for image in (
        Image.open(spot),
        array,
        np.dstack([array, array[..., :1]]),
        Image.open(spot).convert("RGBA"),
    ):
        found = model.predict(image)
        assert same(found, expected)
        assert found.path == ""


def test_grey_images_are_taken_in_every_shape(model: Predictor, tmp_path: Path) -> None:
    grey = drawn.part(3, (50, 60))[..., 0]
    images.write_png(tmp_path / "grey.png", grey)
    expected = model.predict(tmp_path / "grey.png")
    for image in (grey, grey[..., None], np.dstack([grey] * 3), Image.fromarray(grey)):
        assert same(model.predict(image), expected)


def test_a_float_image_is_from_0_to_1(model: Predictor) -> None:
    array = drawn.spotted(4)[0]
    exact, found = model.predict(array), model.predict(array / 255)
    assert found.score == pytest.approx(exact.score, rel=1e-4)


def test_an_image_of_the_networks_size_is_not_resized(model: Predictor) -> None:
    array = drawn.part(5)
    found = model.engine.run(images.to_input(array)[None])
    verdict = model.predict(array)
    assert np.array_equal(verdict.map, found["map"][0])
    assert verdict.score == image_scores(found["statistics"], model.calibration)[0]


def test_a_prepared_image_is_what_was_read_and_what_the_network_sees(model: Predictor, spot: Path) -> None:
    prepared, image = model.prepare(spot), images.read(spot)
    assert (prepared.path, prepared.size) == (str(spot), (96, 70))
    assert np.array_equal(prepared.image, image)
    assert prepared.inputs.shape == (1, 3, *model.image_size) == (1, 3, 64, 64)
    assert np.array_equal(prepared.inputs, model.preprocessing.inputs(image))
    (verdict,) = model.finish([prepared])
    assert same(verdict, model.predict(spot))


@pytest.mark.parametrize("image", [None, 3, b"bytes", [[1, 2]], np.zeros((2, 2, 2), np.uint8), np.zeros(3)])
def test_what_is_no_image_is_refused(model: Predictor, image: Any) -> None:
    with pytest.raises(ImageError, match="is not an image"):
        model.predict(image)


def test_a_batch_is_its_images(model: Predictor, spot: Path) -> None:
    several = [spot, drawn.part(6), drawn.part(7, (30, 200))]
    found = model.predict_batch(several)
    assert [verdict.path for verdict in found] == [str(spot), "", ""]
    for verdict, image in zip(found, several, strict=True):
        assert verdict.score == pytest.approx(model.predict(image).score, rel=1e-4, abs=1e-4)
    assert model.predict_batch([]) == []


# --- streams ---


def test_a_stream_yields_source_image_and_verdict_in_order_and_goes_on_after_an_error(
    model: Predictor, spot: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(spot.read_bytes()[:100])
    missing = tmp_path / "missing.png"
    stream: list[Any] = [spot, broken, drawn.part(8), missing, None, str(spot), Image.open(spot)]
    found = list(model.stream(stream))
    assert len(found) == len(stream)
    assert all(outcome.source is source for outcome, source in zip(found, stream, strict=True))
    for place, said in ((1, str(broken)), (3, str(missing)), (4, "is not an image")):
        outcome = found[place]
        assert isinstance(outcome.error, ImageError)
        assert said in str(outcome.error)
        assert (outcome.image, outcome.verdict) == (None, None)
    read = images.read(spot)
    for place, image in ((0, read), (2, stream[2]), (5, read), (6, read)):
        outcome = found[place]
        assert outcome.image is not None
        assert np.array_equal(outcome.image, image)
        assert judged(outcome) == model.predict(stream[place])  # the path, too
        assert same(judged(outcome), model.predict(stream[place]))


def test_maps_of_a_stream_may_have_the_size_of_their_images(model: Predictor) -> None:
    several = [drawn.part(1, (90, 70)), drawn.spotted(2, (64, 100))[0]]
    for outcome, image in zip(model.stream(several, full_size=True), several, strict=True):
        assert judged(outcome).map.shape == image.shape[:2]
        assert same(judged(outcome), model.predict(image, full_size=True))


def test_a_stream_reads_a_bounded_number_of_images_ahead(model: Predictor) -> None:
    asked: list[int] = []

    def endless() -> Iterator[AnyArray]:
        while True:
            asked.append(len(asked))
            yield drawn.part(9)

    stream = model.stream(endless())
    for taken in range(1, 5):
        next(stream)
        assert len(asked) <= taken + predictor.AHEAD
    stream.close()
    assert list(model.stream([])) == []


def test_a_verdict_does_not_wait_for_the_next_image(model: Predictor) -> None:
    arrived, ended = threading.Event(), threading.Event()

    def camera() -> Iterator[AnyArray]:
        try:
            yield drawn.part(1)
            assert arrived.wait(30), "the verdict waits for another image"
            yield drawn.part(2)
            threading.Event().wait()  # a line that stands still
        finally:
            ended.set()

    stream = model.stream(camera())
    for number in (1, 2):
        found = judged(next(stream))
        arrived.set()
        assert same(found, model.predict(drawn.part(number)))
    stream.close()  # does not wait either
    assert not ended.is_set()


def test_what_a_stream_raises_comes_after_the_verdicts_before_it(model: Predictor) -> None:
    def unplugged() -> Iterator[AnyArray]:
        yield drawn.part(1)
        raise ConnectionError("the camera is gone")

    stream = model.stream(unplugged())
    judged(next(stream))
    with pytest.raises(ConnectionError, match="the camera is gone"):
        next(stream)


def test_a_stream_that_is_left_asks_for_no_more(model: Predictor) -> None:
    left = threading.Event()

    def endless() -> Iterator[AnyArray]:
        try:
            while True:
                yield drawn.part(9)
        finally:
            left.set()

    stream = model.stream(endless())
    next(stream)
    stream.close()
    assert left.wait(30)


class Faulty(Preprocessing):
    """Preprocessing with a bug."""

    @override
    def resized(self, image: AnyArray) -> AnyArray:
        raise ZeroDivisionError


class FaultyEngine:
    """An engine with a bug."""

    outputs = ("map", "statistics")

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        raise ZeroDivisionError


def test_a_bug_is_no_unreadable_image(model: Predictor) -> None:
    opened = bundle.read(MODEL)
    faulty = replace(opened.manifest, preprocessing=Faulty((64, 64), 65535.0))
    for broken in (
        Predictor(replace(opened, manifest=faulty), engine=model.engine),
        Predictor(opened, engine=FaultyEngine()),
    ):
        with pytest.raises(ZeroDivisionError):
            list(broken.stream([drawn.part(1)]))


# --- threads, and the end ---


def test_several_threads_at_once_get_the_verdicts_that_each_gets_alone(model: Predictor) -> None:
    several = [drawn.spotted(n, (60 + n, 70))[0] if n % 2 else drawn.part(n, (50, 60 + n)) for n in range(8)]
    alone = [model.predict(image) for image in several]
    assert len({verdict.score for verdict in alone}) == len(several)

    def streamed(_: int) -> list[Verdict]:
        return [judged(outcome) for outcome in model.stream(several)]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found, expected in zip(pool.map(model.predict, several), alone, strict=True):
                assert same(found, expected)
        for verdicts in pool.map(streamed, range(4)):
            assert all(same(found, expected) for found, expected in zip(verdicts, alone, strict=True))


def test_a_closed_predictor_is_refused_in_one_sentence() -> None:
    with blemish.load(MODEL, threads=1) as model:
        assert isinstance(model, Predictor)
        assert model.predict(drawn.part(1)).label == "ok"
    model.close()  # a second time does nothing
    for judge in (
        lambda: model.predict(drawn.part(1)),
        lambda: model.predict_batch([drawn.part(1)]),
        lambda: list(model.stream([drawn.part(1)])),
    ):
        with pytest.raises(ConfigError, match=r"format1\.blemish was closed; expected an open one"):
            judge()


def test_close_releases_the_engine() -> None:
    model = blemish.load(MODEL, threads=1)
    engine = weakref.ref(model.engine)
    model.close()
    gc.collect()
    assert engine() is None


def test_a_with_block_that_fails_closes_the_predictor() -> None:
    with pytest.raises(ZeroDivisionError), blemish.load(MODEL, threads=1) as model:
        raise ZeroDivisionError
    with pytest.raises(ConfigError, match="was closed"):
        model.predict(drawn.part(1))


def test_a_verdict_that_is_being_computed_survives_close(model: Predictor) -> None:
    """The engine waits until the predictor has been closed behind it."""
    running, closed = threading.Event(), threading.Event()

    class Slow:
        outputs = model.engine.outputs

        def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
            running.set()
            assert closed.wait(30)
            return model.engine.run(inputs)

    slow = Predictor(bundle.read(MODEL), engine=Slow())
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(slow.predict, drawn.part(1))
        assert running.wait(30)
        slow.close()
        closed.set()
        assert same(verdict.result(30), model.predict(drawn.part(1)))


# --- verdicts ---


def test_the_p_value_is_a_rank_among_held_out_good_parts(model: Predictor) -> None:
    held_out = model.calibration.scores
    for score in (*held_out, -1e9, 1e9, 0.5):
        expected = (1 + sum(other >= score for other in held_out)) / (1 + len(held_out))
        assert p_value(score, model.calibration) == expected
    verdict = model.predict(drawn.part(10))
    assert verdict.p_value == p_value(verdict.score, model.calibration)


def test_labels_follow_the_thresholds(model: Predictor) -> None:
    image = drawn.part(11)
    score = model.predict(image).score
    for review, defect, label in (
        (score, score, "ok"),
        (score - 1, score, "review"),
        (score - 2, score - 1, "defect"),
        (score + 1, score + 1, "ok"),
    ):
        changed = replace(model.calibration, review_threshold=review, defect_threshold=defect)
        assert calibrated(model, changed).predict(image).label == label


def test_a_model_that_leaves_light_as_it_is_says_nothing_of_it(model: Predictor) -> None:
    verdict = model.predict(drawn.part(10))
    assert (verdict.light_p, verdict.reason) == (None, "")
    assert model.prepare(drawn.part(10)).light is None
    assert list(as_record(verdict)) == ["path", "score", "label", "p_value", "regions"]


LIT = FILES / "format2.blemish"


@pytest.fixture(scope="module")
def lit() -> Predictor:
    return blemish.load(LIT, threads=1)


def with_light_limit(model: Predictor, scores: tuple[float, ...], limit: float) -> Predictor:
    """Return a predictor with another light calibration that runs on the same engine."""
    opened = bundle.read(LIT)
    known = LightCalibration(scores, limit)
    return Predictor(
        replace(opened, manifest=replace(opened.manifest, light_calibration=known)), engine=model.engine
    )


def test_the_light_p_value_is_a_rank_among_held_out_good_parts(lit: Predictor) -> None:
    known, preprocessing = lit.manifest.light_calibration, lit.preprocessing
    assert known is not None
    assert known.limit == 0
    for image in (drawn.part(10), (0.6 * drawn.part(10)).astype(np.uint8)):
        score = preprocessing.with_light_score(preprocessing.resized(image))[1]
        assert score is not None
        verdict = lit.predict(image)
        assert verdict.light_p == (1 + sum(other >= score for other in known.scores)) / (
            1 + len(known.scores)
        )
        record = as_record(verdict)
        assert (record["light_p"], record["reason"]) == (verdict.light_p, "")
    assert verdict.light_p == 1 / (1 + len(known.scores))


def test_a_light_limit_makes_an_ok_part_review_and_changes_nothing_else(lit: Predictor) -> None:
    part, spot = drawn.part(10), drawn.spotted(6000)[0]
    plain = lit.predict(part), lit.predict(spot)
    assert [verdict.label for verdict in plain] == ["ok", "defect"]
    cases: list[tuple[tuple[float, ...], float, dict[str, Any]]] = [
        ((1e-9,) * 19, 0.05, {"label": "review", "light_p": 0.05, "reason": "light"}),
        ((1e-9,) * 19, 0.0, {"label": "ok", "light_p": 0.05}),
        ((1e-9,) * 18, 0.05, {"label": "ok", "light_p": 1 / 19}),
        ((1e9,) * 19, 0.05, {"label": "ok", "light_p": 1.0}),
    ]
    for scores, limit, changes in cases:
        limited = with_light_limit(lit, scores, limit)
        assert same(limited.predict(part), replace(plain[0], **changes))
        changes |= {"label": "defect", "reason": ""}
        assert same(limited.predict(spot), replace(plain[1], **changes))
        for batched in limited.predict_batch([part, part]):
            assert batched.light_p == limited.predict(part).light_p


def test_the_score_is_the_statistics_joined(model: Predictor) -> None:
    inputs = np.stack([images.to_input(drawn.part(number)) for number in range(3)])
    statistics = model.engine.run(inputs)["statistics"].astype(np.float64)
    for row, number in enumerate(range(3)):
        c = model.calibration
        z = [(x - m) / s for x, m, s in zip(statistics[row], c.centers, c.scales, strict=True)]
        assert model.predict(drawn.part(number)).score == pytest.approx(max(z), rel=1e-4, abs=1e-4)


class Parts:
    """An engine whose map is the mean of two parts, one of which has a quarter of the cells."""

    outputs = ("map", "statistics", "fine", "coarse")

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        fine, coarse = inputs.mean(1), inputs.mean(1)[:, ::2, ::2]
        maps = (fine + coarse.repeat(2, 1).repeat(2, 2)) / 2
        statistics = np.repeat(maps.max((1, 2))[:, None], 3, 1)
        return {"map": maps, "statistics": statistics, "fine": fine, "coarse": coarse}


def test_the_parts_of_a_map_are_returned_where_they_are_asked_for() -> None:
    model, image = Predictor(bundle.read(MODEL), engine=Parts()), drawn.part(14, (90, 70))
    assert model.predict(image).parts == {}
    inputs = model.prepare(image).inputs
    found = model.predict(image, parts=True)
    assert list(found.parts) == ["fine", "coarse"]
    assert np.array_equal(found.parts["fine"], inputs[0].mean(0))
    assert found.parts["coarse"].shape == (32, 32)
    large = model.predict(image, parts=True, full_size=True)
    for name, part in large.parts.items():
        assert np.array_equal(part, images.resize_map(found.parts[name], (90, 70)))


# --- regions ---


def flooded(mask: AnyArray) -> list[set[tuple[int, int]]]:
    """Return the 8-connected regions, found by flooding them pixel by pixel."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while left:
        front, region = [left.pop()], set[tuple[int, int]]()
        while front:
            y, x = front.pop()
            region.add((y, x))
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= around
            front += around
        found.append(region)
    return found


def by_hand(anomaly_map: FloatArray, threshold: float) -> list[Region]:
    found = []
    for region in flooded(anomaly_map > threshold):
        ys, xs = [y for y, _ in region], [x for _, x in region]
        peak_y, peak_x = max(region, key=lambda place: anomaly_map[place])
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        found.append(Region(box, len(region), float(anomaly_map[peak_y, peak_x]), (peak_x, peak_y)))
    return sorted(found, key=lambda region: -region.peak)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 5), (33, 65), (40, 50)])
def test_regions_are_those_found_by_hand(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    for threshold in (-3.0, 0.0, 0.8, 1.5, 2.5, 9.0):
        for _ in range(4):
            anomaly_map = rng.standard_normal(size).astype(np.float32)
            assert list(regions(anomaly_map, threshold)) == by_hand(anomaly_map, threshold)


def test_regions_touch_at_corners_and_not_across_borders() -> None:
    anomaly_map = np.zeros((6, 6), np.float32)
    anomaly_map[[0, 1, 2], [0, 1, 2]] = [1, 3, 2]
    anomaly_map[5, 5] = 5
    anomaly_map[0, 5] = 4
    assert regions(anomaly_map, 0.5) == (
        Region((5, 5, 6, 6), 1, 5.0, (5, 5)),
        Region((5, 0, 6, 1), 1, 4.0, (5, 0)),
        Region((0, 0, 3, 3), 3, 3.0, (1, 1)),
    )
    assert regions(anomaly_map, 5.0) == ()  # above is strictly above


@pytest.mark.parametrize("size", [(64, 64), (120, 200), (256, 64), (30, 21), (1, 1)])
def test_regions_of_a_verdict_are_in_pixels_of_the_image(model: Predictor, size: tuple[int, int]) -> None:
    """The oracle is each pixel of the map as the rectangle of image pixels that it touches."""
    rng = np.random.default_rng(4)
    small = rng.standard_normal((64, 64)).astype(np.float32)
    sy, sx = size[0] / 64, size[1] / 64
    for before in regions(small, 1.5):
        found = model.in_image(before, (64, 64), size)
        x0, y0, x1, y1 = before.box
        touched = [
            [n for n in range(length) if n < stop * step and n + 1 > start * step]
            for length, start, stop, step in ((size[1], x0, x1, sx), (size[0], y0, y1, sy))
        ]
        assert found.box == (touched[0][0], touched[1][0], touched[0][-1] + 1, touched[1][-1] + 1)
        assert found.area == pytest.approx(max(1.0, before.area * sx * sy), abs=0.5)
        assert found.peak == before.peak
        x, y = before.peak_xy
        assert found.peak_xy == (int((x + 0.5) * sx), int((y + 0.5) * sy))


def test_regions_lie_on_the_defect_and_do_not_depend_on_the_size_of_the_map(model: Predictor) -> None:
    image, mask = drawn.spotted(12, (120, 200))
    small, full = model.predict(image), model.predict(image, full_size=True)
    assert small == full  # all but the maps
    assert small.map.shape == (64, 64)
    assert np.array_equal(full.map, images.resize_map(small.map, (120, 200)))
    first = small.regions[0]
    assert first.peak == small.map.max() > model.calibration.pixel_threshold
    x, y = first.peak_xy
    assert full.map[y, x] > 0.95 * full.map.max()
    ys, xs = np.nonzero(mask)
    margin = 20  # the map is blurred
    assert ys.min() - margin <= y <= ys.max() + margin
    assert xs.min() - margin <= x <= xs.max() + margin
    assert first.box[0] <= x < first.box[2]
    assert first.box[1] <= y < first.box[3]


def test_an_image_over_the_pixel_threshold_has_a_region(model: Predictor) -> None:
    """The threshold is for maps at the network's size: resizing them lowers their peaks."""
    image = drawn.spotted(13, (300, 310))[0]
    peak, lower = model.predict(image).map.max(), model.predict(image, full_size=True).map.max()
    assert lower < peak
    changed = replace(model.calibration, pixel_threshold=float(lower + peak) / 2)
    assert calibrated(model, changed).predict(image, full_size=True).regions


# --- without torch ---


def test_the_runtime_scores_the_same_without_torch(model: Predictor, tmp_path: Path) -> None:
    paths = []
    for number in (*GOOD, *BAD):
        paths.append(tmp_path / f"{number}.png")
        images.write_png(paths[-1], drawn.part(number) if number in GOOD else drawn.spotted(number)[0])
    program = """
import json, blemish
model = blemish.load(sys.argv[1], threads=1)
verdicts = [model.predict(path) for path in sys.argv[2:]]
print(json.dumps([[v.score, v.label, v.p_value, len(v.regions), float(v.map.sum())] for v in verdicts]))
"""
    done = run_base_only(program, MODEL, *paths)
    assert done.returncode == 0, done.stderr
    expected = [model.predict(path) for path in paths]
    assert json.loads(done.stdout) == [
        [v.score, v.label, v.p_value, len(v.regions), float(v.map.sum())] for v in expected
    ]


def test_evaluating_predicting_and_calibrating_need_no_torch(tmp_path: Path) -> None:
    data = drawn.data_set(tmp_path / "parts", train=3, good=3, bad=3)
    done = run_base_only(
        COMMAND_LINE, "evaluate", MODEL, data, "--json", tmp_path / "e.json", "--report", tmp_path / "e.html",
        "--csv", tmp_path / "e.csv",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main(["evaluate", str(MODEL), str(data), "--json", str(tmp_path / "here.json")]) == 0
    found, here = (json.loads((tmp_path / name).read_text()) for name in ("e.json", "here.json"))
    assert found["images"] == here["images"]
    assert found["rows"][0]["image_auroc"] == 1.0
    assert (tmp_path / "e.html").read_text().startswith("<!doctype html>")
    done = run_base_only(
        COMMAND_LINE, "predict", MODEL, data / "test", "--maps", tmp_path / "m", "--overlays", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()][3:] == ["defect"] * 3
    done = run_base_only(
        COMMAND_LINE, "calibrate", MODEL, data / "test" / "good", "--out", tmp_path / "new.blemish"
    )
    assert done.returncode == 0, done.stderr
    done = run_base_only(COMMAND_LINE, "check", data)
    assert done.returncode in (0, 1), done.stderr


def test_training_without_torch_says_what_to_install(tmp_path: Path) -> None:
    data = drawn.data_set(tmp_path / "parts", train=3, good=0, bad=0)
    out = tmp_path / "m.blemish"
    for words in (["train", data, "--model", "supersimplenet", "--out", out], ["weights", "list"]):
        done = run_base_only(COMMAND_LINE, *words)
        assert done.returncode == 2
        assert done.stderr == "blemish: torch is not installed; this needs blemish[train]\n"
    assert not out.exists()
