"""A run ends in the same bytes however often it is killed, and every number of it follows from the seed."""

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

import drawn
from blemish import images, seeding
from blemish.cli.terminal import stop_requests
from blemish.data.folds import Fold
from blemish.data.loading.batches import Batches, Photographs, readable
from blemish.data.loading.cache import FeatureCache, Memory
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.detectors import registry
from blemish.detectors.schedules import SCHEDULES
from blemish.detectors.supersimplenet.config import SuperSimpleNetConfig
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.errors import ConfigError, DataError, ImageError, ModelFileError, StoppedError
from blemish.evaluation.run import evaluate
from blemish.images import Preprocessing
from blemish.inference import bundle
from blemish.inference.predictor import Predictor
from blemish.progress import Event
from blemish.training import checkpoint, loop, run
from blemish.training.length import Length, seconds
from blemish.training.plan import plan
from blemish.training.request import DistillationRequest, TrainingRequest
from blemish.types import Batch, Sample
from drawn import Tiny

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 30
SCRIPT = """
import sys
from blemish.cli.main import main
from blemish.training import loop
loop.CHECKPOINT_SECONDS = 0
loop.HISTORY = 10
sys.exit(main(sys.argv[1:]))
"""


def command(tiny: Tiny, out: Path, *more: str) -> list[str]:
    """Return the command of a training run that writes a checkpoint after every step."""
    settings = [f"--set={key}={as_word(value)}" for key, value in drawn.TINY.items()]
    words = ["train", tiny.data, "--model", "supersimplenet", "--out", out, "--weights", tiny.weights]
    words += ["--precision", "fp32", "--device", "cpu", *settings, *more]
    return [sys.executable, "-c", SCRIPT, *map(str, words)]


def as_word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def start(words: list[str]) -> subprocess.Popen[str]:
    # One thread: small tensors lose more than they gain by two.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def reached(path: Path) -> int:
    """Return the step of a checkpoint that is replaced over and over; 0 if it is not there yet."""
    try:
        return int(checkpoint.header(path)["step"]) if path.is_file() else 0
    except ModelFileError:
        return 0


def wait_for_step(process: subprocess.Popen[str], path: Path, step: int) -> None:
    """Wait until a run's checkpoint has reached a step."""
    deadline = time.monotonic() + 60
    while reached(path) < step:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.005)


def given(tiny: Tiny, out: Path, **changes: Any) -> TrainingRequest:
    """Return the request by which the tiny model was trained, with some changes."""
    usual: dict[str, Any] = {
        "data": tiny.data,
        "out": out,
        "model": "supersimplenet",
        "weights": tiny.weights,
        "settings": drawn.TINY,
        "precision": "fp32",
        "device": "cpu",
    }
    if not {"steps", "epochs", "budget"} & set(changes):
        usual["steps"] = STEPS
    return TrainingRequest(**usual | changes)


def train(tiny: Tiny, out: Path, **changes: Any) -> Predictor:
    """Train as the tiny model was, with some changes; report and stop may be among them."""
    watched = {name: changes.pop(name) for name in ("report", "stop") if name in changes}
    return run.run(given(tiny, out, **changes), **watched)


