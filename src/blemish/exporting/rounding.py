"""Rounding the weights of a graph to 8-bit integers such that the outputs of its layers change least.

Rounded to the nearest integer, each weight is as right as can be, but a layer is not: what it reads is
smooth, neighbouring pixels and channels rise and fall together, and the errors of their weights add up. Here
the weights of an output are rounded one after the other, and the error of each is made up for by those that
are still to be rounded, by what the layer reads on good images (Frantar et al.: "GPTQ", 2022, after Hassibi
and Stork: "Optimal brain surgeon", 1993). What is lost on average is added to the bias. Of the error of
EfficientAD's first convolution this left a hundredth, of that of its teacher's second one a ninetieth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional

from blemish.detectors.onnx_graph import suppress_messages
from blemish.types import FloatArray

MOST = 127
"""Largest integer."""
LARGEST = 2500
"""Most inputs of an output, for time grows with their third power; larger layers are left as they are."""
IMAGES = 8
"""Good images whose cells are looked at."""
PLACES = 1000
"""Cells of each."""
DAMPING = 0.01
"""Added to the mean square of each input, as a share of the mean: what hardly varies decides nothing."""
LEAST = 1e-6
"""Least variance of an input, as a share of the mean square of them all."""
BLOCK = 128
"""Weights after which the error is passed on to all that follow."""


def rounded_weights(
    model: onnx.ModelProto, layers: Collection[str], images: Sequence[FloatArray]
) -> dict[str, dict[str, FloatArray]]:
    """Round the constant weights of convolutions and products, and shift biases by the mean of what is lost.

    layers: names of nodes; images: inputs (N, 3, h, w) of good ones. One scale for each output channel makes
    its largest weight 127. Returns the new values of each layer's tensors by their name.
    """
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [
        node for node in model.graph.node if node.name in layers and is_known(node, constants[node.input[1]])
    ]
    weights = {node.name: matrices(node, constants[node.input[1]]) for node in nodes}
    nodes = [node for node in nodes if weights[node.name].shape[2] <= LARGEST]
    seen = {node.name: Inputs(weights[node.name]) for node in nodes}
    for read in inputs_of(model, nodes, images[:IMAGES]):
        for node in nodes:
            seen[node.name].add(patches(node, read[node.input[0]], weights[node.name]))
    found: dict[str, dict[str, FloatArray]] = {}
    for node in nodes:
        exact, known = weights[node.name], seen[node.name]
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in constants else ""
        made = compensated(exact, known.covariance if bias else known.products)
        array = made.flatten(0, 1) if node.op_type == "Conv" else made[0].T
        values = {node.input[1]: array.reshape(constants[node.input[1]].shape)}
        if bias:
            lost = ((exact.double() - made) @ known.mean[:, :, None]).flatten()
            values[bias] = torch.from_numpy(np.array(constants[bias])) + lost
        found[node.name] = {
            name: np.ascontiguousarray(value.numpy(), np.float32) for name, value in values.items()
        }
    return found


class Inputs:
    """Moments of the rows of numbers that a layer's outputs are products of, in float64."""

    def __init__(self, weights: Tensor) -> None:
        """weights: (G, O, D), those of the layer."""
        groups, _, size = weights.shape
        self.count = 0
        self.origin = torch.zeros(groups, size)
        """The mean of the first rows: sums about it lose nothing of inputs that hardly vary."""
        self.sums = torch.zeros(groups, size, dtype=torch.float64)
        self.squares = torch.zeros(groups, size, size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add (G, n, D) rows."""
        if not self.count:
            self.origin = rows.mean(1)
        apart = rows - self.origin[:, None]
        self.count += rows.shape[1]
        self.sums += apart.double().sum(1)
        self.squares += (apart.mT @ apart).double()

    @property
    def mean(self) -> Tensor:
        """The mean row, (G, D)."""
        return self.origin.double() + self.sums / self.count

    @property
    def covariance(self) -> Tensor:
        """The (G, D, D) covariance of the inputs, which makes something even of inputs that never vary."""
        apart = self.sums / self.count
        found = self.squares / self.count - apart[:, :, None] * apart[:, None]
        least = LEAST * self.mean.square().mean(1).clamp(min=1e-12)
        return found + least[:, None, None] * torch.eye(found.shape[1], dtype=torch.float64)

    @property
    def products(self) -> Tensor:
        """The (G, D, D) mean products of the inputs."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None]


def is_known(node: onnx.NodeProto, weights: FloatArray) -> bool:
    """Return whether a layer is one whose inputs `patches` can read."""
    if node.op_type == "Conv":
        return weights.ndim == 4 and attributes(node).get("auto_pad", b"NOTSET") == b"NOTSET"
    return node.op_type == "MatMul" and weights.ndim == 2


def matrices(node: onnx.NodeProto, weights: FloatArray) -> Tensor:
    """Return the (groups, outputs, inputs) matrices of a convolution's or a product's weights."""
    tensor = torch.from_numpy(np.array(weights))
    if node.op_type == "Conv":
        groups = int(attributes(node).get("group", 1))
        return tensor.reshape(groups, len(tensor) // groups, -1)
    return tensor.T[None]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes."""
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def inputs_of(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], images: Sequence[FloatArray]
) -> Iterator[dict[str, Tensor]]:
    """Yield what the nodes read of each image, by the name of the tensor."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {each.name for each in model.graph.input}
    names = sorted({node.input[0] for node in nodes} - given)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with suppress_messages():
        session = onnxruntime.InferenceSession(
            watched.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    for image in images:
        for row in image:
            found = session.run(names, {"images": row[None]}) if names else []
            read = dict(zip(names, found, strict=True)) | {"images": row[None]}
            yield {name: torch.from_numpy(array) for name, array in read.items()}


def patches(node: onnx.NodeProto, read: Tensor, weights: Tensor) -> Tensor:
    """Return the (groups, places, inputs) numbers that a layer's outputs are products of, at some places."""
    draw = np.random.default_rng(0).permutation
    if node.op_type != "Conv":
        rows = read.reshape(-1, weights.shape[2])
        return rows[np.sort(draw(len(rows))[:PLACES])][None]
    known = attributes(node)
    top, left, bottom, right = known.get("pads", (0, 0, 0, 0))
    (down, across), (tall, wide) = known.get("strides", (1, 1)), known.get("dilations", (1, 1))
    height, width = known["kernel_shape"]
    seen = functional.pad(read[0], (left, right, top, bottom))
    windows = seen.unfold(1, (height - 1) * tall + 1, down).unfold(2, (width - 1) * wide + 1, across)
    windows = windows[..., ::tall, ::wide].permute(1, 2, 0, 3, 4)  # (h, w, C, height, width), nothing copied
    down_at, across_at = np.divmod(
        np.sort(draw(windows.shape[0] * windows.shape[1])[:PLACES]), windows.shape[1]
    )
    found = windows[down_at, across_at]
    return found.reshape(len(found), len(weights), -1).transpose(0, 1)


def compensated(weights: Tensor, squares: Tensor) -> Tensor:
    """Round (G, O, D) weights of G groups of O outputs, given the (G, D, D) mean products of their inputs.

    The largest weight of an output, which sets its scale, keeps its integer, so that rounding what is
    returned to the nearest integers changes nothing.
    """
    weights, count = weights.double(), weights.shape[2]
    scale = weights.abs().amax(2).clamp(min=1e-12) / MOST
    mean = squares.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    squares = squares + DAMPING * mean[:, None, None] * torch.eye(count, dtype=torch.float64)
    order = squares.diagonal(dim1=1, dim2=2).sort(dim=1, descending=True, stable=True).indices
    squares = torch.stack([each[index][:, index] for each, index in zip(squares, order, strict=True)])
    left = weights.gather(2, order[:, None].expand_as(weights)).clone()
    largest = left.abs().argmax(2)
    kept = (left.gather(2, largest[:, :, None])[:, :, 0] / scale).round()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(squares)), upper=True)
    made = torch.zeros_like(left)
    for first in range(0, count, BLOCK):
        block = range(first, min(first + BLOCK, count))
        errors = []
        for place in block:
            nearest = (left[:, :, place] / scale).round().clamp(-MOST, MOST)
            made[:, :, place] = scale * torch.where(largest == place, kept, nearest)
            error = (left[:, :, place] - made[:, :, place]) / factor[:, place, place, None]
            left[:, :, place : block.stop] -= error[:, :, None] * factor[:, None, place, place : block.stop]
            errors.append(error)
        rest = factor[:, block.start : block.stop, block.stop :]
        left[:, :, block.stop :] -= torch.stack(errors, 2) @ rest
    return torch.zeros_like(made).scatter(2, order[:, None].expand_as(made), made)
