"""The rim of a map: rings against NumPy, and a blind margin that nothing looks through."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from blemish.detectors import edges, ops
from blemish.detectors.edges import INSIDE, RINGS
from blemish.detectors.settings import STATISTICS
from blemish.errors import ConfigError
from blemish.types import AnyArray

SIZES = [(1, 1), (1, 9), (3, 40), (5, 9), (16, 16), (17, 40), (40, 33)]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ring_of(y: int, x: int, height: int, width: int) -> int:
    """Return the ring of a cell: those of the top come first, then bottom, left and right."""
    away = [y, height - 1 - y, x, width - 1 - x]
    side = away.index(min(away))
    return 7 * side + min(away) if min(away) < min(7, height // 4, width // 4) else 28


def by_ring(size: tuple[int, int]) -> dict[int, list[tuple[int, int]]]:
    """Return the places of the cells of each ring, and of the inside."""
    rings: dict[int, list[tuple[int, int]]] = {}
    for y, x in product(*map(range, size)):
        rings.setdefault(ring_of(y, x, *size), []).append((y, x))
    return rings


def top(values: AnyArray) -> float:
    """Return the mean of the highest thousandth, or of the highest five."""
    highest = np.sort(values.ravel())[::-1]
    return float(highest[: max(5, round(len(highest) / 1000))].mean())


def nearness(size: tuple[int, int]) -> Tensor:
    """Return (h, w) numbers from 1 at the border towards 0 inside."""
    return torch.exp(-edges.distances(size).amin(0).float())


def loud(count: int, size: tuple[int, int], seed: int = 0, by: float = 1.0) -> Tensor:
    """Sample (count, h, w) maps of noise with a rim that is louder than the inside, or quieter."""
    return (1 + by * nearness(size)) * torch.randn(count, *size, generator=draw(seed)) - 3


def damped(cells: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    size = cells.shape[1:]
    return edges.treated(cells, "rings", edges.by_cell(gain, size), edges.by_cell(shift, size), 0)


def in_rim(maps: Tensor, width: int) -> float:
    """Return the share of (B, h, w) maps whose maximum lies within `width` of the border."""
    places = maps.flatten(1).argmax(1)
    return float((edges.distances(maps.shape[1:]).amin(0).flatten()[places] < width).float().mean())


# --- rings ---


@pytest.mark.parametrize("size", SIZES)
def test_each_cell_is_in_the_ring_of_its_nearest_side(size: tuple[int, int]) -> None:
    spread = edges.by_cell(torch.arange(INSIDE + 1.0), size)
    assert tuple(spread.shape) == size
    for number, places in by_ring(size).items():
        assert {float(spread[place]) for place in places} == {number}
    assert int((spread == INSIDE).sum()) * 4 >= size[0] * size[1]  # there is always something to compare with


@pytest.mark.parametrize(("count", "size"), [(1, (20, 18)), (7, (17, 40)), (60, (5, 9)), (40, (64, 64))])
def test_rings_are_damped_as_numpy_says(count: int, size: tuple[int, int]) -> None:
    cells = loud(count, size)
    gain, shift = edges.measure_rings(torch.split(cells, 2))
    found, values = damped(cells, gain, shift).numpy(), cells.double().numpy()
    rings = {
        number: np.stack([values[:, y, x] for y, x in places], 1) for number, places in by_ring(size).items()
    }
    centre = rings[INSIDE].mean()
    usual, expected = top(rings[INSIDE]) - centre, values.copy()
    for number, places in by_ring(size).items():
        reach = (count * (top(rings[number]) - centre) + 20 * usual) / (count + 20)
        for y, x in places if reach > usual else ():
            expected[:, y, x] = centre + (values[:, y, x] - centre) * usual / reach
    assert not np.array_equal(expected, values)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_damped_rings_reach_as_far_as_the_inside() -> None:
    cells = loud(2000, (32, 32))
    made = damped(cells, *edges.measure_rings([cells])).numpy()
    numbers = edges.ring_numbers((32, 32)).numpy()
    assert np.array_equal(made[:, numbers == INSIDE], cells.numpy()[:, numbers == INSIDE])
    for number in range(0, INSIDE, RINGS):  # the outermost of each side
        before, after = (top(each[:, numbers == number]) for each in (cells.numpy(), made))
        inside = top(made[:, numbers == INSIDE])
        assert before > inside + 2
        assert after == pytest.approx(inside, abs=0.1)


def test_a_quiet_rim_and_each_quiet_side_stay_as_they_are() -> None:
    gain, shift = edges.measure_rings([loud(100, (32, 32), by=-0.5)])
    assert torch.equal(gain[:RINGS], torch.ones(RINGS))
    assert torch.equal(shift[:RINGS], torch.zeros(RINGS))
    cells = loud(100, (32, 32), by=0.0)
    cells[:, 1:31, 31] = 3 * cells[:, 1:31, 31] + 6
    changed = (edges.measure_rings([cells])[0] < 0.8).nonzero().flatten().tolist()
    assert changed == [3 * RINGS]


def test_few_images_change_little() -> None:
    gains = [edges.measure_rings([loud(count, (32, 32))])[0][0] for count in (5, 20, 200)]
    assert gains[2] < gains[1] < gains[0] < 1


def test_the_maxima_of_a_loud_rim_spread_over_the_map() -> None:
    gain, shift = edges.measure_rings(torch.split(loud(200, (32, 40)), 1))
    unseen = loud(300, (32, 40), seed=1)
    before, after = (in_rim(maps, 2) for maps in (unseen, damped(unseen, gain, shift)))
    area = 1 - 28 * 36 / (32 * 40)
    assert before > 0.8
    assert after < area + 0.1


def test_one_image_of_many_does_not_damp_a_ring() -> None:
    """Such as one with an unnoticed defect at its border."""
    cells = loud(200, (64, 64), by=0.0)
    clean = edges.measure_rings([cells])[0]
    cells[0, 0, 30:33] += 20
    assert float(edges.measure_rings([cells])[0][0] / clean[0]) > 0.5


@pytest.mark.parametrize("size", SIZES)
def test_a_constant_map_stays_as_it_is(size: tuple[int, int]) -> None:
    flat = torch.full((3, *size), -2.5)
    gain, shift = edges.measure_rings([flat])
    assert torch.equal(gain, torch.ones(INSIDE + 1))
    assert torch.equal(damped(flat, gain, shift), flat)


def test_a_rim_around_a_constant_inside_stays_as_it_is() -> None:
    """There is nothing that it could be as loud as."""
    cells = torch.full((4, 16, 16), 2.0)
    cells[:, 0] = torch.randn(4, 16, generator=draw()) + 3
    assert torch.equal(damped(cells, *edges.measure_rings([cells])), cells)


# --- blind ---


@pytest.mark.parametrize("margin", [1, 2, 4])
def test_nothing_in_the_margin_raises_map_or_statistics(margin: int) -> None:
    cells = torch.randn(3, 14, 18, generator=draw())
    inside = edges.distances((14, 18)).amin(0) >= margin
    other = torch.where(inside, cells, 1e6 * torch.rand(3, 14, 18, generator=draw(1)))
    lowest = cells[:, inside].amin(1)
    made = edges.blinded(cells, margin)
    assert torch.equal(made, edges.blinded(other, margin))
    assert torch.equal(made[:, inside], cells[:, inside])
    assert torch.equal(made[:, ~inside], lowest[:, None].expand(-1, int((~inside).sum())))
    maps = functional.interpolate(made[:, None], (56, 72), mode="bilinear")[:, 0]
    found = dict(zip(STATISTICS, ops.map_statistics(maps, made, STATISTICS).T, strict=True))
    inner = cells[:, margin:-margin, margin:-margin]
    assert (found["maximum"] <= inner.amax((1, 2)) + 1e-5).all()
    assert (found["smoothed_maximum"] <= inner.amax((1, 2)) + 1e-5).all()
    torch.testing.assert_close(found["top_mean"], inner.flatten(1).topk(5).values.mean(1))
    assert in_rim(maps, 4 * margin - 2) == 0


@pytest.mark.parametrize("size", [(4, 9), (9, 4), (3, 3)])
def test_a_margin_that_leaves_nothing_is_refused(size: tuple[int, int]) -> None:
    cells = torch.zeros(1, *size)
    with pytest.raises(
        ConfigError, match=f"edges=blind leaves nothing of a map of {size[0]}x{size[1]} cells, 2 of them"
    ):
        edges.blinded(cells, 2)
    assert edges.blinded(torch.zeros(1, 5, 5), 2).shape == (1, 5, 5)


def test_no_treatment_returns_the_cells_themselves() -> None:
    cells = torch.randn(1, 6, 6, generator=draw())
    assert edges.treated(cells, "none", torch.zeros(6, 6), torch.ones(6, 6), 2) is cells


def test_cells_are_levelled_by_their_mean_and_deviation() -> None:
    size = (12, 16)
    level, width = torch.rand(size, generator=draw(1)), 0.5 + torch.rand(size, generator=draw(2))
    smooth = functional.avg_pool2d(torch.stack([level, width])[None], 5, 1, 2, count_include_pad=False)[0]
    maps = 3 * smooth[0] + smooth[1] * torch.randn(4000, *size, generator=draw(3))
    gain, shift = edges.measure_cells([maps])
    found = edges.treated(maps, "cells", gain, shift)
    whole = maps.double()
    # Of 4,000 images hardly anything is left to the prior; neighbours blur what is smooth only a little.
    assert float((found.mean(0) - whole.mean()).abs().max()) < 0.35
    assert float((found.std(0) / found.std() - 1).abs().max()) < 0.15
    assert float((maps.mean(0) - whole.mean()).abs().max()) > 0.5  # which it was not before
    few_gain, _ = edges.measure_cells([maps[:2]])
    assert float((few_gain - 1).abs().max()) < 0.2  # of two images, a tenth of the way
    flat_gain, flat_shift = edges.measure_cells([torch.full((3, 4, 4), 7.0)])
    assert torch.equal(flat_gain * 7 + flat_shift, torch.full((4, 4), 7.0))
