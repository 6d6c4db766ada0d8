"""Several processes in one run, started by torchrun: their ranks, and the values they must agree on.

Without torchrun there is a single process, and all functions here behave accordingly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from blemish.errors import ConfigError
from blemish.progress import Report, silent


def count() -> int:
    """Return the number of processes."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def rank() -> int:
    """Return this process's number; process 0 writes and reports."""
    return distributed.get_rank() if count() > 1 else 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the other processes that torchrun started, if any; raise ConfigError for too few GPUs."""
    ours = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
    if ours:
        join(device)
    try:
        yield
    finally:
        if ours:
            distributed.destroy_process_group()


def report_from_first(report: Report) -> Report:
    """Return `report` in the first of several processes, and a silent report in the others."""
    return report if rank() == 0 else silent


def join(device: str) -> None:
    """Wait for all the processes that torchrun started; on GPUs, each takes one of its own."""
    if device != "cuda":
        distributed.init_process_group("gloo")
        return
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here > gpus:
        raise ConfigError(
            f"found {here} processes on this machine; expected at most {gpus}, one for each GPU"
        )
    own = torch.device(device, int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    distributed.init_process_group("nccl", device_id=own)


def own_indices(total: int) -> range:
    """Return the indices of this process's share of `total` items."""
    return range(rank(), total, count())


def any_of(flag: bool, device: str) -> bool:
    """Return whether the flag is set in any process."""
    return flag if count() == 1 else bool(gathered(torch.tensor(flag, device=device)).any())


def first_of(number: int, device: str) -> int:
    """Return the first process's number in every process."""
    return number if count() == 1 else int(gathered(torch.tensor(number, device=device))[0])


def gathered(part: Tensor) -> Tensor:
    """Stack the tensors of all processes, which have the same shape, in the order of the processes."""
    if count() == 1:
        return part[None]
    parts = [torch.empty_like(part) for _ in range(count())]
    distributed.all_gather(parts, part)
    return torch.stack(parts)


def wait() -> None:
    """Wait until every process has reached this point."""
    if count() > 1:
        distributed.barrier()
