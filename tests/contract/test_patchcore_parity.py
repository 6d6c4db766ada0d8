"""PatchCore against numbers recorded from the authors' implementation, and equation 7 from a re-creation.

Inputs are drawn as they were for the recording, by the seeds given here. All is computed in float64.
"""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from test_parity import ROUNDING, rand, recorded
from torch import Tensor

from blemish.detectors.patchcore import coreset
from blemish.detectors.patchcore.aggregation import aggregate, kernels
from blemish.detectors.patchcore.config import PAPER, PatchCoreConfig
from blemish.detectors.patchcore.detector import PatchCore, reweighted


def known(name: str) -> Tensor:
    tensor = recorded("patchcore")[name]
    return tensor.double() if tensor.is_floating_point() else tensor


def close(found: Tensor, name: str, least: float = 0.0) -> None:
    expected = known(name)
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= max(ROUNDING * scale, least), name


def aggregated(seeds: tuple[int, int], sizes: tuple[tuple[int, ...], ...], numbers: int = 1024) -> Tensor:
    planes = [rand(seed, *size) for seed, size in zip(seeds, sizes, strict=True)]
    weights = [kernel.double() for kernel in kernels(tuple(size[1] for size in sizes), numbers)]
    return aggregate(planes, weights).permute(0, 2, 3, 1).flatten(0, 2)


SQUARE = ((2, 512, 28, 28), (2, 1024, 14, 14))


def test_aggregated_features_of_square_maps() -> None:
    rows = aggregated((101, 102), SQUARE)
    close(rows[::49], "aggregate.square.rows_every49")
    close(rows.mean(0), "aggregate.square.column_mean")


def test_aggregated_features_of_384_numbers() -> None:
    close(aggregated((101, 102), SQUARE, 384)[::98], "aggregate.square384.rows_every98")


@pytest.mark.parametrize(
    ("name", "every", "seeds", "sizes"),
    [
        ("wide", 35, (103, 104), ((1, 512, 20, 28), (1, 1024, 10, 14))),
        ("odd", 13, (105, 106), ((1, 512, 15, 13), (1, 1024, 8, 7))),
    ],
)
def test_aggregated_features_of_other_shapes(
    name: str, every: int, seeds: tuple[int, int], sizes: tuple[tuple[int, ...], ...]
) -> None:
    close(aggregated(seeds, sizes)[::every], f"aggregate.{name}.rows_every{every}")


def order(seed: int, count: int) -> Tensor:
    return rand(seed, count).argsort()


def test_the_published_choice_and_its_ceiling() -> None:
    points = rand(111, 500, 256) + 2 * rand(112, 20, 256)[torch.arange(500) % 20]
    projection, start = rand(113, 128, 256) / 16, order(114, 500)[:10]
    assert torch.equal(start, known("coreset.start_points"))
    small = points @ projection.T
    values = torch.cdist(small, small[start]).mean(1)
    others = torch.ones(500, dtype=torch.bool)
    others[start] = False  # rounding of a point's distance to itself raises these (README of the recording)
    assert float((values - known("coreset.start_values"))[others].abs().max()) < 2e-4
    chosen = coreset.published(points, 50, projection, start)
    assert torch.equal(chosen, known("coreset.indices"))


def test_plain_farthest_first_from_the_authors_exact_start() -> None:
    points = rand(111, 500, 256) + 2 * rand(112, 20, 256)[torch.arange(500) % 20]
    small = points @ (rand(113, 128, 256) / 16).T
    values = torch.cdist(small, small).norm(dim=1)
    assert float((values - known("coreset.exact.start_values")).abs().max()) < 1e-2
    assert torch.equal(coreset.farthest_first(small, 50, values.square()), known("coreset.exact.indices"))


def scoring(size: tuple[int, int], bank: Tensor, neighbours: int = 1) -> PatchCore:
    """Return a detector that scores as published, with this bank, in float64."""
    changes = {"image_size": size, "backbone": "efficientnet_lite0", "layers": ("stage3", "stage5")}
    config = PatchCoreConfig(**PAPER | changes | {"aggregation": "mean", "neighbours": neighbours})
    detector = PatchCore(config).double().eval()
    detector.bank = bank
    return detector


