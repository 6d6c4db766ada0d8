"""Exports: eight-bit integers, the gate, thresholds, files, and refusals."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_format
import pytest
import torch
from onnx import numpy_helper
from scipy import stats
from torch import Tensor, nn
from typing_extensions import override

import blemish
import drawn
from blemish import data
from blemish.backbones.pdn import PDNS
from blemish.cli import main
from blemish.detectors import onnx_graph
from blemish.errors import ConfigError, DataError, ExportError
from blemish.exporting import gate, pipeline, quantise
from blemish.exporting.gate import LIMITS, Agreement, ComparedEngine, DetectorEngine, Limits
from blemish.exporting.pipeline import Request, export
from blemish.files import short_digest
from blemish.inference import bundle
from blemish.inference.bundle import Bundle
from blemish.inference.calibration import fit
from blemish.inference.choice import Choice
from blemish.inference.engines import Engine, open_engine, open_graph
from blemish.inference.engines.pytorch import restored
from blemish.inference.manifest import ExportRecord
from blemish.progress import Event
from blemish.testing.slim import slimmer
from blemish.training import run
from blemish.types import FloatArray

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[onnx_format.ModelProto], None]


def edited(graph: bytes, change: Change) -> bytes:
    """Return a graph with a change."""
    model = onnx_format.load_model_from_string(graph)
    change(model)
    written: bytes = model.SerializeToString()
    return written


@pytest.fixture
def traced(tiny: drawn.Tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Use the model file's own graph instead of tracing one, which takes seconds; a change breaks it."""

    def use(change: Change) -> None:
        graph = edited(bundle.read(tiny.file).graph, change)
        monkeypatch.setattr(onnx_graph, "export_network", lambda *_, **__: graph)

    use(lambda model: None)
    return use


def command(*words: Any) -> int:
    """Run `blemish export`."""
    return main.main(["export", *map(str, words)])


def good_inputs(tiny: drawn.Tiny) -> list[FloatArray]:
    """Return the inputs of the held-out good images."""
    return pipeline.held_out(bundle.read(tiny.file), tiny.data)


def unseen() -> list[Any]:
    """Return parts that no data set has, good and bad."""
    return [*(drawn.part(3000 + n) for n in range(3)), *(drawn.spotted(4000 + n)[0] for n in range(3))]


# --- eight-bit integers ---


class Outlier(nn.Module):
    """Three layers, of which the second has huge weights for a channel that is always zero; then a blur."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head, self.blur = nn.Conv2d(8, 1, 1), nn.Conv2d(1, 1, 3, bias=False)
        with torch.no_grad():
            for value in first.parameters():
                value[0] = 0
            second.weight[:, 0] = 1000
        self.layers = nn.ModuleList([first, second, third])

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images
        for layer in self.layers:
            x = torch.relu(layer(x))
        maps = self.blur(self.head(x))[:, 0]
        return maps, maps.amax((1, 2))[:, None]


def off_by(graph: bytes, batch: FloatArray, limit: float = 1.0) -> quantise.Used:
    """Return what measures how far a graph's map is from that of another: its deviations, over a limit."""
    outputs = ("map", "statistics")
    wanted = open_graph(graph, outputs, Choice()).run(batch)["map"]

    def error(changed: bytes) -> float:
        found = open_graph(changed, outputs, Choice()).run(batch)["map"]
        return float(np.sqrt(np.square(found - wanted).mean()) / wanted.std()) / limit

    return error


def makers(graph: bytes) -> tuple[onnx_format.ModelProto, dict[str, str]]:
    """Return a graph, and the kind of operation that each of its tensors comes from."""
    model = onnx_format.load_model_from_string(graph)
    return model, {output: node.op_type for node in model.graph.node for output in node.output}


