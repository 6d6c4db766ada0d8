"""Post-training quantisation to int8: ranges from good images, first layers in floating point.

Weights have one scale for each output channel, activations one for each tensor, over the range from the
smallest to the largest value on good images; `rounding` says how weights are rounded. Layers with weights are
quantised, and so are the operations between two of them; those that turn the last layers' outputs into the
map stay in floating point. ONNX Runtime's own quantiser writes the graph, with QuantizeLinear and
DequantizeLinear around each operation, which every runtime understands.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from typing_extensions import override

from blemish.detectors.onnx_graph import suppress_messages
from blemish.errors import ExportError
from blemish.exporting import rounding
from blemish.progress import Report, silent, tell
from blemish.types import FloatArray

LAYERS: tuple[str, ...] = ("Conv", "MatMul", "Gemm")

BETWEEN: tuple[str, ...] = (
    *("AveragePool", "MaxPool", "Relu", "Clip", "LeakyRelu", "Add"),
    *("Concat", "Split", "Slice", "Reshape", "Transpose"),
)
"""Operations that 8-bit integers can pass through."""

MOVING: tuple[str, ...] = ("Slice", "Reshape", "Transpose")
"""Operations that change no value."""

MAX_RANGE_IMAGES = 64
"""Largest number of good images used to measure ranges: more of them change little."""

Used = Callable[[bytes], float]
"""Returns how much of what the gate allows a graph uses up: 1 is all of it."""


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Passes images to the calibrator one by one."""

    def __init__(self, images: Sequence[FloatArray]) -> None:
        self.left = iter(images)

    @override
    def get_next(self) -> dict[str, FloatArray] | None:
        image = next(self.left, None)
        return None if image is None else {"images": image}


def quantise(
    graph: bytes,
    images: Sequence[FloatArray],
    used: Used,
    report: Report = silent,
    last: int = 0,
) -> tuple[bytes, list[str]]:
    """Quantise as many layers as the gate allows, all but the first ones.

    images: the inputs (N, 3, h, w) of good ones; last: only so many layers, the last ones, may be quantised;
    0: all. Returns the graph, and the names of the layers left in floating point; raises ExportError if that
    would be all of them. These are the first in
    depth, since the first layers are sensitive and cheap, and since no layer in floating point then lies
    between two quantised ones: ONNX Runtime, without being asked, quantises such a layer with one scale for
    all of its output channels.
    """
    prepared = preprocessed(graph)
    layers = by_depth(prepared, quantisable_layers(prepared))
    least = max(len(layers) - last, 0) if last else 0
    ranges = measured(prepared, images[:MAX_RANGE_IMAGES])
    # A method that lets the last layers alone be quantised has prepared them itself.
    rounded = {} if least else rounding.rounded_weights(prepared, layers, images)
    made: dict[int, bytes] = {}

    def within(left: int) -> bool:
        values = [rounded[name] for name in layers[left:] if name in rounded]
        model = with_weights(prepared, dict(pair for each in values for pair in each.items()))
        made[left] = quantised_graph(model, ranges, layers[left:])
        found = used(made[left])
        tell(report, f"int8 with {left} of {len(layers)} layers in floating point: {found:.0%} of the limits")
        return found <= 1

    more = range(least + 1, len(layers))
    left = least if within(least) else least + 1 + bisect_left(more, True, key=within)
    if layers and left == len(layers):
        raise ExportError(
            "no layer can be computed in integers within the limits; expected another precision"
        )
    return made[left], layers[:left]


def by_depth(model: onnx.ModelProto, layers: Collection[str]) -> list[str]:
    """Sort layers by how many layers lie before them at most; layers of one depth stay in their order."""
    depths: dict[str, int] = {}  # of tensors: the number of layers up to them
    found: dict[str, int] = {}
    for node in model.graph.node:
        depth = max((depths.get(name, 0) for name in node.input), default=0)
        if node.name in layers:
            found[node.name] = depth
        depths |= dict.fromkeys(node.output, depth + (node.name in layers))
    return sorted(found, key=found.__getitem__)


def with_weights(model: onnx.ModelProto, weights: Mapping[str, FloatArray]) -> onnx.ModelProto:
    """Return a copy of a graph with other values of these tensors."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    return made


def preprocessed(graph: bytes) -> onnx.ModelProto:
    """Fold constants and batch norms and infer shapes, as the quantiser requires."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        before.write_bytes(graph)
        with suppress_messages():
            quant_pre_process(before, after, skip_symbolic_shape=True)
        model: onnx.ModelProto = onnx.load(after)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    unshare(model)
    return model