def checkpoint_of(out: Path) -> Path:
    return out.with_name(out.name + ".checkpoint")


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Let runs end with their parameters in this list, without the export that takes most of the time."""
    found: list[dict[str, Tensor]] = []

    def keep(path: Path, detector: torch.nn.Module, *arguments: Any) -> None:
        path.write_bytes(b"trained")
        found.append({key: value.clone() for key, value in detector.state_dict().items()})

    monkeypatch.setattr(run, "finalise", keep)
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- the story: killed, killed again, interrupted, and the same in the end ---


def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A point of the loss curve is then the mean over three steps, which a kill may fall between.
    monkeypatch.setattr(loop, "HISTORY", 10)
    train(tiny, tmp_path / "whole.blemish")
    whole = bundle.read(tmp_path / "whole.blemish")
    out, path = tmp_path / "killed.blemish", tmp_path / "killed.blemish.checkpoint"
    for number, step in enumerate((5, 14)):
        resume = ["--resume"] * (number > 0)
        process = start(command(tiny, out, "--steps", str(STEPS), *resume))
        wait_for_step(process, path, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
    assert checkpoint.header(path)["step"] < STEPS
    process = start(command(tiny, out, "--steps", str(STEPS), "--resume"))
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert "resuming from step" in said
    resumed = bundle.read(out)
    assert resumed.weights == whole.weights
    assert resumed.manifest.calibration == whole.manifest.calibration
    histories = [opened.manifest.training.history for opened in (resumed, whole)]
    assert histories[0] == histories[1]
    assert [point["step"] for point in histories[0]] == [3.0 * number for number in range(1, 11)]
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_checkpoint(tiny: Tiny, tmp_path: Path, number: int) -> None:
    out, path = tmp_path / "stopped.blemish", tmp_path / "stopped.blemish.checkpoint"
    process = start(command(tiny, out, "--steps", "100000"))
    wait_for_step(process, path, 2)
    process.send_signal(number)
    stdout, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stdout == ""
    last = said.splitlines()[-1]
    assert last.startswith("blemish: stopped after step ")
    assert "--resume" in last
    assert str(path) in last
    assert "Traceback" not in said
    assert checkpoint.header(path)["step"] == int(last.split()[4])
    assert sorted(tmp_path.iterdir()) == [path]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_stopping_within_the_process_leaves_the_signals_as_they_were(
    tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]]
) -> None:
    before = handlers()

    def interrupt(event: Event) -> None:
        if event.losses and event.step == 4:
            assert handlers() != before
            signal.raise_signal(signal.SIGINT)

    train(tiny, tmp_path / "whole.blemish")
    stopped = pytest.raises(
        StoppedError, match=r"stopped after step 4 of 30; checkpoint written to .*--resume"
    )
    with stopped, stop_requests() as stop:
        train(tiny, tmp_path / "m.blemish", report=interrupt, stop=stop)
    assert handlers() == before
    train(tiny, tmp_path / "m.blemish", resume=True)
    assert equal(*states)


# --- reports and stops ---


def test_a_run_is_watched_and_stopped_from_another_thread(
    tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]]
) -> None:
    out, stop = tmp_path / "m.blemish", threading.Event()
    events: queue.Queue[Event] = queue.Queue(1)  # so that the run is never far ahead of who watches it
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(train, tiny, out, report=events.put, stop=stop.is_set)
        while not ((event := events.get(timeout=60)).losses and event.step == 7):
            pass
        stop.set()
        while not future.done():
            with contextlib.suppress(queue.Empty):
                events.get(timeout=0.05)
        with pytest.raises(
            StoppedError, match=r"stopped after step \d+ of 30; checkpoint written to .*--resume"
        ):
            future.result()
    assert 7 <= checkpoint.header(checkpoint_of(out))["step"] <= 10
    assert states == []
    assert sorted(tmp_path.iterdir()) == [checkpoint_of(out)]
    train(tiny, out, resume=True)
    train(tiny, tmp_path / "whole.blemish")
    assert equal(*states)


def test_a_run_reports_what_it_does_and_the_library_itself_says_nothing(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the library handles no signals")

    monkeypatch.setattr(signal, "signal", refuse)
    events: list[tuple[int, Event]] = []
    asked: list[tuple[str, int]] = []

    def report(event: Event) -> None:
        events.append((threading.get_ident(), event))

    def stop() -> bool:
        if events:
            asked.append((events[-1][1].phase, events[-1][1].step))
        return False

    model = train(tiny, tmp_path / "m.blemish", steps=6, report=report, stop=stop)
    evaluate(model, tiny.data, exhibits=0)
    assert capfd.readouterr() == ("", "")
    assert {thread for thread, _ in events} == {threading.get_ident()}
    phases = {
        phase: [(event.step, event.steps) for _, event in events if event.phase == phase]
        for phase in dict.fromkeys(event.phase for _, event in events if event.phase)
    }
    assert list(phases.items()) == [
        ("encoding", [(step, 7) for step in range(8)]),
        ("training", [(step, 6) for step in range(7)]),
    ]
    # Before each image that is read or encoded, and after each step.
    assert [step for phase, step in asked if phase == "encoding"] == list(range(7))
    assert [step for phase, step in asked if phase == "training"] == [1, 2, 3, 4, 5, 6]
    assert [phase for phase, _ in asked].count("") == 7 + 5
    losses = [event.losses for _, event in events if event.phase == "training"][1:]
    for terms in losses:
        parts = [value for name, value in terms.items() if name != "loss"]
        assert terms["loss"] == pytest.approx(sum(parts), rel=1e-6)
    history = model.manifest.training.history  # a point for each step, as there are so few
    assert history == tuple({"step": float(step)} | dict(terms) for step, terms in enumerate(losses, 1))
    messages = [event.message for _, event in events if event.message]
    assert messages[0] == "reading 7 training and 5 held-out good images"
    assert messages[1].startswith("supervision none: 7 good training images")
    assert {event.source for _, event in events} == {""}


def test_a_run_without_a_report_is_silent(
    tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoppedError):
        train(tiny, tmp_path / "m.blemish", **drawn.stop_after(2))
    train(tiny, tmp_path / "m.blemish", resume=True)
    assert capfd.readouterr() == ("", "")


def test_a_request_to_stop_at_the_last_step_is_too_late(
    tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]]
) -> None:
    train(tiny, tmp_path / "m.blemish", steps=3, **drawn.stop_after(3))
    assert (tmp_path / "m.blemish").is_file()
    assert not checkpoint_of(tmp_path / "m.blemish").exists()


def test_each_training_image_is_opened_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To decode it and to take its digest; of a defect with a mask the header is read once more."""
    data = drawn.data_set(tmp_path / "parts", train_bad=2)
    opened: Counter[Path] = Counter()
    read: Counter[Path] = Counter()
    open_, read_bytes = Path.open, Path.read_bytes

    def counted_open(self: Path, *arguments: Any, **options: Any) -> Any:
        opened[self] += 1
        return open_(self, *arguments, **options)

    def counted_read(self: Path) -> bytes:
        read[self] += 1
        return read_bytes(self)

    monkeypatch.setattr(Path, "open", counted_open)
    monkeypatch.setattr(Path, "read_bytes", counted_read)
    settings = drawn.TINY | {"layers": ("stage2",), "classification_head": False}
    train(tiny, tmp_path / "m.blemish", data=data, settings=settings, steps=2)
    monkeypatch.undo()
    good = sorted((data / "train/good").iterdir())
    defective = sorted((data / "train" / drawn.KIND).iterdir())
    assert {path: opened[path] for path in good} == dict.fromkeys(good, 1)
    assert {path: read[path] for path in (*good, *defective)} == dict.fromkeys((*good, *defective), 1)
    assert not [path for path in opened if data / "test" in path.parents]


