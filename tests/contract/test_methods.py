"""What every method promises, over the whole registry, and over a method that is written here.

Pretrained weights are drawn at random. EfficientAD's networks keep their shape but have few channels: the
recorded tensors of test_parity.py pin the published widths.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

import blemish
import drawn
from blemish import seeding, testing
from blemish.backbones import BACKBONES, choose_layers
from blemish.backbones.pdn import PDNS
from blemish.cli.main import main
from blemish.detectors import ops, registry
from blemish.detectors.base import Detector
from blemish.detectors.padim import config as padim
from blemish.detectors.patchcore import config as patchcore
from blemish.detectors.settings import GOOD_ONLY, Config, Method, Preset
from blemish.errors import ConfigError
from blemish.images import to_input
from blemish.inference import bundle
from blemish.testing.contract import loss_falls
from blemish.testing.slim import slimmer
from blemish.testing.subject import Subject, good_batch
from blemish.types import Batch, Supervision

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

RESNET = drawn.PLAIN | {
    "backbone": "resnet18",
    "hidden_channels": 32,
    "image_size": (64, 96),
    "noise_ratio": 1.0,
}
WHOLE = {"upscale": False, "anomalies": "whole", "focal_loss": False}
LEARNED = WHOLE | {
    "whitening": 0.1,
    "components": 12,
    "misplaced": 0.25,
    "differences": 0.5,
    "edges": "rings",
}
SMALL = drawn.TINY | {"layers": ("stage2",)}
FEW = SMALL | {"batch_size": 4}
REMEMBERED = {
    "image_size": (64, 96),
    "layers": ("stage2", "stage3"),
    "bank_size": 300,
    "statistics": ("maximum", "smoothed_maximum", "top_mean", "cell_maximum", "reweighted"),
}
PUBLISHED = patchcore.PAPER | {
    "image_size": (64, 64),
    "backbone": "resnet18",
    "layers": ("layer1", "layer2"),
}
GAUSSIANS = {"image_size": (64, 96), "layers": ("stage2", "stage3"), "dimensions": 16}
SCATTERED = padim.PAPER | {"image_size": (64, 64), "layers": ("layer1", "layer2"), "dimensions": 20}
BOTH = {"statistics": ("head", "maximum")}
HEAD = BOTH | {"classification_head": True, "stop_gradient": False}
CASES: dict[str, tuple[str, Supervision, dict[str, Any], int | None]] = {
    "efficientad-s": ("efficientad-s", "none", {}, 2),
    "efficientad-s, whole image": ("efficientad-s", "none", {"statistics": ("maximum", "whole_image")}, 2),
    "efficientad-m": ("efficientad-m", "none", {"image_size": (256, 320)}, 2),
    "supersimplenet": ("supersimplenet", "none", RESNET, 30),
    "supersimplenet weak": ("supersimplenet", "weak", FEW, 30),
    "supersimplenet mixed": ("supersimplenet", "mixed", FEW | BOTH, 30),
    "supersimplenet full": (
        "supersimplenet",
        "full",
        FEW | {"mask_dilation": 3, "distance_weights": True},
        30,
    ),
    "supersimplenet rings": ("supersimplenet", "none", SMALL | {"edges": "rings"}, 30),
    "supersimplenet for good images": ("supersimplenet", "none", drawn.TINY | LEARNED, 60),
    "simplenet": ("simplenet", "none", SMALL | WHOLE, 60),
    "simplenet blind": ("simplenet", "none", SMALL | WHOLE | {"edges": "blind"}, 60),
    "patchcore": ("patchcore", "none", REMEMBERED, None),
    "patchcore as published": ("patchcore", "none", PUBLISHED, None),
    "padim": ("padim", "none", GAUSSIANS, None),
    "padim, one Gaussian": ("padim", "none", GAUSSIANS | {"place": "all", "dimensions": 0}, None),
    "padim as published": ("padim", "none", SCATTERED, None),
    "toy": ("toy", "none", {}, None),
}
"""Method, supervision, settings and steps."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all elements": ("efficientad-s", {"hard_quantile": 0.0}),
    "no penalty": ("efficientad-s", {"penalty": False}),
    "no autoencoder": ("efficientad-s", {"autoencoder": False}),
    "raw maps": ("efficientad-s", {"map_normalisation": False}),
    "padding": ("efficientad-s", {"padding": True, "crop": 0}),
    "the whole and Adam": (
        "efficientad-s",
        {"crop": 0, "optimiser": "adam", "learning_rate": 5e-4, "hard_quantile": 0.999},
    ),
    "no upscaling": ("supersimplenet", SMALL | {"upscale": False}),
    "features before the adaptor": (
        "supersimplenet",
        SMALL | HEAD | {"adapt_classification_features": False},
    ),
    "anomalies on whole copies": ("supersimplenet", SMALL | {"anomalies": "whole"}),
    "no focal loss": ("supersimplenet", SMALL | {"focal_loss": False}),
    "no blur": ("supersimplenet", SMALL | {"blur_sigma": 0.0}),
    "fixed noise": ("supersimplenet", SMALL | {"noise": 0.015}),
    "three layers": ("supersimplenet", RESNET | {"layers": ("layer1", "layer2", "layer4")}),
    "rings": ("supersimplenet", SMALL | {"edges": "rings"}),
    "blind": ("supersimplenet", SMALL | {"edges": "blind"}),
}


