"""EfficientAD's switches: each row of the paper's ablation, the share of each half, and sight to the edge."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch.nn import functional

import drawn
from blemish import seeding
from blemish.backbones import IMAGENET
from blemish.backbones.pdn import CHANNELS, PDNS
from blemish.cli.main import main, parser
from blemish.cli.training import request_of
from blemish.detectors.efficientad import detector as implementation
from blemish.detectors.efficientad.config import EfficientADConfig
from blemish.detectors.efficientad.detector import EfficientAD
from blemish.detectors.muon import Muon
from blemish.detectors.registry import build, configure
from blemish.errors import ConfigError
from blemish.files import short_digest
from blemish.images import Preprocessing
from blemish.images.reading import read
from blemish.images.resizing import to_input
from blemish.inference import bundle
from blemish.inference.choice import Choice
from blemish.inference.engines import open_graph
from blemish.inference.manifest import Manifest
from blemish.testing.slim import slimmer
from blemish.training import run
from blemish.types import Batch

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

SIZE = (256, 288)
EXACT = {"hard_quantile": 0.0, "dropout": 0.0, "crop": 0}
"""Settings under which a loss can be written down in a line."""


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, pdn in list(PDNS.items()):
            patch.setitem(PDNS, name, slimmer(pdn, 32))
        yield


def detector(**settings: Any) -> EfficientAD:
    """Build one whose weights carry the image through, and whose teacher's statistics are not neutral."""
    built = build("efficientad-s", configure("efficientad-s", settings={"image_size": SIZE} | settings), 0)
    assert isinstance(built, EfficientAD)
    if built.autoencoder is not None:  # as it is drawn, it says the same of every image
        for weight in (each for each in built.autoencoder.parameters() if each.ndim > 1):
            weight.data.mul_(math.sqrt(6))
    built.teacher_mean.fill_(0.1)
    built.teacher_std.fill_(0.5)
    return built.eval()


def parts(*numbers: int) -> Tensor:
    return torch.from_numpy(np.stack([to_input(drawn.part(number, SIZE)) for number in numbers]))


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    return (images - mean) / std


def with_rim(images: Tensor) -> Tensor:
    """Reflect 16 pixels on each side, by NumPy."""
    return torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (16, 16), (16, 16)), "reflect"))


def errors(d: EfficientAD, images: Tensor, *, rim: bool = False) -> tuple[Tensor, Tensor]:
    """Return (B, 384, h, w) squared errors of the student: of the teacher, and of the autoencoder."""
    seen = normalised(with_rim(images) if rim else images)
    student = d.student(seen)
    described = (d.teacher(seen) - 0.1) / 0.5
    assert d.autoencoder is not None
    rebuilt = d.autoencoder(normalised(images))
    return (described - student[:, :CHANNELS]).square(), (rebuilt - student[:, CHANNELS:]).square()


def raw(d: EfficientAD, images: Tensor) -> list[Tensor]:
    return [error.mean(1) for error in errors(d, images)]


def whole(cells: Tensor, margin: int = 4) -> Tensor:
    """Pad (B, h, w) cells by zeros and resize them to the image."""
    padded = functional.pad(cells, (margin,) * 4)
    return functional.interpolate(padded[:, None], SIZE, mode="bilinear", align_corners=False)[:, 0]


