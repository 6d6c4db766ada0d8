"""What a distillation measures: the target's moments, and the share of its variance a network explains."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from blemish.data.loading.stores import EncodedStore
from blemish.detectors import ops
from blemish.progress import Report, Stop, never, tell, tracked
from blemish.training import distributed
from blemish.training.distillation.pairs import Pairs
from blemish.training.distillation.teacher import Distillation

MAX_STATISTICS_IMAGES = 10_000
"""Largest number of images from which the target's channel moments are computed (algorithm 3)."""


def measure_target(detector: Distillation, targets: EncodedStore, report: Report, stop: Stop = never) -> None:
    """Compute the target's channel moments on the training images, each process on its share of them."""
    chosen = distributed.own_indices(min(MAX_STATISTICS_IMAGES, len(targets.store.paths)))
    parts = (
        targets.batch([(index, 0)])[0]
        for index in tracked(chosen, len(chosen), report, "measuring the target", stop=stop)
    )
    detector.set_target_moments(*moments_of_all(parts, targets.device))
    tell(report, f"feature cache: {targets.cache.describe()}")


def moments_of_all(parts: Iterable[Tensor], device: str) -> tuple[Tensor, Tensor]:
    """Return the channel moments over all processes' parts, as `ops.channel_moments` does for one."""
    elements = 0

    def counted() -> Iterator[Tensor]:
        nonlocal elements
        for part in parts:
            elements += part[:, 0].numel()
            yield part

    mean, variance = ops.channel_moments(counted())
    own = torch.stack([mean, variance, torch.full_like(mean, elements)]).to(device)
    means, variances, counts = distributed.gathered(own).cpu().unbind(1)
    return ops.merged_moments(counts[:, 0], means, variances)


def explained(detector: Distillation, network: nn.Module, pairs: Pairs, report: Report) -> float:
    """Return the share of the target's variance that a network explains, over all channels together.

    Each process measures its share of the images, whose targets all have the same size.
    """
    chosen, device = distributed.own_indices(len(pairs.paths)), pairs.targets.device
    errors: list[float] = []
    network.to(device)

    def targets() -> Iterator[Tensor]:
        for index in tracked(chosen, len(chosen), report, "measuring on held-out images"):
            target, described = compare(detector, network, pairs, index)
            errors.append(float((described - target).square().mean()))
            yield target

    _, variance = moments_of_all(targets(), device)
    own = torch.tensor([sum(errors), len(errors)], dtype=torch.float64, device=device)
    error, count = distributed.gathered(own).sum(0).tolist()
    return float(1 - error / count / variance.mean())


def compare(detector: Distillation, network: nn.Module, pairs: Pairs, index: int) -> tuple[Tensor, Tensor]:
    """Return the normalised target of an image, (1, C, h, w), and the network's output for the image."""
    target = detector.normalised(pairs.targets.batch([(index, 0)])[0])
    image = pairs.small.batch([index]).to(pairs.targets.device)
    with torch.no_grad():
        return target, network(detector.normalise(image))


def seconds_at_the_end(detector: Distillation, held_out: Pairs) -> float:
    """Estimate the seconds that measuring the held-out images will take, by timing the second one."""
    for index in range(2):
        started = time.monotonic()
        compare(detector, detector.network, held_out, index)
    return 10.0 + (time.monotonic() - started) * len(distributed.own_indices(len(held_out.paths)))
