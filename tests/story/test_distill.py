"""A teacher learns the backbone's features: in one process, interrupted, and in two processes at once."""

import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import drawn
from blemish import images, seeding
from blemish.backbones import BACKBONES, weights
from blemish.backbones.pdn import PDNS
from blemish.cli import main, options, training
from blemish.data.loading.cache import FeatureCache, Memory
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.detectors import ops
from blemish.detectors.registry import build
from blemish.detectors.registry import configure as configure_method
from blemish.detectors.settings import as_json
from blemish.errors import ConfigError, DataError, ModelFileError, StoppedError
from blemish.files import digest
from blemish.images import Preprocessing
from blemish.progress import Event
from blemish.training import checkpoint, distributed, loop
from blemish.training.distillation import measure, pairs
from blemish.training.distillation import run as distill
from blemish.training.distillation.teacher import Distillation, DistillationConfig, Source, pooling
from blemish.training.fingerprint import digest_all
from blemish.training.request import DistillationRequest
from blemish.types import AnyArray, Batch

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"image_size": "64x64", "crop": "40", "optimiser": "adam"}
STEPS = 4
PAGE = Path(__file__).parents[2] / "docs/distill.md"
COMMON = ["--size", "small", "--source", "efficientnet_lite0", "--precision", "fp32", "--device", "cpu"]
KILLED = """
import json, os, signal, sys
from blemish.training import loop
from blemish.training.distillation.run import run
from blemish.training.request import DistillationRequest
loop.CHECKPOINT_SECONDS = 0

def kill(event):
    if event.phase == "training" and event.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

run(DistillationRequest.from_json(json.loads(sys.argv[1])), report=kill)
"""
"""A distillation with a checkpoint after each step, killed after its third step."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Render 40 images of two sizes, in folders."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(40):
        image = drawn.spotted(number, (80, 96) if number % 2 else (64, 64))[0]
        images.write_png(folder / f"{'ab'[number % 2]}/{number:02}.png", image)
    return folder


def given(photos: Path, out: Path, **changes: Any) -> DistillationRequest:
    """Return the request for a distillation of a few steps."""
    usual: dict[str, Any] = {"source": "efficientnet_lite0", "settings": SETTINGS}
    usual |= {"precision": "fp32", "device": "cpu"} | changes
    if not {"steps", "epochs", "budget"} & set(changes):
        usual["steps"] = STEPS
    return DistillationRequest(images=photos, out=out, **usual)


def run(photos: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Distil for a few steps; report and stop may be among the changes."""
    watched = {name: changes.pop(name) for name in ("report", "stop") if name in changes}
    return distill.run(given(photos, out, **changes), **watched)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distil a teacher without interruption; return its file."""
    out = tmp_path_factory.mktemp("whole") / "teacher.safetensors"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(photos, out)
    torch.set_num_threads(threads)
    return out


def facts(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        found: dict[str, Any] = json.loads(opened.metadata()["blemish"])
    return found


def equal(one: Path, other: Path) -> bool:
    tensors, others = load_file(one), load_file(other)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)


def words(photos: Path, out: Path, *more: str) -> list[str]:
    """Return the arguments of the command that does what `run` does."""
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    return ["distill", str(photos), "--out", str(out), "--steps", str(STEPS), *COMMON, *settings, *more]


# --- the target ---


def unfolded(layers: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Aggregate features word by word as in algorithm 3: patches, resize, pool, join, pool."""
    pooled = []
    for layer in layers:
        count, channels, height, width = layer.shape
        patches = functional.unfold(layer, 3, padding=1).view(count, channels * 9, height, width)
        patches = functional.interpolate(patches, size, mode="bilinear", align_corners=False)
        pooled.append(functional.adaptive_avg_pool1d(patches.permute(0, 2, 3, 1).flatten(0, 2), 1024))
    joined = functional.adaptive_avg_pool1d(torch.cat(pooled, 1), 384)
    return joined.view(count, *size, 384).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet18", ()), ("resnet18", ("layer1", "layer4")), ("efficientnet_lite0", ())],
)
def test_the_target_is_that_of_algorithm_3(name: str, layers: tuple[str, ...]) -> None:
    source = Source(name, layers)
    seen = torch.rand((2, 3, 128, 192), generator=torch.Generator().manual_seed(1))
    features = source.backbone(seen)
    assert len(features) == len(layers or BACKBONES[name].default)
    target = source(seen)
    assert target.shape == (2, 384, 16, 24)
    torch.testing.assert_close(target, unfolded(list(features), (16, 24)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(9216, 1024), (2048, 384), (360, 1024), (5, 5)])