# --- requests ---


RICH: dict[str, Any] = {
    "settings": drawn.TINY | {"layers": ("stage2",), "classification_head": False},
    "train_defects": 1,  # 1.0 would be all of them
    "train_masks": "100%",
    "fold": Fold(1, 2, 3),
    "schedule": "paper",
    "false_reject_rate": 0.05,
    "cache": Path("off"),
}


@pytest.mark.parametrize(
    "changes", [{"steps": 3}, RICH | {"steps": 3}, RICH | {"epochs": 2}, RICH | {"budget": "1.5h"}]
)
def test_a_request_goes_through_json_and_back(tiny: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    request = given(tiny, tmp_path / "m.blemish", **changes)
    text = json.dumps(request.to_json(), allow_nan=False)
    again = TrainingRequest.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert dataclasses.replace(again, settings=request.settings) == request  # whose tuples are lists now
    assert plan(again) == plan(request)


def test_a_request_trains_the_same_weights_after_json(
    tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for the folder of that name that the cache is
    request = given(tiny, tmp_path / "m.blemish", **RICH, steps=4, seed=5)
    run.run(request)
    run.run(TrainingRequest.from_json(json.loads(json.dumps(request.to_json()))))
    assert equal(*states)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"setings": {}}, "a request has no field 'setings'; did you mean 'settings'"),
        ({"length": 5}, "a request has no field 'length'; expected one of out, preset,"),
        (
            {"fold": {"index": 0, "count": 2, "number": 1}},
            r"no field 'fold\.number'; expected one of index, count,",
        ),
        ({"data": None}, r"at `\$\.data`"),
        ({"data": 5}, r"at `\$\.data`"),
        ({"steps": "5"}, r"Expected `int \| null`, got `str` - at `\$\.steps`"),
        ({"seed": 1.5}, r"Expected `int`, got `float` - at `\$\.seed`"),
        ({"resume": 1}, r"Expected `bool`, got `int` - at `\$\.resume`"),
        ({"settings": ["steps"]}, r"at `\$\.settings`"),
        ({"train_defects": True}, r"got `bool` - at `\$\.train_defects`"),
        ({"fold": {"index": 0}}, r"missing required field `count` - at `\$\.fold`"),
        ({"steps": 5, "epochs": 5}, "steps and epochs were both given"),
        ({"budget": "5"}, "expected a duration such as"),
        ({"false_reject_rate": 2}, r"false.reject rate is 2\.0"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    record = TrainingRequest(data=Path("parts"), out=Path("m.blemish")).to_json()
    assert TrainingRequest.from_json(record).to_json() == record
    with pytest.raises(ConfigError, match=says):
        TrainingRequest.from_json(record | changes)


@pytest.mark.parametrize("record", [None, 5, [], "train"])
def test_what_is_no_record_is_no_request(record: Any) -> None:
    for kind in (TrainingRequest, DistillationRequest):
        with pytest.raises(ConfigError, match="this is not a valid request: Expected `object`, got"):
            kind.from_json(record)


@pytest.mark.parametrize("name", ["data", "out"])
def test_a_request_without_a_field_that_it_needs_is_refused(name: str) -> None:
    record = TrainingRequest(data=Path("parts"), out=Path("m.blemish")).to_json()
    del record[name]
    with pytest.raises(ConfigError, match=f"missing required field `{name}`"):
        TrainingRequest.from_json(record)


def test_paths_may_be_text_and_a_path_is_never_a_word() -> None:
    """`Path("none")` is a folder of that name; "none" switches the penalty off."""
    texts: dict[str, Any] = {"data": "parts", "out": "m.blemish", "weights": "w", "start": "old.blemish"}
    paths: dict[str, Any] = {name: Path(value) for name, value in texts.items()}
    assert TrainingRequest(**texts) == TrainingRequest(**paths)
    for name in ("cache", "natural_images"):
        said = [
            getattr(TrainingRequest(**texts | {name: choice}), name)
            for choice in ("off", Path("off"), "./off", Path("/data/off"), "a/b", Path("a/b"))
        ]
        assert said == ["off", "./off", "./off", str(Path("/data/off")), "a/b", str(Path("a/b"))]


# --- resuming ---


@pytest.fixture
def stopped(tiny: Tiny, tmp_path: Path) -> Path:
    """Return the model file of a run that stopped after its fourth step."""
    out = tmp_path / "m.blemish"
    with pytest.raises(StoppedError, match="stopped after step 4 of 30"):
        train(tiny, out, **drawn.stop_after(4))
    return out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"settings": drawn.TINY | {"hidden_channels": 17}}, r"its config is .*'hidden_channels': 16.*17"),
        ({"precision": "bf16"}, "its precision is float32, not bfloat16"),
        ({"preset": "paper"}, "its preset is default, not paper"),
        ({"steps": STEPS + 1}, f"belongs to a run of {STEPS} steps; {STEPS + 1} were asked for"),
    ],
)
def test_another_run_is_not_resumed(tiny: Tiny, stopped: Path, changes: dict[str, Any], says: str) -> None:
    path = checkpoint_of(stopped)
    before = path.read_bytes()
    with pytest.raises(ModelFileError, match=says) as raised:
        train(tiny, stopped, resume=True, **{"settings": drawn.TINY} | changes)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == before


