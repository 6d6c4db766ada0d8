"""Methods that remember good images: few images, new images, copies, order, thresholds, and why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

import blemish
import drawn
from blemish import images
from blemish.cli.main import main
from blemish.data.loading import altering
from blemish.detectors.patchcore import coreset
from blemish.detectors.registry import FIRST, LABELLED
from blemish.errors import ConfigError, DataError
from blemish.inference import bundle
from blemish.inference.calibration import promised_rate
from blemish.inference.engines.pytorch import restored

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"image_size": (64, 64), "layers": ("stage1", "stage2"), "bank_size": 300}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn.tiny_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn.data_set(tmp_path_factory.mktemp("parts"), train=12, good=3, bad=3)


def train(data: Path, out: Path, weights: Path | None, **options: Any) -> blemish.Predictor:
    options = {"model": "patchcore", "settings": SETTINGS, "device": "cpu"} | options
    return blemish.train(data, out=out, weights=weights, **options)


@pytest.fixture(scope="module")
def model(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> blemish.Predictor:
    return train(data, tmp_path_factory.mktemp("model") / "m.blemish", weights)


def tensors(model: blemish.Predictor) -> dict[str, torch.Tensor]:
    return load_tensors(bundle.read(model.path).weights)


# --- thresholds ---


def test_every_good_image_counts_for_the_thresholds(model: blemish.Predictor) -> None:
    calibration, facts = model.calibration, model.manifest.training
    assert (len(calibration.scores), facts.good_images, facts.held_out_images) == (12, 12, 0)
    assert calibration.left_out
    assert calibration.promised_rate == pytest.approx(promised_rate(12, 0, 0.95))


def test_a_score_without_itself_is_that_of_a_model_that_never_had_it(
    data: Path, weights: Path, model: blemish.Predictor, tmp_path: Path
) -> None:
    # All cells are remembered, so that leaving one image's out is fitting to the others.
    everything = SETTINGS | {
        "bank_size": 100_000,
        "candidates": 0,
        "edges": "none",
        "statistics": ("maximum",),
    }
    whole = train(data, tmp_path / "whole.blemish", weights, settings=everything)
    found = []
    for path in sorted((data / "train/good").iterdir())[:3]:
        others = tmp_path / path.stem
        shutil.copytree(data, others)
        (others / "train/good" / path.name).unlink()
        without = train(others, tmp_path / f"{path.stem}.blemish", weights, settings=everything)
        found.append(without.predict(path).score)
    for score in found:
        assert np.abs(np.array(whole.calibration.scores) - score).min() < 0.02 * score


def test_validation_images_are_held_out_where_there_are_some(
    data: Path, weights: Path, tmp_path: Path
) -> None:
    lines = ["image,label,split"]
    for number, path in enumerate(sorted((data / "train/good").iterdir())):
        lines.append(f"{path},good,{'validation' if number % 3 == 0 else 'train'}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    model = train(tmp_path / "table.csv", tmp_path / "m.blemish", weights)
    assert (model.manifest.training.good_images, len(model.calibration.scores)) == (8, 4)
    assert not model.calibration.left_out


@pytest.mark.parametrize("size", [300, 100_000])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_few_good_images_are_enough(
    count: int, size: int, data: Path, weights: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    for number, path in enumerate(sorted((data / "train/good").iterdir())[:count]):
        images.write_png(few / f"{number}.png", images.read(path))
    model = train(few, tmp_path / "m.blemish", weights, settings=SETTINGS | {"bank_size": size})
    assert len(model.calibration.scores) == count
    assert model.calibration.promised_rate == pytest.approx(promised_rate(count, 0, 0.95))
    good = [model.predict(drawn.part(500 + n)).score for n in range(3)]
    bad = [model.predict(drawn.spotted(600 + n)[0]).score for n in range(3)]
    assert min(bad) > max(good)


def test_gaussians_need_three_images(data: Path, weights: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    for number in range(2):
        images.write_png(few / f"{number}.png", drawn.part(number))
    settings = {"image_size": (64, 64), "layers": ("stage1", "stage2"), "dimensions": 8}
    with pytest.raises(ConfigError, match="found 2 good images; this method needs at least 3"):
        train(few, tmp_path / "m.blemish", weights, model="padim", settings=settings)


# --- what is remembered ---


def test_the_order_of_the_files_does_not_matter(
    data: Path, weights: Path, model: blemish.Predictor, tmp_path: Path
) -> None:
    renamed = tmp_path / "parts"
    names = sorted(path.name for path in (data / "train/good").iterdir())
    for old, new in zip(names, reversed(names), strict=True):
        (renamed / "train/good").mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "train/good" / old, renamed / "train/good" / new)
    other = train(renamed, tmp_path / "m.blemish", weights)
    for name, value in tensors(model).items():
        assert torch.equal(value, tensors(other)[name]), name


def test_a_copy_of_an_image_adds_nothing(
    data: Path, weights: Path, model: blemish.Predictor, tmp_path: Path
) -> None:
    copied = tmp_path / "parts"
    shutil.copytree(data, copied)
    first = min((copied / "train/good").iterdir())
    shutil.copy(first, first.with_name("again.png"))
    everything = SETTINGS | {"bank_size": 100_000, "candidates": 0}
    with_copy = tensors(train(copied, tmp_path / "a.blemish", weights, settings=everything))
    without = tensors(train(data, tmp_path / "b.blemish", weights, settings=everything))
    assert len(with_copy["bank"]) == len(without["bank"])
    model = blemish.load(tmp_path / "a.blemish")
    assert len(model.calibration.scores) == 12  # one image is one score, and no better promise
    assert model.manifest.training.good_images == 12


def test_memory_does_not_grow_with_the_number_of_images(weights: Path, tmp_path: Path) -> None:
    from blemish.detectors.patchcore.config import PatchCoreConfig
    from blemish.detectors.patchcore.detector import PatchCore
    from blemish.types import Batch

    config = PatchCoreConfig(**SETTINGS | {"candidates": 400, "bank_size": 50})
    detector = PatchCore(config)

    class Many:
        """Five thousand images, made one after the other."""

        count = 5000

        def __iter__(self) -> Any:
            for number in range(5000):
                draw = torch.Generator().manual_seed(number)
                encoded = tuple(
                    torch.rand(1, size, size, c, generator=draw) for size, c in ((32, 16), (16, 24))
                )
                name = f"{number:064x}"
                yield Batch(torch.empty(0), encoded, torch.zeros(1), torch.ones(1) > 0, names=(name,))

    features, cells, owners = detector.gather(Many(), torch.Generator().manual_seed(0))
    assert len(features) == len(cells) == len(owners) == 400


@pytest.mark.parametrize("size", [1, 5, 64])
def test_batches_change_nothing(
    size: int, data: Path, weights: Path, model: blemish.Predictor, tmp_path: Path
) -> None:
    batched = train(data, tmp_path / "b.blemish", weights, settings=SETTINGS | {"batch_size": size})
    assert batched.manifest.training.notes == model.manifest.training.notes  # as many candidates
    torch.testing.assert_close(tensors(batched)["gain"], tensors(model)["gain"], rtol=0.01, atol=0.01)


def test_something_is_always_left_to_compare_with(data: Path, weights: Path, tmp_path: Path) -> None:
    images.write_png(tmp_path / "one/0.png", drawn.part(0))
    model = train(tmp_path / "one", tmp_path / "m.blemish", weights, settings=SETTINGS | {"bank_size": 1})
    assert np.isfinite(model.calibration.scores).all()


def test_the_least_typical_cells_are_those_unlike_other_images() -> None:
    generator = torch.Generator().manual_seed(0)
    points, owners = torch.randn(200, 3, generator=generator), torch.arange(200) // 50
    points[[10, 60, 110]] += 30  # far from everything, and from each other's images
    points[60] += 30
    points[110] -= 90
    kept = coreset.typical(points, owners, 0.015, generator)
    assert (~kept).nonzero().flatten().tolist() == [10, 60, 110]
    assert coreset.typical(points, torch.zeros(200), 0.5, generator).all()  # of one image nothing is unlike


# --- altered copies ---


def test_what_copies_show_is_remembered_of_their_image(
    data: Path, weights: Path, model: blemish.Predictor, tmp_path: Path
) -> None:
    copied = train(data, tmp_path / "copied.blemish", weights, settings=SETTINGS | {"copies": 4})
    owners, before = tensors(copied)["owners"], tensors(model)["owners"]
    assert set(owners.tolist()) == set(before.tolist())  # copies belong to their images
    path = min((data / "train/good").iterdir())
    darker = tmp_path / "darker.png"
    images.write_png(darker, np.rint(images.read(path) * 0.92).astype(np.uint8))
    rise, rise_before = (one.predict(darker).score - one.predict(path).score for one in (copied, model))
    assert rise < 0.8 * rise_before


def test_copies_are_cached_under_the_limits_that_they_were_made_with(
    data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "cache"

    def names(out: str) -> set[str]:
        options = {"cache": str(shared), "settings": SETTINGS | {"copies": 2}}
        train(data, tmp_path / out, weights, **options)
        return {path.name for path in shared.rglob("*") if path.is_file() and "." in path.name}

    first = names("a.blemish")
    assert len(first) == 12 * (1 + 2)
    assert names("b.blemish") == first
    monkeypatch.setattr(altering, "DIGEST", "others")
    assert len(names("c.blemish")) == 12 * (1 + 2 + 2)


# --- going on ---


@pytest.fixture
def new_parts(tmp_path: Path) -> Path:
    """Draw five good parts that are darker than those before."""
    folder = tmp_path / "new"
    for number in range(5):
        darker = (0.7 * drawn.part(700 + number)).astype(np.uint8)
        images.write_png(folder / f"{number}.png", darker)
    return folder


def test_new_good_images_join_an_earlier_model(
    data: Path, model: blemish.Predictor, new_parts: Path, tmp_path: Path
) -> None:
    grown = train(new_parts, tmp_path / "new.blemish", None, model=None, settings={}, start=model.path)
    old, new = tensors(model)["bank"], tensors(grown)["bank"]
    assert torch.equal(new[: len(old)], old)
    assert len(new) > len(old)
    for path in sorted((data / "train/good").iterdir()):
        before, after = model.predict(path), grown.predict(path)
        assert after.map.max() <= before.map.max() * (1 + 1e-5)
    dark = (0.7 * drawn.part(800)).astype(np.uint8)
    assert grown.predict(dark).score < model.predict(dark).score
    assert len(grown.calibration.scores) == 12 + 5
    assert set(grown.manifest.training.files.names.values()) >= {"0.png", "train/good/000.png"}  # type: ignore[union-attr]


def test_images_that_are_remembered_already_are_left_out(
    data: Path, model: blemish.Predictor, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"was fitted to all 12 good images in .* already; expected new ones"):
        train(data, tmp_path / "new.blemish", None, model=None, settings={}, start=model.path)


def test_what_is_remembered_fixes_some_settings(
    model: blemish.Predictor, new_parts: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"place_weight=2: the weights in .* were trained with place_weight=1"
    ):
        train(
            new_parts,
            tmp_path / "n.blemish",
            None,
            model=None,
            settings={"place_weight": 2},
            start=model.path,
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [("squared", True), ("edges", "none"), ("statistics", ("maximum",)), ("top_share", 0.5)],
)
def test_what_earlier_scores_depend_on_is_fixed(
    name: str, value: Any, model: blemish.Predictor, new_parts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* which cannot be changed"):
        train(new_parts, tmp_path / "n.blemish", None, model=None, settings={name: value}, start=model.path)


def test_light_that_was_remembered_is_fixed(
    model: blemish.Predictor, new_parts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"model": None, "settings": {}, "start": model.path}
    with pytest.raises(ConfigError, match=r"light standardise: what .* remembers was seen with light off"):
        train(new_parts, tmp_path / "n.blemish", None, light="standardise", **options)


def test_the_light_of_all_images_counts(data: Path, weights: Path, new_parts: Path, tmp_path: Path) -> None:
    first = train(data, tmp_path / "lit.blemish", weights, light="standardise")
    grown = train(
        new_parts, tmp_path / "n.blemish", None, model=None, settings={}, start=first.path, light_limit=0.06
    )
    assert grown.manifest.preprocessing.light == first.manifest.preprocessing.light
    before, after = first.manifest.light_calibration, grown.manifest.light_calibration
    assert before is not None
    assert after is not None
    assert len(after.scores) == 12 + 5
    assert set(before.scores) <= set(after.scores)
    assert after.limit == 0.06  # which five images alone could not support


def test_the_white_level_stays(weights: Path, tmp_path: Path) -> None:
    """Images of 12 bits that happen to be dark join a model that has seen brighter ones."""
    for folder, brightest in (("old", 4000), ("new", 900)):
        for number in range(4):
            deep = drawn.part(900 + number).astype(np.uint16) * (brightest // 255)
            images.write_png(tmp_path / folder / f"{number + 4 * (folder == 'new')}.png", deep[..., 0])
    first = train(tmp_path / "old", tmp_path / "old.blemish", weights)
    assert first.manifest.preprocessing.white == 4095
    grown = train(tmp_path / "new", tmp_path / "n.blemish", None, model=None, settings={}, start=first.path)
    assert grown.manifest.preprocessing.white == 4095


def test_another_rate_is_promised_for_all_images(
    model: blemish.Predictor, new_parts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"model": None, "settings": {}, "start": model.path}
    grown = train(new_parts, tmp_path / "n.blemish", None, false_reject_rate=0.3, **options)
    assert grown.calibration.false_reject_rate == 0.3
    assert grown.calibration.defect_threshold < max(grown.calibration.scores)


def test_what_was_chosen_otherwise_cannot_go_on(
    data: Path, weights: Path, new_parts: Path, tmp_path: Path
) -> None:
    first = train(data, tmp_path / "a.blemish", weights, settings=SETTINGS | {"choice": "random"})
    with pytest.raises(ConfigError, match="choice=cover and a bank_size: found choice=random"):
        train(new_parts, tmp_path / "n.blemish", None, model=None, settings={}, start=first.path)


# --- why ---


def test_the_nearest_good_image_and_place_are_named(
    data: Path, model: blemish.Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = drawn.part(0)  # as train/good/000.png
    image[20:28, 40:48] = images.read(data / "train/good/005.png")[20:28, 40:48] // 2
    images.write_png(tmp_path / "part.png", image)
    assert main(["predict", str(model.path), str(tmp_path / "part.png"), "--why"]) == 0
    found = json.loads(capsys.readouterr().out)["nearest"]
    assert found["image"].startswith("train/good/")
    assert (data / found["image"]).is_file()
    x, y = found["worst_xy"]
    assert 32 <= x < 56
    assert 12 <= y < 36
    assert found["distance"] > 0


def test_a_cell_of_a_remembered_image_is_most_like_itself(data: Path, model: blemish.Predictor) -> None:
    detector = restored(bundle.read(model.path))
    path = data / "train/good/003.png"
    inputs = torch.from_numpy(model.preprocessing.inputs(images.read(path)))
    rows = detector.rows(detector.encode(inputs))[0]  # type: ignore[operator]
    names = {name: digest for digest, name in model.manifest.training.files.names.items()}  # type: ignore[union-attr]
    own = int(names["train/good/003.png"][:15], 16)
    mine = detector.owners == own
    distances = torch.cdist(rows, detector.bank[mine])  # type: ignore[index]
    assert torch.equal(distances.argmin(0), detector.origins[mine])  # type: ignore[index]
    assert float(distances.amin(0).max()) < 0.02


def test_a_model_that_remembers_nothing_cannot_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: drawn.Tiny
) -> None:
    images.write_png(tmp_path / "part.png", drawn.part(1))
    assert main(["predict", str(tiny.file), str(tmp_path / "part.png"), "--why"]) == 2
    assert "does not remember good images" in capsys.readouterr().err


# --- the choice of a method ---


def says(told: list[str]) -> Callable[[Any], None]:
    return lambda event: told.append(event.message) if event.message else None


def test_good_images_alone_get_the_first_method(data: Path, weights: Path, tmp_path: Path) -> None:
    told: list[str] = []
    model = train(data, tmp_path / "m.blemish", weights, model=None, budget=60.0, report=says(told))
    assert model.manifest.method == FIRST
    assert any(line.startswith(f"model {FIRST}: ") and "the budget is not needed" in line for line in told)


@pytest.mark.parametrize("options", [{"train_defects": 2}, {"supervision": "none", "steps": 2}])
def test_defects_or_steps_get_a_method_that_is_trained(
    options: dict[str, Any], data: Path, weights: Path, tmp_path: Path
) -> None:
    options = {"steps": 2, "settings": drawn.TINY} | options
    model = train(data, tmp_path / "m.blemish", weights, model=None, **options)
    assert model.manifest.method == LABELLED


# --- eight-bit integers ---


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_rows_are_measured_as_integers_hold_them(
    weight: float, data: Path, weights: Path, tmp_path: Path
) -> None:
    """A row that rounding moved is at a distance from where it is now, and not from where it was."""
    model = train(data, tmp_path / "m.blemish", weights, settings=SETTINGS | {"place_weight": weight})
    detector = restored(bundle.read(model.path))
    network = detector.for_integers(detector.fused(), [])
    columns = network.get_buffer("bank").double()
    steps = columns / (columns.abs().amax(0) / 127)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert (float(network.get_buffer("shares")[-1]) != 1) == bool(weight)  # places are divided among copies
    image = torch.rand(1, 3, 64, 64)
    found, wanted = network(image)[0], detector(image)[0]
    # The rows' own shift is all that is left of the error.
    assert 0 < float((found - wanted).square().mean().sqrt() / wanted.std()) < 0.02


def test_a_model_of_one_image_is_exported(weights: Path, tmp_path: Path) -> None:
    images.write_png(tmp_path / "one/0.png", drawn.part(0))
    model = train(tmp_path / "one", tmp_path / "m.blemish", weights)
    out = tmp_path / "one.onnx"
    found = blemish.export(model.path, tmp_path / "one", out=out, format="onnx")
    assert found["good images"].images == 1
    assert out.exists()


def test_a_model_that_remembers_is_exported_in_integers(
    model: blemish.Predictor, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "int8.blemish"
    found = blemish.export(model.path, data, out=out, format="onnx", precision="int8")
    assert found["good images"].map_error <= 0.05
    record = blemish.load(out).manifest.export
    assert record is not None
    assert not any(name.startswith("MatMul") for name in record.in_floating_point)  # the search, the dearest
