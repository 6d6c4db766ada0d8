"""From the images' size to that of the network's input: shape, scale, and the smallest defect."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import blemish
import drawn
from base_install import COMMAND_LINE, run_base_only
from blemish import images
from blemish.data.defects import DefectSizes, shorter_sides, summarise
from blemish.data.shapes import Shape, most_frequent
from blemish.detectors import registry, sizing
from blemish.detectors.registry import METHODS
from blemish.detectors.settings import FROM_IMAGES, Config
from blemish.detectors.supersimplenet.config import SuperSimpleNetConfig
from blemish.errors import BlemishError, ConfigError
from blemish.training.plan import plan
from blemish.training.request import TrainingRequest

pytestmark = pytest.mark.usefixtures("one_thread")

BACKBONES, STUDENT = Config(batch_size=1), registry.configure("efficientad-s")
SHAPES = (1.12, 1.25, 4 / 3, 1.5, 16 / 9, 1.93, 2.275, 2.52, 3.0, 3.34, 4.0)


def with_side(side: int) -> Config:
    return Config(batch_size=1, side=side)


# --- the default: the shape of the images ---


@pytest.mark.parametrize(
    ("image", "expected", "student"),
    [
        ((512, 512), (256, 256), (256, 256)),
        ((630, 250), (416, 160), (640, 256)),
        ((250, 630), (160, 416), (256, 640)),
        ((1050, 1000), (256, 256), (256, 256)),
        ((1000, 1100), (256, 256), (256, 256)),
        ((1000, 905), (288, 256), (288, 256)),
        ((1080, 1920), (192, 352), (256, 448)),
        ((768, 1024), (224, 288), (256, 352)),
        ((300, 100), (480, 160), (768, 256)),
        ((4, 3), (288, 224), (352, 256)),
        ((16384, 2048), (768, 96), (2048, 256)),
        ((3648, 5472), (192, 288), (256, 384)),
    ],
)
def test_the_default_keeps_the_shape(image: sizing.Size, expected: sizing.Size, student: sizing.Size) -> None:
    assert sizing.for_shape(BACKBONES, image) == expected
    assert sizing.for_shape(STUDENT, image) == student


def test_the_default_size_of_a_square_follows_its_side() -> None:
    for side, expected in ((256, 256), (320, 320), (384, 384), (300, 288), (32, 32)):
        assert sizing.square(with_side(side)) == (expected, expected)
        assert sizing.for_shape(with_side(side), (700, 700)) == (expected, expected)
    assert sizing.square(registry.configure("efficientad-s", settings={"side": 64})) == (256, 256)
    assert sizing.for_shape(with_side(384), (630, 250)) == (640, 256)


@pytest.mark.parametrize("side", [256, 320, 384])
def test_no_usual_shape_changes_much_nor_does_the_number_of_pixels(side: int) -> None:
    for ratio, turned in itertools.product(SHAPES, (False, True)):
        image = (10000, round(10000 * ratio)) if turned else (round(10000 * ratio), 10000)
        height, width = sizing.for_shape(with_side(side), image)
        assert height % 32 == width % 32 == 0
        assert abs(math.log(height / width * image[1] / image[0])) < 0.06
        assert 0.8 < height * width / side**2 < 1.25


def test_the_nearest_size_is_that_of_an_exhaustive_search() -> None:
    def distance(pair: tuple[int, int], height: float, width: float) -> float:
        logs = math.log(pair[0] / height), math.log(pair[1] / width)
        return 4 * abs(logs[0] - logs[1]) + abs(logs[0] + logs[1])

    rng = np.random.default_rng(0)
    for _ in range(30):
        height = math.exp(rng.uniform(math.log(20), math.log(1000)))
        width = height * math.exp(rng.uniform(-1.5, 1.5))
        least = rng.choice([32, 64, 250, 256], 2).tolist()
        lengths = [range(-(-length // 32) * 32, 6000, 32) for length in least]
        best = min(distance((h, w), height, width) for h, w in itertools.product(*lengths))
        found = sizing.nearest(height, width, (least[0], least[1]))
        assert distance(found, height, width) == pytest.approx(best)
        assert found[0] >= least[0]
        assert found[1] >= least[1]


def test_a_detector_built_without_images_is_square() -> None:
    for settings, expected in (({}, 256), ({"side": 96}, 96)):
        config = registry.configure("padim", settings=settings)
        assert config.image_size == FROM_IMAGES
        assert registry.build("padim", config, 0).config.image_size == (expected, expected)


def test_a_side_replaces_the_size_of_a_preset() -> None:
    for name in METHODS:
        published = (224, 224) if name in ("patchcore", "padim") else (256, 256)
        assert registry.configure(name, "paper").image_size == published
        assert registry.configure(name, "paper", {"side": "320"}).image_size == FROM_IMAGES
        assert registry.configure(name, "paper", {"side": 320, "image_size": "64x96"}).image_size == (64, 96)
    with pytest.raises(ConfigError, match="side 16: expected at least 32"):
        registry.configure("supersimplenet", settings={"side": "16"})


# --- scale ---


def test_a_scale_counts_network_pixels_for_each_image_pixel() -> None:
    for image, scale, expected in (
        ((630, 250), (1.0, 1.0), (640, 256)),
        ((630, 250), (0.5, 0.5), (320, 128)),
        ((2048, 16384), (0.25, 0.0625), (512, 1024)),
        ((512, 512), (2.0, 0.5), (1024, 256)),
        ((40, 40), (0.1, 0.1), (32, 32)),
        ((126, 50), (1.0, 1.0), (128, 64)),
    ):
        assert sizing.at_scale(image, scale) == expected


def test_scales_and_defects_are_also_given_as_text() -> None:
    for given, expected in (("0.5", (0.5, 0.5)), ("0.5x0.25", (0.5, 0.25)), (2, (2.0, 2.0))):
        assert sizing.read_scale(given) == expected
    assert sizing.read_scale((0.5, 1)) == (0.5, 1.0)
    for text, pixels in (("12", 12.0), ("12px", 12.0), (" 7.5px", 7.5), (3, 3.0)):
        assert sizing.read_defect_size(text) == pixels


@pytest.mark.parametrize("given", ["", "half", "0", "-1", "nan", "inf", "1x2x3", "1,2"])
def test_a_scale_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"scale .*: expected a number above 0, or two as in 0\.5x0\.25"):
        TrainingRequest(data=Path(), out=Path("m.blemish"), scale=given)


@pytest.mark.parametrize("given", ["", "px", "12mm", "0", "-3px", "nan", "inf"])
def test_a_defect_size_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"defect size .*: expected pixels of the image above 0, such as"):
        TrainingRequest(data=Path(), out=Path("m.blemish"), defect_size=given)


def test_a_request_with_sizes_survives_json() -> None:
    for changes in ({"scale": "0.5x0.25"}, {"scale": 2}, {"defect_size": "12px"}):
        request = TrainingRequest(data=Path("d"), out=Path("m.blemish"), **changes)
        assert TrainingRequest.from_json(request.to_json()) == request


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"scale": 1.0, "defect_size": 9}, "scale and defect_size"),
        ({"scale": 1.0, "settings": {"image_size": "64x64"}}, "image_size and scale"),
        ({"defect_size": "9px", "settings": {"image_size": (64, 64)}}, "image_size and defect_size"),
    ],
)
def test_at_most_one_choice_of_size_can_be_given(changes: dict[str, Any], names: str) -> None:
    says = f"^{names} were given; expected at most one of image_size, scale, defect_size$"
    with pytest.raises(ConfigError, match=says):
        TrainingRequest(data=Path("d"), out=Path("m.blemish"), **changes)


# --- the smallest defect ---


def test_the_size_for_a_defect_shows_enough_of_it() -> None:
    for config, image in itertools.product(
        (BACKBONES, STUDENT, with_side(384)), ((512, 512), (630, 250), (768, 1024), (3000, 4000), (60, 90))
    ):
        usual, areas = sizing.for_shape(config, image), list[int]()
        for defect in (3, 8, 12, 13.7, 20, 50, 1000):
            size = sizing.for_defect(config, image, defect)
            assert size[0] % 32 == size[1] % 32 == 0
            assert min(size) >= config.LEAST
            enlarged = all(found >= length for found, length in zip(size, image, strict=True))
            assert enlarged or sizing.coverage(image, size, defect) >= config.NEED
            areas.append(math.prod(size))
        assert areas == sorted(areas, reverse=True)
        assert areas[-1] == math.prod(usual)


def test_the_size_for_a_defect_is_no_larger_than_the_images_nor_smaller_than_the_default() -> None:
    assert sizing.for_defect(BACKBONES, (630, 250), 12) == (640, 256)
    assert sizing.for_defect(BACKBONES, (630, 250), 3) == (640, 256)
    assert sizing.for_defect(BACKBONES, (512, 512), 16) == (384, 384)
    assert sizing.for_defect(BACKBONES, (512, 512), 100) == (256, 256)
    assert sizing.for_defect(STUDENT, (512, 512), 16) == (256, 256)
    assert sizing.for_defect(STUDENT, (512, 512), 10) == (416, 416)
    assert sizing.for_defect(BACKBONES, (60, 60), 3) == (256, 256)


def test_regions_are_measured_across_their_shorter_side() -> None:
    mask = np.zeros((41, 63), np.bool_)
    mask[2:5, 10:40] = True  # 3 x 30
    mask[10:30, 50:57] = True  # 20 x 7
    mask[35, 3] = mask[36, 4] = True  # touch at a corner: one region of 2 x 2
    assert sorted(shorter_sides(mask)) == [2, 3, 7]
    assert shorter_sides(np.zeros((41, 63), np.bool_)) == ()
    assert shorter_sides(np.ones((5, 9), np.bool_)) == (5,)
    assert summarise([]) is None
    assert summarise([*range(1, 21)]) == DefectSizes(20, 2, 10.5)


# --- the most frequent shape ---


def test_the_most_frequent_shape_counts_sizes_that_are_alike() -> None:
    alike = [(620 + number, 250) for number in range(12)]  # no size occurs twice
    assert most_frequent([*alike, *[(256, 256)] * 5]) == Shape((620, 250), 12, 5)
    assert most_frequent([*alike, (631, 250)]).size == (631, 250)
    assert most_frequent([(480, 640), *[(960, 1280)] * 3, *[(640, 480)] * 3]) == Shape((960, 1280), 4, 3)
    assert most_frequent([(7, 9)]) == Shape((7, 9), 1, 0)


# --- what a run makes of it ---


def planned(data: Path, **changes: Any) -> tuple[sizing.Size, str]:
    """Return the image size of a planned run, and the reason for it."""
    given = {"model": "supersimplenet"} | changes
    found = plan(TrainingRequest(data=data, out=Path("m.blemish"), **given))
    return found.config.image_size, found.size_reason


@pytest.fixture(scope="module")
def long_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn.data_set(tmp_path_factory.mktemp("long"), train=6, good=0, bad=1, size=(126, 50))


@pytest.mark.parametrize(
    ("changes", "expected", "says"),
    [
        ({}, (800, 320), "800 x 320 (shape kept; 6.4 of the size)"),
        ({"settings": {"side": 256}}, (416, 160), "416 x 160 (shape kept; 3.3 of the size)"),
        ({"model": "efficientad-s"}, (640, 256), "640 x 256 (shape kept; 5.1 of the size)"),
        ({"settings": {"side": "384"}}, (640, 256), "640 x 256 (shape kept; 5.1 of the size)"),
        ({"scale": "2"}, (256, 96), "256 x 96 (scale 2)"),
        ({"scale": "2x4"}, (256, 192), "256 x 192 (scale 2 x 4)"),
        ({"scale": 2, "preset": "paper"}, (256, 96), "256 x 96 (scale 2)"),
        (
            {"defect_size": "4px", "settings": {"side": 256}},
            (416, 160),
            "416 x 160 (a defect of 4 pixels covers 12.8, of 12 needed)",
        ),
        ({"settings": {"image_size": "64x32"}}, (64, 32), ""),
        ({"preset": "paper"}, (256, 256), ""),
        ({"preset": "journal"}, (256, 256), ""),
    ],
)
def test_a_plan_settles_the_size_and_says_why(
    changes: dict[str, Any], expected: sizing.Size, says: str, long_parts: Path
) -> None:
    found, said = planned(long_parts, **changes)
    assert found == expected
    assert said == (f"images are 126 x 50: the network sees {says}" if says else "")


def test_nearly_square_images_are_said_to_change_shape(tmp_path: Path) -> None:
    data = drawn.data_set(tmp_path, train=4, good=0, bad=0, size=(108, 100))
    size, said = planned(data, settings={"side": 256})
    assert size == (256, 256)
    assert said == "images are 108 x 100: the network sees 256 x 256 (shape kept within 8 %; 2.5 of the size)"


def test_the_shape_is_that_after_orientation(tmp_path: Path) -> None:
    for number in range(6):
        exif = Image.Exif()
        exif[274] = 6  # turned by a quarter
        (tmp_path / "good").mkdir(exist_ok=True)
        stored = Image.fromarray(drawn.part(number, (50, 126)))
        stored.save(tmp_path / f"good/{number}.jpg", exif=exif)
    assert images.read(tmp_path / "good/0.jpg").shape == (126, 50, 3)
    assert planned(tmp_path)[0] == (800, 320)


def test_of_several_shapes_the_most_frequent_decides(
    long_parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned(long_parts)
    assert not caplog.messages
    for number in range(12):
        size = (100, 100) if number % 3 == 2 else (126 + number % 2, 50)
        images.write_png(tmp_path / f"train/good/{number}.png", drawn.part(number, size))
        images.write_png(tmp_path / f"validation/good/{number}.png", drawn.part(50 + number, (64, 640)))
    assert planned(tmp_path)[0] == (800, 320)
    assert caplog.messages == [
        "the training images have several shapes: the network's input has that of 126 x 50, the most "
        "frequent; the others are stretched (4 of 12)"
    ]


def test_only_headers_are_read(long_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(images, "read", read)
    monkeypatch.setattr(images, "read_digested", read)
    assert planned(long_parts)[0] == (800, 320)


def test_a_warm_start_keeps_the_earlier_size(tiny: drawn.Tiny, long_parts: Path) -> None:
    earlier: dict[str, Any] = {"start": tiny.file, "model": None}
    assert planned(long_parts, **earlier) == ((64, 64), "")
    assert planned(long_parts, scale=1, **earlier)[0] == (128, 64)
    assert planned(long_parts, settings={"side": 64}, **earlier)[0] == (160, 64)


def test_a_warm_start_cannot_change_a_size_that_weights_depend_on(
    tiny: drawn.Tiny, long_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SuperSimpleNetConfig, "FIXED", frozenset({"image_size"}))
    earlier: dict[str, Any] = {"start": tiny.file, "model": None}
    assert planned(long_parts, **earlier)[0] == (64, 64)
    for changes in ({"scale": "1"}, {"settings": {"side": 64}}, {"defect_size": 3}):
        with pytest.raises(BlemishError, match=r"trained with 64 x 64, which cannot be changed"):
            planned(long_parts, **earlier | changes)


# --- advice ---


def with_defects(root: Path, sides: list[int], size: tuple[int, int] = (300, 600)) -> Path:
    """Write ten good parts, and one defective part for each side with a mark of that side by 40 pixels."""
    for number in range(10):
        images.write_png(root / f"good/{number}.png", drawn.part(number, size))
    for number, side in enumerate(sides):
        mask = np.zeros(size, np.uint8)
        mask[20 : 20 + side, 30:70] = 255
        images.write_png(root / f"dent/{number}.png", drawn.part(100 + number, size))
        images.write_png(root / f"masks/dent/{number}.png", mask)
    return root


def notes(data: Path, **options: Any) -> list[str]:
    return [problem.sentence for problem in blemish.check(data, **options).problems]


def test_check_advises_a_size_where_marked_defects_are_small(tmp_path: Path) -> None:
    data = with_defects(tmp_path, [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 30])
    report = blemish.check(data)
    assert (report.size, report.defects) == ((300, 600), DefectSizes(11, 11, 15.0))
    assert report.passed
    assert notes(data) == [
        "11 regions are marked as defects: their shorter side is 11 pixels at the 10 % quantile and 15 at "
        "the median",
        "with patchcore, a defect of 11 pixels covers 9.4 pixels of the default 256 x 512, of 12 needed: try "
        "--defect-size 11px (320 x 640, 1.6 times the pixels; it then covers 11.7)",
        "with padim, a defect of 11 pixels covers 7 pixels of the default 192 x 384, of 12 needed: try "
        "--defect-size 11px (320 x 640, 2.8 times the pixels; it then covers 11.7)",
    ]


def test_advice_is_for_what_the_data_set_would_be_learned_from(tmp_path: Path) -> None:
    """With labelled defects to learn from, supersimplenet has a smaller default than from good images."""
    data = with_defects(tmp_path / "train", [11, 11]).parent
    with_defects(data / "test", [11])
    advised = [sentence for sentence in notes(data) if "192 x 384" in sentence]
    assert [sentence.split(", a defect")[0] for sentence in advised] == [
        "with supersimplenet, simplenet, padim"
    ]


def test_check_says_nothing_of_defects_that_are_large_enough(tmp_path: Path) -> None:
    report = blemish.check(with_defects(tmp_path, [30, 35]))
    assert report.defects == DefectSizes(2, 30, 32.5)
    assert report.problems == ()


def test_check_answers_for_a_defect_without_masks(tmp_path: Path) -> None:
    data = with_defects(tmp_path, [])
    assert blemish.check(data).defects is None
    assert notes(data) == []
    assert notes(data, defect_size="40px") == [
        "defects of 40 pixels are large enough for every method's default size"
    ]
    small, large = notes(data, defect_size=16), notes(data, defect_size="6px")
    assert [sentence.partition(":")[0] for sentence in small] == [
        "with padim, a defect of 16 pixels covers 10.2 pixels of the default 192 x 384, of 12 needed"
    ]
    assert [sentence.split(",")[0] for sentence in large] == [
        *("with efficientad-s", "with supersimplenet", "with patchcore", "with padim")
    ]
    with pytest.raises(ConfigError, match="defect size 1mm"):
        blemish.check(tmp_path / "none", defect_size="1mm")


def test_check_says_where_only_more_pixels_would_help(tmp_path: Path) -> None:
    data = with_defects(tmp_path, [], (60, 60))
    (said,) = notes(data, defect_size=2)
    assert said == (
        "with padim, a defect of 2 pixels covers 8.5 pixels of the default 256 x 256, of 12 needed; a larger "
        "size would not help, only images with more pixels"
    )
    assert notes(with_defects(tmp_path, [2], (60, 60))) == []  # not asked for


def test_without_torch_check_measures_but_gives_no_advice(tmp_path: Path) -> None:
    data = with_defects(tmp_path, [11, 11])
    assert len(notes(data)) == 3
    done = run_base_only(COMMAND_LINE, "check", data)
    assert (done.returncode, done.stderr) == (0, "")
    assert "covers" not in done.stdout
    done = run_base_only(COMMAND_LINE, "check", data, "--defect-size", "11")
    assert "which size each method needs is known only where blemish[train] is installed" in done.stdout
    measured = run_base_only("import blemish; print(blemish.check(sys.argv[1]).defects)", data)
    assert measured.stdout == "DefectSizes(regions=2, small=11, median=11.0)\n"
