"""Muon beside torch's own for matrices, beside Adam for vectors, and over a checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blemish.detectors.muon import ROWS, Muon, orthogonalised
from blemish.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn_gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=draw) for _ in range(count)]


def walked(optimizer: torch.optim.Optimizer, parameter: Tensor, gradients: list[Tensor]) -> Tensor:
    """Take a step for each gradient; give where the parameter is then."""
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30), (1, 9)])
def test_a_matrix_becomes_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """The singular vectors stay, and all singular values come near 1."""
    (matrix,) = drawn_gradients(shape, 1)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(1000 * matrix)
    assert found.dtype == torch.float32
    values = left.T @ found @ right.T
    assert values.diagonal().min() > 0.6
    assert values.diagonal().max() < 1.3
    assert (values - values.diagonal().diag()).abs().max() < 0.05
    assert functional.cosine_similarity(found.flatten(), (left @ right).flatten(), 0) > 0.95


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_matrices_walk_as_with_torchs_own(shape: tuple[int, int]) -> None:
    gradients = drawn_gradients(shape, 6)
    ours, theirs = torch.ones(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
    found = walked(Muon([ours], 0.1, 0.3), ours, gradients)
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    expected = walked(other, theirs, gradients)
    # Theirs divides by the norm in bfloat16, ours before it.
    assert (found - expected).norm() < 0.02 * (expected - 1).norm()


def test_a_convolution_walks_as_the_matrix_of_its_outputs() -> None:
    gradients = drawn_gradients((8, 3, 2, 2), 4)
    kernel = torch.ones(8, 3, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    matrix = torch.ones(8, 12, requires_grad=True)
    found = walked(Muon([kernel], 0.1), kernel, gradients)
    flat = walked(Muon([matrix], 0.1), matrix, [gradient.flatten(1) for gradient in gradients])
    torch.testing.assert_close(found.flatten(1), flat)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_rows_beyond_a_block_walk_by_themselves() -> None:
    gradients = drawn_gradients((ROWS + 8, 20), 3)
    tall = torch.ones(ROWS + 8, 20, requires_grad=True)
    found = walked(Muon([tall], 0.1), tall, gradients)
    for rows in (slice(0, ROWS), slice(ROWS, None)):
        block = torch.ones_like(tall[rows], requires_grad=True)
        part = walked(Muon([block], 0.1), block, [gradient[rows] for gradient in gradients])
        torch.testing.assert_close(found[rows], part)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_vectors_walk_as_with_adam(decay: float) -> None:
    gradients = [
        10.0**power * gradient for power, gradient in zip(range(-3, 4), drawn_gradients((9,), 7), strict=True)
    ]
    ours, theirs = torch.ones(9, requires_grad=True), torch.ones(9, requires_grad=True)
    found = walked(Muon([ours], 0.01, decay), ours, gradients)
    adam = torch.optim.AdamW([theirs], lr=0.01, weight_decay=decay)
    torch.testing.assert_close(found, walked(adam, theirs, gradients))


def test_a_step_on_a_matrix_is_as_large_as_one_of_adam() -> None:
    for shape in ((16, 256), (64, 64), (256, 16)):
        parameter = torch.zeros(shape, requires_grad=True)
        moved = walked(Muon([parameter], 1.0), parameter, drawn_gradients(shape, 1))
        assert moved.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = torch.ones(3, 3, requires_grad=True)
    Muon([parameter], 0.1, 0.5).step()
    assert torch.equal(parameter.detach(), torch.ones(3, 3))


def making() -> tuple[nn.Module, Muon]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, Muon(network.parameters(), 0.02, 1e-3)


def learn(network: nn.Module, optimizer: Muon, steps: int) -> float:
    """Teach a network something that it can learn; give the last loss."""
    (images,) = drawn_gradients((4, 3, 12, 12), 1)
    with torch.no_grad():
        wanted = torch.stack([images[:, 0], images[:, 1:].amax(1)], 1).repeat(1, 3, 1, 1)[:, :5, 1:-1, 1:-1]
    for _ in range(steps):
        loss = (network(images) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_a_network_learns() -> None:
    network, optimizer = making()
    assert learn(network, optimizer, 80) < 0.2 * learn(*making(), 1)


def test_its_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    whole, stopped, resumed = making(), making(), making()
    learn(*whole, 6)
    learn(*stopped, 3)
    checkpoint.save(tmp_path / "c", *stopped, {})
    checkpoint.load(tmp_path / "c", *resumed)
    learn(*resumed, 3)
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)
    kernel = next(resumed[0].parameters())
    assert resumed[1].state[kernel]["momentum"].stride() == kernel.stride()