@pytest.mark.parametrize("neighbours", [1, 5])
def test_squared_distances_scores_and_map(neighbours: int) -> None:
    bank, rows = rand(121, 50, 64), rand(122, 336, 64)
    rows[168 + 5 * 12 + 7] *= 2.5
    detector = scoring((112, 96), bank, neighbours)
    assert detector.cell_size == (14, 12)
    maps, statistics = detector.judge(rows.view(2, 168, 64))
    expected = known(f"nearest.k{neighbours}.squared_distances").mean(3)
    found = detector.planes(detector.squared(rows.view(2, 168, 64)))
    assert float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())
    close(statistics[:, 0], f"nearest.k{neighbours}.image_scores")
    close(maps[:, ::2, ::2], f"nearest.k{neighbours}.map_every2")


def test_from_features_to_scores() -> None:
    fine, coarse = rand(131, 5, 512, 28, 28), rand(132, 5, 1024, 14, 14)
    fine[4, :, 10:13, 5:8] += 0.6
    coarse[4, :, 5:7, 2:4] += 0.6
    weights = [kernel.double() for kernel in kernels((512, 1024))]
    rows = aggregate([fine, coarse], weights).permute(0, 2, 3, 1).flatten(1, 2)
    good = rows[:3].flatten(0, 1)
    start = order(134, len(good))[:10]
    chosen = coreset.published(good, int(0.02 * len(good)), rand(133, 128, 1024) / 32, start)
    assert torch.equal(chosen, known("pipeline.bank_indices"))
    detector = scoring((224, 224), good[chosen])
    close(detector.planes(detector.squared(rows[3:])), "pipeline.squared_distances")
    close(detector.judge(rows[3:])[1][:, 0], "pipeline.image_scores")


@pytest.mark.parametrize("support", [3, 9])
def test_equation_7(support: int) -> None:
    bank, rows = rand(141, 40, 16) / 2, rand(142, 90, 16).view(3, 30, 16) / 2
    distances = torch.cdist(rows, bank).amin(2)
    close(distances, "equation7.distances")
    assert torch.equal(distances.argmax(1), known("equation7.worst_cell"))
    close(reweighted(rows, distances.square(), bank, support), f"equation7.b{support}.score")


# --- independent oracles ---


def test_the_search_finds_what_scikit_learn_finds() -> None:
    bank, rows = rand(1, 300, 20), rand(2, 1000, 20)
    expected, _ = (
        NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank.numpy()).kneighbors(rows.numpy())
    )
    distances = torch.full((1000,), torch.inf, dtype=torch.float64)
    coreset.nearest_to(bank, rows, rows.square().sum(1), distances)
    assert torch.allclose(distances.sqrt(), torch.from_numpy(expected[:, 0]), atol=1e-9)


def literal(points: Tensor, count: int) -> list[int]:
    """Choose as farthest-first search is written in books: one choice, one pass over all points."""
    chosen = [int((points - points.mean(0)).square().sum(1).argmax())]
    distances = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        chosen.append(int(distances.argmax()))
        distances = distances.minimum((points - points[chosen[-1]]).square().sum(1))
    return chosen


@pytest.mark.parametrize("pool", [1, 7, 64, 5000])
def test_a_pool_changes_no_choice(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreset, "POOL", pool)
    monkeypatch.setattr(coreset, "CHUNK", 100)
    points = rand(3, 1000, 12) * (1 + rand(4, 1000, 1).abs())
    chosen, radius = coreset.cover(points, 150)
    assert chosen.tolist() == literal(points, 150)
    assert radius == pytest.approx(float(torch.cdist(points, points[chosen]).amin(1).amax()) ** 2)


def test_copies_of_a_point_are_taken_once() -> None:
    points = rand(5, 40, 6).repeat(3, 1)
    chosen, radius = coreset.cover(points, 100)
    assert len(chosen) == 40
    assert len(set(map(tuple, points[chosen].tolist()))) == 40
    assert radius == pytest.approx(0, abs=1e-12)
