"""Rounding weights with what a layer reads in view: what is kept, what is gained, and what is read."""

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from blemish.detectors import onnx_graph
from blemish.exporting import quantise, rounding
from blemish.types import FloatArray

pytestmark = pytest.mark.usefixtures("one_thread")


def smooth(count: int, seed: int = 0) -> Tensor:
    """Return the (1, 24, 24) mean products of inputs that rise and fall together."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 4, generator=draw) @ torch.randn(4, 24, generator=draw)
    rows += 0.05 * torch.randn(count, 24, generator=draw)
    return (rows.mT @ rows / count).double()[None]


def weights(groups: int = 1) -> Tensor:
    return torch.randn(groups, 10, 24, generator=torch.Generator().manual_seed(1))


def nearest(exact: Tensor) -> Tensor:
    scale = exact.abs().amax(2, keepdim=True) / 127
    return (exact / scale).round() * scale


def lost(made: Tensor, exact: Tensor, squares: Tensor) -> float:
    """Return the mean square by which the outputs change."""
    apart = made.double() - exact.double()
    return float(torch.einsum("goi,gij,goj->", apart, squares, apart))


def test_outputs_change_far_less_than_by_rounding_to_the_nearest() -> None:
    exact, squares = weights(), smooth(500)
    made = rounding.compensated(exact, squares)
    assert lost(made, exact, squares) < 0.1 * lost(nearest(exact), exact, squares)


def test_weights_whose_inputs_are_independent_are_rounded_to_the_nearest() -> None:
    exact = weights(2)
    squares = torch.diag_embed(torch.linspace(1, 3, 48, dtype=torch.float64).view(2, 24))
    torch.testing.assert_close(rounding.compensated(exact, squares).float(), nearest(exact))


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    squares = smooth(500)
    squares[:, 3] = squares[:, :, 3] = 0
    assert rounding.compensated(weights(), squares).isfinite().all()
    made = rounding.compensated(torch.zeros(1, 2, 24), torch.zeros(1, 24, 24, dtype=torch.float64))
    assert not made.any()


def test_what_is_returned_are_integers_of_one_scale_and_the_largest_stays() -> None:
    exact = weights(3)
    made = rounding.compensated(exact, smooth(500).expand(3, 24, 24))
    integers = made / (exact.double().abs().amax(2, keepdim=True) / 127)
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
    assert (integers.abs().amax(2) - 127).abs().max() < 1e-4
    place = exact.abs().argmax(2, keepdim=True)
    torch.testing.assert_close(made.gather(2, place).float(), exact.gather(2, place))


def test_blocks_are_a_matter_of_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, squares = weights(2), torch.cat([smooth(500), smooth(500, seed=3)])
    whole = rounding.compensated(exact, squares)
    monkeypatch.setattr(rounding, "BLOCK", 5)
    torch.testing.assert_close(rounding.compensated(exact, squares), whole)


@pytest.mark.parametrize("value", [0.0, 0.9, 3.3, 5.7, 1e4])
def test_inputs_that_never_vary_do_no_harm(value: float) -> None:
    rows = torch.rand(1, 700, 24, generator=torch.Generator().manual_seed(2))
    for constant in (slice(3, 12), slice(None)):
        rows[..., constant] = value
        seen = rounding.Inputs(weights())
        for part in torch.split(rows, 100, 1):
            seen.add(part)
        torch.testing.assert_close(seen.mean, rows.double().mean(1), rtol=1e-5, atol=1e-5)
        for squares in (seen.covariance, seen.products):
            assert rounding.compensated(weights(), squares).isfinite().all()


def test_moments_are_those_of_all_rows() -> None:
    rows = 5 + torch.randn(2, 900, 24, generator=torch.Generator().manual_seed(2))
    seen = rounding.Inputs(weights(2))
    for part in torch.split(rows, 250, 1):
        seen.add(part)
    apart = rows.double() - rows.double().mean(1, keepdim=True)
    expected = apart.mT @ apart / 900
    torch.testing.assert_close(seen.covariance, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seen.products, rows.double().mT @ rows.double() / 900, rtol=1e-4, atol=1e-3)


class Twice(nn.Module):
    """The same layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layer(torch.relu(self.layer(images)))
        return found[:, 0], found.amax((2, 3))


def test_a_layer_at_two_places_is_rounded_for_each() -> None:
    graph = onnx_graph.export_network(Twice().eval(), (16, 20), ("map", "statistics"))
    model = quantise.preprocessed(graph)
    layers = quantise.quantisable_layers(model)
    images = [image[None] for image in np.random.default_rng(0).random((4, 3, 16, 20), np.float32)]
    made = rounding.rounded_weights(model, layers, images)
    names = [name for each in made.values() for name in each]
    assert len(layers) == 2
    assert len(set(names)) == 4  # weights and bias of each
    run = onnxruntime.InferenceSession
    for one, other in zip(
        run(graph).run(None, {"images": images[0]}),
        run(model.SerializeToString()).run(None, {"images": images[0]}),
        strict=True,
    ):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_groups_are_rounded_as_if_alone() -> None:
    exact, squares = weights(2), torch.cat([smooth(500), smooth(500, seed=3)])
    both = rounding.compensated(exact, squares)
    for number in range(2):
        alone = rounding.compensated(exact[number : number + 1], squares[number : number + 1])
        torch.testing.assert_close(both[number], alone[0])


