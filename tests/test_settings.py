"""From presets and settings in words to a config, or one sentence that says what is wrong."""

import dataclasses
from typing import Any

import pytest

from blemish.detectors import METHODS, PRESETS, build, configure
from blemish.detectors.efficientad import EfficientADConfig
from blemish.errors import ConfigError


def as_text(value: Any) -> str:
    """Write a setting as a command line has it."""
    if isinstance(value, tuple):
        return ("x" if all(isinstance(part, int) for part in value) else ",").join(map(str, value))
    return str(value)


def another(name: str, value: Any) -> Any:
    """Give another value of a field."""
    named = {
        "image_size": (288, 320),
        "statistics": ("top_mean", "maximum"),
        "layers": ("stage2",),
        "schedule": "step-95",
        "backbone": "resnet18",
        "size": "medium" if value == "small" else "small",
    }
    if name in named:
        return named[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.97 * value + 0.02


@pytest.mark.parametrize("method", METHODS)
def test_every_field_is_reachable_as_text(method: str) -> None:
    default = configure(method)
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        assert configure(method, settings={field.name: as_text(value)}) == default
        other = another(field.name, value)
        changed = configure(method, settings={field.name: as_text(other)})
        assert changed == dataclasses.replace(default, **{field.name: other}) != default
        assert type(getattr(changed, field.name)) is type(value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("image_size", "256", "height and width"),
        ("image_size", "256x-256", "at least 32"),
        ("image_size", "256x256x3", "height and width"),
        ("image_size", "wide", "image_size=wide"),
        ("batch_size", "0", "at least 1"),
        ("batch_size", "1.5", "expected int"),
        ("schedule", "one-cycl", "did you mean 'one-cycle'"),
        ("statistics", "", "no statistics"),
        ("statistics", "maximun", "did you mean 'maximum'"),
        ("batchsize", "1", "did you mean 'batch_size'"),
    ],
)
def test_wrong_settings_are_refused(method: str, key: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        configure(method, settings={key: value})
    assert "\n" not in str(raised.value)


def test_booleans_are_said_in_words() -> None:
    for text, value in {
        "true": True,
        "False": False,
        "on": True,
        "off": False,
        "1": True,
        "0": False,
    }.items():
        assert configure("efficientad-s", settings={"padding": text}).padding is value
    with pytest.raises(ConfigError, match="padding=maybe"):
        configure("efficientad-s", settings={"padding": "maybe"})


def test_the_presets_are_those_documented() -> None:
    assert PRESETS == ("default", "paper")
    for size in ("s", "m"):
        paper = configure(f"efficientad-{size}", "paper")
        assert isinstance(paper, EfficientADConfig)
        # Algorithm 1 of the paper, to the number.
        assert (paper.steps, paper.learning_rate, paper.weight_decay) == (70_000, 1e-4, 1e-5)
        assert (paper.schedule, paper.batch_size, paper.statistics) == ("step-95", 1, ("maximum",))
        assert (paper.hard_quantile, paper.low_quantile, paper.high_quantile) == (0.999, 0.9, 0.995)
        assert (paper.dropout, paper.penalty, paper.autoencoder, paper.padding) == (0.2, True, True, False)
        assert paper.image_size == (256, 256)
    # Section 4.2 of SuperSimpleNet's paper, and the authors' settings.
    paper = configure("supersimplenet", "paper")
    assert (paper.backbone, paper.layers, paper.image_size) == ("wide_resnet50_2", (), (256, 256))
    assert (paper.batch_size, paper.steps, paper.epochs) == (32, 0, 300)
    assert (paper.schedule, paper.statistics, paper.noise) == ("step-80-90", ("head",), 0.015)
    assert paper.classification_head
    rates = ("adaptor_learning_rate", "adaptor_weight_decay", "head_learning_rate", "head_weight_decay")
    assert [getattr(paper, name) for name in rates] == [1e-4, 1e-2, 2e-4, 1e-5]
    assert (paper.hidden_channels, paper.perlin_threshold, paper.blur_sigma) == (1024, 0.2, 4.0)
    assert paper.stop_gradient
    assert paper.focal_loss
    assert paper.upscale
    assert paper.adapt_classification_features


def test_a_setting_overrides_a_preset() -> None:
    assert configure("efficientad-s", "paper", {"steps": "5"}).steps == 5


def test_the_head_cannot_score_unless_it_is_built() -> None:
    with pytest.raises(ConfigError, match="classification_head=true"):
        build("supersimplenet", configure("supersimplenet", settings={"statistics": "head"}), 0)