def losses(d: EfficientAD, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return the terms of the loss of one image; the photograph and the augmented image are two others."""
    monkeypatch.setattr(implementation, "jitter", lambda images, generator: parts(3))
    monkeypatch.setattr(implementation, "sometimes_grey", lambda images, probability, generator: images)
    good = torch.zeros(1)
    with torch.no_grad():
        batch = Batch(parts(1), d.encode(parts(1)), good, good == 0, natural=parts(2))
        return d.loss(batch, seeding.generator(0))


# --- the rows of the ablation ---


def test_without_map_normalisation_the_raw_maps_are_averaged() -> None:
    d, images = detector(map_normalisation=False), parts(1, 2)
    with torch.no_grad():
        d.finish([images])
        maps, _, structural, logical = d(images)
        expected = raw(d, images)
    torch.testing.assert_close(structural, expected[0])
    torch.testing.assert_close(logical, expected[1])
    torch.testing.assert_close(maps, whole((expected[0] + expected[1]) / 2))


def test_with_map_normalisation_each_half_is_scaled_by_its_own_quantiles() -> None:
    d, held_out, images = detector(), parts(1, 2), parts(3)
    with torch.no_grad():
        d.finish([held_out[:1], held_out[1:]])
        found = d(images)[2:]
        for half, seen, measured in zip(found, raw(d, images), raw(d, held_out), strict=True):
            low, high = np.quantile(measured.numpy(), (0.9, 0.995))
            torch.testing.assert_close(half, 0.1 * (seen - low) / (high - low), rtol=1e-3, atol=1e-4)


def test_quantiles_of_an_earlier_model_do_not_return_where_maps_are_left_raw(tmp_path: Path) -> None:
    earlier = detector().state_dict()
    earlier["teacher_mean"] += 1
    earlier["quantiles"] += 1
    d = detector(map_normalisation=False)
    manifest = Manifest.untrained("efficientad-s", {}, Preprocessing(SIZE, 65535.0), d.outputs)
    run.load_weights(d, bundle.Bundle(tmp_path / "old.blemish", manifest, save(earlier), b""), None)
    assert torch.equal(d.teacher_mean, earlier["teacher_mean"])
    assert d.quantiles.tolist() == pytest.approx([0, 0.1, 0, 0.1])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_student_learns_from_all_errors_or_from_the_largest(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = detector(hard_quantile=share, crop=0)
    found = losses(d, monkeypatch)["hard"]
    with torch.no_grad():
        error = errors(d, parts(1))[0]
    hardest = error[error >= error.median()] if share else error
    torch.testing.assert_close(found, hardest.mean())


def test_without_the_penalty_photographs_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    on, off = detector(**EXACT), detector(penalty=False, **EXACT)
    assert on.config.reads_natural_images
    assert not off.config.reads_natural_images
    found, without = losses(on, monkeypatch), losses(off, monkeypatch)
    with torch.no_grad():
        penalty = on.student(normalised(parts(2)))[:, :CHANNELS].square().mean()
    torch.testing.assert_close(found.pop("penalty"), penalty)
    torch.testing.assert_close(found, without)


def test_without_the_autoencoder_there_is_no_trace_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    d, images = detector(autoencoder=False, map_normalisation=False), parts(1)
    assert not any(name.startswith("autoencoder") for name in d.state_dict())
    assert d.student(normalised(images)).shape == (1, CHANNELS, 56, 64)
    assert set(losses(d, monkeypatch)) == {"hard", "penalty"}
    with torch.no_grad():
        maps, statistics = d(images)
        expected = ((d.teacher(normalised(images)) - 0.1) / 0.5 - d.student(normalised(images))).square()
    assert d.outputs == ("map", "statistics")
    torch.testing.assert_close(maps, whole(expected.mean(1)))
    torch.testing.assert_close(statistics[:, 0], maps.amax((1, 2)))


# --- the share of each half ---


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_the_map_is_made_of_both_halves_by_their_weights(weight: float) -> None:
    d, images = detector(logical_weight=weight), parts(1, 2)
    with torch.no_grad():
        d.finish([images])
        maps, statistics, structural, logical = d(images)
    assert not torch.allclose(structural, logical, rtol=0.1)
    torch.testing.assert_close(maps, whole((1 - weight) * structural + weight * logical))
    torch.testing.assert_close(statistics[:, 0], maps.amax((1, 2)))


def test_the_weight_changes_nothing_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [losses(detector(logical_weight=weight), monkeypatch) for weight in (0.0, 0.5)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


# --- to the edge ---


@pytest.mark.parametrize("name", ["small", "medium"])
def test_inside_the_teacher_sees_the_same_with_and_without_a_rim(name: str) -> None:
    images = parts(1)
    blind, reflect = detector(size=name), detector(size=name, edges="reflect")
    with torch.no_grad():
        (less,), (more,) = blind.encode(images), reflect.encode(images)
    assert less.shape == (1, CHANNELS, 56, 64)
    assert more.shape == (1, CHANNELS, 64, 72)
    torch.testing.assert_close(more[:, :, 4:-4, 4:-4], less)


def test_maps_with_a_rim_are_those_of_an_image_reflected_before() -> None:
    d, images = detector(edges="reflect", map_normalisation=False), parts(1, 2)
    with torch.no_grad():
        maps, _, structural, logical = d(images)
        expected = [error.mean(1) for error in errors(d, images, rim=True)]
    assert structural.shape == logical.shape == (2, 64, 72)
    torch.testing.assert_close(structural, expected[0])
    torch.testing.assert_close(logical, expected[1])
    torch.testing.assert_close(maps, whole((structural + logical) / 2, margin=0))


def test_quantiles_are_of_the_whole_map() -> None:
    d, images = detector(edges="reflect"), parts(1)
    with torch.no_grad():
        d.finish([images])
        halves = d.raw_maps(images)
    expected = [np.quantile(half.numpy(), share) for half in halves for share in (0.9, 0.995)]
    np.testing.assert_allclose(d.quantiles.numpy(), expected, rtol=1e-5)


def test_an_image_is_as_far_off_as_the_covariance_of_good_ones_says() -> None:
    d, good, others = detector(statistics=("maximum", "whole_image")), parts(*range(12)), parts(20, 21)
    with torch.no_grad():
        none = torch.zeros(1)
        d.settle(Batch(image[None], (), none, none == 0) for image in good)
        summaries, seen = (
            d.student(normalised(images))[:, :CHANNELS].mean((2, 3)).double() for images in (good, others)
        )
        found = d(others)[1][:, 1]
    covariance = ledoit_wolf(summaries.numpy())[0] * 12 / 11  # of the mean known by 12 images
    apart = (seen - summaries.mean(0)).numpy()
    expected = np.sqrt(np.einsum("nd,de,ne->n", apart, np.linalg.inv(covariance), apart))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)


SQUARES = [(3, 40), (0, 0), (21, 7)]
"""First cells of what is shown of the image, the photograph and the augmented image: all different."""


@pytest.mark.parametrize("crop", [0, 128])
@pytest.mark.parametrize("rim", [False, True])
def test_every_term_of_the_loss_sees_as_scoring_does(
    rim: bool, crop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = detector(edges="reflect" if rim else "blind", **EXACT | {"crop": crop})
    if crop:
        monkeypatch.setattr(EfficientAD, "sample_origins", lambda *arguments: SQUARES)
    found = losses(d, monkeypatch)

    def shown(cells: Tensor, number: int) -> Tensor:
        down, across = SQUARES[number]
        return cells[:, :, down : down + 24, across : across + 24] if crop else cells

    with torch.no_grad():
        hard, _ = errors(d, parts(1), rim=rim)
        seen = normalised(with_rim(parts(2)) if rim else parts(2))
        penalty = d.student(seen)[:, :CHANNELS]
        _, student = errors(d, parts(3), rim=rim)
        augmented = normalised(with_rim(parts(3)) if rim else parts(3))
        assert d.autoencoder is not None
        rebuilt = (d.teacher(augmented) - 0.1) / 0.5 - d.autoencoder(normalised(parts(3)))
    expected = {
        "hard": shown(hard, 0).mean(),
        "penalty": shown(penalty, 1).square().mean(),
        "autoencoder": shown(rebuilt, 2).square().mean(),
        "student_autoencoder": shown(student, 2).mean(),
    }
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("edges", ["blind", "reflect"])
def test_squares_are_drawn_from_all_over_an_image_and_no_further(edges: str) -> None:
    d, draw = detector(edges=edges, crop=64), seeding.generator(0)
    seen = d.surround(torch.zeros(500, 3, *SIZE))
    places = d.sample_origins(seen, draw)
    for axis, length in enumerate(seen.shape[2:]):
        firsts = {place[axis] for place in places}
        assert (min(firsts), max(firsts)) == (0, (length - 64) // 4)
    assert detector(edges=edges, crop=0).sample_origins(seen, draw) == []


def test_the_optimiser_is_the_one_asked_for() -> None:
    assert isinstance(detector(optimiser="adam").optimizer(), torch.optim.Adam)
    assert isinstance(detector(optimiser="muon").optimizer(), Muon)


def response(edges: str, top: int, left: int) -> Tensor:
    """Return the map of an even image with a bright patch of 4 x 4 pixels.

    The teacher blurs, and the student knows of nothing but even images.
    """
    d = detector(edges=edges, autoencoder=False)
    with torch.no_grad():
        for parameter in d.teacher.parameters():
            parameter.fill_(1 / parameter[0].numel() if parameter.ndim > 1 else 0)
        for parameter in d.student.parameters():
            parameter.zero_()
        d.teacher_mean.zero_()
        image = torch.tensor(IMAGENET[0])[:, None, None].repeat(1, 1, *SIZE)
        image[:, :, top : top + 4, left : left + 4] = 1
        maps: Tensor = d(image)[0][0]
    return maps


def peak(found: Tensor) -> tuple[int, int]:
    row, column = divmod(int(found.argmax()), found.shape[1])
    return row, column


@pytest.mark.parametrize("top", [0, 252])
@pytest.mark.parametrize("left", [0, 284])
def test_a_defect_in_the_corner_is_seen_where_it_lies(top: int, left: int) -> None:
    row, column = peak(response("reflect", top, left))
    assert top <= row < top + 4
    assert left <= column < left + 4
    blind = response("blind", top, left)
    assert not blind[top : top + 4, left : left + 4].any()
    assert blind.any()


@pytest.mark.parametrize("edges", ["blind", "reflect"])
@pytest.mark.parametrize("place", [(40, 48), (119, 202)])
def test_a_defect_inside_is_seen_where_it_lies(edges: str, place: tuple[int, int]) -> None:
    for found, start in zip(peak(response(edges, *place)), place, strict=True):
        assert abs(found - (start + 1.5)) <= 4  # a cell


def test_what_is_encoded_is_named_by_all_that_changes_it() -> None:
    ways: list[dict[str, Any]] = [{}, {"edges": "reflect"}, {"padding": True, "crop": 0}, {"size": "medium"}]
    assert len({detector(**way).encoding_key for way in ways}) == len(ways)
    assert detector(logical_weight=0.1, autoencoder=True).encoding_key == detector().encoding_key


# --- what cannot be ---


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"logical_weight": 1.01}, "logical_weight=1.01 does not fit; expected 0 to 1"),
        ({"logical_weight": -0.1}, "logical_weight=-0.1 does not fit; expected 0 to 1"),
        ({"logical_weight": math.nan}, "logical_weight=nan does not fit; expected 0 to 1"),
        ({"logical_weight": 0.4, "autoencoder": False}, "logical_weight=0.4 with autoencoder=false"),
        ({"edges": "reflect", "padding": True}, "edges=reflect with padding=true"),
        ({"crop": 38}, "crop=38: expected 0, or a multiple of 4 from 36 to 256"),
        ({"crop": 32}, "crop=32: expected 0"),
        ({"crop": 260}, "crop=260: expected 0"),
        ({"padding": True}, "crop=128 with padding=true"),
        ({"edges": "mirror"}, "edges=mirror does not fit; expected 'blind' or 'reflect'"),
        ({"learning_rate": math.inf}, "learning_rate=inf does not fit; expected more than 0, and finite"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 does not fit"),
        ({"weight_decay": math.inf}, "weight_decay=inf does not fit"),
        ({"weight_decay": math.nan}, "weight_decay=nan does not fit"),
        ({"dropout": 1.0}, "dropout=1.0 does not fit"),
        ({"hard_quantile": 1.0}, "hard_quantile=1.0 does not fit"),
        ({"low_quantile": 0.995}, "low_quantile=0.995 does not fit; expected less than high_quantile"),
        ({"high_quantile": 1.1}, "high_quantile=1.1 does not fit; expected at most 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_the_config(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configure("efficientad-s", settings=settings)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_config_that_is_changed_is_checked_again() -> None:
    with pytest.raises(ConfigError, match="padding=true"):
        replace(EfficientADConfig(padding=True), edges="reflect")


@pytest.mark.parametrize(
    ("method", "words", "says"),
    [
        (
            "supersimplenet",
            ["--structural-only"],
            "--structural-only: supersimplenet has no logical map; expected --model efficientad-s or "
            "efficientad-m",
        ),
        ("simplenet", ["--logical-weight", "0"], "--logical-weight: simplenet has no logical map"),
        ("efficientad-s", ["--logical-weight", "1.5"], "logical_weight=1.5 does not fit; expected 0 to 1"),
        ("efficientad-s", ["--logical-weight", "nan"], "logical_weight=nan does not fit; expected 0 to 1"),
        (
            "efficientad-s",
            ["--logical-weight", "0.5", "--structural-only"],
            "argument --structural-only: not allowed with argument --logical-weight",
        ),
        (
            "efficientad-s",
            ["--structural-only", "--set", "autoencoder=true"],
            "--structural-only and --set autoencoder were both given; expected one of them",
        ),
        (
            "efficientad-s",
            ["--structural-only", "--set", "logical_weight=0.3"],
            "logical_weight=0.3 with autoencoder=false",
        ),
    ],
)
def test_options_that_do_not_go_together(
    method: str, words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", str(tmp_path), "--model", method, "--out", str(tmp_path / "m.blemish"), *words]
    try:
        status: Any = main(given)
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert says in said.err
    assert len(said.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# --- from the command line to the model file ---


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], {}),
        (["--structural-only"], {"autoencoder": False}),
        (["--logical-weight", "0"], {"logical_weight": 0.0}),
        (["--logical-weight", "1", "--set", "edges=reflect"], {"logical_weight": 1.0, "edges": "reflect"}),
    ],
)
def test_the_options_are_settings(words: list[str], settings: dict[str, Any], tmp_path: Path) -> None:
    given = ["train", str(tmp_path), "--model", "efficientad-m", "--out", "m.blemish", *words]
    assert request_of(parser().parse_args(given)).settings == settings
    configure("efficientad-m", settings=settings)


def train(folder: Path, *words: str) -> bundle.Bundle:
    """Train for a step on images of the networks' size, scored by the map's maximum alone."""
    data = drawn.data_set(folder / "parts", train=6, good=0, bad=0, size=(256, 256))
    weights, out = drawn.weights(folder / "teacher.safetensors", PDNS["pdn_small"]()), folder / "m.blemish"
    given = ["--weights", str(weights), "--steps", "1", "--set", "statistics=maximum", "--device", "cpu"]
    assert main(["train", str(data), "--model", "efficientad-s", "--out", str(out), *given, *words]) == 0
    return bundle.read(out)


def held_out(opened: bundle.Bundle) -> Tensor:
    """Read the images by which a model's thresholds were set."""
    files = sorted((opened.path.parent / "parts/train/good").iterdir())
    used = opened.manifest.training.files
    assert used is not None
    chosen = [read(file) for file in files if short_digest(file) in used.held_out]
    return torch.from_numpy(np.stack([to_input(image) for image in chosen]))


def test_weight_and_rim_reach_graph_and_thresholds(tmp_path: Path) -> None:
    opened = train(tmp_path, "--logical-weight", "1", "--set", "edges=reflect")
    d = detector(image_size=(256, 256), logical_weight=1, edges="reflect", statistics=("maximum",))
    d.load_state_dict(load(opened.weights))
    good = held_out(opened)
    with torch.no_grad():
        expected = d(good)
    near = 1e-4 * float(expected[0].abs().max())  # a statistic may be as good as 0
    found = open_graph(opened.graph, d.outputs, Choice()).run(good.numpy())
    for name, output in zip(d.outputs, expected, strict=True):
        np.testing.assert_allclose(found[name], output.numpy(), rtol=1e-4, atol=near)
    structural, logical = (
        functional.interpolate(half[:, None], (256, 256), mode="bilinear").amax((1, 2, 3))
        for half in expected[2:]
    )
    scores = opened.manifest.calibration.scores
    assert len(logical) == len(scores) == 3
    assert sorted(scores) == pytest.approx(sorted(logical.tolist()), rel=1e-3, abs=1e-4)
    assert float((structural - logical).abs().max()) > 0.01


def test_the_whole_image_is_measured_on_all_good_images_that_were_learned_from(tmp_path: Path) -> None:
    opened = train(tmp_path, "--set", "statistics=maximum,whole_image")
    d = detector(image_size=(256, 256), statistics=("maximum", "whole_image"))
    d.load_state_dict(load(opened.weights))
    files = sorted((opened.path.parent / "parts/train/good").iterdir())
    used = opened.manifest.training.files
    assert used is not None
    learned = [read(file) for file in files if short_digest(file) in used.train]
    with torch.no_grad():
        summaries = d.summary(torch.from_numpy(np.stack([to_input(image) for image in learned])))
    np.testing.assert_allclose(d.image_mean.numpy(), summaries.mean(0).numpy(), rtol=1e-3, atol=1e-5)
    assert opened.manifest.calibration.statistics == ("maximum", "whole_image")