def test_a_run_on_other_images_or_weights_is_not_resumed(tiny: Tiny, stopped: Path, tmp_path: Path) -> None:
    root = drawn.data_set(tmp_path / "parts", bad=1)
    (root / "train/good/000.png").write_bytes(images.png_bytes(drawn.part(777)))
    with pytest.raises(ModelFileError, match=r"its (images|held_out) is [0-9a-f]{64}, not [0-9a-f]{64}"):
        train(Tiny(root, tiny.weights, tiny.file, tiny.model), stopped, resume=True)
    other = drawn.tiny_weights(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(ModelFileError, match="its pretrained is "):
        train(Tiny(tiny.data, other, tiny.file, tiny.model), stopped, resume=True)


def test_images_may_move_between_stop_and_resume(
    tiny: Tiny, stopped: Path, tmp_path: Path, states: list[dict[str, Tensor]]
) -> None:
    """The content of the images counts, not where they are."""
    root = drawn.data_set(tmp_path / "elsewhere" / "parts", bad=0)
    train(Tiny(root, tiny.weights, tiny.file, tiny.model), stopped, resume=True)
    train(tiny, tmp_path / "whole.blemish")
    assert equal(*states)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", bytes(500)])
def test_a_damaged_checkpoint_is_refused(tiny: Tiny, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.blemish.checkpoint"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="is not a checkpoint of a training run"):
        train(tiny, tmp_path / "m.blemish", resume=True)
    path.write_bytes(tiny.weights.read_bytes())  # safetensors, but no checkpoint
    with pytest.raises(ModelFileError, match="is not a checkpoint of a training run"):
        train(tiny, tmp_path / "m.blemish", resume=True)


def test_a_truncated_checkpoint_is_refused(tiny: Tiny, stopped: Path) -> None:
    path = checkpoint_of(stopped)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="is not a checkpoint of a training run"):
        train(tiny, stopped, resume=True)


def test_resuming_nothing_starts_anew_and_says_so(
    tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]]
) -> None:
    messages: list[str] = []
    train(
        tiny,
        tmp_path / "m.blemish",
        steps=2,
        resume=True,
        report=lambda event: messages.append(event.message),
    )
    assert any("no checkpoint at" in message for message in messages)
    train(tiny, tmp_path / "m.blemish", steps=2)
    assert equal(*states)


