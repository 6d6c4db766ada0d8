"""Several processes on one run, started by torchrun: who is who, and what they must agree on.

Without torchrun there is one process, and everything here is what it would be without the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from blemish import progress


def rank() -> int:
    """Give this process's number; 0 writes and speaks."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """Count the processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the other processes that torchrun started, each on its own GPU where there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        with progress.muted(rank() > 0):
            yield
    finally:
        distributed.destroy_process_group()


def any_of(flag: bool, device: str) -> bool:
    """Say whether any process says yes."""
    if count() == 1:
        return flag
    votes = torch.tensor(float(flag), device=device)
    distributed.all_reduce(votes)
    return bool(votes > 0)


def first_of(number: int, device: str) -> int:
    """Give the first process's number to all."""
    if count() == 1:
        return number
    shared = torch.tensor(number, device=device)
    distributed.broadcast(shared, 0)
    return int(shared)


def gathered(part: Tensor) -> Tensor:
    """Stack every process's tensor of one shape, in the order of the processes."""
    if count() == 1:
        return part[None]
    parts = [torch.empty_like(part) for _ in range(count())]
    distributed.all_gather(parts, part)
    return torch.stack(parts)


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        distributed.barrier()