def unshare(model: onnx.ModelProto) -> None:
    """Copy constants that several layers read: what one layer rounds, another may leave as it is."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    taken: set[str] = set()
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if node.op_type in LAYERS and place and name in constants:
                if name in taken:
                    own = f"{name}.{node.name}"
                    model.graph.initializer.add().CopyFrom(constants[name])
                    model.graph.initializer[-1].name = node.input[place] = own
                taken.add(name)


def measured(model: onnx.ModelProto, images: Sequence[FloatArray]) -> TensorsData:
    """Measure the range of every tensor on images; that of the images themselves is 0 to 1.

    Pixels of 8 bits then stay what they are, also those that are brighter than any good part.
    """
    with tempfile.TemporaryDirectory() as folder, suppress_messages():
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        calibrator = create_calibrator(
            path,
            [*LAYERS, *BETWEEN],
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"symmetric": False},
        )
        calibrator.collect_data(Reader(images))
        found = calibrator.compute_data()
    moved = {"images"}
    for node in model.graph.node:
        if node.op_type in MOVING and node.input[0] in moved:
            moved.update(node.output)
    for name in moved & set(found.keys()):
        found[name] = TensorData(lowest=np.float32(0), highest=np.float32(1))
    return found


def quantisable_layers(model: onnx.ModelProto) -> list[str]:
    """Return the names of the layers: products with constant weights, to more than one output channel.

    The blur that computes a statistic has one output channel, and is not quantised.
    """
    constants = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type in LAYERS and node.input[1] in constants:
            shape = constants[node.input[1]]
            if len(shape) > 1 and (shape[0] if node.op_type == "Conv" else shape[-1]) > 1:
                found.append(node.name)
    return found


def quantised_graph(model: onnx.ModelProto, ranges: TensorsData, layers: Sequence[str]) -> bytes:
    """Return the graph with these layers, and the operations between them, quantised."""
    if not layers:  # which would stand for all of them
        return bytes(model.SerializeToString())
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    quantiser = QDQQuantizer(
        copied,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=nodes_between(model, layers),
        nodes_to_exclude=[],
        op_types_to_quantize=[*LAYERS, *BETWEEN],
        extra_options={"ForceQuantizeNoInputCheck": True},
    )
    with suppress_messages():
        quantiser.quantize_model()
    made = quantiser.model.model
    keep_sums(made, last_products(model, layers))
    read_exactly(made, set(quantisable_layers(model)) - set(layers))
    data: bytes = made.SerializeToString()
    return data


def last_products(model: onnx.ModelProto, layers: Sequence[str]) -> set[str]:
    """Return the outputs of the products of matrices, among the layers, that nothing quantised reads."""
    inside = set(nodes_between(model, layers))
    read = {name for node in model.graph.node if node.name in inside for name in node.input}
    return {
        node.output[0]
        for node in model.graph.node
        if node.name in inside and node.op_type == "MatMul" and node.output[0] not in read
    }


def keep_sums(model: onnx.ModelProto, outputs: Collection[str]) -> None:
    """Let what follows these products read their sums, which are exact, instead of their rounding to 8 bits.

    A runtime computes a product of integers in 32 bits in any case, and then costs no more.
    """
    rounded = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in outputs
    }
    instead = {
        node.output[0]: rounded[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded
    }
    left = [node for node in model.graph.node if not {*node.output} & {*rounded, *instead}]
    for node in left:
        for place, name in enumerate(node.input):
            node.input[place] = instead.get(name, name)
    del model.graph.node[:]
    model.graph.node.extend(left)


def read_exactly(model: onnx.ModelProto, layers: Collection[str]) -> None:
    """Let these layers, which stay in floating point, read what was computed instead of its rounding.

    Otherwise one whose input a quantised operation reads, too, lies between two quantised ones.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.name in layers:
            rounded = makers.get(node.input[0])
            if rounded is not None and rounded.op_type == "DequantizeLinear":
                node.input[0] = makers[rounded.input[0]].input[0]


def nodes_between(model: onnx.ModelProto, layers: Sequence[str]) -> list[str]:
    """Return the names of the layers and of every operation between one of them and the next."""
    makers = {output: node for node in model.graph.node for output in node.output}
    nodes = {node.name: node for node in model.graph.node}
    found = dict.fromkeys(layers)
    waiting = [nodes[name].input[0] for name in layers]
    while waiting:
        maker = makers.get(waiting.pop())
        if maker is not None and maker.op_type in BETWEEN and maker.name not in found:
            found[maker.name] = None
            waiting.extend(maker.input)
    rounded: set[str] = set()  # what comes from one of the layers; before the first, nothing is rounded
    for node in model.graph.node:
        if node.name in layers or (node.name in found and not rounded.isdisjoint(node.input)):
            rounded.update(node.output)
    return [name for name in found if not rounded.isdisjoint(nodes[name].output)]