def test_without_resume_a_checkpoint_is_not_overwritten(tiny: Tiny, stopped: Path) -> None:
    path = checkpoint_of(stopped)
    before = path.read_bytes()
    with pytest.raises(
        ConfigError, match="belongs to an unfinished run: continue it with --resume, or delete the file"
    ):
        train(tiny, stopped)
    assert path.read_bytes() == before


def test_a_checkpoint_brings_back_every_number(tmp_path: Path) -> None:
    def making() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        return network, torch.optim.AdamW(network.parameters(), lr=0.1)

    def step(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        network(torch.arange(12.0).view(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, other = making(), making()
    step(*one)
    checkpoint.save(tmp_path / "c", *one, {"step": 1, "notes": ["ä"]})
    assert checkpoint.header(tmp_path / "c") == {"step": 1, "notes": ["ä"]}
    checkpoint.load(tmp_path / "c", *other)
    for made in (one, other):
        step(*made)
    assert equal(one[0].state_dict(), other[0].state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


# --- length ---


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1.5h", 5400), (" 3s ", 3), ("0.5s", 0.5)]
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    "text", ["", "10", "m", "10 m", "-3s", "0s", "0.0h", "1d", "1e3s", "ten minutes", "1s1s"]
)
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a duration such as 90s, 10m or 2h"):
        seconds(text)


@pytest.mark.parametrize(
    ("length", "says"),
    [
        (Length(steps=0), "steps 0: expected more than 0"),
        (Length(epochs=-1), "epochs -1: expected more than 0"),
        (Length(budget=0.0), r"budget 0\.0: expected more than 0"),
        (Length(budget=float("nan")), "budget nan: expected more than 0"),
        (Length(budget=float("inf")), "budget inf: expected more than 0"),
        (Length(steps=1, epochs=1), "steps and epochs were both given"),
        (Length(steps=1, budget=1.0), "steps and budget were both given"),
    ],
)
def test_impossible_lengths_are_refused(length: Length, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        length.check()


def test_epochs_are_counted_in_steps(tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]]) -> None:
    # 12 good images: 5 held out, 7 to train on; batches of 3 make 3 steps an epoch.
    settings = drawn.TINY | {"batch_size": 3}
    train(tiny, tmp_path / "m.blemish", settings=settings, epochs=2)
    train(tiny, tmp_path / "m.blemish", settings=settings, steps=6)
    train(tiny, tmp_path / "m.blemish", settings=settings | {"epochs": 2, "steps": 0}, steps=None)
    assert equal(states[0], states[1])
    assert equal(states[0], states[2])


def test_a_budget_that_is_too_short_is_refused_before_training(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"a budget of 2 s leaves 0 s for training.*expected a budget of at least 1\d s"
    ):
        train(tiny, tmp_path / "m.blemish", budget="2s")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], "itertools.count[float]"]:
    """Return what sets a clock on which each reading takes so many seconds."""

    def tick(step: float) -> "itertools.count[float]":
        elapsed = itertools.count(0.0, step)
        for module in (run, loop):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=elapsed.__next__))
        return elapsed

    return tick


def test_a_budget_equals_the_steps_that_it_reports(
    tiny: Tiny,
    tmp_path: Path,
    states: list[dict[str, Tensor]],
    slow_clock: Callable[[float], "itertools.count[float]"],
) -> None:
    messages: list[str] = []
    slow_clock(0.1)
    train(tiny, tmp_path / "m.blemish", budget="25s", report=lambda event: messages.append(event.message))
    (said,) = (message for message in messages if "--steps " in message)
    steps = int(said.split("--steps ")[1].split(")")[0])
    assert steps >= 20
    train(tiny, tmp_path / "m.blemish", steps=steps)
    assert equal(*states)


