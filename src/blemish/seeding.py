"""Random generators, one for each purpose of a run."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def initial_seed(seed: int, *labels: str | int) -> int:
    """Return the seed of one purpose of one run: 63 bits, from the run's seed and the labels alone."""
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *labels: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for one purpose of one run, such as (seed, "step", 17).

    Every random draw of a run comes from such a generator, so a checkpoint carries no random state.
    """
    import torch

    return torch.Generator(device).manual_seed(initial_seed(seed, *labels))
