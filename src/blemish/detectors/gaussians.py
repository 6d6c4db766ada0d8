"""Gaussians from streams of features: moments, shrunk covariances, whitening factors, leaving one out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Moments of n samples at each of P positions, in float64."""

    count: int
    mean: Tensor
    """(P, D)."""
    covariance: Tensor
    """(P, D, D), unbiased."""
    fourth: Tensor
    """(P,), the mean fourth power of a sample's distance from the mean."""


def moments(samples: Iterable[Tensor]) -> Moments:
    """Return the moments of a stream of (n_i, P, D) samples, read twice: of positions P, n samples in all."""
    count, total = 0, torch.zeros(())
    for part in samples:
        count, total = count + len(part), total + part.double().sum(0)
    mean = total / count
    squares, fourth = torch.zeros(()), torch.zeros(())
    for part in samples:
        apart = part.double() - mean
        squares = squares + torch.einsum("npd,npe->pde", apart, apart)
        fourth = fourth + apart.square().sum(2).square().sum(0)
    return Moments(count, mean, squares / max(count - 1, 1), fourth / count)


def shares(found: Moments) -> Tensor:
    """Return the (P,) shares by which covariances are shrunk towards their mean variance.

    Ledoit and Wolf: "A well-conditioned estimator for large-dimensional covariance matrices", 2004: the share
    that is expected to bring the estimate nearest to the truth.
    """
    biased = found.covariance * ((found.count - 1) / found.count)
    scale = biased.diagonal(dim1=1, dim2=2).mean(1)
    identity = torch.eye(biased.shape[1], dtype=biased.dtype, device=biased.device)
    apart = (biased - scale[:, None, None] * identity).square().sum((1, 2))
    noise = (found.fourth - biased.square().sum((1, 2))).clamp(min=0) / found.count
    return torch.where(apart > 0, (noise / apart.clamp(min=1e-300)).clamp(max=1), 1.0)


FLOOR = 1e-6
"""Smallest variance along any direction, as a share of the mean variance of all positions."""


def shrunk(found: Moments, constant: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return (P, D, D) shrunk covariances, and the (P,) shares by which they were shrunk.

    constant: added to each variance, as published, instead.
    """
    identity = torch.eye(found.covariance.shape[1], dtype=torch.float64, device=found.covariance.device)
    scale = found.covariance.diagonal(dim1=1, dim2=2).mean(1)
    if constant:
        return found.covariance + constant * identity, torch.zeros_like(scale)
    share = shares(found)
    floor = FLOOR * float(scale.mean()) or 1.0
    target = (share * scale + floor)[:, None, None] * identity
    return (1 - share)[:, None, None] * found.covariance + target, share


def factors(covariances: Tensor) -> Tensor:
    """Return the (P, D, D) matrices W for which |W x| is the Mahalanobis length of x."""
    lower: Tensor = torch.linalg.cholesky(covariances)
    identity = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    found: Tensor = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    return found


def left_out(squared: Tensor, count: int, share: Tensor) -> Tensor:
    """Return the squared distances of samples from the Gaussian of the others, approximately.

    squared: (..., P), those from the Gaussian of all `count` samples, at least 3; share: (P,), by which its
    covariances were shrunk, which stays. Removing a sample takes a matrix of rank one from the covariance, so
    that the distance follows from the old one (Sherman and Morrison, 1950). Exact for a share of 0; of few
    samples, whose covariances are shrunk much, distances come out too short (by a sixth of five).
    """
    taken = (1 - share) * count / (count - 1) ** 2
    scale = (count / (count - 1)) ** 2 * ((count - 2) / (count - 1))
    farther: Tensor = scale * squared / (1 - taken * squared).clamp(min=1e-6)
    return farther
