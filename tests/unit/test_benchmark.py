"""How long models take: who takes part, how often what is run, in which order, and what is said of it."""

import importlib
import json
import math
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

import drawn
from blemish import images
from blemish.benchmark import entries, machine, roofline, tables
from blemish.benchmark import run as benchmark
from blemish.benchmark.entries import Contender, Entry, Work, prepare, read_entry
from blemish.benchmark.machine import Machine
from blemish.benchmark.roofline import Rate
from blemish.benchmark.run import Benchmark, Burst, Plan, Row, Stream, Timings
from blemish.cli import main
from blemish.detectors import fusing
from blemish.detectors.registry import build, configure
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.errors import ConfigError, ImageError, ModelFileError, StoppedError
from blemish.inference import bundle
from blemish.inference.choice import Choice
from blemish.inference.manifest import ExportRecord
from blemish.inference.predictor import Outcome
from blemish.progress import Event
from blemish.types import FloatArray
from drawn import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = Path(__file__).parents[1] / "files"
MODEL = FILES / "format1.blemish"
SMALL = {"image_size": (64, 64), "layers": ("stage1", "stage2"), "hidden_channels": 16}


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """An engine whose runs take the seconds that they are told to, the last of them again and again."""

    outputs = ("map",)

    def __init__(self, clock: Clock, *seconds: float) -> None:
        self.clock, self.seconds, self.runs = clock, list(seconds), 0

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        self.runs += 1
        self.clock.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return {}


NOTHING = np.zeros((1, 3, 2, 2), np.float32)


EXPORTED = ExportRecord(
    limits={}, agreement={}, flops=1, reduced=(), in_floating_point=(), thresholds="those of the model"
)
"""What an export says of itself."""


def contender(name: str = "a", **changes: Any) -> Contender:
    return replace(Contender(name, bundle.read(MODEL), Choice()), **changes)


# --- how often what is run ---


def test_a_burst_warms_up_and_times_as_often_as_it_is_told() -> None:
    clock = Clock()
    engine = Timed(clock, 9.0, 8.0, 1.0, 2.0, 3.0)
    found = benchmark.burst(engine, NOTHING, Burst(1, warm_up=2, runs=3, seconds=math.inf), clock)
    assert found == [1.0, 2.0, 3.0]
    assert engine.runs == 5


def test_a_burst_ends_with_its_time() -> None:
    clock = Clock()
    engine = Timed(clock, 0.25)
    found = benchmark.burst(engine, NOTHING, Burst(1, warm_up=1000, runs=1000, seconds=10.0), clock)
    assert engine.runs - len(found) == 4  # a tenth of the time, and what was begun
    assert len(found) == 36  # the rest


def test_a_burst_has_a_warm_up_and_a_timed_run_however_slow() -> None:
    clock = Clock()
    engine = Timed(clock, 99.0)
    assert benchmark.burst(engine, NOTHING, Burst(16, 1000, 1000, 0.1), clock) == [99.0]
    assert engine.runs == 2


def test_rows_take_turns_and_the_throughput_waits_while_it_has_had_its_time() -> None:
    asked: list[tuple[str, Burst]] = []

    def row(name: str, seconds: float) -> benchmark.Ask:
        def ask(wanted: Burst | Stream) -> list[float]:
            assert isinstance(wanted, Burst)
            asked.append((name, wanted))
            return [seconds * wanted.batch] * 2

        return ask

    plan = Plan(threads=1, rounds=4, warm_up=7, runs=8, seconds=20.0, batch=10)
    timings = [Timings(), Timings()]
    for number in range(plan.rounds):
        benchmark.take_turns(number, [row("quick", 0.01), row("slow", 0.3)], timings, plan)
    latency = [name for name, burst in asked if burst.batch == 1]
    assert latency == ["quick", "slow"] * 4
    assert {burst for _, burst in asked if burst.batch == 1} == {Burst(1, 7, 8, 3.0)}
    # Of 8 seconds for the throughput, the slow row takes 6 in the first round, so it waits for three.
    assert [name for name, burst in asked if burst.batch == 10] == [
        "quick",
        "slow",
        "quick",
        "quick",
        "quick",
    ]
    assert {burst for _, burst in asked if burst.batch == 10} == {Burst(10, 7, 8, 2.0)}
    assert timings[1].latency == [[0.3, 0.3]] * 4
    assert timings[1].throughput == [[3.0, 3.0]]