def test_layers_up_to_the_sensitive_one_stay_in_floating_point() -> None:
    torch.manual_seed(0)
    graph = onnx_graph.export_network(Outlier().eval(), (16, 16), ("map", "statistics"))
    batch = np.random.default_rng(0).random((6, 3, 16, 16), np.float32)
    error, inputs = off_by(graph, batch), [image[None] for image in batch]
    events: list[Event] = []
    made, left = quantise.quantise(graph, inputs, off_by(graph, batch, 0.1), events.append)
    said = [event.message for event in events]
    assert all(
        re.fullmatch(r"int8 with \d of 3 layers in floating point: \d+% of the limits", each) for each in said
    )
    assert said[0].startswith("int8 with 0 of 3")
    assert error(made) <= 0.1
    model, makes = makers(made)
    layers = {node.name: makes.get(node.input[1]) for node in model.graph.node if node.op_type == "Conv"}
    assert list(layers) == sorted(layers, key=lambda name: int(name.split("_")[1]))
    assert left == list(layers)[:2]  # the second is sensitive
    # What has one channel, the head and the blur, is never quantised.
    assert list(layers.values()) == [None, None, "DequantizeLinear", None, None]
    everything, none = quantise.quantise(graph, inputs, off_by(graph, batch, 1e9))
    assert none == []
    assert error(everything) > 0.1
    with pytest.raises(ExportError, match="no layer can be computed in integers"):
        quantise.quantise(graph, inputs, off_by(graph, batch, 1e-9))