def test_a_budget_is_kept(
    tiny: Tiny,
    tmp_path: Path,
    states: list[dict[str, Tensor]],
    slow_clock: Callable[[float], "itertools.count[float]"],
) -> None:
    elapsed = slow_clock(1.0)  # which is read once in every step
    train(tiny, tmp_path / "m.blemish", budget=100.0)
    assert 30 < next(elapsed) <= 100  # some of it is kept for what follows training


# --- draws ---


def test_schedules_have_their_corners() -> None:
    table: dict[str, dict[float, float]] = {
        "constant": {0: 1, 0.5: 1, 1: 1},
        "step-95": {0: 1, 0.9499: 1, 0.95: 0.1, 1: 0.1},
        "step-80-90": {0: 1, 0.7999: 1, 0.8: 0.4, 0.8999: 0.4, 0.9: 0.16, 1: 0.16},
        "one-cycle": {0: 0.05, 0.025: 0.525, 0.05: 1, 0.4999: 1, 0.5: 1, 0.75: 0.505, 1: 0.01},
    }
    assert set(table) == set(SCHEDULES)
    for name, corners in table.items():
        for progress, factor in corners.items():
            assert SCHEDULES[name](progress) == pytest.approx(factor, abs=1e-9), (name, progress)


class Noting(SuperSimpleNet):
    """Notes the learning rates and the seed of every step."""

    def __init__(self, config: SuperSimpleNetConfig) -> None:
        super().__init__(config)
        self.rates: list[list[float]] = []
        self.seeds: list[int] = []

    @override
    def optimizer(self) -> torch.optim.Optimizer:
        self.made = super().optimizer()
        return self.made

    @override
    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        self.rates.append([group["lr"] for group in self.made.param_groups])
        self.seeds.append(generator.initial_seed())
        return super().loss(batch, generator)


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> list[Noting]:
    """List the method "noting", and return the detectors that are built by it."""
    made: list[Noting] = []

    def build(config: SuperSimpleNetConfig) -> Noting:
        made.append(Noting(config))
        return made[-1]

    usual = registry.method("supersimplenet")
    monkeypatch.setitem(registry.METHODS, "noting", dataclasses.replace(usual, build=build))
    return made


def test_the_schedule_sets_the_rates(
    tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]], noting: list[Noting]
) -> None:
    settings = drawn.TINY | {"schedule": "step-80-90"}
    train(tiny, tmp_path / "m.blemish", model="noting", steps=10, settings=settings)
    (detector,) = noting
    expected = [[1e-4 * factor, 1e-2 * factor] for factor in [1] * 8 + [0.4, 0.16]]
    np.testing.assert_allclose(detector.rates, expected)


def test_parts_that_are_not_square_keep_their_shape(tmp_path: Path) -> None:
    data, file = drawn.data_set(tmp_path / "parts", train=8, size=(126, 50)), tmp_path / "m.blemish"
    settings = {"layers": ("stage2",), "hidden_channels": 16, "side": 256}
    weights = drawn.tiny_weights(tmp_path / "lite0.safetensors", layers=("stage2",))
    events = list[Event]()
    model = run.train(
        data, out=file, model="supersimplenet", weights=weights, settings=settings, steps=2, device="cpu",
        report=events.append,
    )  # fmt: skip
    says = "images are 126 x 50: the network sees 416 x 160 (shape kept; 3.3 of the size)"
    assert [event.message for event in events].count(says) == 1
    manifest = model.manifest
    assert (manifest.config["image_size"], manifest.config["side"]) == ([416, 160], 256)
    assert manifest.preprocessing.image_size == (416, 160)
    assert registry.restore(
        manifest.method, manifest.config, bundle.read(file).weights, "m"
    ).config.image_size == (416, 160)
    part = drawn.part(70, (126, 50))
    assert model.predict(part).map.shape == (416, 160)
    assert model.predict(part, full_size=True).map.shape == (126, 50)
    square = drawn.data_set(tmp_path / "square", train=8)
    later = plan(TrainingRequest(data=square, out=tmp_path / "later.blemish", start=file))
    assert (later.config.image_size, later.size_reason) == ((416, 160), "")


def test_the_settings_change_the_result(tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]]) -> None:
    """A setting, a seed and a schedule that did nothing would show here."""
    for changes in (
        {},
        {"seed": 1},
        {"settings": drawn.TINY | {"schedule": "step-95"}},
        {"precision": "bf16"},
    ):
        train(tiny, tmp_path / "m.blemish", steps=3, **changes)
    for one, other in itertools.combinations(states, 2):
        assert not equal(one, other)


