"""How fast a network could be: its FLOPs at the rate of the fastest matrix product on this machine.

The fastest is chosen among the installed packages, in the precision asked for: the matrix products and
convolutions of PyTorch and OpenVINO. A convolution is a matrix product, too, and on some processors the
faster one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from blemish.inference.choice import Choice

SECONDS = 0.1
"""Time for each kind of product; at least three runs are made."""

SIDE = {"cpu": 2048, "cuda": 8192, "tensorrt": 8192}
"""Side of the square matrices, by device."""

CELLS, CHANNELS, WINDOW = 28, 512, 3
"""Height and width, channels in and out, and kernel size of the convolution; it fits a processor's cache."""

Product = tuple[str, int, Callable[[], object]]
"""A name, the FLOPs of one run, and a function that runs it once."""


@dataclass(frozen=True)
class Rate:
    """The rate of the fastest product of a machine in one precision."""

    flops: float
    """FLOPs per second."""
    by: str
    """Name of the product."""


def fastest(choice: Choice, threads: int, clock: Callable[[], float] = time.perf_counter) -> Rate | None:
    """Measure the fastest product in a choice's precision on its device; None if nothing can run one."""
    found = []
    for name, count, run in products(choice, threads):
        run()
        seconds: list[float] = []
        start = clock()
        while len(seconds) < 3 or clock() - start < SECONDS:
            before = clock()
            run()
            seconds.append(clock() - before)
        found.append(Rate(count / min(seconds), name))
    return max(found, key=lambda rate: rate.flops, default=None)


def products(choice: Choice, threads: int) -> Iterator[Product]:
    """Yield the products of the installed packages."""
    if choice.device == "cpu" and choice.precision != "fp16" and find_spec("openvino") is not None:
        yield from of_openvino(choice, threads)
    if find_spec("torch") is not None:
        yield from of_torch(choice, threads)


def of_torch(choice: Choice, threads: int) -> Iterator[Product]:
    """Yield PyTorch's products: of matrices and, on a CPU except in int8, a convolution."""
    import torch
    from torch.nn import functional

    device, side = "cpu" if choice.device == "cpu" else "cuda", SIDE[choice.device]
    if device == "cpu":
        torch.set_num_threads(threads)
    if choice.precision == "int8":
        numbers = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
        yield "PyTorch's matrix product", 2 * side**3, lambda: synchronised(torch._int_mm(numbers, numbers.T))
        return
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[choice.precision]
    matrix = torch.rand(side, side, device=device).to(dtype)
    yield "PyTorch's matrix product", 2 * side**3, lambda: synchronised(matrix @ matrix)
    if device == "cpu":
        x = torch.rand(1, CHANNELS, CELLS, CELLS).to(dtype).to(memory_format=torch.channels_last)
        kernel = torch.rand(CHANNELS, CHANNELS, WINDOW, WINDOW).to(dtype)
        kernel = kernel.to(memory_format=torch.channels_last)
        count = 2 * CELLS**2 * CHANNELS**2 * WINDOW**2
        yield "PyTorch's convolution", count, lambda: functional.conv2d(x, kernel, padding=WINDOW // 2)


def synchronised(tensor: Any) -> Any:
    """Wait until a GPU has computed a tensor, and return it."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return tensor


def of_openvino(choice: Choice, threads: int) -> Iterator[Product]:
    """Yield OpenVINO's products; for int8, the graph quantises their operands."""
    import openvino
    from openvino import opset13 as operations

    from blemish.inference.engines.openvino import HINTS, same_signal_stack

    hints = {
        "INFERENCE_PRECISION_HINT": HINTS[choice.precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    rng, side = np.random.default_rng(0), SIDE["cpu"]

    def numbers(*shape: int) -> Any:
        return rng.uniform(-1, 1, shape).astype(np.float32)

    def quantised(node: Any, levels: int) -> Any:
        if choice.precision != "int8":
            return node
        ends = np.float32(-1), np.float32(1)
        return operations.fake_quantize(node, *ends, *ends, levels)

    def compiled(inputs: Any, node: Any) -> Callable[[], object]:
        highest = operations.reduce_max(node, np.array([0, 1]), False)  # so that no large result is copied
        model = openvino.Model([highest], [inputs])
        with same_signal_stack():
            request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
        tensor = openvino.Tensor(numbers(*inputs.shape))
        return lambda: request.infer([tensor])

    for size in (side // 2, side):
        left = operations.parameter([size, size], np.float32)
        right = quantised(operations.constant(numbers(size, size)), 255)
        node = operations.matmul(quantised(left, 256), right, False, False)
        yield "OpenVINO's matrix product", 2 * size**3, compiled(left, node)
    x = operations.parameter([1, CHANNELS, CELLS, CELLS], np.float32)
    kernel = quantised(operations.constant(numbers(CHANNELS, CHANNELS, WINDOW, WINDOW)), 255)
    around = [WINDOW // 2] * 2
    node = operations.convolution(quantised(x, 256), kernel, [1, 1], around, around, [1, 1])
    count = 2 * CELLS**2 * CHANNELS**2 * WINDOW**2
    yield "OpenVINO's convolution", count, compiled(x, node)
