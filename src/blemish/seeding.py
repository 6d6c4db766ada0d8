"""Random generators, one for each use of randomness in a run."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def initial_seed(seed: int, *labels: str | int) -> int:
    """Return a 63-bit seed derived from the run's seed and the labels of one use of randomness."""
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *labels: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for one use of randomness in a run, such as (seed, "step", 17).

    All random numbers of a run come from such generators, so checkpoints need no random state.
    """
    import torch

    return torch.Generator(device).manual_seed(initial_seed(seed, *labels))