def test_pooling_is_torchs_own(sizes: tuple[int, int]) -> None:
    row = torch.rand((1, sizes[0]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = functional.adaptive_avg_pool1d(row, sizes[1])
    torch.testing.assert_close(row @ pooling(*sizes).T, expected)


def configured(**settings: Any) -> DistillationConfig:
    chosen: dict[str, Any] = {"image_size": "64x64", "crop": "40"} | settings
    return distill.configure("default", "small", "efficientnet_lite0", chosen)


def test_without_padding_the_target_lacks_the_margin_of_the_network() -> None:
    plain = Distillation(configured())
    padded = Distillation(configured(padding="true", crop="0"))
    padded.source = plain.source
    (whole,), (middle,) = padded.encode(torch.ones(1, 3, 128, 128)), plain.encode(torch.ones(1, 3, 128, 128))
    assert torch.equal(middle, whole[:, :, 4:-4, 4:-4])
    for detector, target in ((plain, middle), (padded, whole)):
        assert detector.network(torch.zeros(1, 3, 64, 64)).shape == target.shape


@pytest.mark.parametrize("size", ["small", "medium"])
def test_a_square_of_the_image_has_its_part_of_the_target(size: str) -> None:
    """A network without padding makes of the square what it makes of the image at its place."""
    settings = {"image_size": "64x96", "crop": "44"}
    detector = Distillation(distill.configure("default", size, "efficientnet_lite0", settings))
    shown = torch.rand((3, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    target = detector.network(shown)
    square, part = detector.cropped(shown, target, seeding.generator(0, "step", 1))
    assert square.shape == (3, 3, 44, 44)
    assert part.shape == (3, 384, 3, 3)
    torch.testing.assert_close(detector.network(square), part)
    assert not torch.equal(detector.cropped(shown, target, seeding.generator(0, "step", 2))[0], square)


def test_squares_are_drawn_from_all_over_the_image() -> None:
    detector = Distillation(configured(image_size="64x72", crop="40"))
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), indexing="ij")
    target, shown = torch.stack([rows, columns]).repeat(400, 1, 1, 1), torch.zeros(400, 3, 64, 72)
    part = detector.cropped(shown, target, seeding.generator(0))[1]
    counts = Counter((int(down), int(across)) for down, across in part[:, :, 0, 0].tolist())
    assert set(counts) == set(itertools.product(range(7), range(9)))


def test_the_source_goes_to_the_device_and_not_into_a_checkpoint(tmp_path: Path) -> None:
    file = drawn.weights(tmp_path / "r.safetensors", BACKBONES["resnet18"].build(("layer1",)))
    config = distill.configure("default", "small", "resnet18", {"layers": "layer1"})
    detector = distill.make(config, file, 0, "meta")
    held = [*detector.parameters(), *detector.buffers()]
    source = [*detector.source[0].parameters(), *detector.source[0].buffers()]
    assert {value.device.type for value in [*held, *source]} == {"meta"}
    assert not any(value.requires_grad for value in source)
    names = {name.split(".")[0] for name in detector.state_dict()}
    assert names == {"network", "normalise", "mean", "std"}


def test_a_channel_that_never_changes_is_learned_as_it_is() -> None:
    detector = Distillation(configured())
    mean, variance = torch.full((384,), 2.0), torch.full((384,), 9.0)
    variance[5] = 0
    detector.set_target_moments(mean, variance)
    target = detector.normalised(torch.full((1, 384, 1, 1), 5.0)).flatten()
    assert target[5] == 3
    assert set(target.tolist()) == {1.0, 3.0}


# --- images and views ---


def pairs_of(photos: Path, seen: list[Tensor], seed: int = 0, **settings: Any) -> pairs.Pairs:
    """Pair images with the mean colours of their cells; `seen` receives what is encoded."""

    def encode(large: Tensor) -> tuple[Tensor, ...]:
        seen.append(large)
        return (functional.avg_pool2d(large, 8)[:, :, 4:-4, 4:-4],)

    paths = images.list_images(photos, recursive=True)
    small, large = stored(paths, 64), stored(paths, 128)
    targets = EncodedStore(encode, large, FeatureCache(Memory(0)), "cpu", view=pairs.apply_view)
    return pairs.Pairs(small, targets, configured(**settings), seed)


def stored(paths: list[Path], side: int) -> ImageStore:
    return ImageStore(paths, Preprocessing((side, side), 65535.0), Memory(0))


@pytest.mark.parametrize(("mirror", "grey"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_an_image_and_what_is_encoded_are_seen_alike(photos: Path, mirror: int, grey: int) -> None:
    encoded: list[Tensor] = []
    paired = pairs_of(photos, encoded, mirror=str(mirror), grey=str(grey))
    batch = paired.at(3)
    for (index, _), shown, large in zip(paired.entries(3), batch.images, encoded, strict=True):
        for found, side in ((shown, 64), (large[0], 128)):
            plain = images.resize(images.read(paired.paths[index]), (side, side)).astype(np.float64) / 255
            expected: AnyArray = plain[:, ::-1] if mirror else plain
            if grey:
                luma = 0.299 * expected[..., 0] + 0.587 * expected[..., 1] + 0.114 * expected[..., 2]
                expected = np.stack([luma] * 3, -1)
            np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert batch.encoded[0].shape == (4, 3, 8, 8)


def test_steps_are_a_function_of_the_seed_and_their_number(photos: Path) -> None:
    one, other, third = (pairs_of(photos, [], seed) for seed in (0, 0, 1))
    steps = [one.entries(step) for step in range(200)]
    assert [other.entries(step) for step in reversed(range(200))] == steps[::-1]
    assert [third.entries(step) for step in range(200)] != steps
    assert {index for step in steps[:10] for index, _ in step} == set(range(40))
    views = Counter(view for step in steps for _, view in step)
    assert (views[1] + views[3]) / 800 == pytest.approx(0.5, abs=0.06)
    assert (views[2] + views[3]) / 800 == pytest.approx(0.1, abs=0.04)
    assert len({tuple(view for _, view in step) for step in steps}) > 5


def test_processes_share_a_step(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, targets and squares of both together are those of one alone."""
    paired, detector = pairs_of(photos, []), Distillation(configured())

    def step() -> tuple[Tensor, Tensor]:
        batch = paired.at(1)
        return detector.cropped(batch.images, batch.encoded[0], seeding.generator(0))

    alone, parts = step(), []
    monkeypatch.setattr(distributed, "count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(step())
    for number, both in enumerate(zip(*parts, strict=True)):
        assert torch.equal(torch.stack(both, 1).flatten(0, 1), alone[number])


def test_a_batch_may_be_larger_than_all_images(photos: Path) -> None:
    """Each of the processes then still has as many images as the others."""
    assert len(pairs_of(photos, [], batch_size="64").entries(0)) == 64


def test_moments_of_parts_are_those_of_the_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [3 + torch.randn((count, 5), generator=draw, dtype=torch.float64) for count in (2, 70, 11)]
    moments = [torch.var_mean(part, 0) for part in parts]
    mean, variance = ops.merged_moments(
        torch.tensor([2.0, 70, 11]),
        torch.stack([m for _, m in moments]),
        torch.stack([v for v, _ in moments]),
    )
    expected = torch.var_mean(torch.cat(parts), 0)
    torch.testing.assert_close((variance, mean), expected)


def test_a_tenth_is_held_out_and_no_more_than_a_thousand() -> None:
    for count, held in ((20, 2), (40, 4), (30_000, 1000)):
        paths = [Path(str(number)) for number in range(count)]
        train, held_out = pairs.divide(paths, 0)
        assert len(held_out) == held
        assert {*train, *held_out} == set(paths)
        assert len(train) + held == count
        assert pairs.divide(paths, 0) == (train, held_out) != pairs.divide(paths, 1)


# --- runs ---


def test_a_teacher_learns_and_says_what_it_explains(photos: Path, tmp_path: Path) -> None:
    """The share is measured again here, on the held-out images, in another way."""
    out = tmp_path / "t.safetensors"
    told = run(photos, out, steps=30, settings=SETTINGS | {"mirror": "0", "grey": "0"})
    assert told["history"][-1]["loss"] < 0.7 * told["history"][0]["loss"]
    network = PDNS["pdn_small"]()
    weights.fill(network, out)
    train, held_out = pairs.divide(images.list_images(photos, recursive=True), 0)
    detector = Distillation(configured())
    detector.load_pretrained(weights.find("efficientnet_lite0"))

    def targets(paths: list[Path]) -> Tensor:
        with torch.no_grad():
            return detector.encode(stored(paths, 128).batch(range(len(paths))))[0]

    std, mean = torch.std_mean(targets(train), (0, 2, 3), keepdim=True)
    wanted = (targets(held_out) - mean) / std
    with torch.no_grad():
        found = network(detector.normalise(stored(held_out, 64).batch(range(4))))
    share = 1 - (found - wanted).square().mean() / wanted.var((0, 2, 3)).mean()
    assert told["explained_variance"] == pytest.approx(float(share), abs=2e-3)
    assert 0.2 < share < 1


def test_a_run_that_is_killed_and_resumed_ends_in_the_same_file(photos: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"optimiser": "muon"}
    one, out = tmp_path / "one.safetensors", tmp_path / "killed.safetensors"
    path = tmp_path / "killed.safetensors.checkpoint"
    told = run(photos, one, settings=settings)
    request = json.dumps(given(photos, out, settings=settings).to_json())
    assert ended(["-c", KILLED, request]) == (-signal.SIGKILL, "", "")
    assert checkpoint.header(path)["step"] == 2
    assert not out.exists()
    with pytest.raises(ConfigError, match="belongs to an unfinished run"):
        run(photos, out, settings=settings)
    with another_run(path, processes=2), pytest.raises(ModelFileError, match="its processes is 2, not 1"):
        run(photos, out, settings=settings, resume=True)
    resumed = run(photos, out, settings=settings, resume=True)
    assert equal(one, out)
    # Nothing in the file tells a run that was killed from one that was not, except the time that it took.
    assert {**resumed, "seconds": 0} == {**told, "seconds": 0} == {**facts(out), "seconds": 0}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["killed.safetensors", "one.safetensors"]


@contextmanager
def another_run(path: Path, **changes: Any) -> Iterator[None]:
    """Make a checkpoint one of a run that differs in its fingerprint, for a while."""
    before = path.read_bytes()
    header = checkpoint.header(path)
    header["run"] |= changes
    save_file(load_file(path), path, {"blemish": json.dumps(header)})
    yield
    path.write_bytes(before)


def test_a_run_is_watched_and_stopped_and_goes_on(
    photos: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, events = tmp_path / "t.safetensors", list[Event]()
    with pytest.raises(
        StoppedError, match=r"stopped after step 2 of 4; checkpoint written to .*t\.safetensors\.checkpoint"
    ):
        run(photos, out, **drawn.stop_after(2, events.append))
    assert not out.exists()
    run(photos, out, report=events.append, resume=True)
    assert equal(out, whole)
    assert capfd.readouterr() == ("", "")
    steps = [(event.step, event.steps) for event in events if event.phase == "training"]
    assert steps == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]
    measured = {event.phase: event.steps for event in events if event.phase and event.phase != "training"}
    assert measured == {"measuring the target": 36, "measuring on held-out images": 4}
    messages = [event.message for event in events if event.message]
    assert messages[0] == "distilling efficientnet_lite0 into pdn_small: 36 images, 4 held out"
    assert "resuming from step 2 of 4" in messages


def test_a_request_goes_through_json_and_back(photos: Path, tmp_path: Path) -> None:
    request = given(photos, tmp_path / "t.safetensors", weights="w.pth", budget="10m", memory=0)
    again = DistillationRequest.from_json(json.loads(json.dumps(request.to_json())))
    assert again == request
    assert (again.images, again.weights, again.budget) == (photos, Path("w.pth"), 600.0)
    for changes, says in (
        ({"image": "photos"}, "a request has no field 'image'; did you mean 'images'"),
        ({"data": "parts"}, "a request has no field 'data'; expected one of "),
        ({"size": 5}, r"Expected `str`, got `int` - at `\$\.size`"),
    ):
        with pytest.raises(ConfigError, match=says):
            DistillationRequest.from_json(request.to_json() | changes)


def test_distilling_from_python_takes_the_fields_of_a_request(
    photos: Path, whole: Path, tmp_path: Path
) -> None:
    """With a folder and a file as text, too."""
    out = tmp_path / "t.safetensors"
    fields = {
        name: getattr(given(photos, out), name) for name in ("source", "settings", "steps", "precision")
    }
    assert distill.distill(str(photos), out=str(out), device="cpu", **fields)["steps"] == STEPS
    assert equal(out, whole)


def ended(arguments: list[str]) -> tuple[int, str, str]:
    """Run Python to its end; return its status and what it wrote."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, *arguments]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=100, check=False)
    return done.returncode, done.stdout, done.stderr


def test_two_processes_do_what_one_does(photos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.safetensors"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "blemish.cli"]
    status, printed, said = ended([*torchrun, *words(photos, out)])
    assert status == 0, said
    one, two = facts(whole), facts(out)
    assert (one["run"].pop("processes"), two["run"].pop("processes")) == (1, 2)
    assert two["run"] == one["run"]
    for told, known in zip(two["history"], one["history"], strict=True):
        assert told == pytest.approx(known, rel=1e-5)
    assert two["explained_variance"] == pytest.approx(one["explained_variance"], abs=2e-4)
    for name, value in load_file(whole).items():
        torch.testing.assert_close(load_file(out)[name], value, rtol=2**-9, atol=4e-5)
    assert printed.count("explains") == said.count("distilling ") == said.count("feature cache") == 1
    assert "Error" not in said
    assert list(tmp_path.iterdir()) == [out]


def test_a_cache_changes_no_result(photos: Path, whole: Path, tmp_path: Path) -> None:
    """Nor does what runs with images of another size left in it."""
    out, shared, wide = tmp_path / "t.safetensors", tmp_path / "shared", SETTINGS | {"image_size": "72x64"}
    run(photos, out, memory=0, cache="off")
    assert equal(out, whole)
    run(photos, out, memory=0, cache=shared)
    assert equal(out, whole)
    for number, cache in enumerate((shared, "off")):
        run(photos, tmp_path / f"{number}.safetensors", settings=wide, steps=1, cache=cache)
    assert equal(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    assert len(list(shared.iterdir())) == 2


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return what sets a clock on which each reading takes so many seconds."""

    def tick(seconds: float) -> None:
        clock = SimpleNamespace(monotonic=itertools.count(0.0, seconds).__next__)
        for module in (distill, measure, loop):
            monkeypatch.setattr(module, "time", clock)

    return tick


def test_a_budget_equals_the_steps_that_it_reports(
    photos: Path, tmp_path: Path, slow_clock: Callable[[float], None]
) -> None:
    slow_clock(0.1)
    messages: list[str] = []
    told = run(
        photos,
        tmp_path / "a.safetensors",
        budget="13.5s",
        report=lambda event: messages.append(event.message),
    )
    assert any(f"to repeat this run: --steps {told['steps']}" in message for message in messages)
    assert 20 <= told["steps"] < 30
    run(photos, tmp_path / "b.safetensors", steps=told["steps"])
    assert equal(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_a_budget_keeps_time_for_the_held_out_images(
    photos: Path, tmp_path: Path, slow_clock: Callable[[float], None]
) -> None:
    """An image takes 5 s here, so 30 s are kept for the four held-out ones and the end of the run."""
    slow_clock(5)
    with pytest.raises(ConfigError, match="a budget of 70 s leaves 5 s for training"):
        run(photos, tmp_path / "a.safetensors", budget=70.0)


def test_images_that_cannot_be_read_are_left_out_and_counted(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.list_images(photos, recursive=True)[:20]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "cut.png").write_bytes(images.list_images(photos, recursive=True)[0].read_bytes()[:200])
    assert len(pairs.list_readable(folder)) == 20
    assert caplog.messages == ["leaving out 2 of 22 images, which cannot be read"]
    caplog.clear()
    next(folder.glob("[0-9]*.png")).unlink()
    with pytest.raises(DataError, match=r"found 19 readable images in .*; expected at least 20$"):
        pairs.list_readable(folder)
    assert caplog.messages == []


# --- the file ---


def test_the_file_says_how_it_was_made(photos: Path, whole: Path) -> None:
    told = facts(whole)
    assert {name: told[name] for name in ("network", "source", "source_licence")} == {
        "network": "pdn_small",
        "source": "efficientnet_lite0",
        "source_licence": "Apache-2.0",
    }
    assert (told["images"], told["held_out_images"], told["steps"]) == (36, 4, STEPS)
    assert [point["step"] for point in told["history"]] == [1.0, 2.0, 3.0, 4.0]
    assert told["run"]["pretrained"] == digest_all([digest(weights.find("efficientnet_lite0"))])
    program, *rest = shlex.split(told["command"])
    assert program == "blemish"
    parsed = main.parser().parse_args([*rest, "--out", "x.safetensors"])
    assert parsed.images == Path(photos.name)
    assert (parsed.steps, parsed.seed, parsed.precision) == (STEPS, 0, "fp32")
    again = distill.configure(parsed.preset, parsed.size, parsed.source, options.settings(parsed.set))
    assert as_json(again) == told["run"]["config"]


def test_train_takes_the_file(whole: Path) -> None:
    state = load_file(whole)
    assert {value.dtype for value in state.values()} == {torch.float16}
    detector = build("efficientad-s", configure_method("efficientad-s"), 0)
    detector.load_pretrained(whole)
    seen = torch.rand(1, 3, 256, 256)
    expected = distill.with_weights(configured(), state)(Distillation(configured()).normalise(seen))
    with torch.no_grad():
        torch.testing.assert_close(detector.encode(seen)[0], expected.detach())


def test_the_command_prints_what_is_explained(
    photos: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.safetensors"
    assert main.main(words(photos, out, "--memory", "0")) == 0
    share = 100 * facts(out)["explained_variance"]
    assert capsys.readouterr().out == (
        f"{out}: explains {share:.1f} % of the target's variance on 4 held-out images\n"
    )
    assert equal(out, whole)
    assert list(tmp_path.iterdir()) == [out]  # the features that went into files are gone


# --- settings and refusals ---


def test_the_paper_preset_is_algorithm_3() -> None:
    config = distill.configure("paper", "medium", None, {})
    expected = {
        "size": "medium",
        "source": "wide_resnet101_2",
        "image_size": (256, 256),
        "padding": True,
        "crop": 0,
        "mirror": 0.0,
        "grey": 0.1,
        "optimiser": "adam",
        "learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "schedule": "constant",
        "batch_size": 16,
        "steps": 60_000,
        "epochs": 0,
        "clip_norm": 0.0,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert BACKBONES[config.source].default == ("layer2", "layer3")
    optimizer = Distillation(configured(optimiser="adam", learning_rate="1e-4")).optimizer()
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["weight_decay"] == 1e-5
    assert measure.MAX_STATISTICS_IMAGES == 10_000


def test_the_table_of_settings_is_true() -> None:
    """A row is | `name` | default | paper | what it is |, with "same" where the paper has the default."""
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    default, paper = (vars(distill.configure(preset, "small", None, {})) for preset in distill.PRESETS)
    stated = {name: value for name, value, _ in rows}
    assert stated == {name: shown(value) for name, value in default.items()}
    stated |= {name: value.strip("`") for name, _, value in rows if value != "same"}
    assert stated == {name: shown(value) for name, value in paper.items()}


def shown(value: object) -> str:
    """Return a setting as `--set` takes it."""
    if isinstance(value, tuple):
        return ("x" if value and isinstance(value[0], int) else ",").join(map(str, value)) or "(empty)"
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_command_for_torchrun_exists() -> None:
    (line,) = re.findall(r"^torchrun --nproc-per-node 4 -m blemish.cli (.+)$", PAGE.read_text(), re.M)
    assert main.parser().parse_args(shlex.split(line)).command is training.run_distill


REFUSED: dict[str, tuple[list[str], str]] = {
    "size": (["--size=large"], "setting size=large does not fit; expected 'small' or 'medium'"),
    "size twice": (["--set=size=medium"], "size is given twice: small and the setting size=medium"),
    "source": (["--source=resnet19"], "unknown backbone 'resnet19'; expected one of efficientnet_lite0, "),
    "layer": (["--set=layers=layer2"], "efficientnet_lite0 has no layer 'layer2'"),
    "suffix": (["--out=t.pth"], "--out t.pth: expected a name that ends in .safetensors"),
    "folder": (["--out=."], "cannot write .: it is a folder"),
    "weights": (["--weights=nowhere.pth"], "found no weights file at nowhere.pth"),
    "preset": (["--preset=papper"], "distillation has no preset 'papper'; expected default or paper"),
    "setting": (["--set=crops=64"], "did you mean 'crop'"),
    "no setting": (["--set=crop"], "--set crop: expected KEY=VALUE"),
    "image size": (["--set=image_size=68x64"], "image size 68x64: distillation needs multiples of 8, at "),
    "small images": (["--set=image_size=56x64"], "image size 56x64: distillation needs multiples of 8, at "),
    "crop": (["--set=crop=42"], "expected 0, or without padding a multiple of 4 from 36 to 64"),
    "small crop": (["--set=crop=32"], "crop=32 with padding=false: expected 0, or without padding"),
    "large crop": (["--set=crop=68"], "crop=68 with padding=false: expected 0, or without padding"),
    "padded crop": (["--set=padding=true"], "crop=40 with padding=true: expected 0, or without padding"),
    "probability": (["--set=mirror=1.5"], "setting mirror=1.5 does not fit; expected 0 to 1"),
    "rate": (["--set=learning_rate=0"], "setting learning_rate=0.0 does not fit; expected more than 0"),
    "no number": (["--set=learning_rate=nan"], "learning_rate=nan: expected 0 or more, and finite"),
    "device": (["--device=gpu"], "unknown device 'gpu'"),
    "precision": (["--precision=fp16"], "unknown precision 'fp16'"),
    "length": (["--steps=0"], "steps 0: expected more than 0"),
    "memory": (["--memory=-1"], "memory -1: expected gigabytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    more, says = REFUSED[name]
    refused(words(photos, Path("t.safetensors"), *more), says, tmp_path, monkeypatch, capsys)


def refused(
    arguments: list[str],
    says: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check that a command prints one line, ends with status 2 and writes nothing."""
    monkeypatch.chdir(here)
    before = sorted(here.rglob("*"))
    assert main.main(arguments) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said.count("\n") == 1
    assert said.startswith("blemish: ")
    assert says in said
    assert sorted(here.rglob("*")) == before


def test_images_and_weights_that_will_not_do_are_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, few, junk = tmp_path / "nowhere", tmp_path / "few", tmp_path / "junk.safetensors"
    images.write_png(few / "a.png", drawn.part(1))
    save_file({"one": torch.zeros(1)}, junk)
    for arguments, says in (
        (
            words(nowhere, tmp_path / "t.safetensors"),
            f"found no folder at {nowhere}; expected a folder of natural images",
        ),
        (words(few / "a.png", tmp_path / "t.safetensors"), "a.png; expected a folder of natural images"),
        (words(few, tmp_path / "t.safetensors"), f"found 1 readable images in {few}; expected at least 20"),
        (words(photos, tmp_path / "t.safetensors", "--weights", str(junk)), f"{junk} does not fit: it lacks"),
        (words(photos, tmp_path / "t.safetensors", f"--cache={junk}"), f"cannot write to {junk}"),
    ):
        refused(arguments, says, tmp_path, monkeypatch, capsys)


def test_only_one_length_is_taken(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(words(photos, tmp_path / "t.safetensors", "--budget", "10m"))
    assert "--budget: not allowed with argument --steps" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="steps and budget were both given; expected one of them"):
        run(photos, tmp_path / "t.safetensors", steps=1, budget="10m")


def test_processes_that_do_not_share_evenly_are_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 3)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(ConfigError, match="batch size 4 for 3 processes; expected a multiple of that"):
        run(photos, tmp_path / "t.safetensors")
    with pytest.raises(DataError, match=r"found 40 readable images in .*; expected at least 60"):
        pairs.list_readable(photos)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(
            ConfigError, match="found 2 processes on this machine; expected at most 1, one for each GPU"
        ),
        distributed.joined("cuda"),
    ):
        pass


def test_a_loss_that_is_none_is_refused_by_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process looks at the loss of all of them, so that none waits for one that has given up."""
    detector, none = Distillation(configured(crop="0")), torch.zeros(1)
    batch = Batch(torch.rand(1, 3, 64, 64), (torch.zeros(1, 384, 8, 8),), none, none > 0)
    alone = detector.loss(batch, seeding.generator(0))["distance"]
    monkeypatch.setattr(distributed, "gathered", lambda part: torch.stack([part, torch.full((), math.nan)]))
    assert detector.loss(batch, seeding.generator(0))["distance"].isnan()
    monkeypatch.setattr(distributed, "gathered", lambda part: torch.stack([part, 3 * part]))
    together = detector.loss(batch, seeding.generator(0))["distance"]
    torch.testing.assert_close(together, 2 * alone)
    weight = next(detector.parameters())
    (gradient,), (expected,) = torch.autograd.grad(together, weight), torch.autograd.grad(alone, weight)
    torch.testing.assert_close(gradient, expected)