def test_without_a_batch_there_is_no_throughput() -> None:
    timings = [Timings()]
    benchmark.take_turns(0, [lambda wanted: [1.0]], timings, Plan(1, batch=1))
    assert timings == [Timings(latency=[[1.0]])]


def test_without_a_limit_the_protocol_is_the_papers() -> None:
    plan = Plan(threads=1)
    assert (plan.rounds, plan.warm_up, plan.runs, plan.seconds, plan.batch) == (5, 1000, 1000, math.inf, 16)


class Judging:
    """A model whose verdicts take a second each."""

    def __init__(self, clock: Clock, error: ImageError | None = None) -> None:
        self.clock, self.error = clock, error

    def stream(self, images: Any) -> Iterator[Outcome]:
        for source in images:
            self.clock.now += 1
            yield Outcome(source, None, None, self.error)


def test_files_are_judged_over_and_over_until_the_time_is_over() -> None:
    for seconds, count in ((math.inf, 2), (0.5, 2), (3.5, 4), (4.5, 6)):
        clock = Clock()
        judged = benchmark.judge(Judging(clock), [Path("a"), Path("b")], seconds, clock)  # type: ignore[arg-type]
        assert judged == [1.0] * count
    with pytest.raises(ImageError, match="broken"):
        benchmark.judge(Judging(clock, ImageError("broken")), [Path("a")], 1.0)  # type: ignore[arg-type]


# --- who takes part ---


