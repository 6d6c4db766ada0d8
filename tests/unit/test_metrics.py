"""Metrics against recorded values, scikit-learn, and brute force over every threshold."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file
from sklearn import metrics as sklearn_metrics

from blemish.errors import ConfigError, MetricError
from blemish.evaluation import metrics, score_store
from blemish.evaluation.metrics import PixelScores
from blemish.types import AnyArray, BoolArray, FloatArray

FILES = Path(__file__).parents[1] / "files"
Images = list[tuple[FloatArray, BoolArray | None]]
ALL_FOUR: dict[str, Callable[[PixelScores], float]] = {
    "auroc": PixelScores.auroc,
    "average_precision": PixelScores.average_precision,
    "f1_max": PixelScores.f1_max,
    "aupro": PixelScores.aupro,
}


def gathered(
    images: Sequence[tuple[FloatArray, BoolArray | None]], memory_budget: int = 2**30
) -> PixelScores:
    pixels = PixelScores(memory_budget)
    for map, mask in images:
        pixels.update(map, mask)
    return pixels


def drawn_images(seed: int, count: int = 3, levels: int = 6) -> Images:
    """Draw small maps of different sizes with few distinct values, most with defects, one without."""
    draw = np.random.default_rng(seed)
    images: Images = [(draw.integers(0, levels, (5, 4)).astype(np.float32), None)]
    for _ in range(count):
        shape = tuple(draw.integers(6, 12, 2))
        mask = draw.random(shape) < 0.25
        images.append(((draw.integers(0, levels, shape) + mask).astype(np.float32), mask))
    return images


# --- Recorded values ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, AnyArray], dict[str, float]]:
    return load_file(FILES / "metrics.safetensors"), json.loads((FILES / "metrics.json").read_text())


def test_pixel_metrics_equal_the_recorded_ones(
    recorded: tuple[dict[str, AnyArray], dict[str, float]],
) -> None:
    tensors, values = recorded
    pixels = gathered(list(zip(tensors["maps"], tensors["masks"].astype(bool), strict=True)))
    for limit in (0.3, 0.05, 0.01, 1.0):
        assert pixels.aupro(limit) == pytest.approx(values[f"aupro_{limit}"], abs=1e-6)
    assert pixels.aupro() == pixels.aupro(0.3)
    for name in ("auroc", "average_precision", "f1_max"):
        assert ALL_FOUR[name](pixels) == pytest.approx(values[f"pixel_{name}"], abs=1e-6)


def test_image_metrics_equal_the_recorded_ones(
    recorded: tuple[dict[str, AnyArray], dict[str, float]],
) -> None:
    tensors, values = recorded
    scores, labels = tensors["maps"].max(axis=(1, 2)), tensors["masks"].any(axis=(1, 2))
    for name in ("auroc", "average_precision"):
        measured = getattr(metrics, name)(scores, labels)
        assert measured == pytest.approx(values[f"image_{name}_of_map_maximum"], abs=1e-6)


# --- Image level against scikit-learn -----------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_image_metrics_equal_scikit_learn(levels: int) -> None:
    draw = np.random.default_rng(levels)
    for count in (3, 20, 200):
        labels = np.append([0, 1], draw.integers(0, 2, count))
        scores = draw.integers(-levels, levels, count + 2) / 7 + labels * 0.2
        assert metrics.auroc(scores, labels) == pytest.approx(
            sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12
        )
        assert metrics.average_precision(scores, labels) == pytest.approx(
            sklearn_metrics.average_precision_score(labels, scores), abs=1e-12
        )
        every_f1 = [sklearn_metrics.f1_score(labels, scores >= threshold) for threshold in scores]
        assert metrics.f1_max(scores, labels) == pytest.approx(max(every_f1), abs=1e-12)
        for found, expected in zip(
            metrics.roc_curve(scores, labels),
            sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False),
            strict=True,
        ):
            np.testing.assert_allclose(found, expected, atol=1e-12)


def test_scores_are_not_squashed() -> None:
    """No scale of the scores changes a metric: nothing is clipped, rounded or passed through a sigmoid."""
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.3, 0.2, 0.4])
    for scale, offset in ((1, 0), (1e9, 0), (1e-9, 0), (1, 1e6), (1, -1e6)):
        assert metrics.auroc(scores * scale + offset, labels) == 0.75


# --- Pixel level against every threshold --------------------------------------------------------------------


def mean_overlaps_by_flood(
    images: Images, thresholds: npt.NDArray[np.float64]
) -> tuple[list[float], list[float]]:
    """Return false-positive rate and mean overlap at each threshold; regions are filled pixel by pixel."""
    regions = [(map, region) for map, mask in images if mask is not None for region in flood(mask)]
    normal = np.concatenate([map.ravel() if mask is None else map[~mask] for map, mask in images])
    rates = [float(np.mean(normal >= threshold)) for threshold in thresholds]
    overlaps = [
        float(np.mean([np.mean(map[region] >= threshold) for map, region in regions]))
        for threshold in thresholds
    ]
    return rates, overlaps


def flood(mask: BoolArray) -> Iterator[BoolArray]:
    left = set(zip(*map(list, np.nonzero(mask)), strict=True))
    while left:
        region, front = np.zeros_like(mask), [left.pop()]
        while front:
            y, x = front.pop()
            region[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front.extend(near)
        yield region


def area_by_small_steps(rates: list[float], overlaps: list[float], limit: float) -> float:
    """Integrate by trapezoids, with the curve read off at the limit and at nothing beyond."""
    x, y = np.array([0.0, *rates]), np.array([0.0, *overlaps])
    area = 0.0
    for x0, x1, y0, y1 in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / limit


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [2, 6, 10_000])
def test_aupro_equals_brute_force(seed: int, levels: int) -> None:
    images = drawn_images(seed, levels=levels)
    pixels = gathered(images)
    thresholds = np.unique(np.concatenate([map.ravel() for map, _ in images]))[::-1]
    rates, overlaps = mean_overlaps_by_flood(images, thresholds)
    for limit in (0.01, 0.05, 0.3, 0.77, 1.0):
        expected = area_by_small_steps(rates, overlaps, limit)
        assert pixels.aupro(limit) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_pixel_metrics_equal_scikit_learn(seed: int) -> None:
    images = drawn_images(seed)
    pixels = gathered(images)
    scores = np.concatenate([map.ravel() for map, _ in images])
    labels = np.concatenate(
        [(np.zeros(map.shape, bool) if mask is None else mask).ravel() for map, mask in images]
    )
    assert pixels.auroc() == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert pixels.average_precision() == pytest.approx(
        sklearn_metrics.average_precision_score(labels, scores), abs=1e-12
    )
    every_f1 = [sklearn_metrics.f1_score(labels, scores >= threshold) for threshold in np.unique(scores)]
    assert pixels.f1_max() == pytest.approx(max(every_f1), abs=1e-12)


def test_pixels_that_touch_diagonally_are_one_region() -> None:
    mask = np.zeros((6, 6), bool)
    mask[0, 0] = mask[1, 1] = mask[2, 0] = mask[5, 5] = True
    map = np.zeros((6, 6), np.float32)
    map[1, 1] = 1
    # Before any false alarm, a third of a region of three pixels is found and none of a region of one pixel;
    # then all is found at once: a line from (0, 1/6) to (1, 1).
    assert gathered([(map, mask)]).aupro(1.0) == pytest.approx((1 / 6 + 1) / 2)


def test_each_region_counts_the_same_whatever_its_area() -> None:
    mask = np.zeros((20, 20), bool)
    mask[:10] = mask[19, 19] = True
    map = np.zeros((20, 20), np.float32)
    map[mask] = 2
    map[19, 19] = 0
    map[15, :10] = 1
    # 200 pixels of 201 are found at once, yet the overlap stays at one half up to a rate of 10 / 199.
    assert gathered([(map, mask)]).aupro(0.05) == pytest.approx(0.5)


def test_an_empty_mask_is_an_all_good_image() -> None:
    map = np.arange(6, dtype=np.float32).reshape(2, 3)
    defect = (map, map > 3)
    with_none, with_empty = gathered([defect, (map, None)]), gathered([defect, (map, np.zeros((2, 3), bool))])
    for metric in ALL_FOUR.values():
        assert metric(with_none) == metric(with_empty) != metric(gathered([defect]))


def test_answers_follow_what_is_added_after_them() -> None:
    images = drawn_images(11, count=6)
    pixels = gathered(images[:4])
    before = [metric(pixels) for metric in ALL_FOUR.values()]
    for map, mask in images[4:]:
        pixels.update(map, mask)
    after = [metric(pixels) for metric in ALL_FOUR.values()]
    assert after == [metric(gathered(images)) for metric in ALL_FOUR.values()] != before


def test_maps_may_be_overwritten_once_they_are_added() -> None:
    images = drawn_images(12)
    expected = gathered(images).aupro()
    pixels = PixelScores()
    for map, mask in images:
        map = map.copy()
        pixels.update(map, mask)
        map[:] = 0
    assert pixels.aupro() == expected


# --- Several together, and on several threads ---------------------------------------------------------------


def test_what_others_gathered_counts_as_well() -> None:
    images = drawn_images(13, count=8)
    good, scratches, dents = PixelScores(), PixelScores(), PixelScores()
    scratched, every = PixelScores(also=[good, scratches]), PixelScores(also=[good, scratches, dents])
    for index, (map, mask) in enumerate(images):
        (good if mask is None else (scratches, dents)[index % 2]).update(map, mask)
        if index > 3:  # answers follow what is added to any of them
            for metric in ALL_FOUR.values():
                assert metric(every) == pytest.approx(metric(gathered(images[: index + 1])), abs=1e-12)
    for metric in ALL_FOUR.values():
        assert metric(scratched) == pytest.approx(metric(gathered(images[:1] + images[2::2])), abs=1e-12)
    every.update(*images[1])
    assert every.aupro() == pytest.approx(gathered([*images, images[1]]).aupro(), abs=1e-12)
    assert dents.aupro() == pytest.approx(gathered(images[1::2]).aupro(), abs=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("levels", [1, 20, 2**24])
def test_sorting_on_threads_is_sorting(threads: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_store, "WORTH_A_THREAD", 100)
    scores = np.random.default_rng(threads).integers(0, levels, 10_001).astype(np.float32)
    expected = np.sort(scores)
    score_store.sort(scores, threads)
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("levels", [1, 4, 60, 10**6])
@pytest.mark.parametrize("chunk", [1, 7, 2**14])
def test_ranks_are_those_of_one_search(levels: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_store, "CHUNK", chunk)
    draw = np.random.default_rng(levels)
    parts = [np.sort(draw.integers(0, levels, size).astype(np.float32)) for size in (300, 0, 1, 41)]
    scores = np.unique(draw.integers(-5, levels + 5, 200)).astype(np.float32)
    together = np.sort(np.concatenate(parts))
    below, at_or_below = score_store.ranks(parts, scores)
    np.testing.assert_array_equal(below, np.searchsorted(together, scores, "left"))
    np.testing.assert_array_equal(at_or_below, np.searchsorted(together, scores, "right"))


# --- Saturated PRO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_saturated_pro_equals_brute_force(seed: int) -> None:
    draw = np.random.default_rng(seed)
    maps = [draw.integers(0, 9, (9, 8)).astype(np.float32) for _ in range(3)]
    masks: list[BoolArray | None] = [None, draw.random((3, 9, 8)) < 0.3, draw.random((1, 9, 8)) < 0.2]
    areas: list[list[float]] = [[], [3, 7.5, 1000], [1]]
    regions = [
        (map, region, min(area, region.sum()))
        for map, mask, each in zip(maps, masks, areas, strict=True)
        if mask is not None
        for region, area in zip(mask, each, strict=True)
    ]
    normal = np.concatenate(
        [
            map.ravel() if mask is None else map[~mask.any(axis=0)]
            for map, mask in zip(maps, masks, strict=True)
        ]
    )
    thresholds = np.arange(8, -1, -1)
    rates = [float(np.mean(normal >= threshold)) for threshold in thresholds]
    overlaps = [
        float(np.mean([min((map[region] >= threshold).sum() / area, 1) for map, region, area in regions]))
        for threshold in thresholds
    ]
    for limit in (0.05, 0.3, 1.0):
        expected = area_by_small_steps(rates, overlaps, limit)
        assert metrics.saturated_pro(maps, masks, areas, limit=limit) == pytest.approx(expected, abs=1e-12)
    assert metrics.saturated_pro(maps, masks, areas) == metrics.saturated_pro(maps, masks, areas, limit=0.05)


# --- Beyond the memory budget -------------------------------------------------------------------------------


def pixels_of_a_model(distort: Callable[[FloatArray, BoolArray, int], AnyArray], *, good: int = 0) -> Images:
    """Draw 20 noise maps of 512 x 1024 with discs that stand out, none in the first `good` of them.

    10 million pixels need 52 MB to be sorted: more than the least budget.
    """
    draw = np.random.default_rng(7)
    noise = draw.standard_normal((512, 1024), np.float32)
    y, x = np.mgrid[:512, :1024]
    images: Images = []
    for index in range(20):
        mask = np.zeros(noise.shape, bool)
        for _ in range(3 if index >= good else 0):
            mask |= np.hypot(y - draw.integers(512), x - draw.integers(1024)) < draw.integers(3, 35)
        shifted = np.roll(noise, tuple(draw.integers(512, size=2)), (0, 1))
        images.append((distort(shifted, mask, index).astype(np.float32), mask))
    return images


@pytest.mark.parametrize(
    ("distort", "good"),
    [
        pytest.param(lambda noise, mask, _: noise + 1.5 * mask, 0, id="plain"),
        pytest.param(lambda noise, mask, _: noise + 0.2 * mask, 0, id="hardly better than chance"),
        pytest.param(lambda noise, mask, _: 5.005 + 0.001 * noise + 0.002 * mask, 0, id="from 5.0 to 5.01"),
        pytest.param(lambda noise, mask, _: np.exp(3 * noise + 3 * mask), 0, id="seven decades"),
        pytest.param(lambda noise, mask, _: np.maximum(noise + 1.5 * mask - 1, 0), 0, id="mostly 0"),
        pytest.param(
            lambda noise, mask, _: np.where(abs(noise + mask - 1) < 0.2, 1, noise + mask),
            0,
            id="a fifth is 1",
        ),
        pytest.param(lambda noise, mask, index: noise + 2 * mask - 0.3 * index, 0, id="drift down"),
        pytest.param(
            lambda noise, mask, index: noise + 2 * mask + 0.3 * index, 18, id="good first, drift up"
        ),
        pytest.param(
            lambda noise, mask, index: noise + (1.5 + 100 * (index > 18)) * mask, 12, id="beyond all seen"
        ),
    ],
)
def test_histogram_stays_within_a_ten_thousandth(
    distort: Callable[[FloatArray, BoolArray, int], AnyArray], good: int
) -> None:
    images = pixels_of_a_model(distort, good=good)
    exact, histogram = gathered(images), gathered(images, metrics.SMALLEST_BUDGET)
    assert histogram._scores.histogram is not None
    assert exact._scores.histogram is None
    for name, metric in ALL_FOUR.items():  # 1e-4 is promised; areas do better unless bins lean to one side
        within = 1e-5 if name in ("auroc", "aupro") else 5e-5
        assert metric(histogram) == pytest.approx(metric(exact), abs=within)
    assert histogram.aupro(0.01) == pytest.approx(exact.aupro(0.01), abs=1e-5)


def test_histogram_keeps_what_came_before_it_and_between_answers() -> None:
    images = pixels_of_a_model(lambda noise, mask, _: noise + 1.5 * mask)
    pixels = PixelScores(metrics.SMALLEST_BUDGET)
    for map, mask in images:
        pixels.update(map, mask)
        pixels.auroc()
    assert pixels.aupro() == pytest.approx(gathered(images).aupro(), abs=1e-4)
    held = pixels._scores.histogram
    assert held is not None
    assert held.normals.sum() + held.anomalous.sum() == 20 * 512 * 1024
    assert held.scores.size < 3 * metrics.SMALLEST_BUDGET / score_store.BYTES_PER_BIN
    assert (np.diff(held.scores) > 0).all()


def test_many_joins_move_scores_neither_up_nor_down() -> None:
    """A hundred times the scores of the first histogram, a tenth of them tied, in few bins."""
    draw = np.random.default_rng(0)
    bins, every = 256, []
    held: list[score_store.Histogram] = []
    for _ in range(100):
        scores = np.sort(draw.random(2000)).astype(np.float32)
        scores[(scores > 0.4) & (scores < 0.5)] = 0.45
        every.append(scores)
        held = [score_store.joined([*held, score_store.normal_histogram(scores, bins)], bins)]
    middle_ranks = np.cumsum(held[0].normals) - held[0].normals / 2
    scores = np.sort(np.concatenate(every))
    expected = (
        np.searchsorted(scores, held[0].scores) + np.searchsorted(scores, held[0].scores, "right")
    ) / 2
    moved = (middle_ranks - expected) / scores.size * bins
    assert abs(moved.mean()) < 1
    assert abs(moved).max() < 10
    assert held[0].normals[held[0].scores == 0.45] == pytest.approx(np.sum(scores == 0.45), rel=0.1)


def test_histograms_of_several_are_joined() -> None:
    images = pixels_of_a_model(lambda noise, mask, _: noise + 1.5 * mask, good=14)
    good, folded, whole = (PixelScores(metrics.SMALLEST_BUDGET) for _ in range(3))
    every = PixelScores(metrics.SMALLEST_BUDGET, also=[good, folded, whole])
    for index, (map, mask) in enumerate(images[:10] + images[14:] * 4):
        (good if index < 10 else whole if index == 10 else folded).update(map, mask)
    assert folded._scores.histogram is not None
    expected = gathered(images[:10] + images[14:] * 4)
    for metric in ALL_FOUR.values():
        assert metric(every) == pytest.approx(metric(expected), abs=5e-5)
    assert whole._scores.histogram is None
    assert good._scores.histogram is None
    assert whole.aupro() == gathered(images[14:15]).aupro()


@pytest.mark.parametrize("grown", [0, 9])
def test_memory_stays_within_its_budget(grown: int) -> None:
    """With few anomalous pixels, and with many."""
    images = [
        (map, mask | (np.arange(len(mask))[:, None] % 10 < grown))
        for map, mask in pixels_of_a_model(lambda noise, mask, _: noise + 1.5 * mask)
        if mask is not None
    ]
    for count, budget in (
        (60, metrics.SMALLEST_BUDGET),  # a histogram, several times joined
        (12 if not grown else 1, 2 * metrics.SMALLEST_BUDGET),  # exact
    ):
        tracemalloc.start()
        pixels = gathered((images * 3)[:count], budget)
        for metric in ALL_FOUR.values():
            metric(pixels)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (pixels._scores.histogram is None) == (count < 60)
        assert peak < budget + 2**20  # a part of one image may pass through besides


def test_histogram_is_exact_where_scores_are_few() -> None:
    images = pixels_of_a_model(lambda noise, mask, _: np.round(4 * (noise + mask)))
    exact, histogram = gathered(images), gathered(images, metrics.SMALLEST_BUDGET)
    for metric in ALL_FOUR.values():
        assert metric(histogram) == pytest.approx(metric(exact), abs=1e-12)


# --- Bootstrap ----------------------------------------------------------------------------------------------


def test_bootstrap_interval_covers_as_often_as_stated() -> None:
    """Two Gaussians one deviation apart have an AUROC of Phi(1 / sqrt 2) = 0.7602."""
    draw = np.random.default_rng(4)
    labels = np.repeat([0, 1], 40)
    inside = 0
    for _ in range(60):
        scores = draw.standard_normal(80) + labels
        low, high = metrics.bootstrap_interval(metrics.auroc, scores, labels, draws=200, level=0.8)
        assert low < metrics.auroc(scores, labels) < high
        inside += low < 0.7602 < high
    assert 0.65 * 60 <= inside <= 0.93 * 60


def test_bootstrap_interval_repeats_with_its_seed_and_widens_with_its_level() -> None:
    draw = np.random.default_rng(5)
    labels = np.arange(50) % 2
    scores = draw.standard_normal(50) + labels
    low, high = metrics.bootstrap_interval(metrics.f1_max, scores, labels, draws=100)
    assert (low, high) == metrics.bootstrap_interval(metrics.f1_max, scores, labels, draws=100)
    assert (low, high) != metrics.bootstrap_interval(metrics.f1_max, scores, labels, draws=100, seed=1)
    inner = metrics.bootstrap_interval(metrics.f1_max, scores, labels, draws=100, level=0.5)
    assert low < inner[0] < inner[1] < high


def test_bootstrap_draws_have_both_classes_even_where_one_has_one_image() -> None:
    interval = metrics.bootstrap_interval(metrics.auroc, [0, 1, 2, 3], [0, 0, 0, 1], draws=50)
    assert interval == (1.0, 1.0)


# --- Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric",
    [
        metrics.auroc,
        metrics.average_precision,
        metrics.f1_max,
        metrics.roc_curve,
        lambda scores, labels: metrics.bootstrap_interval(metrics.auroc, scores, labels),
    ],
)
@pytest.mark.parametrize(
    ("scores", "labels", "sentence"),
    [
        ([0.1, 0.2], [0, 0], "2 normal and 0 anomalous"),
        ([0.1, 0.2], [1, 1], "0 normal and 2 anomalous"),
        ([], [], "0 normal and 0 anomalous"),
        ([0.1, np.nan], [0, 1], "1 of 2 scores are NaN or infinite"),
        ([np.inf, 0.1], [0, 1], "1 of 2 scores are NaN or infinite"),
        ([0.1, 0.2, 0.3], [0, 1], r"shape \(3,\) and labels \(2,\)"),
        ([[0.1, 0.2]], [[0, 1]], r"shape \(1, 2\)"),
        ([0.1, 0.2, 0.3], [0, 1, 2], "labels hold 2"),
    ],
)
def test_refuses_image_scores(
    metric: Callable[..., object], scores: list[float], labels: list[int], sentence: str
) -> None:
    with pytest.raises(MetricError, match=sentence):
        metric(scores, labels)


MAP = np.zeros((4, 5), np.float32)
MASK = np.ones((4, 5), bool)


@pytest.mark.parametrize(
    ("map", "mask", "areas", "sentence"),
    [
        (np.full((4, 5), np.nan, np.float32), None, None, "20 of 20 scores are NaN"),
        (np.full((4, 5), 1e300), None, None, "20 of 20 scores are NaN or infinite"),
        (np.zeros((4, 5, 1), np.float32), None, None, r"shape \(4, 5, 1\)"),
        (np.zeros((4, 5), np.uint8), None, None, "a map is uint8"),
        (MAP, MASK.T, None, r"shape \(5, 4\); expected bool of shape \(4, 5\)"),
        (MAP, MASK.astype(np.uint8), None, "a mask is uint8"),
        (MAP, MASK, [3], r"expected bool of shape \(1, 4, 5\)"),
        (MAP, MASK[None], [3, 4], r"expected bool of shape \(2, 4, 5\)"),
        (MAP, None, [3], "a mask is None"),
        (MAP, MASK[None], [0], "20 pixels with saturation area 0;"),
        (MAP, MASK[None], [np.nan], "saturation area nan"),
        (MAP, ~MASK[None], [3], "a region of 0 pixels"),
    ],
)
def test_refuses_images(
    map: AnyArray, mask: BoolArray | None, areas: list[float] | None, sentence: str
) -> None:
    pixels = gathered(drawn_images(1))
    before = pixels.aupro()
    with pytest.raises(MetricError, match=sentence):
        pixels.update(map, mask, saturation_areas=areas)
    assert pixels.aupro() == before


@pytest.mark.parametrize("metric", ALL_FOUR.values(), ids=ALL_FOUR)
def test_refuses_one_class_of_pixels(metric: Callable[[PixelScores], float]) -> None:
    for images in ([], [(MAP, None)], [(MAP, MASK)]):
        with pytest.raises(MetricError, match="expected at least one of each"):
            metric(gathered(images))


def test_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(MetricError, match="2 maps, 1 masks and 2 lists"):
        metrics.saturated_pro([MAP, MAP], [None], [[], []])


def test_refuses_options() -> None:
    pixels = gathered(drawn_images(1))
    for limit in (0, -0.1, 1.01, np.nan):
        with pytest.raises(ConfigError, match="false-positive limit"):
            pixels.aupro(limit)
    with pytest.raises(ConfigError, match="memory budget of 1000"):
        PixelScores(1000)
    for options in ({"draws": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(ConfigError, match="bootstrap"):
            metrics.bootstrap_interval(metrics.auroc, [0, 1], [0, 1], **options)
