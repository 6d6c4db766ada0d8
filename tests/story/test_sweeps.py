"""Series of trials: their names, what is trained and what is not, and what is said of them together."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drawn
from blemish.data.folds import Fold
from blemish.errors import ConfigError, DataError, ModelFileError, OutputError, StoppedError
from blemish.sweeps import local, repeats
from blemish.sweeps.repeats import plan, run
from blemish.sweeps.summary import Spread, summarise, table, write_json
from blemish.sweeps.trial import Trial
from blemish.training import run
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


# --- running, with real models ---


def options(tiny: drawn.Tiny, **others: Any) -> dict[str, Any]:
    """Give the options that `tiny` is trained with, but fewer steps."""
    return {
        "model": "supersimplenet",
        "weights": tiny.weights,
        "settings": drawn.TINY,
        "steps": 4,
        "precision": "fp32",
        "device": "cpu",
    } | others


@dataclasses.dataclass(frozen=True)
class Series:
    """Two trials that have ended."""

    trials: list[Trial]
    options: dict[str, Any]
    results: list[tuple[Trial, Evaluation]]


@pytest.fixture(scope="module")
def series(tiny: drawn.Tiny, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Series:
    """Train two seeds, one after the other; tests leave the files as they are."""
    planned = plan(tmp_path_factory.mktemp("series") / "tiny.blemish", 3, 2, None, None)
    given = options(tiny)
    return Series(planned, given, run(planned, tiny.data, given))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*arguments: Any, **given: Any) -> None:
        raise RuntimeError("trained")

    monkeypatch.setattr(run, "train", train)


def test_seeds_are_trained_and_evaluated(series: Series, tiny: drawn.Tiny) -> None:
    assert [trial for trial, _ in series.results] == series.trials
    for trial, evaluation in series.results:
        assert trial.out.is_file()
        assert evaluation.provenance["seed"] == trial.seed
        assert evaluation.provenance["model file"] == trial.out.name
        assert len(evaluation.images) == 8
    first, second = (evaluation for _, evaluation in series.results)
    assert [image.score for image in first.images] != [image.score for image in second.images]


@pytest.mark.usefixtures("no_training")
def test_what_has_ended_is_evaluated_only(
    series: Series, tiny: drawn.Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert figures(run(series.trials, tiny.data, series.options)) == figures(series.results)
    said = capsys.readouterr().err
    assert all(f"{trial.out} has ended before" in said for trial in series.trials)


def figures(results: list[tuple[Trial, Evaluation]]) -> list[Any]:
    return [(trial, evaluation.rows, evaluation.images) for trial, evaluation in results]


@pytest.mark.usefixtures("no_training")
def test_processes_give_the_same_and_say_who_speaks(
    series: Series, tiny: drawn.Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run(series.trials, tiny.data, series.options, jobs=2)
    for (trial, here), (other, there) in zip(series.results, found, strict=True):
        assert other == trial
        assert [image.path for image in there.images] == [image.path for image in here.images]
        # The runtime's sums depend on its threads, in the last digits.
        np.testing.assert_allclose(
            [image.score for image in there.images], [image.score for image in here.images], rtol=1e-4
        )
    said = capfd.readouterr().err
    for trial in series.trials:
        assert f"\n{trial.out.stem}: evaluating: 100%" in f"\n{said}"


def test_an_error_comes_out_of_its_process_and_stops_the_other(tiny: drawn.Tiny, tmp_path: Path) -> None:
    failing, long = plan(tmp_path / "tiny.blemish", 3, 2, None, None)
    checkpoint(failing.out).write_bytes(b"nothing")
    with pytest.raises(ModelFileError, match=r"tiny\.seed3\.blemish\.checkpoint is no checkpoint"):
        run([failing, long], tiny.data, options(tiny, steps=2000), jobs=2)
    assert not long.out.exists()


def checkpoint(out: Path) -> Path:
    return out.with_name(out.name + ".checkpoint")


@pytest.mark.usefixtures("no_training")
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
        ({"weights": Path(drawn.__file__)}, "its training run pretrained is "),
    ],
)
def test_a_file_of_another_run_is_in_the_way(
    series: Series, tiny: drawn.Tiny, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(ModelFileError, match=rf"tiny\.seed3\.blemish is of another run, {text}.*; delete it"):
        run(series.trials, tiny.data, series.options | change)


@pytest.mark.usefixtures("no_training")
def test_a_file_of_another_seed_or_fold_or_data_set_is_in_the_way(
    series: Series, tiny: drawn.Tiny, tmp_path: Path
) -> None:
    out = series.trials[0].out
    with pytest.raises(ModelFileError, match="its training run seed is 3, not 9"):
        run([Trial(9, None, out)], tiny.data, series.options)
    # The images that a fold trains on are others; its test is whatever differs first.
    with pytest.raises(ModelFileError, match="is of another run, its training run "):
        run([Trial(3, Fold(0, 2), out)], tiny.data, series.options)
    with pytest.raises(ModelFileError, match="its training run images is "):
        run([Trial(3, None, out)], drawn.data_set(tmp_path, train=13), series.options)


@pytest.mark.usefixtures("no_training")
def test_nothing_is_trained_before_every_place_is_looked_at(tiny: drawn.Tiny, tmp_path: Path) -> None:
    given, free = options(tiny), Trial(0, None, tmp_path / "free.blemish")
    (tmp_path / "folder.blemish").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        run([free, Trial(1, None, tmp_path / "folder.blemish")], tiny.data, given)
    (tmp_path / "text.blemish").write_text("no model")
    with pytest.raises(ModelFileError, match=r"text\.blemish is no model file"):
        run([free, Trial(1, None, tmp_path / "text.blemish")], tiny.data, given)
    with pytest.raises(DataError, match="fold 1 of 5 would test no defective image"):
        run([free, Trial(0, Fold(0, 5), tmp_path / "fold.blemish")], tiny.data, given)
    good_only = drawn.data_set(tmp_path / "good", good=0, bad=0)
    with pytest.raises(DataError, match="good holds no test images"):
        run([free], good_only, given)
    with pytest.raises(ConfigError, match="found 0 jobs"):
        run([free], tiny.data, given, jobs=0)


# --- running, with a stand-in for training ---


class Trainer:
    """Copies a model file in the place of training one; says with what it was called."""

    def __init__(self, model: Path, fail_at: int = -1) -> None:
        self.model, self.fail_at = model, fail_at
        self.calls: list[dict[str, Any]] = []

    def __call__(self, root: Path, **given: Any) -> None:
        self.calls.append(given)
        if len(self.calls) - 1 == self.fail_at:
            raise StoppedError("stopped after step 3")
        given["out"].write_bytes(self.model.read_bytes())


Use = Callable[..., Trainer]


@pytest.fixture
def trainer(tiny: drawn.Tiny, monkeypatch: pytest.MonkeyPatch) -> Use:
    def use(fail_at: int = -1) -> Trainer:
        made = Trainer(tiny.file, fail_at)
        monkeypatch.setattr(run, "train", made)
        return made

    return use


def test_training_gets_the_options_and_what_belongs_to_the_trial(
    tiny: drawn.Tiny, tmp_path: Path, trainer: Use
) -> None:
    planned = plan(tmp_path / "x.blemish", 1, 2, 2, None)
    used = trainer()
    run(planned, tiny.data, {"model": "supersimplenet", "steps": 3}, layout="mvtec")
    assert used.calls == [
        {
            "model": "supersimplenet",
            "steps": 3,
            "layout": "mvtec",
            "resume": False,
            "seed": trial.seed,
            "fold": trial.fold,
            "out": trial.out,
        }
        for trial in planned
    ]


def test_a_trial_that_was_interrupted_goes_on(tiny: drawn.Tiny, tmp_path: Path, trainer: Use) -> None:
    planned = plan(tmp_path / "x.blemish", 0, 2, None, None)
    checkpoint(planned[1].out).touch()
    used = trainer()
    run(planned, tiny.data, {"model": "supersimplenet"})
    assert [call["resume"] for call in used.calls] == [False, True]


def test_an_error_stops_the_rest_and_what_has_ended_stays(
    tiny: drawn.Tiny, tmp_path: Path, trainer: Use
) -> None:
    planned = plan(tmp_path / "x.blemish", 0, 3, None, None)
    used = trainer(fail_at=1)
    with pytest.raises(StoppedError, match="stopped after step 3"):
        run(planned, tiny.data, {"model": "supersimplenet"})
    assert len(used.calls) == 2
    assert [trial.out.exists() for trial in planned] == [True, False, False]


@pytest.mark.parametrize(("count", "jobs"), [(1, 1), (2, 1), (4, 1), (7, 1), (8, 2), (64, 16)])
def test_trials_share_the_cores(monkeypatch: pytest.MonkeyPatch, count: int, jobs: int) -> None:
    monkeypatch.setattr(repeats, "cores", lambda: count)
    assert local.room("cpu") == jobs


def test_cores_are_those_that_may_be_used() -> None:
    assert 1 <= trials.cores() <= (os.cpu_count() or 1)


def test_a_gpu_runs_one_trial_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(repeats, "cores", lambda: 64)
    assert (local.room("auto"), local.room("cuda"), local.room("cpu")) == (1, 1, 16)


# --- summing up ---


def row(**given: float | None) -> MetricRow:
    nothing: dict[str, Any] = dict.fromkeys(trials.COLUMNS)
    return MetricRow("all", 4, 4, 4, **(nothing | given))


def made_up(seed: int, fold: Fold | None = None, **given: float | None) -> tuple[Trial, Evaluation]:
    calibration = Calibration(("maximum",), (0,), (1,), (0, 1), (0, 1), 0.01, 0.05, 0.95, 0.5, 299, 1, 1, 1)
    evaluation = Evaluation(
        "parts", (row(**given), row(image_ap=0.1)), {}, (), ("one is torn",), calibration, {"steps": 3}, ()
    )
    return Trial(seed, fold, Path(f"x.seed{seed}.blemish")), evaluation


def test_every_metric_has_a_column() -> None:
    counts = {"kind", "good", "defective", "masked"}
    assert set(trials.COLUMNS) == {field.name for field in dataclasses.fields(MetricRow)} - counts


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
    given = {
        "model": "supersimplenet",
        "weights": Path("w.safetensors"),
        "settings": {"layers": ("a", "b")},
    }
    results = folded({3: [0.5, 0.7], 4: [0.6, 0.9]})
    write_json(summarise(results), tmp_path / "series.json", given)
    found = json.loads((tmp_path / "series.json").read_text(encoding="utf-8"))
    assert found["options"] == {
        "model": "supersimplenet",
        "weights": "w.safetensors",
        "settings": {"layers": ["a", "b"]},
    }
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
    write_json(summarise([made_up(0)]), tmp_path / "one.json", {})
    found = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
    assert (found["trials"][0]["fold"], found["over_folds"]) == (None, [])