@pytest.mark.parametrize("text", ["", "plain:", "a:b:c:d", "efficientad-s:cuda", "m.blemish:torch:int4"])
def test_refuses_what_is_no_entry(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        read_entry(text)


def test_a_file_runs_as_it_says_unless_told(tiny: Tiny, tmp_path: Path) -> None:
    opened, path = bundle.read(tiny.file), tmp_path / "m.blemish"
    manifest = replace(opened.manifest, engine=Choice("openvino", "int8"), export=EXPORTED)
    bundle.write(path, manifest, opened.weights, opened.graph)
    as_said = prepare(Entry(str(path)))
    assert as_said.choice == Choice("openvino", "int8")
    assert as_said.work is not None
    assert as_said.work.flops == EXPORTED.flops
    told = prepare(Entry(str(path), backend="onnxruntime"))
    assert told.choice == Choice("onnxruntime", "int8")
    assert told.opened.graph == opened.graph
    assert prepare(Entry(str(path), plain=True, backend="torch")).choice == Choice("torch", "fp32")
    with pytest.raises(ConfigError, match=r"precision fp32 for .*m\.blemish: its graph is int8"):
        prepare(Entry(str(path), precision="fp32"))
    with pytest.raises(ConfigError, match=r"precision int8 for .*: its graph is fp32"):
        prepare(Entry(str(tiny.file), precision="int8"))


def test_a_graph_whose_weights_fit_no_detector_runs_uncounted(tmp_path: Path) -> None:
    opened, path = bundle.read(MODEL), tmp_path / "m.blemish"
    bundle.write(path, opened.manifest, save({"unknown": torch.zeros(1)}), opened.graph)
    events: list[Event] = []
    assert prepare(Entry(str(path)), report=events.append).work is None
    assert [event.message.partition(":")[0] for event in events] == ["not counting FLOPs"]
    with pytest.raises(ModelFileError, match="do not match its method"):
        prepare(Entry(str(path), backend="torch"))


def test_a_gpu_has_half_precision_unless_told() -> None:
    opened = entries.untrained("supersimplenet", SMALL)
    choose = entries.choose
    assert choose(Entry("supersimplenet"), "cuda", opened) == Choice("torch", "fp16", "cuda")
    assert choose(Entry("supersimplenet"), "tensorrt", opened) == Choice("onnxruntime", "fp32", "tensorrt")
    assert choose(Entry("supersimplenet", precision="bf16"), "cuda", opened).precision == "bf16"
    assert choose(Entry("m", backend="onnxruntime"), "cuda", opened) == Choice("onnxruntime", "fp32", "cuda")
    with pytest.raises(ConfigError, match="precision fp16 for m: its graph is fp32, which onnxruntime"):
        choose(Entry("m", backend="onnxruntime", precision="fp16"), "cuda", opened)
    assert choose(Entry("supersimplenet"), "", opened) == Choice("onnxruntime", "fp32", "cpu")


def test_a_backend_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("openvino", "torch"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"openvino is not installed; expected blemish\[openvino\]"):
        prepare(Entry(str(MODEL), backend="openvino"))
    assert prepare(Entry(str(MODEL))).work is None  # a PC without torch cannot count


def test_fusing_a_network_of_a_useful_size_saves_work() -> None:
    settings = {"backbone": "resnet18", "image_size": (256, 256)}
    work = prepare(Entry("supersimplenet", backend="torch"), settings=settings).work
    assert work is not None
    assert work.flops < work.plain_flops


def test_a_plain_row_runs_the_detectors_own_network() -> None:
    """Its graph has the layers that the fused one multiplied into others, and gives the same numbers."""
    inputs = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    fused, *plain = (
        prepare(Entry("supersimplenet", plain, backend), settings=SMALL)
        for plain, backend in ((False, "onnxruntime"), (True, "onnxruntime"), (True, "torch"))
    )
    expected = entries.open_contender(fused, 1).run(inputs)
    assert fused.work is not None
    for row in plain:
        assert row.work is not None
        assert row.work.flops == row.work.plain_flops == fused.work.plain_flops != fused.work.flops
        found = entries.open_contender(row, 1).run(inputs)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4)
    assert plain[0].opened.graph != fused.opened.graph
    last = replace(plain[1], channels_last=True)
    found = entries.open_contender(last, 1).run(inputs)
    np.testing.assert_allclose(found["map"], expected["map"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "parameters", "billions"),
    [("efficientad-s", 8_057_856, 75.9), ("efficientad-m", 20_738_432, 235.4)],
)
def test_efficientad_computes_what_was_published(method: str, parameters: int, billions: float) -> None:
    """The paper's supplement has 8 and 21 million parameters, 76 and 235 GFLOP."""
    detector = build(method, configure(method), 0)
    assert sum(each.numel() for each in detector.parameters()) == parameters
    plain = fusing.flops(detector, (256, 256))
    assert plain / 1e9 == pytest.approx(billions, abs=0.05)
    assert 0.98 < fusing.flops(detector.fused(), (256, 256)) / plain < 1


# --- the roofline ---


def test_the_fastest_product_sets_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def product(*seconds: float) -> Any:
        engine = Timed(clock, *seconds)
        return lambda: engine.run(NOTHING)

    offered = [("slow", 100, product(9, 2, 4)), ("fast", 300, product(9, 5, 3, 5)), ("huge", 400, product(5))]
    monkeypatch.setattr(roofline, "products", lambda choice, threads: offered)
    assert roofline.fastest(Choice(), 1, clock) == Rate(100.0, "fast")
    monkeypatch.setattr(roofline, "products", lambda choice, threads: [])
    assert roofline.fastest(Choice(), 1, clock) is None
    assert benchmark.highest([None, Rate(1, "a"), Rate(3, "b"), Rate(2, "c")]) == Rate(3, "b")
    assert benchmark.highest([None, None]) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp16"])
