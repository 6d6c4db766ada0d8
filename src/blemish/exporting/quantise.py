"""Post-training quantisation to int8: ranges from good images, sensitive layers left in floating point.

Weights have one scale for each output channel, activations one for each tensor, over the range from the
smallest to the largest value on good images. Layers with weights are quantised, and so are the operations
between two of them; those that turn the last layers' outputs into the map stay in floating point. ONNX
Runtime's own quantiser writes the graph, with QuantizeLinear and DequantizeLinear around each operation,
which every runtime understands.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from typing_extensions import override

from blemish.detectors.onnx_graph import suppress_messages
from blemish.progress import Report, silent, tracked
from blemish.types import FloatArray

LAYERS: tuple[str, ...] = ("Conv", "MatMul", "Gemm")

BETWEEN: tuple[str, ...] = (
    *("AveragePool", "MaxPool", "Relu", "Clip", "LeakyRelu", "Add"),
    *("Concat", "Split", "Slice", "Reshape", "Transpose"),
)
"""Operations that 8-bit integers can pass through."""

MAX_RANGE_IMAGES = 64
"""Largest number of good images used to measure ranges: more of them change little."""

Error = Callable[[bytes], float]
"""Returns the map error of a graph."""


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Passes images to the calibrator one by one."""

    def __init__(self, images: Sequence[FloatArray]) -> None:
        self.left = iter(images)

    @override
    def get_next(self) -> dict[str, FloatArray] | None:
        image = next(self.left, None)
        return None if image is None else {"images": image}


def quantise(
    graph: bytes, images: Sequence[FloatArray], error: Error, limit: float, report: Report = silent
) -> tuple[bytes, list[str]]:
    """Quantise all layers, then exclude the most sensitive ones until the error is within the limit.

    images: the inputs (N, 3, h, w) of good ones. Returns the graph, and the names of the layers left in
    floating point. The sensitivity of a layer is the error if it alone is quantised.
    """
    prepared = preprocessed(graph)
    ranges = measured(prepared, images[:MAX_RANGE_IMAGES])
    layers = quantisable_layers(prepared)
    made = quantised_graph(prepared, ranges, layers)
    if error(made) <= limit:
        return made, []
    left: list[str] = []
    for name in by_sensitivity(prepared, ranges, layers, error, report):
        left.append(name)
        made = quantised_graph(prepared, ranges, [layer for layer in layers if layer not in left])
        if error(made) <= limit:
            break
    return made, left


def by_sensitivity(
    prepared: onnx.ModelProto, ranges: TensorsData, layers: Sequence[str], error: Error, report: Report
) -> list[str]:
    """Sort layers by the error that each causes if it alone is quantised, the most sensitive first."""
    found = {
        name: error(quantised_graph(prepared, ranges, [name]))
        for name in tracked(layers, len(layers), report, "sensitivity of layers", unit="layer")
    }
    return sorted(layers, key=found.__getitem__, reverse=True)


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
    return model


def measured(model: onnx.ModelProto, images: Sequence[FloatArray]) -> TensorsData:
    """Measure the range of every tensor on images."""
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
        return calibrator.compute_data()


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
    return list(found)
