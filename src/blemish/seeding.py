"""Random generators, one for each purpose of a run."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *labels: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator for one purpose of one run, such as (seed, "step", 17).

    Every random draw of a run comes from such a generator, so nothing has to be carried along when a run is
    interrupted and resumed.
    """
    text = "/".join(str(part) for part in (seed, *labels))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator(device).manual_seed(number)