class Residual(nn.Module):
    """Two blocks whose first layer reads what their sum reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)) for _ in range(2)
        )

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(images)
        for block in self.blocks:
            x = x + block(x)
        return x[:, 0], x.amax((1, 2, 3))[:, None]


def test_no_layer_in_floating_point_reads_what_was_rounded() -> None:
    torch.manual_seed(0)
    graph = onnx_graph.export_network(Residual().eval(), (16, 16), ("map", "statistics"))
    inputs = [image[None] for image in np.random.default_rng(0).random((3, 3, 16, 16), np.float32)]
    prepared = quantise.preprocessed(graph)
    layers = quantise.by_depth(prepared, quantise.quantisable_layers(prepared))
    ranges = quantise.measured(prepared, inputs)
    assert len(layers) == 5
    for left in range(5):
        model, makes = makers(quantise.quantised_graph(prepared, ranges, layers[left:]))
        read = {node.name: makes.get(node.input[0]) for node in model.graph.node if node.op_type == "Conv"}
        assert "DequantizeLinear" not in [read[name] for name in layers[:left]], left
        assert {read[name] for name in layers[left:]} == {"DequantizeLinear"}, left


def test_only_the_last_layers_are_quantised_if_no_others_may_be() -> None:
    torch.manual_seed(0)
    graph = onnx_graph.export_network(Residual().eval(), (16, 16), ("map", "statistics"))
    inputs = [image[None] for image in np.random.default_rng(0).random((3, 3, 16, 16), np.float32)]
    made, left = quantise.quantise(graph, inputs, lambda graph: 0.0, last=1)
    model, makes = makers(made)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [node.name for node in convolutions if makes.get(node.input[0]) != "DequantizeLinear"] == left
    assert len(left) == 4
    # What lies between two layers in floating point, or before the quantised one, is not rounded either.
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) <= 2
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    assert all(makes.get(name) != "DequantizeLinear" for name in sums[0].input)
    everything, none = quantise.quantise(graph, inputs, lambda graph: 0.0, last=99)
    assert none == []
    assert everything == quantise.quantise(graph, inputs, lambda graph: 0.0)[0]


def test_layers_are_sorted_by_how_many_lie_before_them() -> None:
    def layer(name: str, into: str, *inputs: str) -> onnx_format.NodeProto:
        return onnx_format.helper.make_node("Conv" if "conv" in name else "Add", inputs, [into], name=name)

    nodes = [
        layer("conv_a", "a", "images", "w"),
        layer("conv_b", "b", "a", "w"),
        layer("conv_c", "c", "b", "w"),
        layer("conv_d", "d", "images", "w"),
        layer("add", "e", "c", "d"),
        layer("conv_f", "f", "e", "w"),
    ]
    model = onnx_format.ModelProto(graph=onnx_format.GraphProto(node=nodes))
    layers = ["conv_f", "conv_a", "conv_c", "conv_d", "conv_b"]
    assert quantise.by_depth(model, layers) == ["conv_a", "conv_d", "conv_b", "conv_c", "conv_f"]


@pytest.fixture(scope="module")
def integers(tiny: drawn.Tiny) -> bytes:
    """Quantise all layers of the small model."""
    return quantise.quantise(bundle.read(tiny.file).graph, good_inputs(tiny), lambda graph: 0.0)[0]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_integers_run_close_to_the_network(backend: str, integers: bytes, tiny: drawn.Tiny) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    detector = restored(bundle.read(tiny.file))
    watched = ComparedEngine(
        open_graph(integers, detector.outputs, Choice(backend, "int8")), DetectorEngine(detector)
    )
    for inputs in good_inputs(tiny):
        watched.run(inputs)
    assert 1e-3 < watched.map_error < 0.3


def test_a_graph_that_cannot_run_here_is_infinitely_wrong(integers: bytes, tiny: drawn.Tiny) -> None:
    """The search for layers to leave in floating point then goes on with more of them."""
    detector = restored(bundle.read(tiny.file))
    manifest = bundle.read(tiny.file).manifest
    request = pipeline.Request("onnx", "int8", tiny.file.with_name("exported.blemish"))
    used = pipeline.limits_used(DetectorEngine(detector), good_inputs(tiny), request, manifest)
    assert used(b"no graph") == np.inf
    assert 1e-3 < used(integers) < 1


def test_layers_are_in_integers_and_the_map_is_not(integers: bytes) -> None:
    model, makes = makers(integers)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    kinds = [node.op_type for node in model.graph.node]
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(kinds)
    layers = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(layers) > 10
    for node in layers:
        quantised = makes.get(node.input[1])
        if quantised is None:  # the statistics' blur, of one channel
            assert constants[node.input[1]].dims[0] == 1
        else:
            assert (quantised, makes[node.input[0]]) == ("DequantizeLinear", "DequantizeLinear")
    stored = [tensor for tensor in constants.values() if tensor.data_type == onnx_format.TensorProto.INT8]
    assert any(tensor.dims and tensor.dims[0] > 1 for tensor in stored)
    enlarging = [node for node in model.graph.node if node.input[0] in ("down", "across")]
    assert len(enlarging) == 2  # the map is made of cells in floating point
    for node in enlarging:
        assert constants[node.input[0]].data_type == onnx_format.TensorProto.FLOAT
        assert makes[node.input[1]] != "DequantizeLinear"


# --- the gate ---

FINE = Agreement(200, 0.99, 0.01, 1, auroc=(0.9, 0.9), aupro=(0.8, 0.8))
BOUNDS = Limits(0.98, 0.05, flips=0.01, auroc_loss=0.002, aupro_loss=0.005)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_correlation": 0.979}, "rank correlation 0.9790, at least 0.98"),
        ({"rank_correlation": float("nan")}, "rank correlation nan, at least 0.98"),
        ({"map_error": 0.051}, "map error 0.0510, at most 0.05"),
        ({"map_error": float("nan")}, "map error nan, at most 0.05"),
        ({"flips": 3}, "3 of 200 verdicts flipped, at most 2"),
        ({"auroc": (0.9, 0.897)}, "image AUROC 0.8970 (model: 0.9000), allowed loss 0.002"),
        ({"aupro": (0.8, 0.794)}, "AUPRO 0.7940 (model: 0.8000), allowed loss 0.005"),
    ],
)
def test_each_limit_refuses_by_itself(changes: dict[str, Any], said: str) -> None:
    gate.refuse("drawn images", FINE, BOUNDS)
    assert gate.used(FINE, BOUNDS) == pytest.approx(0.5)  # the order of the scores, and the verdicts
    assert gate.used(replace(FINE, flips=2), BOUNDS) == 1
    assert gate.used(replace(FINE, flips=1), replace(BOUNDS, flips=0)) == np.inf
    with pytest.raises(ExportError) as refused:
        gate.refuse("drawn images", replace(FINE, **changes), BOUNDS)
    if not {"auroc", "aupro"} & changes.keys():  # which good images do not have
        assert gate.used(replace(FINE, **changes), BOUNDS) > 1
    beginning = "the export differs too much from the trained model on drawn images: "
    assert str(refused.value) == beginning + said


def test_every_exceeded_limit_is_named_and_no_limit_that_is_only_met() -> None:
    with pytest.raises(ExportError, match=r": rank correlation .*; map error .*; 200 of 200 .*; image AUROC"):
        gate.refuse("x", Agreement(200, -1.0, 9.0, 200, auroc=(1.0, 0.0)), BOUNDS)
    gate.refuse("x", Agreement(200, 0.98, 0.05, 2, auroc=(0.5, 0.9), aupro=(0.5, 0.9)), BOUNDS)
    gate.refuse("x", Agreement(3, 1.0, 0.0, 0), BOUNDS)
    with pytest.raises(ExportError, match="1 of 3 verdicts flipped, at most 0"):
        gate.refuse("x", Agreement(3, 1.0, 0.0, 1), BOUNDS)


def test_limits_of_a_finer_precision_are_no_wider() -> None:
    order = [LIMITS[name] for name in ("fp32", "fp16", "bf16", "int8")]
    for finer, coarser in pairwise(order):
        assert finer.rank_correlation >= coarser.rank_correlation
        assert finer.map_error <= coarser.map_error
        assert finer.flips <= coarser.flips
    assert Request("onnx", "fp16", Path("a.onnx"), reduced=0.03).bounds.map_error == pytest.approx(0.11)


def test_rank_correlation_is_pearsons_of_average_ranks() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 6, 40).astype(float), rng.integers(0, 6, 40).astype(float)
    ranks = stats.rankdata(one), stats.rankdata(other)
    assert gate.rank_correlation(one.tolist(), other.tolist()) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert gate.rank_correlation([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert gate.rank_correlation([1, 1, 1], [2, 2, 2]) == 1
    assert gate.rank_correlation([1, 1, 1], [1, 2, 3]) == 0


class Fixed:
    """An engine that returns given maps one after another."""

    outputs = ("map", "statistics")

    def __init__(self, maps: list[FloatArray]) -> None:
        self.maps = iter(maps)

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        found = next(self.maps)
        return {"map": found, "statistics": found.max((1, 2))[:, None]}


def watch(found: list[FloatArray], expected: list[FloatArray]) -> ComparedEngine:
    one, other = Fixed(found), Fixed(expected)
    engines: tuple[Engine, Engine] = one, other
    watched = ComparedEngine(*engines)
    for maps in found:
        assert np.array_equal(watched.run(maps)["map"], maps)
    return watched


def test_the_map_error_is_that_of_all_maps_together() -> None:
    rng = np.random.default_rng(0)
    expected = [rng.normal(5, 2, (n, 4, 6)).astype(np.float32) for n in (1, 3, 2)]
    found = [maps + rng.normal(0.1, 0.5, maps.shape).astype(np.float32) for maps in expected]
    one, other = np.concatenate(found).astype(float), np.concatenate(expected).astype(float)
    watched = watch(found, expected)
    assert watched.map_error == pytest.approx(np.sqrt(np.mean((one - other) ** 2)) / other.std(), rel=1e-6)
    peaks = np.concatenate([each["map"][:, 0, 0] for each in watched.expected])
    assert np.array_equal(peaks, np.concatenate(expected).max((1, 2)))
    flat = [np.ones((1, 2, 2), np.float32)]
    assert watch(flat, flat).map_error == 0
    assert watch([flat[0] + 1], flat).map_error == float("inf")


def shifted_weight(model: onnx_format.ModelProto) -> None:
    """Change the largest weight initializer of all by a half."""
    largest = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = numpy_helper.to_array(largest)
    largest.CopyFrom(numpy_helper.from_array(values * np.float32(1.5), largest.name))


def negated_statistics(model: onnx_format.ModelProto) -> None:
    """Reverse the order of the scores, without changing the maps."""
    for node in model.graph.node:
        for number, output in enumerate(node.output):
            if output == "statistics":
                node.output[number] = "turned"
    model.graph.node.append(onnx_format.helper.make_node("Neg", ["turned"], ["statistics"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shifted_weight, "map error "),
        (negated_statistics, "rank correlation -"),
    ],
)
def test_the_gate_refuses_a_broken_export(
    change: Change,
    said: str,
    tiny: drawn.Tiny,
    traced: Callable[[Change], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    traced(change)
    (tmp_path / "there.blemish").write_bytes(b"from yesterday")
    before = drawn.snapshot(tmp_path)
    for name in ("there.blemish", "new.onnx", "folder/new.blemish"):
        status = command(tiny.file, "--format", "onnx", "--out", tmp_path / name, "--data", tiny.data)
        told = capsys.readouterr()
        assert status == 1
        assert told.out == ""
        sentence = told.err.splitlines()[-1]
        assert sentence.startswith("blemish: the export differs too much from the trained model on held-out")
        assert said in sentence
        assert f"{'map error' if said.startswith('rank') else 'AUROC'} " not in sentence
        assert drawn.snapshot(tmp_path) == before


def test_the_gate_refuses_an_export_that_fails_on_labelled_images_alone(
    tiny: drawn.Tiny, traced: Callable[[Change], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, "fp32", Limits(-2.0, float("inf"), flips=1.0))
    traced(negated_statistics)
    with pytest.raises(ExportError, match=r"on labelled images: image AUROC 0\.0000 \(model: 1\.0000\)"):
        export(tiny.file, tiny.data, out=tmp_path / "a.onnx", format="onnx", evaluation=tiny.data)
    assert not drawn.snapshot(tmp_path)


# --- thresholds ---


def exported(opened: Bundle) -> ExportRecord:
    """Return the export record of a model file's manifest."""
    record = opened.manifest.export
    assert record is not None
    return record


def held_out_paths(tiny: drawn.Tiny) -> list[Path]:
    files = bundle.read(tiny.file).manifest.training.files
    assert files is not None
    samples = data.scan(tiny.data, "auto")
    return [sample.path for sample in samples if short_digest(sample.path) in files.held_out]


def test_thresholds_are_set_again_from_the_exports_own_scores(tiny: drawn.Tiny, tmp_path: Path) -> None:
    found = export(tiny.file, tiny.data, out=tmp_path / "half.blemish", format="onnx", precision="fp16")
    opened, old = bundle.read(tmp_path / "half.blemish"), tiny.model.calibration
    manifest = opened.manifest
    facts = exported(opened)
    assert facts.thresholds == "set anew on the same images"
    assert facts.agreement == {"held-out good images": asdict(found["held-out good images"])}
    assert facts.limits == asdict(LIMITS["fp16"])
    assert manifest.engine == Choice(precision="fp16")
    engine = open_engine(opened, Choice(precision="fp16"))
    runs = [engine.run(tiny.model.prepare(path).inputs) for path in held_out_paths(tiny)]
    statistics = np.concatenate([run["statistics"] for run in runs])
    maxima = np.array([run["map"].max() for run in runs])
    assert manifest.calibration == fit(
        statistics,
        maxima,
        old.statistics,
        false_reject_rate=old.false_reject_rate,
        review_rate=old.review_rate,
        confidence=old.confidence,
    )
    assert manifest.calibration.defect_threshold != old.defect_threshold
    assert len(manifest.calibration.scores) == len(old.scores)
    model = blemish.load(tmp_path / "half.blemish")
    assert model.choice.precision == "fp16"
    for image in unseen():
        one, other = model.predict(image), tiny.model.predict(image)
        assert one.label == other.label
        near = np.abs(one.map - other.map).max() / np.abs(other.map).max()
        assert 0 < near < 0.05


def test_thresholds_are_kept_if_held_out_images_are_missing(
    tiny: drawn.Tiny,
    traced: Callable[[Change], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for number, path in enumerate(held_out_paths(tiny)[1:]):  # all but one
        image = tmp_path / f"parts/train/good/{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(path.read_bytes())
    drawn.data_set(tmp_path / "parts", train=0)
    found = export(tiny.file, tmp_path / "parts", out=tmp_path / "a.blemish", format="onnx")
    opened = bundle.read(tmp_path / "a.blemish")
    assert opened.manifest.calibration == tiny.model.calibration
    assert exported(opened).thresholds == "as trained"
    assert found["held-out good images"].images == len(tiny.model.calibration.scores) - 1
    assert caplog.messages == [
        f"{tmp_path / 'parts'} has only 4 of the 5 good images that an export of this model is "
        "measured on, so the thresholds are kept"
    ]


# --- files ---


def test_the_command_writes_a_model_file_that_scores_as_the_model(
    tiny: drawn.Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new/a.blemish"
    words = ("--format", "onnx", "--out", path, "--data", tiny.data, "--evaluation", tiny.data)
    assert command(tiny.file, *words) == 0
    told = capsys.readouterr()
    assert told.out == f"{path}\n"
    assert "labelled images, 8 images: rank correlation 1.0000, map error 0.0000, 0 verdicts" in told.err
    opened, before = bundle.read(path), bundle.read(tiny.file)
    assert opened.weights == before.weights
    assert set(opened.manifest.to_json()) == {*before.manifest.to_json(), "engine", "export"}
    agreement = exported(opened).agreement["labelled images"]
    assert agreement["images"] == 8
    assert agreement["auroc"][0] == agreement["auroc"][1] == 1
    model = blemish.load(path)
    for image in unseen():
        one, other = model.predict(image), tiny.model.predict(image)
        assert one.label == other.label
        assert one.score == pytest.approx(other.score, rel=1e-3, abs=1e-3)
        np.testing.assert_allclose(one.map, other.map, atol=1e-4 * float(np.abs(other.map).max()))


def test_python_and_the_command_write_the_same_file(
    tiny: drawn.Tiny,
    traced: Callable[[Change], None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    ours, theirs, events = tmp_path / "ours.blemish", tmp_path / "theirs.blemish", list[Event]()
    found = blemish.export(
        tiny.file,
        tiny.data,
        out=ours,
        format="onnx",
        precision="fp32",
        evaluation=tiny.data,
        report=events.append,
    )
    assert capfd.readouterr() == ("", "")
    words = ("--format", "onnx", "--data", tiny.data, "--evaluation", tiny.data)
    assert command(tiny.file, *words, "--out", theirs) == 0
    assert ours.read_bytes() == theirs.read_bytes()
    assert list(found) == ["held-out good images", "labelled images"]
    messages = [event.message for event in events if event.message]
    assert messages == [gate.describe(name, each) for name, each in found.items()]
    assert [line for line in capfd.readouterr().err.splitlines() if "%" not in line] == messages


def test_an_int8_model_file_records_its_engine_and_refuses_other_precisions(
    tiny: drawn.Tiny, traced: Callable[[Change], None], tmp_path: Path
) -> None:
    path = tmp_path / "a.blemish"
    export(tiny.file, tiny.data, out=path, format="onnx", precision="int8")
    opened = bundle.read(path)
    assert exported(opened).in_floating_point == ()
    model = blemish.load(path)
    assert (model.choice.backend, model.choice.precision) == ("onnxruntime", "int8")
    assert "QuantizeLinear" in {node.op_type for node in makers(opened.graph)[0].graph.node}
    for image in unseen()[:3]:
        one, other = model.predict(image), tiny.model.predict(image)
        error = np.sqrt(np.square(one.map - other.map).mean()) / other.map.std()
        assert 0 < error < LIMITS["int8"].map_error
    with pytest.raises(
        ConfigError, match="an export can only run as a graph"
    ):  # the weights are another network's
        blemish.load(path, backend="torch", precision="fp32")
    with pytest.raises(ConfigError, match="its graph is int8"):
        blemish.load(path, precision="fp32")
    with pytest.raises(ConfigError, match="precision int8 with torch"):
        blemish.load(path, backend="torch")


def test_the_model_itself_is_not_overwritten(
    tiny: drawn.Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.blemish"
    own.write_bytes(tiny.file.read_bytes())
    assert command(own, "--format", "onnx", "--out", own, "--data", tiny.data) == 2
    assert "is the model itself" in capsys.readouterr().err
    assert own.read_bytes() == tiny.file.read_bytes()


def test_a_missing_image_changes_no_verdict_and_no_threshold(
    tiny: drawn.Tiny, traced: Callable[[Change], None], tmp_path: Path
) -> None:
    """Not even that of the image that the threshold was set by, which rounding moves over it."""
    for missing in held_out_paths(tiny):
        folder = tmp_path / missing.stem
        shutil.copytree(tiny.data, folder)
        (folder / missing.relative_to(tiny.data)).unlink()
        export(tiny.file, folder, out=tmp_path / "a.blemish", format="onnx")
        assert bundle.read(tmp_path / "a.blemish").manifest.calibration == tiny.model.calibration


def test_a_bare_onnx_graph_has_its_metadata(
    tiny: drawn.Tiny, traced: Callable[[Change], None], tmp_path: Path
) -> None:
    assert command(tiny.file, "--format", "onnx", "--out", tmp_path / "a.onnx", "--data", tiny.data) == 0
    model = onnx_format.load(tmp_path / "a.onnx")
    onnx_format.checker.check_model(model)
    (entry,) = [each for each in model.metadata_props if each.key == "blemish"]
    told = json.loads(entry.value)
    check_told(told, tiny, "onnxruntime", "fp32")
    graph = (tmp_path / "a.onnx").read_bytes()
    found = open_graph(graph, ("map", "statistics"), Choice()).run(good_inputs(tiny)[0])
    assert np.array_equal(found["map"], tiny.model.engine.run(good_inputs(tiny)[0])["map"])


def check_told(told: dict[str, Any], tiny: drawn.Tiny, backend: str, precision: str) -> None:
    """Check the metadata of a bare graph."""
    expected = tiny.model.manifest.to_json()["preprocessing"]
    assert told["preprocessing"] == expected | {"image_size": [64, 64]}
    assert told["outputs"] == ["map", "statistics"]
    assert told["calibration"]["defect_threshold"] > 0
    assert (told["engine"]["backend"], told["engine"]["precision"]) == (backend, precision)
    assert "training" not in told


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bare_openvino_graph_has_its_metadata(
    precision: str,
    tiny: drawn.Tiny,
    traced: Callable[[Change], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    openvino = pytest.importorskip("openvino")
    if precision == "fp16":
        drawn.need_half_in_openvino()
    monkeypatch.setitem(LIMITS, "fp16", Limits(0.5, 0.1))  # five scores, of which two are near
    words = ("--format", "openvino", "--precision", precision, "--out", tmp_path / "a.xml")
    assert command(tiny.file, *words, "--data", tiny.data) == 0
    assert sorted(drawn.snapshot(tmp_path)) == ["a.bin", "a.xml"]
    model = openvino.Core().read_model(tmp_path / "a.xml")
    check_told(json.loads(model.get_rt_info(["blemish"]).astype(str)), tiny, "openvino", precision)
    # Left alone it computes in bfloat16 where the processor has it.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.compile_model(model, "CPU", settings)(good_inputs(tiny)[0])["map"]
    wanted = tiny.model.engine.run(good_inputs(tiny)[0])["map"]
    assert np.abs(found - wanted).max() < {"fp32": 1e-4, "fp16": 0.05}[precision] * np.abs(wanted).max()
    whole = sum(value.nbytes for value in restored(bundle.read(tiny.file)).state_dict().values())
    assert ((tmp_path / "a.bin").stat().st_size < 0.75 * whole) == (precision == "fp16")


def test_a_model_file_for_openvino_runs_there(
    tiny: drawn.Tiny, traced: Callable[[Change], None], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    export(tiny.file, tiny.data, out=tmp_path / "a.blemish", format="openvino")
    model = blemish.load(tmp_path / "a.blemish")
    assert model.choice.backend == "openvino"
    assert blemish.load(tmp_path / "a.blemish", backend="onnxruntime").choice.backend == "onnxruntime"
    for image in unseen():
        one, other = model.predict(image), tiny.model.predict(image)
        assert one.label == other.label
        assert one.score == pytest.approx(other.score, rel=1e-3, abs=1e-3)


# --- EfficientAD ---


@pytest.fixture(scope="module")
def efficientad(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Train an EfficientAD with few channels for two steps; yield its file and its data set."""
    folder = tmp_path_factory.mktemp("efficientad")
    root = drawn.data_set(folder / "parts", train=6, good=1, bad=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PDNS, "pdn_small", slimmer(PDNS["pdn_small"], 2))
        run.train(
            root,
            model="efficientad-s",
            out=folder / "a.blemish",
            weights=drawn.weights(folder / "weights.safetensors", PDNS["pdn_small"]()),
            natural_images="drawn",
            settings={"autoencoder": False, "penalty": False},
            steps=2,
            precision="fp32",
            device="cpu",
        )
        yield folder / "a.blemish", root


def test_reduced_channels_in_integers(
    efficientad: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, root = efficientad
    monkeypatch.setattr(pipeline, "REDUCTION_IMAGES", 2)
    events: list[Event] = []
    found = export(
        file,
        root,
        out=tmp_path / "a.blemish",
        format="onnx",
        precision="int8",
        reduced=0.05,
        report=events.append,
    )
    opened = bundle.read(tmp_path / "a.blemish")
    kept = exported(opened).reduced
    assert [each["layer"] for each in kept] == ["structural", "second"]
    assert sum(each["kept"] for each in kept) < sum(each["of"] for each in kept)
    assert all(each["error"] <= 0.05 for each in kept)
    said = [event.message for event in events if " channels, map error " in event.message]
    assert [sentence.split(": ")[0] for sentence in said] == ["structural", "second"]
    limit = exported(opened).limits["map_error"]
    assert limit == pytest.approx(LIMITS["int8"].map_error + 2 * 0.05)
    model, makes = makers(opened.graph)
    widths = [tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert kept[0]["kept"] in widths
    assert 384 not in widths
    assert "AveragePool" not in makes.values()
    assert found["held-out good images"].map_error <= limit


# --- refusals ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "tflite"), "unknown format 'tflite'; expected onnx or openvino"),
        (("--precision", "fp8"), "unknown precision 'fp8'; expected fp32, fp16, bf16, int8"),
        (("--precision", "bf16"), "precision bf16 with onnxruntime: it has no bf16 convolutions"),
        (("--reduced", "1"), "a map error of 1.0 for reduced channels: expected 0 to below 1"),
        (("--reduced",), "--reduced: this method does not support reduced channels"),
        (("--out", "a.xml"), "--out a.xml: expected a name that ends in .blemish or .onnx"),
        (("--format", "openvino"), "expected a name that ends in .blemish or .xml"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_impossible_exports_are_refused_in_one_sentence(
    words: tuple[str, ...], said: str, tiny: drawn.Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ("--format", "onnx", "--out", tmp_path / "a.onnx", "--data", tiny.data)
    assert command(tiny.file, *usual, *words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (sentence,) = told.err.splitlines()
    assert sentence.startswith("blemish: ")
    assert said in sentence
    assert not drawn.snapshot(tmp_path)


def test_a_data_set_without_the_held_out_images_is_refused(tiny: drawn.Tiny, tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "other", train=3, size=(32, 32))
    with pytest.raises(
        DataError, match=r"found none of the 5 good images in .*other that .*tiny\.blemish was"
    ):
        export(tiny.file, root, out=tmp_path / "a.onnx", format="onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_a_missing_package_is_named(
    tiny: drawn.Tiny,
    traced: Callable[[Change], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, "blemish.inference.engines.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert command(tiny.file, "--format", "openvino", "--out", tmp_path / "a.xml", "--data", tiny.data) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "blemish: openvino is not installed; this needs blemish[openvino]"
    assert not drawn.snapshot(tmp_path)
