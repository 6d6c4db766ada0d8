"""Engines: each returns the same arrays, and refuses what it cannot do."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from make_format1 import FILES
from safetensors.torch import load, save

import drawn
from blemish.errors import ConfigError, ModelFileError
from blemish.images.resizing import to_input
from blemish.inference import bundle
from blemish.inference.choice import BACKENDS, Choice
from blemish.inference.engines import open_engine, open_graph
from blemish.inference.engines.plain import PlainTorch
from blemish.inference.engines.pytorch import restored
from blemish.inference.manifest import Manifest
from blemish.types import FloatArray

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(count: int) -> FloatArray:
    return np.stack([to_input(drawn.spotted(n)[0] if n % 2 else drawn.part(n)) for n in range(count)])


def near(found: dict[str, FloatArray], expected: dict[str, FloatArray]) -> None:
    assert list(found) == list(expected)
    for name, wanted in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == wanted.shape
        assert np.abs(found[name] - wanted).max() <= 1e-4 * np.abs(wanted).max(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_engines_agree_with_the_trained_network(backend: str, tiny: drawn.Tiny) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    opened = bundle.read(tiny.file)
    detector = restored(opened)
    engine = open_engine(opened, Choice(backend), threads=1)
    assert engine.outputs == detector.outputs
    plain = PlainTorch(detector, detector.outputs, Choice("torch"), threads=1)
    for count in (3, 1, 2, 3):
        images = inputs(count)
        near(engine.run(images), plain.run(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_serves_several_threads_at_once(backend: str, tiny: drawn.Tiny) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    engine = open_engine(bundle.read(tiny.file), Choice(backend), threads=1)
    images = [one[None] for one in inputs(6)]
    alone = [engine.run(one) for one in images]
    with ThreadPoolExecutor(len(images)) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(engine.run, images), alone, strict=True):
                near(found, expected)


def test_openvino_compiles_each_batch_size_once_and_returns_arrays_of_its_own(tiny: drawn.Tiny) -> None:
    pytest.importorskip("openvino")
    from blemish.inference.engines.openvino import OpenVino

    engine = open_engine(bundle.read(tiny.file), Choice("openvino"), threads=1)
    assert isinstance(engine, OpenVino)
    first, second = inputs(2)[:1], inputs(2)[1:]
    found = engine.run(first)
    before = {name: array.copy() for name, array in found.items()}
    assert not np.array_equal(engine.run(second)["map"], before["map"])
    assert all(np.array_equal(found[name], array) for name, array in before.items())
    engine.run(inputs(2))
    assert set(engine.requests) == {(1, 3, 64, 64), (2, 3, 64, 64)}


def test_a_graph_that_openvino_cannot_compile_is_refused_in_a_sentence(
    tiny: drawn.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino")

    def refuse(*_: object) -> None:
        raise RuntimeError(
            "Exception from core.cpp:117:\nCheck 'prim' failed:\nunsupported reorder case.\n\n"
        )

    engine = open_engine(bundle.read(tiny.file), Choice("openvino"), threads=1)
    monkeypatch.setattr(openvino.Core, "compile_model", refuse)
    with pytest.raises(
        ModelFileError, match="cannot run the graph on this processor: unsupported reorder case"
    ):
        engine.run(inputs(1))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_torch_computes_in_the_precision_asked_for(precision: str, tiny: drawn.Tiny) -> None:
    opened, images = bundle.read(tiny.file), inputs(2)
    exact, rounded = (open_engine(opened, Choice("torch", each)).run(images) for each in ("fp32", precision))
    difference = np.abs(rounded["map"] - exact["map"]).max() / np.abs(exact["map"]).max()
    assert 1e-5 < difference < 0.1


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_foreign_graph_is_refused(backend: str, tiny: drawn.Tiny) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    graph = bundle.read(tiny.file).graph
    with pytest.raises(
        ModelFileError, match="the graph has the outputs map, statistics; expected map, score"
    ):
        open_graph(graph, ("map", "score"), Choice(backend))
    with pytest.raises(ModelFileError, match=r"cannot (run|read) the graph"):
        open_graph(b"no graph", ("map", "statistics"), Choice(backend))


# --- choices ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backend": "tflite"}, "unknown backend 'tflite'; expected onnxruntime, openvino, torch"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; expected fp32, fp16, bf16, int8"),
        ({"device": "tpu"}, "unknown device 'tpu'; expected cpu, cuda, tensorrt"),
        ({"backend": "openvino", "device": "cuda"}, "device cuda with openvino: expected cpu"),
        ({"backend": "torch", "device": "tensorrt"}, "device tensorrt with torch: expected cpu or cuda"),
        ({"backend": "torch", "precision": "int8"}, "precision int8 with torch: expected fp32, fp16 or bf16"),
        ({"precision": "bf16"}, "precision bf16 with onnxruntime: it has no bf16 convolutions"),
        ({"compiled": True}, "compiled with onnxruntime: expected backend torch"),
    ],
)
def test_a_choice_that_no_engine_has_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Choice(**given)
    assert str(refused.value).startswith(message)


def test_a_choice_that_some_engine_has_is_taken() -> None:
    for given in (("openvino", "bf16"), ("openvino", "int8"), ("torch", "bf16"), ("onnxruntime", "int8")):
        assert Choice(*given).device == "cpu"


def test_a_file_that_records_no_engine_runs_on_onnx_runtime() -> None:
    manifest = bundle.read(FILES / "format1.blemish").manifest
    assert "engine" not in manifest.to_json()
    assert manifest.engine == Choice("onnxruntime", "fp32", "cpu")
    told = {"engine": {"backend": "openvino", "precision": "bf16", "device": "cpu"}}
    assert Manifest.from_json(manifest.to_json() | told, "").engine == Choice("openvino", "bf16", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has such a device")
@pytest.mark.parametrize("choice", [Choice("torch", device="cuda"), Choice(device="cuda")])
def test_a_device_that_is_not_there_is_refused(choice: Choice, tiny: drawn.Tiny) -> None:
    with pytest.raises(ConfigError) as refused:
        open_engine(bundle.read(tiny.file), choice)
    assert str(refused.value).startswith("device cuda: this ")
    assert "\n" not in str(refused.value)


# --- weights ---


def test_a_file_that_lacks_a_later_buffer_runs_in_torch_as_its_graph_does() -> None:
    opened = bundle.read(FILES / "format1.blemish")
    assert "doublings" not in load(opened.weights)
    assert int(restored(opened).get_buffer("doublings")) == 0
    found, expected = (open_engine(opened, Choice(each)).run(inputs(3)) for each in ("torch", "onnxruntime"))
    near(found, expected)


def test_weights_that_lack_a_parameter_or_do_not_fit_are_refused(tiny: drawn.Tiny) -> None:
    opened = bundle.read(tiny.file)
    weights = load(opened.weights)
    lacking = {name: value for name, value in weights.items() if name != "adaptor.weight"}
    for changed, said in (
        (lacking, r'Missing key\(s\) in state_dict: "adaptor.weight"'),
        (weights | {"more": torch.ones(1)}, r'Unexpected key\(s\) in state_dict: "more"'),
        (weights | {"kernel": torch.ones(3)}, "size mismatch for kernel"),
    ):
        with pytest.raises(ModelFileError, match=f"do not match its method: {said}"):
            restored(replace(opened, weights=save(changed)))


def test_openvino_leaves_the_stack_of_signals_where_it_was() -> None:
    """Left to itself, it moves the stack into its own memory when it compiles; a later Ctrl-C would crash."""
    pytest.importorskip("openvino")
    program = f"""
import ctypes
import numpy as np
from pathlib import Path
from blemish.inference.engines.openvino import SignalStack
import blemish

def stack():
    found = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.start, found.size

before = stack()
model = blemish.load(Path({str(FILES / "format1.blemish")!r}), backend="openvino", threads=1)
model.predict(np.zeros((64, 64, 3), np.uint8))
assert stack() == before, (before, stack())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