def test_the_seed_alone_decides(tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]]) -> None:
    """Neither earlier draws nor the memory for images change a run, and it leaves torch's own draws alone."""
    torch.manual_seed(1)
    untouched = torch.get_rng_state()
    train(tiny, tmp_path / "m.blemish", steps=5)
    assert torch.equal(torch.get_rng_state(), untouched)
    torch.manual_seed(2)
    train(tiny, tmp_path / "m.blemish", steps=5, memory=0)
    assert equal(*states)


def test_every_step_draws_anew(
    tiny: Tiny, tmp_path: Path, states: list[dict[str, Tensor]], noting: list[Noting]
) -> None:
    for seed in (0, 1, 0):
        train(tiny, tmp_path / "m.blemish", model="noting", steps=4, seed=seed)
    first, other, again = (detector.seeds for detector in noting)
    assert len({*first, *other}) == 8
    assert first == again


def test_a_generator_is_of_its_purpose_alone() -> None:
    def number(*arguments: Any) -> float:
        return float(torch.rand(1, generator=seeding.generator(*arguments)))

    labels: list[tuple[Any, ...]] = [
        (0,),
        (1,),
        (0, "step"),
        (0, "step", 1),
        (0, "step", 11),
        (0, "epoch", 1),
    ]
    labels += [(0, "step", 1, 1), (1, "step", 1)]
    assert len({number(*each) for each in labels}) == len(labels)
    assert number(0, "step", 1) == number(0, "step", 1)


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Tiny, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file({key: value * np.nan for key, value in load_file(tiny.weights).items()}, weights)
    with pytest.raises(ConfigError, match="the loss became nan at step 1: lower the learning rate"):
        train(Tiny(tiny.data, weights, tiny.file, tiny.model), tmp_path / "m.blemish")
    assert not (tmp_path / "m.blemish").exists()


# --- stores and batches ---


