"""What every test stands on: no network, one thread for what is small, and a small model trained once."""

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch counts the cores that it is to share
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import blemish
import drawn


def refuse_remote(address: Any) -> None:
    """Raise PermissionError for an address that is not this machine's own; a path is a local socket."""
    if not isinstance(address, tuple):
        return
    host = address[0]
    try:
        own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = host in ("", "localhost")
    if not own:
        raise PermissionError(f"a test asked the network for {host}")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse sockets to other machines, and looking up their names."""

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: socket.socket, *arguments: Any) -> Any:
            refuse_remote(arguments[-1])  # the address comes last in all of them
            return method(self, *arguments)

        return call

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        refuse_remote((host or "",))
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Make random draws without a generator of their own the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: small tensors lose more than they gain when two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> drawn.Tiny:
    """Train the smallest model that finds spots; tests leave its files as they are."""
    folder = tmp_path_factory.mktemp("tiny")
    data, file = drawn.data_set(folder / "parts"), folder / "tiny.blemish"
    weights = drawn.tiny_weights(folder / "lite0.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = blemish.train(
        data,
        model="supersimplenet",
        out=file,
        weights=weights,
        settings=drawn.TINY,
        steps=drawn.STEPS,
        precision="fp32",
        device="cpu",
    )
    torch.set_num_threads(threads)
    return drawn.Tiny(data, weights, file, model)


@pytest.fixture(scope="module")
def folder_of_benchmarks() -> Iterator[None]:
    """Let a test file import the benchmarks as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield
