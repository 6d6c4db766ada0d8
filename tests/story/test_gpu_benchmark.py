"""`benchmarks/gpu.py`: its dry run goes through everything, and its checks can fail."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish import seeding
from blemish.demo import dataset
from blemish.detectors import ops, registry
from blemish.detectors.base import Detector
from blemish.detectors.settings import GOOD_ONLY, Config, Method, Preset
from blemish.images import FULL_SCALE, Preprocessing
from blemish.types import Batch

pytestmark = pytest.mark.usefixtures("one_thread", "folder_of_benchmarks")

FOLDER = Path(__file__).parents[2] / "benchmarks"
ALONE = """
import runpy, socket, sys
def refuse(*_):
    raise PermissionError("the dry run asked the network")
socket.socket.connect = socket.getaddrinfo = refuse
sys.path.insert(0, sys.argv[1])
sys.argv = ["gpu.py", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/gpu.py", run_name="__main__")
"""
"""Runs the script as a command, without a network."""


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


# --- the whole ---


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Run everything at its smallest; return the JSON and the page."""
    out = tmp_path_factory.mktemp("gpu") / "found"
    words = [sys.executable, "-c", ALONE, FOLDER, "--out", out, "--dry-run", "--distil"]
    words += ["--minutes", "20"]  # on a busy machine, it takes longer
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, check=False, env=environment, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


def test_the_dry_run_does_everything(dry: tuple[dict[str, Any], str]) -> None:
    found, _ = dry
    assert list(found["methods"]) == list(registry.METHODS)
    assert {each["state"] for each in found["parts"]} == {"done"}
    assert found["about"]["command"] == "python benchmarks/gpu.py --out found --dry-run --distil --minutes 20"
    for name, about in found["methods"].items():
        method = registry.method(name)
        training = about["training"]
        assert about["has_steps"] == training["has_steps"] == method.has_steps
        if method.has_steps:
            assert min(training[key] for key in ("step_ms", "step_alone_ms", "load_ms")) > 0
            assert math.isfinite(training["loss_last"])
        else:
            assert 0 < training["fit_seconds"] < training["seconds"]
        if registry.configure(name).reads_natural_images:
            assert training["natural_ms"] > 0
        assert about["times"].keys() >= {"default"}
        for timed in about["times"].values():
            assert timed["numbers"] > 0
            assert set(timed["variants"]) == {
                f"{form}:{precision}"
                for form in ("plain", "fused", "graph")
                for precision in ("fp32", "bf16")
            }
            for each in timed["variants"].values():
                assert 0 < each["median_ms"] <= each["p95_ms"]
                assert each["images_a_second"].keys() == {"1", "2"}
                assert each["best"] == max(each["images_a_second"].values())
    assert found["distillation"]["small"]["step_ms"] > 0


def test_the_dry_run_compares_both_devices(dry: tuple[dict[str, Any], str]) -> None:
    found, _ = dry
    for name, about in found["methods"].items():
        judging, learning = about["checks"]["judging"], about["checks"]["learning"]
        assert {each["precision"] for each in judging} == {"fp32", "bf16"}
        assert all(each["passed"] for each in judging if each["precision"] == "fp32" and each["limit"])
        # Here the device is the processor, so that what both learn is the same to the bit.
        assert {each["value"] for each in learning} == {0}
        names = " ".join(each["check"] for each in learning)
        assert ("losses of 2 steps" in names) == registry.method(name).has_steps
        labelled = "full" in registry.preset(name, "default").regimes
        assert ("labelled defects" in names) == labelled


def test_the_page_shows_every_method_beside_what_is_published(dry: tuple[dict[str, Any], str]) -> None:
    found, page = dry

    def row(name: str) -> str:
        """Return the first row of a network, which is that beside the published figures."""
        return next(line for line in page.splitlines() if line.startswith(f"| {name} ("))

    for name, about in found["methods"].items():
        assert all(row(f"{name}, {preset}").count(" ms, ") >= 2 for preset in about["times"])
    assert row("efficientad-s, default").endswith("| 2.20 ms, 614/s |  |")
    assert row("efficientad-m, default").endswith("| 4.50 ms, 269/s | 6.00 ms, 204/s |")
    assert row("supersimplenet, default").endswith("|  |  |")  # the paper's network is another
    assert row("supersimplenet, paper").endswith("|  | 9.30 ms, 269/s |")
    assert "FAIL" in module("gpu_page").cell({"value": None, "limit": 0.1, "passed": False})
    assert all(f"| {each['part']} |" in page for each in found["parts"])


# --- time ---


def progress(folder: Path, limit: float) -> Any:
    about: dict[str, Any] = {
        "machine": {"processor": "", "cores": 1, "versions": {}},
        "card": "",
        "date": "",
        "command": "",
    }
    about |= {"cuda": None, "cudnn": None, "minutes": limit / 60, "half": "fp16", "dry_run": True}
    known = module("gpu_page").published()
    found = {"about": about, "methods": {}, "distillation": {}, "published": known, "parts": []}
    return module("gpu").Progress(found, folder, limit)


def test_parts_share_the_time_that_is_left(tmp_path: Path) -> None:
    gpu = module("gpu")
    shares: dict[str, float] = {}

    def work(name: str, seconds: float) -> float:
        return shares.setdefault(name, seconds)

    parts = [
        gpu.Part(name, weight, lambda seconds, name=name: work(name, seconds), ("distillation", name))
        for name, weight in (("a", 1), ("b", 1), ("c", 2))
    ]
    told = progress(tmp_path, 12_000)
    gpu.carry_out(parts, told, "cpu")
    # They take next to no time, so that each leaves all of it to the next.
    assert list(shares.values()) == pytest.approx([3000, 4000, 12_000], abs=60)
    assert told.found["distillation"] == shares
    assert [each["state"] for each in told.found["parts"]] == ["done"] * 3


def test_what_is_cut_off_or_fails_leaves_valid_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "OVERRUN", 0)
    monkeypatch.setattr(module("gpu_times"), "release", lambda device: None)
    begun: dict[str, Any] = {}

    def slow(seconds: float) -> None:
        begun["first half"] = 1
        time.sleep(60)

    def wrong(seconds: float) -> None:
        raise KeyError("nothing\nof the kind")

    def late(seconds: float) -> None:
        time.sleep(60)

    parts = [
        gpu.Part("slow", 1, slow, ("distillation", "slow"), begun, most=0.2),
        gpu.Part("wrong", 1, wrong, ("distillation", "wrong")),
        gpu.Part("late", 1, late, ("distillation", "late")),
        gpu.Part("last", 1, late, ("distillation", "last")),
    ]
    start = time.monotonic()
    told = progress(tmp_path, 3)
    gpu.carry_out(parts, told, "cpu")
    assert time.monotonic() - start < 20
    found = json.loads((tmp_path / "gpu.json").read_text())
    states = {each["part"]: each["state"] for each in found["parts"]}
    assert states == {"slow": "cut off", "wrong": "failed", "late": "cut off", "last": "not reached"}
    assert found["distillation"] == {"slow": {"first half": 1}}
    assert "| last |" in (tmp_path / "gpu.md").read_text()
    assert gpu.failed(found) == ["wrong: KeyError: 'nothing\\nof the kind'"]


def test_what_takes_long_leaves_time_for_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module("gpu")
    monkeypatch.setattr(module("gpu_times"), "release", lambda device: None)
    reached: list[float] = []
    parts = [
        gpu.Part("slow", 1, lambda seconds: time.sleep(60), ("distillation", "slow")),
        gpu.Part("times", 1, reached.append, ("distillation", "times"), {}),
    ]
    told = progress(tmp_path, 4)
    gpu.carry_out(parts, told, "cpu")
    assert [each["state"] for each in told.found["parts"]] == ["cut off", "done"]
    assert 0 < reached[0] <= 1  # half of the half that was meant for it


def test_a_dry_run_cuts_nothing_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "OVERRUN", 0)
    monkeypatch.setattr(module("gpu_times"), "release", lambda device: None)
    states = []
    for patient in (False, True):
        parts = [gpu.Part("slow", 1, lambda seconds: time.sleep(0.3), ("distillation", "slow"), most=0.1)]
        told = progress(tmp_path / str(patient), 60)
        gpu.carry_out(parts, told, "cpu", patient=patient)
        states += [each["state"] for each in told.found["parts"]]
    assert states == ["cut off", "done"]


# --- checks ---


def test_the_same_draws_go_on_where_they_were() -> None:
    def draws(generator: torch.Generator) -> list[Tensor]:
        return [
            torch.rand(3, generator=generator, device=generator.device),
            torch.randint(9, (4,), generator=generator),
            torch.zeros(5).normal_(generator=generator),
            torch.bernoulli(torch.full((6,), 0.5), generator=generator),
            torch.randperm(7, generator=generator),
        ]

    learning = module("gpu_learning")
    expected = [each for seed in (1, 2) for each in draws(seeding.generator(seed))]
    with learning.SameDraws() as mode:
        found = [each for seed in (1, 2) for each in draws(seeding.generator(seed))]
        assert len(mode.twins) == 2
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_same_draws_are_made_on_the_processor_and_moved() -> None:
    class Elsewhere:
        device = torch.device("meta")

        def initial_seed(self) -> int:
            return 1

    mode, there = module("gpu_learning").SameDraws(), Elsewhere()
    calls: list[dict[str, Any]] = []

    def rand(*size: int, **given: Any) -> Tensor:
        calls.append(given)
        return torch.rand(size, **given)

    found = mode.__torch_function__(rand, (), (3,), {"generator": there, "device": "meta"})
    assert found.device.type == "meta"
    assert calls == [{"generator": mode.twin(there), "device": "cpu"}]
    again = torch.Generator().manual_seed(1)
    torch.rand(3, generator=again)
    assert torch.equal(torch.rand(3, generator=mode.twin(there)), torch.rand(3, generator=again))
    with pytest.raises(TypeError):  # a device's generator makes nothing on another device
        mode.__torch_function__(rand, (), (3,), {"generator": there})


def learned(scale: float = 1.0) -> Any:
    """Return a linear map that was trained from zeros to a scale."""
    layer = nn.Linear(4, 1, bias=False)
    nn.init.constant_(layer.weight, scale)
    known = {"weight": torch.zeros(1, 4)}
    losses = [{"loss": 2.0 * scale, "one": 1.0}, {"loss": 1.0, "one": 0.5}]
    preprocessing = Preprocessing((8, 8), FULL_SCALE)
    return module("gpu_learning").Learned(layer, preprocessing, losses, known, "Adam")


def test_a_difference_is_a_share_of_what_is_expected() -> None:
    checks = module("gpu_checks")
    assert checks.change_gap(learned(1.5), learned()) == pytest.approx(0.5)
    assert checks.loss_gap(learned(1.5).losses, learned().losses) == pytest.approx(0.5)
    maps = torch.arange(8.0).reshape(2, 2, 2).numpy()
    assert checks.map_gap(maps + 1, maps) == pytest.approx(1 / maps.std())


def test_a_check_fails_beyond_its_limit_and_where_there_is_no_number() -> None:
    check = module("gpu_checks").Check
    assert check("a", "fp32", 0.1, 0.1).passed
    assert check("a", "fp32", 0.11, 0.1).passed is False
    assert check("a", "fp32", math.nan, 0.1).to_json()["passed"] is False
    assert check("a", "fp32", math.nan, 0.1).to_json()["value"] is None
    assert check("a", "fp32", 9.9).passed is None


# --- a method without steps ---


class Toy(Detector):
    """Maps the distance to the nearest of the images that it was fitted to."""

    wants_images = True
    fitted_buffers = ("bank",)
    bank: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("bank", torch.zeros(1, 3, *config.image_size))

    @override
    def fit(self, batches: Iterable[Batch], generator: torch.Generator) -> str:
        noise = 1e-3 * torch.randn(3, 1, 1, generator=generator, device=generator.device)
        self.bank = torch.cat([batch.images for batch in batches]) + noise
        return ""

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        cells = (images[:, None] - self.bank).square().sum(2).amin(1)
        maps = functional.avg_pool2d(cells[:, None], 3, 1, 1)[:, 0]
        return maps, ops.map_statistics(maps, cells, self.config.statistics)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    config = Config(image_size=(64, 64), batch_size=2)
    method = Method(Toy, config, {"default": Preset({}, GOOD_ONLY)}, has_steps=False)
    monkeypatch.setitem(registry.METHODS, "toy", method)
    job = replace(module("gpu_job").Job.smallest(tmp_path, 0), judged=3)
    for data, count in ((job.parts, 6), (job.few, 5)):
        dataset.draw(data, 0, train=count, test_good=1, per_kind=1, size=64)
    return job


def test_a_fit_is_timed_compared_and_judged(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learning, checks, times = map(module, ("gpu_learning", "gpu_checks", "gpu_times"))
    told = learning.train(toy, "toy")
    assert 0 < told["fit_seconds"] < told["seconds"]
    assert "step_ms" not in told
    (check,) = checks.training(toy, "toy")
    assert (check.name, check.value, check.passed) == ("maps after the fit, rms difference", 0, True)
    assert {each.passed for each in checks.judging(toy, "toy") if each.precision == "fp32"} == {True, None}
    timed = times.inference(toy, "toy", "default", {}, 1.0)
    held = told["images"] * 3 * 64 * 64
    assert timed["numbers"] == held
    assert all(each["median_ms"] > 0 for each in timed["variants"].values())

    def other(self: Toy, batches: Iterable[Batch], generator: torch.Generator) -> str:
        self.bank = torch.cat([batch.images for batch in batches])[:1]
        return ""

    expected = learning.learn(toy, "toy", "cpu")
    monkeypatch.setattr(Toy, "fit", other)
    ((_, gap, limit),) = checks.compared(toy, learning.learn(toy, "toy", "cpu"), expected)
    assert gap > limit