# --- a method that is written here: one class, one config, one line in the registry ---


class ToyConfig(Config):
    """Every setting has its usual default but one."""

    FIXED: ClassVar[frozenset[str]] = frozenset({"image_size"})


class Toy(Detector):
    """Remembers good images, averaged over cells of 4 pixels, and maps the distance to the nearest of them.

    It has no frozen part and is fitted without steps; its bank is as long as what it was fitted on.
    """

    wants_images = True
    fitted_buffers = ("bank",)
    bank: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        height, width = config.image_size
        self.register_buffer("bank", torch.zeros(1, 3, height // 4, width // 4))

    @override
    def fit(self, batches: Iterable[Batch], generator: torch.Generator) -> str:
        cells = [functional.avg_pool2d(batch.images, 4) for batch in batches]
        self.bank = torch.cat(cells)
        return f"{len(self.bank)} images remembered"

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        apart = functional.avg_pool2d(images, 4)[:, None] - self.bank
        cells = apart.square().sum(2).amin(1)
        size = (images.shape[2], images.shape[3])
        maps = functional.interpolate(cells[:, None], size, mode="bilinear")[:, 0]
        return maps, ops.map_statistics(maps, cells, self.config.statistics)


TOY = Method(
    Toy,
    ToyConfig(image_size=(64, 64), batch_size=4),
    {"default": Preset({}, GOOD_ONLY)},
    has_steps=False,
)


@pytest.fixture(scope="module", autouse=True)
def with_toy() -> Iterator[None]:
    """Add the method to the registry: this line is all that it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.METHODS, "toy", TOY)
        yield


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """Let patch description networks have few channels inside."""
    with pytest.MonkeyPatch.context() as patch:
        for name, pdn in list(PDNS.items()):
            patch.setitem(PDNS, name, slimmer(pdn, 32))
        yield


def draw_weights(path: Path, method: str, config: Any) -> Path | None:
    """Write random weights for the pretrained part of a method, if it has one."""
    name = registry.build(method, config, 0).pretrained_name
    if not name:
        return None
    network = PDNS[name]() if name in PDNS else BACKBONES[name].build(choose_layers(name, config.layers))
    return drawn.weights(path, network)


@pytest.fixture(scope="module", params=CASES)
def subject(
    request: pytest.FixtureRequest,
    narrow: None,
    with_toy: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Subject:
    """Train one method with small settings."""
    method, supervision, settings, steps = CASES[request.param]
    folder = tmp_path_factory.mktemp("contract")
    config = registry.configure(method, settings=settings, supervision=supervision)
    torch.set_num_threads(1)
    photographs = folder / "parts" / "test" / "good"
    return testing.train(
        folder,
        method,
        supervision=supervision,
        settings=settings,
        steps=steps,
        weights=draw_weights(folder / "weights.safetensors", method, config),
        natural_images=str(photographs) if method == "efficientad-m" else "drawn",
    )


@pytest.mark.parametrize("check", testing.CHECKS)
def test_every_method_keeps_the_contract(subject: Subject, check: str, tmp_path: Path) -> None:
    testing.CHECKS[check](subject, tmp_path)


def test_every_method_and_supervision_is_covered() -> None:
    covered = {(method, supervision) for method, supervision, _, _ in CASES.values()}
    for name in registry.METHODS:
        regimes = registry.method(name).presets["default"].regimes
        mine = {supervision for method, supervision in covered if method == name}
        assert mine == set(regimes) if name == "supersimplenet" else "none" in mine


# --- what the toy shows: fitting without steps, no frozen part, a bank of any length ---


def test_a_bank_has_the_length_of_what_it_was_fitted_on(tmp_path: Path) -> None:
    for count in (8, 15):
        data = drawn.data_set(tmp_path / str(count), train=count, good=1, bad=1)
        out = tmp_path / f"{count}.blemish"
        model = blemish.train(data, out=out, model="toy")
        good = model.manifest.training.good_images
        restored = registry.restore("toy", model.manifest.config, bundle.read(out).weights, str(out))
        assert restored.get_buffer("bank").shape == (good, 3, 16, 16)
        assert model.manifest.training.notes == (f"{good} images remembered",)
        assert model.manifest.training.run.pretrained == ""


def test_a_fitted_method_goes_on_from_an_earlier_model(tmp_path: Path) -> None:
    first = drawn.data_set(tmp_path / "first", train=8, good=1, bad=1)
    more = drawn.data_set(tmp_path / "more", train=16, good=1, bad=1)
    blemish.train(first, out=tmp_path / "one.blemish", model="toy")
    model = blemish.train(more, out=tmp_path / "two.blemish", start=tmp_path / "one.blemish")
    assert model.manifest.method == "toy"
    assert model.manifest.training.run.start


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 5}, "steps: toy is fitted in one pass; expected none of them"),
        ({"settings": {"epochs": "3"}}, "epochs: toy is fitted in one pass; expected none of them"),
        ({"budget": "10m"}, "budget: toy is fitted in one pass"),
        ({"schedule": "paper"}, "schedule: toy is fitted in one pass"),
        ({"resume": True}, "resume: toy is fitted in one pass"),
        ({"weights": Path("w.safetensors")}, "for a method without pretrained weights"),
        ({"natural_images": "none"}, "none: this run has no pretraining penalty"),
    ],
)
def test_what_a_fitted_method_has_no_use_for_is_refused(
    options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    data = drawn.data_set(tmp_path / "parts", train=8, good=1, bad=1)
    if options.get("schedule") == "paper":
        sentence = "toy has no preset 'paper'"
    with pytest.raises(ConfigError, match=sentence):
        blemish.train(data, out=tmp_path / "toy.blemish", model="toy", **options)


def test_the_command_line_trains_and_judges_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = drawn.data_set(tmp_path / "parts"), tmp_path / "toy.blemish"
    assert main(["train", str(data), "--model", "toy", "--out", str(out)]) == 0
    assert main(["evaluate", str(out), str(data)]) == 0
    assert main(["train", str(data), "--model", "tou", "--out", str(tmp_path / "no.blemish")]) == 2
    assert "did you mean 'toy'?" in capsys.readouterr().err


# --- settings ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_score(variant: str, tmp_path: Path) -> None:
    method, settings = VARIANTS[variant]
    config = registry.configure(method, settings=settings)
    detector = registry.build(method, config, 0)
    weights = draw_weights(tmp_path / "weights.safetensors", method, config)
    assert weights is not None
    detector.load_pretrained(weights)
    images = torch.from_numpy(
        np.stack([to_input(drawn.part(n, detector.config.image_size)) for n in range(2)])
    )
    loss_falls(detector, good_batch(detector, images))
    detector.eval()
    with torch.no_grad():
        detector.finish([images])
        outputs = detector(images)
    assert outputs[0].shape == (2, *detector.config.image_size)
    assert len(outputs) == len(detector.outputs)
    assert all(output.isfinite().all() for output in outputs)


def test_variants_differ_from_the_default(tmp_path: Path) -> None:
    """Every switch does something: the same weights give another loss or another map."""
    for variant, (method, settings) in VARIANTS.items():
        if variant in ("three layers", "no autoencoder"):
            continue  # other parameters altogether
        other = registry.configure(method, settings=settings)
        base = RESNET if settings.get("backbone") == "resnet18" else SMALL
        usual = base | (HEAD if "statistics" in settings else {})
        default = registry.configure(method, settings={} if method.startswith("efficientad") else usual)
        file = draw_weights(tmp_path / "weights.safetensors", method, default)
        assert file is not None
        found = [figures(method, config, file) for config in (default, other)]
        assert any(
            one.shape != two.shape or not torch.equal(one, two) for one, two in zip(*found, strict=True)
        ), variant


def figures(method: str, config: Config, file: Path) -> tuple[Tensor, Tensor]:
    """Return the sum of the loss terms, and the maps of one image."""
    detector = registry.build(method, config, 0)
    detector.load_pretrained(file)
    count = config.batch_size  # of SuperSimpleNet several: half of its masks are empty
    images = torch.from_numpy(
        np.stack([to_input(drawn.part(n, detector.config.image_size)) for n in range(count)])
    )
    batch = good_batch(detector, images)
    detector.prepare([batch.encoded])
    with torch.no_grad():
        loss = torch.stack(list(detector.train().loss(batch, seeding.generator(0)).values())).sum()
        detector.eval().settle([batch])
        detector.finish([images])
        return loss, detector(images)[0]


def test_bfloat16_trains(tmp_path: Path) -> None:
    cases: tuple[tuple[str, dict[str, Any]], ...] = (("efficientad-s", {}), ("supersimplenet", SMALL | HEAD))
    for method, settings in cases:
        config = registry.configure(method, settings=settings)
        detector = registry.build(method, config, 0)
        weights = draw_weights(tmp_path / "weights.safetensors", method, config)
        assert weights is not None
        detector.load_pretrained(weights)
        images = torch.from_numpy(to_input(drawn.part(1, detector.config.image_size)))[None]
        batch = good_batch(detector, images)
        detector.prepare([batch.encoded])
        exact = detector.loss(batch, seeding.generator(0))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = detector.loss(batch, seeding.generator(0))
        for name, term in rounded.items():
            assert term.dtype == torch.float32
            torch.testing.assert_close(term, exact[name], rtol=0.05, atol=1e-3)


def test_a_step_sees_how_far_training_has_come(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watching(Toy):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(()))

        @override
        def optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.scale], 0.1)

        @override
        def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
            seen.append(batch.progress)
            return {"scale": (self.scale - 2).square()}

        @override
        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            maps, statistics = super().forward(images)
            return maps * self.scale, statistics * self.scale

    config = ToyConfig(image_size=(64, 64), batch_size=4, steps=4)
    method = Method(Watching, config, {"default": Preset({}, GOOD_ONLY)})
    data = drawn.data_set(tmp_path / "parts", train=8, good=1, bad=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.METHODS, "watching", method)
        blemish.train(data, out=tmp_path / "w.blemish", model="watching")
    assert seen == [0.0, 0.25, 0.5, 0.75]
