"""Muon: momentum that is orthogonalised before each step, for convolutional networks.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the step size follows Liu et
al., "Muon is scalable for LLM training", 2025, so that Adam's learning rates carry over. torch's own Muon
accepts two-dimensional parameters only: neither convolutions nor biases.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz quintic: steep at 0, and within 0.7 to 1.2 after five iterations."""

ROWS = 384
"""Rows of a matrix that are orthogonalised together: the work grows with their square, and each of a
student's two heads, which learn different things, has this many rows."""


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Return an (M, N) matrix with all singular values brought near 1, computed in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / x.norm().clamp_min(1e-12)).bfloat16()
    for _ in range(rounds):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    found: Tensor = (x.T if matrix.shape[0] > matrix.shape[1] else x).float()
    return found


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, each as a matrix with one row per output channel, and Adam for vectors."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas}
        )

    @override
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one optimiser step, with decoupled weight decay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                direction = self.matrix_step if parameter.ndim > 1 else self.vector_step
                parameter.add_(direction(parameter, group), alpha=-group["lr"])

    def matrix_step(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the update direction of a parameter with two or more axes, scaled to the size of Adam's."""
        state, gradient = self.state[parameter], cast(Tensor, parameter.grad)
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        flat = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
        parts = [0.2 * max(part.shape) ** 0.5 * orthogonalised(part) for part in torch.split(flat, ROWS)]
        return torch.cat(parts).view_as(parameter)

    def vector_step(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return Adam's update direction."""
        state, gradient = self.state[parameter], cast(Tensor, parameter.grad)
        first, second = group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        spread = (state["square"] / (1 - second ** float(state["step"]))).sqrt()
        direction: Tensor = state["mean"] / (1 - first ** float(state["step"])) / (spread + 1e-8)
        return direction
