"""Sweeps over seeds and folds: the names of trials, what is trained and what is not, and the summary."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drawn
from blemish.data.folds import Fold
from blemish.devices import cores
from blemish.errors import ConfigError, DataError, ModelFileError, OutputError, StoppedError
from blemish.evaluation.metric_table import METRICS
from blemish.inference import bundle
from blemish.progress import Event
from blemish.sweeps import local
from blemish.sweeps.repeats import plan, run
from blemish.sweeps.summary import Spread, summarise, table, write_json
from blemish.sweeps.trial import Trial
from blemish.training.checkpoint import header
from blemish.training.expected import difference, expected
from blemish.training.request import TrainingRequest
from blemish.types import Calibration, Evaluation, MetricRow

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the plan ---


def names(planned: list[Trial]) -> list[str]:
    return [trial.out.name for trial in planned]


def test_one_trial_keeps_its_name() -> None:
    assert plan(Path("a/bottle.blemish"), 5, 1, None, None) == [Trial(5, None, Path("a/bottle.blemish"))]


def test_trials_are_named_by_what_varies() -> None:
    out = Path("a/x.y.blemish")
    assert names(plan(out, 3, 2, None, None)) == ["x.y.seed3.blemish", "x.y.seed4.blemish"]
    assert names(plan(out, 3, 1, 2, None)) == ["x.y.fold1.blemish", "x.y.fold2.blemish"]
    assert names(plan(out, 0, 2, 2, None)) == [
        *("x.y.seed0.fold1.blemish", "x.y.seed0.fold2.blemish"),
        *("x.y.seed1.fold1.blemish", "x.y.seed1.fold2.blemish"),
    ]


def test_every_seed_has_the_same_folds() -> None:
    planned = plan(Path("x.blemish"), 7, 2, 3, Path("f.csv"), fold_seed=5)
    assert [(trial.seed, trial.fold) for trial in planned] == [
        (seed, Fold(index, 3, 5, Path("f.csv"))) for seed in (7, 8) for index in range(3)
    ]


@pytest.mark.parametrize(
    ("seeds", "count", "file"), [(0, None, None), (1, 1, None), (1, 0, None), (1, None, Path("folds.csv"))]
)
def test_a_plan_that_cannot_be_is_refused(seeds: int, count: int | None, file: Path | None) -> None:
    with pytest.raises(ConfigError, match="expected"):
        plan(Path("x.blemish"), 0, seeds, count, file)


# --- running ---


def request(tiny: drawn.Tiny, **changes: Any) -> TrainingRequest:
    """Return the request by which `tiny` was trained, with fewer steps, and with some changes."""
    usual: dict[str, Any] = {
        "data": tiny.data,
        "out": Path("unused.blemish"),
        "model": "supersimplenet",
        "weights": tiny.weights,
        "settings": drawn.TINY,
        "steps": 4,
        "precision": "fp32",
        "device": "cpu",
    }
    return TrainingRequest(**usual | changes)


@dataclasses.dataclass(frozen=True)
class Series:
    """Two trials that have ended."""

    trials: list[Trial]
    base: TrainingRequest
    results: list[tuple[Trial, Evaluation]]
    events: list[Event]


@pytest.fixture(scope="module")
def series(tiny: drawn.Tiny, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Series:
    """Train two seeds, one after the other; tests leave the files as they are."""
    planned = plan(tmp_path_factory.mktemp("series") / "tiny.blemish", 3, 2, None, None)
    base, events = request(tiny), list[Event]()
    return Series(planned, base, run(planned, base, report=events.append), events)


def checkpoint(out: Path) -> Path:
    return out.with_name(out.name + ".checkpoint")


def test_seeds_are_trained_and_evaluated(series: Series) -> None:
    assert [trial for trial, _ in series.results] == series.trials
    for trial, evaluation in series.results:
        assert trial.out.is_file()
        assert evaluation.provenance["seed"] == trial.seed
        assert evaluation.provenance["model file"] == trial.out.name
        assert len(evaluation.images) == 8
    first, second = (evaluation for _, evaluation in series.results)
    assert [image.score for image in first.images] != [image.score for image in second.images]
    phases = [event.phase for event in series.events if event.phase and event.step == 0]
    assert phases == ["encoding", "training", "evaluating"] * 2
    messages = [event.message for event in series.events if event.message.startswith("trial ")]
    assert messages == ["trial 1 of 2: tiny.seed3.blemish", "trial 2 of 2: tiny.seed4.blemish"]


def figures(results: list[tuple[Trial, Evaluation]]) -> list[Any]:
    return [(trial, evaluation.rows, evaluation.images) for trial, evaluation in results]


def test_what_has_ended_is_evaluated_only(series: Series) -> None:
    events: list[Event] = []
    assert figures(run(series.trials, series.base, report=events.append)) == figures(series.results)
    messages = {event.message for event in events}
    for trial in series.trials:
        assert f"{trial.out} is already trained: evaluating it" in messages
    assert {event.phase for event in events} == {"", "evaluating"}


def test_a_trial_has_what_all_have_in_common_and_its_own(tiny: drawn.Tiny, tmp_path: Path) -> None:
    base = request(tiny, layout="mvtec", seed=7)
    for trial in plan(tmp_path / "x.blemish", 1, 2, 2, None):
        own: dict[str, Any] = {"seed": trial.seed, "fold": trial.fold, "out": trial.out}
        assert trial.request(base) == dataclasses.replace(base, **own) != base


def test_a_sweep_that_was_stopped_goes_on_to_the_same_weights(series: Series, tmp_path: Path) -> None:
    trials = [dataclasses.replace(trial, out=tmp_path / trial.out.name) for trial in series.trials]
    with pytest.raises(StoppedError, match="stopped after step 2 of 4"):
        run(trials, series.base, **drawn.stop_after(2))
    assert list(tmp_path.iterdir()) == [checkpoint(trials[0].out)]
    events: list[Event] = []
    (result,) = run(trials[:1], series.base, report=events.append)
    assert "resuming from step 2 of 4" in [event.message for event in events]
    assert figures([(series.trials[0], result[1])]) == figures(series.results[:1])
    assert bundle.read(trials[0].out).weights == bundle.read(series.trials[0].out).weights
    assert list(tmp_path.iterdir()) == [trials[0].out]


def test_an_evaluation_is_stopped_on_request(series: Series) -> None:
    with pytest.raises(StoppedError, match="stopped while evaluating"):
        run(series.trials, series.base, stop=lambda: True)


def test_an_error_stops_the_rest_and_what_has_ended_stays(series: Series, tmp_path: Path) -> None:
    failing, waiting = plan(tmp_path / "tiny.blemish", 5, 2, None, None)
    checkpoint(failing.out).write_bytes(b"nothing")
    before = drawn.snapshot(series.trials[0].out.parent)
    with pytest.raises(ModelFileError, match=r"tiny\.seed5\.blemish\.checkpoint is not a checkpoint"):
        run([series.trials[0], failing, waiting], series.base)
    assert list(tmp_path.iterdir()) == [checkpoint(failing.out)]
    assert drawn.snapshot(series.trials[0].out.parent) == before


# --- in processes ---


def test_processes_give_the_same_and_say_who_reports(
    series: Series,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = tmp_path / "parts"
    shutil.copytree(series.base.data, data)
    (data / "test/good/torn.png").write_bytes(b"torn")
    events: list[Event] = []
    base = dataclasses.replace(series.base, data=data)
    found = run(series.trials, base, jobs=2, report=events.append)
    for (trial, here), (other, there) in zip(series.results, found, strict=True):
        assert other == trial
        assert [image.path for image in there.images] == [image.path for image in here.images]
        # The runtime's sums depend on its threads, in the last digits.
        np.testing.assert_allclose(
            [image.score for image in there.images], [image.score for image in here.images], rtol=1e-4
        )
    names = [trial.out.stem for trial in series.trials]
    for name in names:
        steps = [event.step for event in events if event.phase == "evaluating" and event.source == name]
        assert steps == list(range(10))
    assert {event.source for event in events} == set(names)
    warnings = Counter(record.getMessage().partition(":")[0] for record in caplog.records)
    assert warnings == dict.fromkeys(names, 1)
    assert all("torn.png" in record.getMessage() for record in caplog.records)
    assert capfd.readouterr() == ("", "")


def test_parallel_trials_report_and_stop_on_request(tiny: drawn.Tiny, tmp_path: Path) -> None:
    trials, base = plan(tmp_path / "tiny.blemish", 3, 2, None, None), request(tiny, steps=100_000)
    reached: dict[str, int] = {}
    asked: list[bool] = []

    def report(event: Event) -> None:
        if event.losses:
            assert event.steps == 100_000
            reached[event.source] = event.step

    def stop() -> bool:
        asked.append(len(reached) == 2 and min(reached.values()) >= 3)
        return asked[-1]

    with pytest.raises(
        StoppedError, match="stopped after 0 of 2 trials; run the same command again to continue"
    ):
        run(trials, base, jobs=2, report=report, stop=stop)
    assert asked.count(True) == 1
    assert sorted(tmp_path.iterdir()) == sorted(checkpoint(trial.out) for trial in trials)
    for trial in trials:
        found = header(checkpoint(trial.out))
        assert found["step"] == reached[trial.out.stem] >= 3  # the last report came before the checkpoint
        assert found["run"]["seed"] == trial.seed
    messages: list[str] = []
    with pytest.raises(StoppedError, match="stopped after step "):
        run(trials[1:], base, **drawn.stop_after(2, lambda event: messages.append(event.message)))
    assert f"resuming from step {reached[trials[1].out.stem]} of 100000" in messages


def test_a_request_to_stop_after_the_last_trial_has_ended_is_too_late(series: Series) -> None:
    """Trials that end while they are waited for count, whenever the request came."""
    ended: Counter[str] = Counter()

    def report(event: Event) -> None:
        ended[event.source] += event.phase == "evaluating" and event.step == event.steps

    found = run(series.trials, series.base, jobs=2, report=report, stop=lambda: ended.total() == 2)
    assert [trial for trial, _ in found] == series.trials


def test_an_error_comes_out_of_its_process_and_stops_the_other(tiny: drawn.Tiny, tmp_path: Path) -> None:
    failing, long = plan(tmp_path / "tiny.blemish", 3, 2, None, None)
    checkpoint(failing.out).write_bytes(b"nothing")
    with pytest.raises(ModelFileError, match=r"tiny\.seed3\.blemish\.checkpoint is not a checkpoint"):
        run([failing, long], request(tiny, steps=100_000), jobs=2)
    assert not long.out.exists()


# --- what is in the way ---


def refused(
    trials: list[Trial], base: TrainingRequest, error: type[Exception], says: str, **more: Any
) -> None:
    """Check that a sweep is refused before anything is trained or evaluated."""
    events: list[Event] = []
    with pytest.raises(error, match=says):
        run(trials, base, report=events.append, **more)
    assert events == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "efficientad-s", "settings": {}}, "its training run model is supersimplenet, not effici"),
        ({"preset": "paper"}, "its training run preset is default, not paper"),
        (
            {"settings": drawn.TINY | {"noise_ratio": 0.5}},
            "its training run config noise_ratio is 1.0, not 0.5",
        ),
        ({"steps": 5}, "its training steps is 4, not 5"),
        ({"steps": None, "epochs": 7}, "its training epochs is 4.0, not 7"),
        ({"steps": None}, "its training steps is 4, not "),
        ({"false_reject_rate": 0.05}, "its calibration false_reject_rate is 0.01, not 0.05"),
        ({"light": "standardise"}, "its training run light is off, not standardise"),
        ({"weights": Path(drawn.__file__)}, "its training run pretrained is "),
    ],
)
def test_a_file_of_another_run_is_in_the_way(series: Series, change: dict[str, Any], text: str) -> None:
    base = dataclasses.replace(series.base, **change)
    says = rf"tiny\.seed3\.blemish belongs to another run: {text}.*; delete it"
    refused(series.trials, base, ModelFileError, says)


def test_a_file_of_another_seed_or_fold_or_data_set_is_in_the_way(series: Series, tmp_path: Path) -> None:
    out, base = series.trials[0].out, series.base
    refused([Trial(9, None, out)], base, ModelFileError, "its training run seed is 3, not 9")
    # The images that a fold trains on are others; its test is whatever differs first.
    refused([Trial(3, Fold(0, 2), out)], base, ModelFileError, "belongs to another run: its training run ")
    other = dataclasses.replace(base, data=drawn.data_set(tmp_path, train=13))
    refused([Trial(3, None, out)], other, ModelFileError, "its training run images is ")


def test_what_is_expected_of_a_file_is_what_is_found(series: Series) -> None:
    """Every field, so that none is compared with nothing."""
    for each in series.trials:
        wanted, found = expected(each.request(series.base)), bundle.read(each.out).manifest.to_json()
        assert difference(found, wanted, "") == ""
        compared = {"model", "preset", "seed", "config", "supervision", "light", "images", "from", "held_out"}
        assert wanted["training"]["run"].keys() == compared | {"pretrained"}
        assert wanted["training"].keys() == {"run", "steps"}
        assert found["training"]["run"].keys() > compared


def test_nothing_is_trained_before_every_place_is_looked_at(tiny: drawn.Tiny, tmp_path: Path) -> None:
    base, free = request(tiny), Trial(0, None, tmp_path / "free.blemish")
    (tmp_path / "folder.blemish").mkdir()
    (tmp_path / "text.blemish").write_text("no model")
    good_only = dataclasses.replace(base, data=drawn.data_set(tmp_path / "good", good=0, bad=0))
    folder, text = (Trial(1, None, tmp_path / f"{name}.blemish") for name in ("folder", "text"))
    fold = Trial(0, Fold(0, 5), tmp_path / "fold.blemish")
    refused([free, folder], base, OutputError, "it is a folder")
    refused([free, text], base, ModelFileError, r"text\.blemish is not a model file")
    refused([free, fold], base, DataError, "fold 1 of 5 would have no defective images")
    refused([free], good_only, DataError, "good holds no test images")
    refused([free], base, ConfigError, "found 0 jobs", jobs=0)


# --- how many at a time ---


@pytest.mark.parametrize(("count", "jobs"), [(1, 1), (2, 1), (4, 1), (7, 1), (8, 2), (64, 16)])
def test_trials_share_the_cores(monkeypatch: pytest.MonkeyPatch, count: int, jobs: int) -> None:
    monkeypatch.setattr(local, "cores", lambda: count)
    assert local.default_jobs("cpu") == jobs


def test_cores_are_those_that_may_be_used() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_a_gpu_runs_one_trial_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(local, "cores", lambda: 64)
    assert (local.default_jobs("auto"), local.default_jobs("cuda"), local.default_jobs("cpu")) == (1, 1, 16)


# --- summing up ---


def row(**given: float | None) -> MetricRow:
    nothing: dict[str, Any] = dict.fromkeys(METRICS)
    return MetricRow("all", 4, 4, 4, **(nothing | given))


def made_up(seed: int, fold: Fold | None = None, **given: float | None) -> tuple[Trial, Evaluation]:
    calibration = Calibration(("maximum",), (0,), (1,), (0, 1), (0, 1), 0.01, 0.05, 0.95, 0.5, 299, 1, 1, 1)
    evaluation = Evaluation(
        "parts", (row(**given), row(image_ap=0.1)), {}, (), ("one is torn",), calibration, {"steps": 3}, ()
    )
    return Trial(seed, fold, Path(f"x.seed{seed}.blemish")), evaluation


def test_every_metric_has_a_column() -> None:
    counts = {"kind", "good", "defective", "masked"}
    assert set(METRICS) == {field.name for field in dataclasses.fields(MetricRow)} - counts


def test_seeds_have_a_mean_and_a_deviation() -> None:
    values = [0.9, 0.7, 0.95]
    found = summarise([made_up(seed, image_auroc=value) for seed, value in enumerate(values)])
    assert found.over_folds == {}
    auroc = found.over_seeds["image_auroc"]
    assert auroc.count == 3
    assert auroc.mean == pytest.approx(np.mean(values))
    assert auroc.deviation == pytest.approx(np.std(values, ddof=1))
    assert found.over_seeds["aupro"] == Spread(None, None, 3)


def folded(values: dict[int, list[float]]) -> list[tuple[Trial, Evaluation]]:
    return [
        made_up(seed, Fold(index, len(each)), aupro=value)
        for seed, each in values.items()
        for index, value in enumerate(each)
    ]


def test_the_folds_of_a_seed_are_averaged_first() -> None:
    values = {3: [0.5, 0.8, 0.9], 4: [0.6, 0.7, 0.95]}
    found = summarise(folded(values))
    for seed, each in values.items():
        mean, deviation = np.mean(each), np.std(each, ddof=1)
        assert dataclasses.astuple(found.over_folds[seed]["aupro"]) == pytest.approx((mean, deviation, 3))
    means = [statistics.fmean(each) for each in values.values()]
    expected = (np.mean(means), np.std(means, ddof=1), 2)
    assert dataclasses.astuple(found.over_seeds["aupro"]) == pytest.approx(expected)


def test_a_mean_without_one_of_its_values_is_none() -> None:
    found = summarise([made_up(0, image_auroc=0.9), made_up(1, image_auroc=None)])
    assert found.over_seeds["image_auroc"] == Spread(None, None, 2)


def test_the_table_has_a_line_for_each_trial_and_two_below() -> None:
    found = summarise([made_up(seed, image_auroc=0.9 + seed / 100, aupro=0.5) for seed in (3, 4)])
    assert [line.split() for line in table(found).splitlines()] == [
        ["trial", "AUROC", "AUPRO"],
        ["seed", "3", "0.9300", "0.5000"],
        ["seed", "4", "0.9400", "0.5000"],
        ["mean", "over", "seeds", "0.9350", "0.5000"],
        ["deviation", "over", "seeds", "0.0071", "0.0000"],
    ]


def test_one_trial_has_no_deviation() -> None:
    lines = table(summarise([made_up(3, image_auroc=0.9)])).splitlines()
    assert lines[-2].split() == ["mean", "over", "seeds", "0.9000"]
    assert lines[-1].split() == ["deviation", "over", "seeds", "-"]


def test_folds_have_lines_of_their_own() -> None:
    text = table(summarise(folded({3: [0.5, 0.7], 4: [0.6, 0.9]})))
    assert text.splitlines() == [
        "trial                          AUPRO",
        "seed 3, fold 1                0.5000",
        "seed 3, fold 2                0.7000",
        "seed 3, mean over folds       0.6000",
        "seed 3, deviation over folds  0.1414",
        "seed 4, fold 1                0.6000",
        "seed 4, fold 2                0.9000",
        "seed 4, mean over folds       0.7500",
        "seed 4, deviation over folds  0.2121",
        "mean over seeds               0.6750",
        "deviation over seeds          0.1061",
    ]


def test_a_metric_that_one_trial_lacks_is_shown_as_none() -> None:
    lines = table(summarise([made_up(0, aupro=0.9), made_up(1)])).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["0.9000", "-", "-", "-"]


def test_everything_is_written_down(tmp_path: Path) -> None:
    base = TrainingRequest(
        data=Path("parts"),
        out=Path("x.blemish"),
        model="supersimplenet",
        weights=Path("w.safetensors"),
        settings={"layers": ("a", "b")},
        steps=5,
    )
    results = folded({3: [0.5, 0.7], 4: [0.6, 0.9]})
    write_json(summarise(results), tmp_path / "series.json", base)
    found = json.loads((tmp_path / "series.json").read_text(encoding="utf-8"))
    asked = {"model": "supersimplenet", "weights": "w.safetensors", "settings": {"layers": ["a", "b"]}}
    assert asked.items() <= found["options"].items()
    assert (found["options"]["steps"], found["options"]["supervision"]) == (5, "auto")
    own = {"data", "out", "seed", "fold", "layout", "resume"}  # of the trials, or of no matter to them
    assert found["options"].keys() == base.to_json().keys() - own
    for written, (trial, evaluation) in zip(found["trials"], results, strict=True):
        assert trial.fold is not None
        assert written == {
            "out": str(trial.out),
            "seed": trial.seed,
            "fold": {"number": trial.fold.index + 1, "count": 2, "seed": 0, "file": None},
            "data": "parts",
            "rows": [dataclasses.asdict(each) for each in evaluation.rows],
            "skipped": ["one is torn"],
            "provenance": {"steps": 3},
        }
    assert [each["seed"] for each in found["over_folds"]] == [3, 4]
    assert found["over_folds"][1]["metrics"]["aupro"] == pytest.approx(
        {"mean": 0.75, "deviation": np.std([0.6, 0.9], ddof=1), "count": 2}
    )
    assert found["over_seeds"]["aupro"]["mean"] == pytest.approx(0.675)
    assert found["over_seeds"]["image_ap"] == {"mean": None, "deviation": None, "count": 2}


def test_a_split_of_the_data_set_itself_is_no_fold(tmp_path: Path) -> None:
    base = TrainingRequest(data=Path("parts"), out=Path("x.blemish"))
    write_json(summarise([made_up(0)]), tmp_path / "one.json", base)
    found = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
    assert (found["trials"][0]["fold"], found["over_folds"]) == (None, [])