def test_every_product_runs(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if precision == "bf16":
        drawn.need_half_in_openvino()
    monkeypatch.setattr(roofline, "SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "CHANNELS", 32)
    choice = Choice("torch" if precision == "fp16" else "openvino", precision)
    names = set()
    for name, count, run in roofline.products(choice, 1):
        run()
        names.add(name)
        assert count in (2 * 32**3, 2 * 64**3, 2 * 28**2 * 32**2 * 9)
    ours = {"PyTorch's matrix product", "PyTorch's convolution"}
    theirs = {"OpenVINO's matrix product", "OpenVINO's convolution"}
    expected = {"fp16": ours, "int8": theirs | {"PyTorch's matrix product"}}
    assert names == expected.get(precision, ours | theirs)


# --- what is said of it ---


def found(*, batch: int = 4) -> Benchmark:
    """Make up a benchmark of two rows."""
    work = Work(parameters=8_000_000, flops=100, plain_flops=200)
    first = Timings([[0.010, 0.030], [0.040]], [[0.1, 0.3]], [0.5, 0.25], memory=2_000_000)
    second = Timings([[0.005, 0.005], [0.010]], stream=[0.125])
    rows = (
        Row(contender("first", work=work), first, Rate(10_000.0, "a product")),
        Row(contender("second", choice=Choice("openvino", "bf16")), second, None),
    )
    about = Machine("A processor", ("avx2",), 4, 2**33, (), "Linux x86_64", {"blemish": "0"})
    return Benchmark(about, Plan(2, rounds=2, seconds=7.0, batch=batch), rows, "random numbers")


def test_figures_sum_up_runs_and_rounds() -> None:
    first, second = (tables.figures(row, 4) for row in found().rows)
    assert first["mean_ms"] == pytest.approx(30)  # of 20 and 40
    assert first["deviation_ms"] == pytest.approx(200**0.5)
    assert first["median_ms"] == pytest.approx(30)  # of 10, 30 and 40
    assert first["p99_ms"] == pytest.approx(39.8)
    assert (first["runs"], first["batch_runs"]) == (3, 2)
    assert first["images_per_second"] == pytest.approx(8 / 0.4)
    assert first["flops_per_second"] == pytest.approx(100 / 0.03)
    assert first["shortest_ms"] == pytest.approx(10)
    assert first["reached"] == pytest.approx(1 / 3)
    unknown = ("images_per_second", "flops", "memory", "fastest_product", "shortest_ms", "reached")
    assert all(second[name] is None for name in unknown)


def test_a_ratio_is_taken_within_a_round() -> None:
    first, second = found().rows
    assert tables.ratio(first, second) == pytest.approx((4.0, 4.0, 4.0))
    slower = replace(second, timings=Timings([[0.010], [0.080]]))
    assert tables.ratio(first, slower) == pytest.approx((1.25, 0.5, 2.0))


def test_the_table_says_on_what_how_and_beside_what() -> None:
    text = tables.table(found())
    lines = text.splitlines()
    assert lines[0] == "A processor: avx2"
    assert lines[1] == "4 cores, 2 threads used, 8 GiB memory, GPU: none"
    assert "The rows take turns, each in its own process." in text
    assert "2 rounds, up to 1000 warm-up and 1000 timed runs per round, within 7 s per row." in text
    times, streamed, done = (line.split() for line in lines if line.startswith("first "))
    assert times[1:] == [
        "64x64",
        "30.00",
        "14.14",
        "30.00",
        "39.80",
        "3",
        "20.0",
        "1.00",
        "(1.00",
        "to",
        "1.00)",
    ]
    assert streamed[1:] == ["375.00", "375.00", "497.50", "2", "2.7"]
    assert done[1:] == ["8.00", "0.0", "0.0", "2", "0", "0", "10.00", "33", "%"]
    assert lines[-16].split()[:2] == ["method", "A6000"]
    assert "OTHER MACHINES" in lines[-18]
    assert lines[-15].split() == ["EfficientAD-S", "2.2", "614", "-", "-"]
    assert "images/s at" not in tables.table(found(batch=1))


def test_one_row_has_no_ratio() -> None:
    one = found()
    one = replace(one, rows=one.rows[:1])
    assert "speed-up" not in tables.table(one)
    assert "take turns" not in tables.table(one)


def test_the_json_has_every_run(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    tables.write_json(replace(found(), plan=Plan(2)), path)
    record = json.loads(path.read_text())
    assert record["plan"]["seconds"] is None
    assert record["machine"]["cores"] == 4
    assert record["rows"][0]["latency_seconds"] == [[0.010, 0.030], [0.040]]
    assert record["rows"][0]["stream_seconds"] == [0.5, 0.25]
    second = record["rows"][1]
    assert (second["backend"], second["precision"], second["device"]) == ("openvino", "bf16", "cpu")
    assert second["times_as_fast"] == {"median": 4.0, "least": 4.0, "greatest": 4.0}
    assert second["method"] == "supersimplenet"
    assert record["published"]["EfficientAD-M"]["V100S ms"] == 6.0


def test_the_machine_is_this_one() -> None:
    about = machine.describe()
    assert about.versions["torch"] == torch.__version__
    assert about.processor
    assert about.cores >= 1


@pytest.mark.skipif(machine.resident() is None, reason="only Linux says")
def test_the_peak_of_memory_is_that_since_it_was_asked_for() -> None:
    before = machine.resident()
    assert before is not None
    with mmap.mmap(-1, 50_000_000) as pages:
        pages.write(bytes([1]) * 50_000_000)
    assert machine.peak_resident() - before > 45e6
    after = machine.resident()
    assert after is not None
    assert machine.peak_resident() - after < 5e6


# --- the command ---


def run(*words: Any) -> int:
    try:
        return main.main(["benchmark", *map(str, words)])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_the_command_compares_in_processes_of_their_own(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn.need_half_in_openvino()
    path, rows = tmp_path / "b.json", [tiny.file, f"plain:{tiny.file}:torch", f"{tiny.file}:openvino:bf16"]
    words = ["--threads", 1, "--seconds", 0.2, "--rounds", 2, "--batch", 3, "--json", path]
    assert run("--compare", *rows, *words) == 0
    names = ["tiny.blemish:onnxruntime:fp32", "plain:tiny.blemish:torch:fp32"]
    names.append("tiny.blemish:openvino:bf16")
    said = capsys.readouterr().out
    assert re.findall(r"^(\S*tiny\S*)", said, re.M) == names * 2
    record = json.loads(path.read_text())
    for row, name in zip(record["rows"], names, strict=True):
        assert row["name"] == name
        assert len(row["latency_seconds"]) == 2
        assert row["figures"]["images_per_second"] > 0
        assert row["figures"]["reached"] > 0
        assert row["figures"]["parameters"] == record["rows"][0]["figures"]["parameters"]
    assert [row["plain"] for row in record["rows"]] == [False, True, False]


def test_the_command_reads_and_judges_files(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        images.write_png(tmp_path / f"images/{number}.png", drawn.part(number, (96, 80)))
    path = tmp_path / "b.json"
    words = ["--threads", 1, "--seconds", 0.1, "--rounds", 1, "--batch", 4, "--json", path]
    assert run(tiny.file, "--images", tmp_path / "images", *words) == 0
    assert "Including decoding, resizing" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["images"] == "3 files"
    assert len(record["rows"][0]["stream_seconds"]) >= 3


def test_what_a_process_cannot_open_is_raised_here(tmp_path: Path) -> None:
    opened = bundle.read(MODEL)
    broken = contender(opened=replace(opened, graph=opened.graph[:500]))
    with (
        pytest.raises(ModelFileError, match="ONNX Runtime cannot run the graph"),
        benchmark.worker(broken, Plan(1), ()),
    ):
        pass


def test_a_process_that_is_killed_is_named() -> None:
    """And no other row's, whose process is ended with it."""
    with ExitStack() as stack:
        ask, _ = stack.enter_context(benchmark.worker(contender("one"), Plan(1), ()))
        (process,) = active_children()
        stack.enter_context(benchmark.worker(contender("other"), Plan(1), ()))
        assert len(ask(Burst(1, 1, 2, math.inf))) == 2
        process.kill()
        with pytest.raises(StoppedError, match="the process of one was killed, probably for lack of memory"):
            ask(Burst(1, 1, 2, math.inf))
    assert active_children() == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "efficientad"], "unknown model 'efficientad'; did you mean"),
        (["--model", "supersimplenet", "--backend", "tflite"], "unknown backend 'tflite'"),
        (
            ["--model", "supersimplenet", "--precision", "int8"],
            "expected fp32, or a file exported in int8",
        ),
        (["--model", "supersimplenet", "--device", "npu"], "unknown device 'npu'"),
        (["--model", "supersimplenet", "--set", "colour=red"], "no setting 'colour'"),
        ([MODEL, "--image-size", "64x64"], "a model file has its own"),
        ([MODEL, "--threads", "-1"], "--threads -1: expected at least 0"),
        ([MODEL, "--batch", "0"], "--batch 0: expected at least 1"),
        ([MODEL, "--seconds", "nan"], "--seconds nan: expected more than 0"),
        ([MODEL, "--images", FILES / "nowhere"], "no images in"),
        ([MODEL, "--plain", "--images", FILES], "no images in"),
        (["--compare", MODEL, "--plain"], "write plain:ENTRY instead"),
        ([MODEL, "--json", FILES], "it is a folder"),
        (["nowhere.blemish"], "found no model file at nowhere.blemish"),
        ([], "required"),
    ],
)
def test_refusals(words: list[Any], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""


def test_images_are_judged_by_trained_models_only() -> None:
    for row in (contender(trained=False), contender(network=entries.plain_network)):
        with pytest.raises(ConfigError, match="which cannot judge images; expected a model file"):
            benchmark.run([row], Plan(1), [Path("a.png")])


# --- the comparison with what peers ship ---


@pytest.fixture(scope="module")
def inference(folder_of_benchmarks: None) -> ModuleType:
    return importlib.import_module("inference")


@pytest.mark.parametrize(
    "settings",
    [
        {"statistics": ("maximum", "top_mean")},
        {"upscale": False, "blur_sigma": 0.0, "edges": "blind"},
        {"misplaced": 0, "edges": "none"},
        {"classification_head": True, "statistics": ("head",)},
        {"classification_head": True, "statistics": ("head",), "adapt_classification_features": False},
    ],
)
def test_plain_supersimplenet_gives_our_numbers(inference: ModuleType, settings: dict[str, Any]) -> None:
    detector = build("supersimplenet", configure("supersimplenet", settings=SMALL | settings), 0).eval()
    assert isinstance(detector, SuperSimpleNet)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):
                assert tensor is not None
                tensor.uniform_(low, high)
    detector.ring_gain.uniform_(0.5, 1.0)
    detector.ring_shift.uniform_(-0.2, 0.2)
    batch = torch.rand(2, 3, 64, 64)
    network = inference.plain(detector)
    assert network is not detector
    with torch.no_grad():
        for mine, theirs in zip(detector(batch), network(batch), strict=True):
            assert float((mine - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def test_the_comparison_has_plain_rows_ours_and_exported_files(tiny: Tiny, inference: ModuleType) -> None:
    chosen = {"image_size": "64x64", "layers": "stage1,stage2"}
    rows = inference.rows("supersimplenet", [str(tiny.file)], chosen, ["torch"])
    assert [(row.name, row.network is not None, row.channels_last) for row in rows] == [
        ("plain:torch:fp32", True, False),
        ("plain:torch:fp32 channels last", True, True),
        ("ours:torch:fp32", False, False),
        ("ours:torch:bf16", False, False),
        ("tiny.blemish:onnxruntime:fp32", False, False),
    ]
    assert rows[0].work.flops == rows[1].work.flops != rows[2].work.plain_flops  # counted on plain's own


def test_ours_is_compared_with_the_best_plain_row(inference: ModuleType) -> None:
    benchmarked = found()
    slow, fast = benchmarked.rows
    plain = [
        replace(slow, contender=replace(slow.contender, name="torch", network=entries.plain_network)),
        replace(fast, contender=replace(fast.contender, name="best", network=entries.plain_network)),
    ]
    ours = replace(fast, timings=Timings([[0.002], [0.005]]))
    title, line = inference.against_best(replace(benchmarked, rows=(*plain, ours)))
    assert "best plain row, best" in title
    assert line.split()[1:] == ["2.25", "(2.00", "to", "2.50)"]
    assert inference.against_best(benchmarked) == []
