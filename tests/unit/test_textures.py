"""Drawn images are as varied as photographs, each step has its own, and a run says which kind it took.

The ranges of the statistics are those that photographs of animals and things showed, widened: a slope of
-3.3 to -2.7 and a kurtosis of 8 to 18 in the middle half of them.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import drawn
from blemish import images
from blemish.backbones.pdn import pdn_small
from blemish.data.loading.batches import Batches
from blemish.data.loading.cache import FeatureCache, Memory
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.data.loading.textures import PATTERNS, SHAPES, Textures, draw
from blemish.detectors.base import Detector
from blemish.detectors.registry import build, configure
from blemish.errors import ConfigError
from blemish.training import run
from blemish.training.plan import plan
from blemish.training.run import open_natural
from blemish.types import AnyArray, Sample

pytestmark = pytest.mark.usefixtures("one_thread")

MANY = 48
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn.data_set(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def many() -> list[AnyArray]:
    return [draw((256, 256), seed) for seed in range(MANY)]


# --- what is drawn ---


@pytest.mark.parametrize("size", [(32, 32), (32, 200), (131, 67), (256, 320)])
def test_an_image_has_the_size_asked_for(size: tuple[int, int]) -> None:
    for seed in range(8):
        image = draw(size, seed)
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous


def test_the_same_seed_draws_the_same_image() -> None:
    state, before = np.random.get_state(legacy=False), torch.random.get_rng_state()
    for seed in range(8):
        assert np.array_equal(draw((64, 96), seed), draw((64, 96), seed))
    assert np.array_equal(state["state"]["key"], np.random.get_state(legacy=False)["state"]["key"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_two_images_are_alike(many: list[AnyArray]) -> None:
    small = [images.resize(image, (8, 8)).astype(float) for image in many]
    apart = [np.abs(one - other).mean() for one, other in itertools.combinations(small, 2)]
    assert min(apart) > 3
    assert np.median(apart) > 30


def luma(image: AnyArray) -> Floats:
    grey: Floats = image @ np.array([0.299, 0.587, 0.114]) / 255
    return grey


def spectrum_slope(image: AnyArray) -> float:
    """Fit the exponent of power over frequency, averaged over rings around the middle of the spectrum."""
    grey = luma(image)
    window = np.hanning(len(grey))
    power = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(window, window))) ** 2
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(len(grey)) * len(grey)] * 2))
    edges = np.geomspace(3, 100, 14)
    rings = [power[(radius >= low) & (radius < high)].mean() for low, high in itertools.pairwise(edges)]
    return float(np.polyfit(np.log(edges[:-1] * edges[1:]) / 2, np.log(np.array(rings) + 1e-9), 1)[0])


def kurtosis(image: AnyArray) -> float:
    """Give the fourth moment of differences between neighbours: 3 for noise, more for sparse edges."""
    steps = np.diff(luma(image), axis=1)
    return float(((steps - steps.mean()) ** 4).mean() / steps.var() ** 2)


def test_statistics_spread_as_those_of_photographs(many: list[AnyArray]) -> None:
    def quartiles(values: list[float]) -> list[float]:
        low, middle, high = np.percentile(values, (25, 50, 75))
        return [float(low), float(middle), float(high)]

    low, middle, high = quartiles([spectrum_slope(image) for image in many])
    assert -4.0 < low < -2.8
    assert -3.5 < middle < -2.2
    assert -3.2 < high < -1.5
    low, middle, high = quartiles([kurtosis(image) for image in many])
    assert 3 < low < 9
    assert 7 < middle < 25
    assert high > 14
    low, middle, high = quartiles([float(image.mean() / 255) for image in many])
    assert 0.3 < low < 0.47
    assert 0.4 < middle < 0.55
    assert 0.47 < high < 0.68
    low, middle, high = quartiles([float(luma(image).std()) for image in many])
    assert 0.1 < low < 0.18
    assert 0.15 < middle < 0.24
    assert 0.19 < high < 0.32


def test_colours_vary_along_the_axes_of_photographs(many: list[AnyArray]) -> None:
    """Most in lightness, less from blue to orange, least from purple to green; all of it in some images."""
    pixels = np.stack([image[::4, ::4].reshape(-1, 3) / 255 for image in many])
    red, green, blue = np.moveaxis(pixels, 2, 0)
    light, warm, verdant = (red + green + blue) / 3, (red - blue) / 2, (2 * green - red - blue) / 4
    assert light.std() > 1.5 * warm.std()
    assert warm.std() > 2.3 * verdant.std()
    assert verdant.std() > 0.01
    colourful = np.abs(warm).mean(1) + np.abs(verdant).mean(1)
    assert np.percentile(colourful, 10) < 0.06
    assert np.percentile(colourful, 90) > 0.12


def test_every_pattern_is_finite_and_varies() -> None:
    assert sum(share for _, share in PATTERNS) == pytest.approx(1)
    for pattern, _ in PATTERNS:
        for seed in range(30):
            values = pattern(np.random.default_rng(seed), (48, 64))
            assert values.shape == (48, 64)
            assert values.dtype == np.float32
            assert np.isfinite(values).all(), pattern
            assert values.std() > 0.01, (pattern, seed)


def test_every_shape_has_an_inside_and_an_end() -> None:
    """It reaches no farther than its window does, and what it covers is neither nothing nor all."""
    v, u = np.mgrid[-2:2:81j, -2:2:81j].astype(np.float32)
    for number, shape in enumerate(SHAPES):
        inside = shape(u, v) < 1
        assert inside.mean() > 0.01, number
        assert not inside[np.maximum(np.abs(u), np.abs(v)) > 1.05].any(), number


def test_a_size_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="image size 31x256: drawn images need at least 32 in both axes"):
        Textures((31, 256), 0)


# --- in a run ---


def batches_of(paths: list[Path], seed: int = 0) -> Batches:
    store = ImageStore(paths, (64, 64), Memory(1 << 30))
    encoded = EncodedStore(lambda x: (x.mean(1),), store, 255.0, FeatureCache(Memory(1 << 30)), "cpu")
    samples = [Sample(path, 0, "good") for path in paths]
    return Batches(samples, store, encoded, batch_size=3, seed=seed, natural=Textures((64, 64), seed))


def test_a_step_has_images_of_its_own_whatever_came_before(parts: Path) -> None:
    """The last step of an epoch has fewer images, and still none that another step had."""
    paths = sorted((parts / "train/good").iterdir())[:5]
    batches, resumed, other = batches_of(paths), batches_of(paths), batches_of(paths, seed=1)
    found = []
    for step in range(6):
        natural = batches.at(step).natural
        assert natural is not None
        assert natural.shape == (2 if step % 2 else 3, 3, 64, 64)
        assert natural.dtype == torch.float32
        assert 0 <= natural.min() < natural.max() <= 1
        found.append(natural)
    for step in (4, 5, 1):
        again, another = resumed.at(step).natural, other.at(step).natural
        assert again is not None
        assert another is not None
        assert torch.equal(again, found[step])
        assert not torch.equal(another, found[step])
    assert len({one.numpy().tobytes() for natural in found for one in natural}) == 15


def test_a_negative_seed_draws_too() -> None:
    assert not torch.equal(Textures((32, 32), -1).batch(0, 1), Textures((32, 32), 1).batch(0, 1))


def detector(method: str, **settings: Any) -> Detector:
    return build(method, configure(method, settings=settings), 0)


def test_images_are_drawn_unless_others_are_chosen(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanting = detector("efficientad-s", image_size=(256, 320))
    assert open_natural("drawn", wanting, Memory(0), 7) == Textures((256, 320), 7)
    photographs = open_natural(parts / "train/good", wanting, Memory(0), 7)
    assert photographs is not None
    assert photographs.batch(3, 2).shape == (2, 3, 256, 320)
    assert capsys.readouterr().err == ""
    assert open_natural("none", wanting, Memory(0), 7) is None
    assert capsys.readouterr().err == "natural images none: the pretraining penalty is off\n"


@pytest.mark.parametrize("chosen", ["none", Path("drawn"), "photographs"])
def test_a_choice_is_refused_where_there_is_no_penalty(chosen: str | Path) -> None:
    for without in (detector("efficientad-s", penalty=False), detector("supersimplenet", **drawn.TINY)):
        assert open_natural("drawn", without, Memory(0), 0) is None
        with pytest.raises(ConfigError, match=f"natural images {chosen} are chosen for a run without"):
            open_natural(chosen, without, Memory(0), 0)


def test_a_folder_may_be_called_as_a_choice_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images.write_png(Path("none/1.png"), drawn.part(1))
    for folder in (Path("none"), "./none"):
        assert open_natural(folder, detector("efficientad-s"), Memory(0), 0) is not None


def test_training_draws_unless_told_otherwise(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []

    def stop(choice: str | Path, *_: Any) -> None:
        chosen.append(choice)
        raise InterruptedError

    monkeypatch.setattr(run, "open_natural", stop)
    file = drawn.weights(tmp_path / "w.safetensors", pdn_small())
    changes: tuple[dict[str, Any], ...] = ({}, {"natural_images": "none"})
    for more in changes:
        with pytest.raises(InterruptedError):
            run.train(parts, out=tmp_path / "m.blemish", model="efficientad-s", weights=file, **more)
    assert chosen == ["drawn", "none"]


def test_a_run_goes_on_with_the_images_that_it_began_with(parts: Path) -> None:
    settled, wanting = settle(parts, model="efficientad-s"), detector("efficientad-s")
    folders = ("drawn", "none", parts / "train/good", parts / "test/good")
    said = [
        run.fingerprint(settled, open_natural(folder, wanting, Memory(0), 0))["natural_images"]
        for folder in folders
    ]
    assert said[:2] == ["drawn", "none"]
    assert len(set(said)) == 4
    assert all(len(digest) == 64 for digest in said[2:])
