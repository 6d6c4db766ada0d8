"""Rendered images vary as photographs do, every step has its own, and a run records which kind it used.

The ranges of the statistics are those measured on photographs of animals and objects, widened: half of the
photographs had a slope of -3.3 to -2.7 and a kurtosis of 8 to 18.
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
from blemish.data.loading.batches import Batches, NaturalImages
from blemish.data.loading.cache import FeatureCache, Memory
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.data.loading.textures import PATTERNS, SHAPES, Textures, draw
from blemish.detectors.base import Detector
from blemish.detectors.registry import build, configure
from blemish.errors import ConfigError, ModelFileError, StoppedError
from blemish.images import Preprocessing
from blemish.progress import Event, silent
from blemish.training import checkpoint, run
from blemish.training import material as materials
from blemish.training.plan import plan
from blemish.training.request import TrainingRequest
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
    """Return the exponent of power over frequency, fitted to means over rings of the spectrum."""
    grey = luma(image)
    window = np.hanning(len(grey))
    power = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(window, window))) ** 2
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(len(grey)) * len(grey)] * 2))
    edges = np.geomspace(3, 100, 14)
    rings = [power[(radius >= low) & (radius < high)].mean() for low, high in itertools.pairwise(edges)]
    return float(np.polyfit(np.log(edges[:-1] * edges[1:]) / 2, np.log(np.array(rings) + 1e-9), 1)[0])


def kurtosis(image: AnyArray) -> float:
    """Return the kurtosis of differences between neighbours: 3 for noise, more for sparse edges."""
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
    """Most in lightness, less from blue to orange, least from purple to green; and not in every image."""
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
    """It stays within its window, and covers neither nothing nor all of it."""
    v, u = np.mgrid[-2:2:81j, -2:2:81j].astype(np.float32)
    for number, shape in enumerate(SHAPES):
        inside = shape(u, v) < 1
        assert inside.mean() > 0.01, number
        assert not inside[np.maximum(np.abs(u), np.abs(v)) > 1.05].any(), number


def test_a_size_that_is_too_small_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="image size 31x256: rendered images need at least 32 pixels in each direction"
    ):
        Textures((31, 256), 0)


# --- in a run ---


def batches_of(paths: list[Path], seed: int = 0) -> Batches:
    store = ImageStore(paths, Preprocessing((64, 64), 65535.0), Memory(1 << 30))
    encoded = EncodedStore(lambda x: (x.mean(1),), store, FeatureCache(Memory(1 << 30)), "cpu")
    samples = [Sample(path, 0, "good") for path in paths]
    return Batches(samples, store, encoded, batch_size=3, seed=seed, natural=Textures((64, 64), seed))


def test_a_step_has_images_of_its_own_whatever_came_before(parts: Path) -> None:
    """The last step of an epoch has fewer images, and it shares none with another step, either."""
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


def opened(wanting: Detector, messages: list[str] | None = None, **given: Any) -> NaturalImages | None:
    """Open the natural images of a request; `messages` receives what is reported."""

    def report(event: Event) -> None:
        if messages is not None:
            messages.append(event.message)

    request = TrainingRequest(data=Path("parts"), out=Path("m.blemish"), **given)
    return materials.open_natural(request, wanting, Memory(0), report)


def test_images_are_drawn_unless_others_are_chosen(parts: Path) -> None:
    wanting, messages = detector("efficientad-s", image_size=(256, 320)), list[str]()
    assert opened(wanting, messages, seed=7) == Textures((256, 320), 7)
    photographs = opened(wanting, messages, natural_images=parts / "train/good", seed=7)
    assert photographs is not None
    assert photographs.batch(3, 2).shape == (2, 3, 256, 320)
    assert messages == []
    assert opened(wanting, messages, natural_images="none") is None
    assert messages == ["natural images none: the pretraining penalty is off"]


@pytest.mark.parametrize("chosen", ["none", Path("drawn"), "photographs"])
def test_a_choice_is_refused_where_there_is_no_penalty(chosen: str | Path) -> None:
    for without in (detector("efficientad-s", penalty=False), detector("supersimplenet", **drawn.TINY)):
        assert opened(without) is None
        with pytest.raises(
            ConfigError, match=rf"natural images (\./)?{chosen}: this run has no pretraining penalty"
        ):
            opened(without, natural_images=chosen)


def test_a_folder_may_be_called_as_a_choice_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images.write_png(Path("none/1.png"), drawn.part(1))
    for folder in (Path("none"), "./none", Path("none").absolute()):
        assert opened(detector("efficientad-s"), natural_images=folder) is not None


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    for folder, says in ((tmp_path / "nowhere", "found no folder at .*nowhere"), (tmp_path, "no images in")):
        with pytest.raises(ConfigError, match=says):
            opened(detector("efficientad-s"), natural_images=folder)


def test_training_draws_unless_told_otherwise(tmp_path: Path) -> None:
    """The checkpoint says so, and a run with other natural images does not go on from it."""
    out, messages = tmp_path / "m.blemish", list[str]()
    parts = drawn.data_set(tmp_path / "parts", train=4, good=0, bad=0)

    def begin(**more: Any) -> None:
        run.train(
            parts,
            out=out,
            model="efficientad-s",
            weights=drawn.weights(tmp_path / "w.safetensors", pdn_small()),
            settings={"autoencoder": False, "crop": 40},
            precision="fp32",
            device="cpu",
            **drawn.stop_after(1, lambda event: messages.append(event.message)),
            **more,
        )

    with pytest.raises(StoppedError, match="stopped after step 1 of 2000"):
        begin()
    path = out.with_name(out.name + ".checkpoint")
    assert checkpoint.header(path)["run"]["natural_images"] == "drawn"
    assert not any("natural images" in message for message in messages)
    with pytest.raises(ModelFileError, match="its natural_images is drawn, not none"):
        begin(natural_images="none", resume=True)
    assert "natural images none: the pretraining penalty is off" in messages
    with pytest.raises(ModelFileError, match=r"its natural_images is drawn, not [0-9a-f]{64}$"):
        begin(natural_images=parts / "train/good", resume=True)


def test_runs_with_other_photographs_are_other_runs(parts: Path) -> None:
    wanting = detector("efficientad-s")
    request = TrainingRequest(data=parts, out=Path("m.blemish"), model="efficientad-s", cache="off")
    planned, store, held = materials.read_images(plan(request), Memory(0), silent)
    material = materials.assemble(request, planned, wanting, store, held, None, "", "cpu")
    said = [
        run.fingerprint_of(planned, material, opened(wanting, natural_images=folder))["natural_images"]
        for folder in ("drawn", "none", parts / "train/good", parts / "test/good")
    ]
    assert said[:2] == ["drawn", "none"]
    assert len(set(said)) == 4
    assert all(len(digest) == 64 for digest in said[2:])