class Layers(nn.Module):
    """Convolutions of several forms, and a product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=(1, 0), dilation=(1, 2))
        self.grouped = nn.Conv2d(8, 12, (1, 3), groups=4)
        self.head = nn.Linear(12, 5)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cells = torch.relu(self.grouped(torch.relu(self.first(images))))
        found = self.head(cells.permute(0, 2, 3, 1))
        return found[..., 0], found.amax((1, 2))


def prepared() -> tuple[onnx.ModelProto, list[str], FloatArray]:
    torch.manual_seed(0)
    graph = onnx_graph.export_network(Layers().eval(), (16, 20), ("map", "statistics"))
    model = quantise.preprocessed(graph)
    images = np.random.default_rng(0).random((4, 3, 16, 20), np.float32)
    return model, quantise.quantisable_layers(model), images


def test_what_a_layer_reads_times_its_weights_is_what_it_says() -> None:
    model, layers, images = prepared()
    assert len(layers) == 3
    nodes = [node for node in model.graph.node if node.name in layers]
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    outputs = [node.output[0] for node in nodes]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    said = onnxruntime.InferenceSession(shown.SerializeToString()).run(outputs, {"images": images[:1]})
    (read,) = rounding.inputs_of(model, nodes, [images[:1]])
    for node, expected in zip(nodes, said, strict=True):
        matrices = rounding.matrices(node, constants[node.input[1]])
        rows = rounding.patches(node, read[node.input[0]], matrices)
        found = (rows @ matrices.mT).numpy()  # (groups, places, outputs)
        if node.op_type == "Conv":
            bias = constants[node.input[2]]
            wanted = (expected[0] - bias[:, None, None]).reshape(len(matrices), -1, expected[0][0].size)
            wanted = wanted.transpose(0, 2, 1)
        else:
            wanted = expected.reshape(1, -1, expected.shape[-1])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_pixels_of_8_bits_stay_what_they_are() -> None:
    """Even if no good part is as bright as white."""
    model, layers, images = prepared()
    ranges = quantise.measured(model, [image[None] / 2 for image in images])
    made = onnx.load_model_from_string(quantise.quantised_graph(model, ranges, layers))
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    (entrance,) = [
        node for node in made.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images"
    ]
    assert float(constants[entrance.input[1]]) == pytest.approx(1 / 255, rel=1e-6)
    assert int(constants[entrance.input[2]]) == 0


def test_a_graph_in_integers_is_closer_with_weights_rounded_so() -> None:
    model, layers, images = prepared()
    singles = [image[None] for image in images]
    ranges = quantise.measured(model, singles)
    made = rounding.rounded_weights(model, layers, singles)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    values = {name: value for each in made.values() for name, value in each.items()}
    assert {name: value.shape for name, value in values.items()} == {name: shapes[name] for name in values}
    assert [len(made[name]) for name in layers] == [2, 2, 1]  # weights, and biases of convolutions

    def maps(graph: bytes) -> FloatArray:
        session = onnxruntime.InferenceSession(graph)
        return np.concatenate([session.run(["map"], {"images": image})[0] for image in singles])

    exact = maps(model.SerializeToString())
    plain, rounded = (
        np.square(maps(quantise.quantised_graph(each, ranges, layers)) - exact).mean()
        for each in (model, quantise.with_weights(model, values))
    )
    assert rounded < plain


def test_on_average_a_convolution_says_the_same() -> None:
    model, layers, images = prepared()
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made = rounding.rounded_weights(model, layers, [image[None] for image in images])
    nodes = [node for node in model.graph.node if node.name in layers and node.op_type == "Conv"]
    for node in nodes:
        said = []
        for values in (constants, constants | made[node.name]):
            matrices = rounding.matrices(node, values[node.input[1]])
            means = [
                (rounding.patches(node, read[node.input[0]], matrices) @ matrices.mT).mean(1)
                for read in rounding.inputs_of(model, nodes, [image[None] for image in images])
            ]
            said.append(torch.stack(means).mean(0).flatten() + torch.from_numpy(values[node.input[2]].copy()))
        torch.testing.assert_close(said[1], said[0], rtol=1e-5, atol=1e-6)


def test_a_layer_with_too_many_inputs_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, images = prepared()
    monkeypatch.setattr(rounding, "LARGEST", 20)
    made = rounding.rounded_weights(model, layers, [image[None] for image in images])
    assert len(made) == 2  # the first convolution reads 27 numbers