SMALL = Preprocessing((32, 32), 65535.0)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Render seven images of two sizes."""
    found = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        images.write_png(path, drawn.part(number, (40, 48) if number % 2 else (32, 32)))
        found.append(path)
    return found


def encode(batch: Tensor) -> tuple[Tensor, ...]:
    return batch.mean(1, keepdim=True) / 3, batch[:, :, ::2, ::2].square()


def test_a_budget_of_memory_changes_no_image(paths: list[Path]) -> None:
    size, one = Preprocessing((32, 32), 65535.0), 32 * 32 * 3
    everything = torch.cat(list(ImageStore(paths, size, Memory(1 << 30)).fill().batches()))
    assert everything.shape == (7, 3, 32, 32)
    for budget, kept in ((0, 0), (one - 1, 0), (one, 1), (3 * one, 3), (1 << 30, 7)):
        memory = Memory(budget)
        store = ImageStore(paths, size, memory).fill()
        for _ in range(2):
            assert torch.equal(torch.cat(list(store.batches(size=3))), everything)
        assert len(store.kept) == kept
        assert memory.left == budget - kept * one >= 0


def test_an_image_in_a_store_is_what_prediction_reads(paths: list[Path]) -> None:
    preprocessing = Preprocessing((48, 32), 65535.0)
    store = ImageStore(paths, preprocessing, Memory(0))
    for index, path in enumerate(paths):
        found = store.batch([index]).numpy()
        assert np.array_equal(found, preprocessing.inputs(images.read(path)))


def test_deep_images_set_the_white_level(paths: list[Path], tmp_path: Path) -> None:
    assert ImageStore(paths, SMALL, Memory(0)).fill().maxima == {}
    deep = np.full((32, 32), 1000, np.uint16)
    deep[3, 4] = 3000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    store = ImageStore([*paths, tmp_path / "deep.png"], SMALL, Memory(0)).fill()
    assert store.maxima == {7: 3000}
    assert float(store.batch([7])[0, 0, 3, 4]) == pytest.approx(3000 / 65535)
    before = store.batch([0])
    store.set_white(4095.0)
    assert float(store.batch([7])[0, 0, 3, 4]) == pytest.approx(3000 / 4095)
    assert torch.equal(store.batch([0]), before)  # of 8 bits, whose white is 255


def test_photographs_are_cropped_from_twice_the_size(tmp_path: Path) -> None:
    image = drawn.part(1, (64, 96))
    images.write_png(tmp_path / "p.png", image)
    cropped = ImageStore(
        [tmp_path / "p.png"], Preprocessing((32, 48), 65535.0), Memory(0), crop=True
    ).resized(0)
    assert np.array_equal(cropped, image[16:48, 24:72])


def make_batches(paths: list[Path], **changes: Any) -> Batches:
    samples = [Sample(path, 0, "good") for path in paths]
    store = ImageStore(paths, SMALL, Memory(1 << 30))
    encoded = EncodedStore(encode, store, FeatureCache(Memory(1 << 30)), "cpu")
    return Batches(samples, store, encoded, **{"batch_size": 3, "seed": 0} | changes)


def test_every_image_has_one_turn_in_an_epoch(paths: list[Path]) -> None:
    batches = make_batches(paths)
    assert batches.per_epoch == 3
    epochs = [[batches.entries(step) for step in range(start, start + 3)] for start in range(0, 30, 3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == [(index, 0) for index in range(7)]
        assert [len(entries) for entries in epoch] == [3, 3, 1]
    assert len({tuple(itertools.chain(*epoch)) for epoch in epochs}) > 5
    other = make_batches(paths, seed=1)
    assert any(other.entries(step) != batches.entries(step) for step in range(2))


def test_more_in_a_batch_than_there_are_images_is_all_of_them(paths: list[Path]) -> None:
    batches = make_batches(paths, batch_size=100)
    assert batches.per_epoch == 1
    everything = [(index, 0) for index in range(7)]
    assert all(sorted(batches.entries(step)) == everything for step in range(3))


def same(one: Batch, other: Batch) -> bool:
    tensors = [
        [b.images, *b.encoded, b.labels, b.masked, *([] if b.natural is None else [b.natural])]
        for b in (one, other)
    ]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_a_batch_depends_on_its_step_alone(paths: list[Path]) -> None:
    in_order, backwards = (make_batches(paths, natural=photographs(paths)) for _ in range(2))
    expected = [in_order.at(step) for step in range(8)]
    for step in (7, 2, 3, 3, 0, 1, 6, 5, 4):
        assert same(backwards.at(step), expected[step]), step
    for step, batch in enumerate(expected):
        chosen = [index for index, _ in in_order.entries(step)]
        assert torch.equal(batch.images, in_order.store.batch(chosen))
        assert torch.equal(batch.labels, torch.zeros(len(chosen)))
        assert batch.masked.all()
        assert batch.masks is None
        assert batch.weights is None
        assert batch.natural is not None
        assert batch.natural.shape == batch.images.shape
        assert all(len(part) == len(chosen) for part in batch.encoded)


def photographs(paths: list[Path]) -> Photographs:
    return Photographs(ImageStore(paths, SMALL, Memory(0), crop=True), 0, "the digest")


def test_photographs_are_drawn_from_all_of_them(paths: list[Path]) -> None:
    chosen = photographs(paths)
    all_of_them = chosen.store.batch(range(7))
    batches, seen = make_batches(paths, natural=chosen), Counter[int]()
    for step in range(30):
        natural = batches.read(step)[1]
        assert natural is not None
        for one in natural:
            seen[next(n for n in range(7) if torch.equal(one, all_of_them[n]))] += 1
    assert set(seen) == set(range(7))


def test_a_photograph_that_cannot_be_read_gives_its_turn_to_the_next(paths: list[Path]) -> None:
    chosen = photographs(paths)
    paths[4].write_bytes(b"none")
    batches = make_batches(paths, natural=chosen, batch_size=7, with_images=False)
    others = chosen.store.batch([0, 1, 2, 3, 5, 6])
    for step in range(5):
        natural = batches.read(step)[1]
        assert natural is not None
        assert all(any(torch.equal(one, other) for other in others) for one in natural)
    for path in paths:
        path.write_bytes(b"none")
    with pytest.raises(DataError, match=r"none of the 7 photographs, such as .*, can be read"):
        readable(chosen.store, 3)


def test_without_images_none_are_decoded(paths: list[Path]) -> None:
    batches = make_batches(paths, with_images=False)
    assert batches.at(0).images.numel() == 0
    assert batches.at(0).natural is None


def test_an_unreadable_image_is_named(paths: list[Path]) -> None:
    paths[4].write_bytes(paths[4].read_bytes()[:200])
    with pytest.raises(ImageError, match=r"4\.png is damaged or truncated"):
        ImageStore(paths, SMALL, Memory(0)).fill()
