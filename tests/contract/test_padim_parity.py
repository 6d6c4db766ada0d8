"""PaDiM against numbers recorded from a re-creation, and its Gaussians against independent oracles.

Inputs are drawn as they were for the recording, by the seeds given here. All is computed in float64.
"""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ledoit_wolf
from test_parity import ROUNDING, rand, recorded
from torch import Tensor

from blemish.detectors import cells, gaussians, registry
from blemish.detectors.padim.detector import PaDiM

SIZE = (12, 12)
JITTER = 1e-5
"""What the recorded version adds to the covariance before it inverts it."""


def close(found: Tensor, name: str, rounding: float = ROUNDING) -> None:
    expected = recorded("padim")[name].double()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rounding * float(expected.abs().max()), name


def layers(seed: int, count: int) -> list[Tensor]:
    """Draw three layers, with neighbouring channels correlated."""
    shapes = ((8, 12), (12, 6), (16, 3))
    drawn = [rand(seed + n, count, width, side, side) for n, (width, side) in enumerate(shapes)]
    return [x + 0.8 * x.roll(1, 1) for x in drawn]


def rows(planes: list[Tensor]) -> Tensor:
    """Return (n, P, D) rows of the ten recorded channels."""
    whole = torch.cat([cells.repeated(plane, SIZE) for plane in planes], 1)
    kept = whole[:, rand(204, 36).argsort()[:10]]
    return kept.flatten(2).transpose(1, 2)


def planted() -> Tensor:
    """Return the rows of two test images, the second with a defect."""
    whole = rows(layers(231, 2)).transpose(1, 2).reshape(2, 10, *SIZE)
    whole[1, :, 4:6, 7:9] += 3
    close(whole, "embedding_of_test")
    return whole.flatten(2).transpose(1, 2)


def test_channels_are_in_the_recorded_order() -> None:
    assert torch.equal(rand(204, 36).argsort()[:10], recorded("padim")["channels"])


@pytest.mark.parametrize(
    ("name", "count", "seed", "rounding"), [("many", 24, 211, 1e-5), ("few", 6, 221, 1e-3)]
)
def test_gaussians_distances_map_and_scores(name: str, count: int, seed: int, rounding: float) -> None:
    found = gaussians.moments([rows(layers(seed, count))])
    close(found.mean.T, f"{name}.mean")
    covariances, _ = gaussians.shrunk(found, 0.01)
    close(covariances[::11], f"{name}.covariance_every11")
    factor = gaussians.factors(covariances + JITTER * torch.eye(10).double())
    close((factor.transpose(1, 2) @ factor)[::11], f"{name}.inverse_every11", rounding)
    settings = {"image_size": (96, 96), "edges": "none", "statistics": ("maximum",), "dimensions": 10}
    detector = registry.build("padim", registry.configure("padim", settings=settings), 0).double()
    assert isinstance(detector, PaDiM)
    assert detector.cell_size == SIZE
    detector.mean, detector.factor = found.mean, factor
    squared = detector.squared(planted())
    close(detector.planes(squared)[:, None], f"{name}.distance", rounding)
    maps, statistics = detector.judge(squared)
    close(maps[:, None, ::2, ::2], f"{name}.map_every2", rounding)
    close(statistics[:, 0], f"{name}.scores", rounding)


# --- independent oracles ---


def samples(count: int, positions: int = 5, size: int = 6) -> Tensor:
    mixing = rand(1, positions, size, size)
    return (rand(2, count, positions, 1, size) @ mixing)[:, :, 0] + rand(3, positions, size)


def test_a_stream_has_the_moments_of_the_whole() -> None:
    whole = samples(23)
    streamed = gaussians.moments([whole[:1], whole[1:10], whole[10:]])
    for place in range(5):
        expected = np.cov(whole[:, place].numpy(), rowvar=False)
        np.testing.assert_allclose(streamed.covariance[place], expected, rtol=1e-10)
    assert torch.allclose(streamed.mean, whole.mean(0))


@pytest.mark.parametrize("count", [4, 12, 200])
def test_covariances_are_shrunk_as_by_ledoit_and_wolf(count: int) -> None:
    drawn = samples(count)
    found = gaussians.moments([drawn])
    shares = gaussians.shares(found)
    for place in range(5):
        _, expected = ledoit_wolf(drawn[:, place].numpy())
        assert float(shares[place]) == pytest.approx(expected, rel=1e-9)


def test_a_distance_is_that_of_mahalanobis() -> None:
    drawn = samples(50)
    found = gaussians.moments([drawn])
    covariances, _ = gaussians.shrunk(found)
    factor = gaussians.factors(covariances)
    apart = drawn[0] - found.mean
    for place in range(5):
        inverse = np.linalg.inv(covariances[place].numpy())
        expected = mahalanobis(drawn[0, place].numpy(), found.mean[place].numpy(), inverse)
        assert float((factor[place] @ apart[place]).norm()) == pytest.approx(expected, rel=1e-9)


def test_leaving_one_out_is_measuring_without_it() -> None:
    drawn = samples(40)
    found = gaussians.moments([drawn])
    factor = gaussians.factors(found.covariance)
    squared = (factor @ (drawn - found.mean)[:, :, :, None])[..., 0].square().sum(2)
    for number in (0, 17):
        others = gaussians.moments([drawn[torch.arange(40) != number]])
        factor = gaussians.factors(others.covariance)
        expected = (factor @ (drawn[number] - others.mean)[:, :, None])[..., 0].square().sum(1)
        alone = gaussians.left_out(squared[number], 40, torch.zeros(5).double())
        assert torch.allclose(alone, expected, rtol=1e-9)


def test_leaving_out_an_image_of_one_gaussian_is_measuring_without_its_cells() -> None:
    settings = {"place": "all", "layers": ("stage1", "stage2"), "image_size": (64, 64)}
    config = registry.configure("padim", settings=settings)
    detector = registry.build("padim", config, 0)
    assert isinstance(detector, PaDiM)
    mixing = rand(1, 40, 40)
    drawn = rand(2, 5, 32 * 32, 40) @ mixing + rand(3, 5, 1, 40)
    whole = gaussians.moments([drawn.flatten(0, 1)[:, None]])
    detector.mean, detector.factor = whole.mean, gaussians.factors(whole.covariance)
    detector.share, detector.count = torch.zeros(1).double(), torch.tensor(5)
    for number in (0, 3):
        others = gaussians.moments([drawn[torch.arange(5) != number].flatten(0, 1)[:, None]])
        factor = gaussians.factors(others.covariance)[0]
        expected = ((drawn[number] - others.mean) @ factor.T).square().sum(1)
        assert torch.allclose(detector.squared_without(drawn[number]).double(), expected, rtol=1e-5)
