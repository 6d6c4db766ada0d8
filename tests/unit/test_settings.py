"""From presets and settings as text to a config, or to one sentence that says what is wrong."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest

from blemish.detectors import registry
from blemish.detectors.efficientad.config import EfficientADConfig
from blemish.detectors.registry import METHODS, build, method, with_schedule
from blemish.detectors.settings import Config, Method, field_types
from blemish.detectors.supersimplenet.config import BOTH, FROM_GOOD, SuperSimpleNetConfig
from blemish.errors import ConfigError
from blemish.types import Supervision


def configure(name: str, *given: Any, **more: Any) -> Any:
    """Return a config as the registry does; which fields it has depends on its method."""
    return registry.configure(name, *given, **more)


def as_text(value: Any) -> str:
    """Return a setting as it is written on a command line."""
    if isinstance(value, tuple):
        return ("x" if all(isinstance(part, int) for part in value) else ",").join(map(str, value))
    return str(value)


def another(name: str, value: Any) -> Any:
    """Return another value of a field."""
    named = {
        "image_size": (288, 320),
        "statistics": ("top_mean", "maximum"),
        "layers": ("stage2",),
        "schedule": "step-95",
        "backbone": "resnet18",
        "anomalies": "none",
        "size": "medium" if value == "small" else "small",
        "edges": "reflect" if value == "blind" else "blind",
        "aggregation": "published",
        "choice": "random",
        "place": "all",
        "reduction": "random",
        "optimiser": "adam",
        "crop": 64,
    }
    if name in named:
        return named[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.97 * value + 0.02


@pytest.mark.parametrize("name", METHODS)
def test_every_field_is_reachable_as_text(name: str) -> None:
    default = configure(name)
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        assert configure(name, settings={field.name: as_text(value)}) == default
        other = another(field.name, value)
        beside: dict[str, Any] = {"crop": 0} if field.name == "padding" else {}
        if field.name == "place":
            beside = {"dimensions": 48}  # all features are kept unless a number is asked for
        if name.endswith("simplenet"):  # what the defaults for good images do not go with is left out
            plain = method(name).config
            left_out = {"backbone": ("layers", "components"), "layers": ("components",)}
            left_out["classification_head"] = tuple(FROM_GOOD)
            beside = {key: getattr(plain, key) for key in left_out.get(field.name, ())}
        changed = configure(name, settings={field.name: as_text(other)} | beside)
        assert changed == dataclasses.replace(default, **{field.name: other}, **beside) != default
        assert type(getattr(changed, field.name)) is type(value)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("image_size", "256", "height and width"),
        ("image_size", "256x-256", "at least 32"),
        ("image_size", "256x256x3", "height and width"),
        ("image_size", "wide", "image_size=wide"),
        ("batch_size", "0", "at least 1"),
        ("batch_size", "1.5", "expected int"),
        ("batch_size", math.inf, "expected int"),
        ("clip_norm", "-1", "clip_norm=-1.0: expected 0 or more"),
        ("clip_norm", "nan", "clip_norm=nan: expected 0 or more, and finite"),
        ("clip_norm", "inf", "clip_norm=inf: expected 0 or more, and finite"),
        ("schedule", "one-cycl", "did you mean 'one-cycle'"),
        ("statistics", "", "no statistics"),
        ("statistics", "maximun", "did you mean 'maximum'"),
        ("batchsize", "1", "did you mean 'batch_size'"),
    ],
)
def test_wrong_settings_are_refused(name: str, key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        configure(name, settings={key: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", ["-0.1", "nan", "inf"])
@pytest.mark.parametrize("name", ["patchcore", "supersimplenet", "simplenet"])
def test_whitening_is_a_share(name: str, value: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"whitening={value} does not fit; expected at least 0, and finite"
    ):
        configure(name, settings={"whitening": value})


@pytest.mark.parametrize("key", ["place_weight", "dimensions", "candidates", "copies"])
def test_what_patchcore_counts_and_weighs_is_not_negative(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=-1\S* does not fit; expected at least 0"):
        configure("patchcore", settings={key: "-1"})


def test_an_unknown_kind_of_anomalies_or_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="anomalies=perlin2 does not fit; expected 'perlin' or 'whole'"):
        configure("supersimplenet", settings={"anomalies": "perlin2"})
    with pytest.raises(
        ConfigError, match="simplenet has no preset 'journal'; expected one of default, paper"
    ):
        configure("simplenet", "journal")


def test_booleans_are_written_as_words() -> None:
    for text, value in {
        "true": True,
        "False": False,
        "on": True,
        "off": False,
        "1": True,
        "0": False,
    }.items():
        assert configure("efficientad-s", settings={"penalty": text}).penalty is value
    with pytest.raises(ConfigError, match="penalty=maybe"):
        configure("efficientad-s", settings={"penalty": "maybe"})


def test_the_presets_are_those_documented() -> None:
    presets = {name: tuple(method(name).presets) for name in METHODS}
    assert presets == {
        "efficientad-s": ("default", "paper"),
        "efficientad-m": ("default", "paper"),
        "supersimplenet": ("default", "paper", "journal"),
        "simplenet": ("default", "paper"),
        "patchcore": ("default", "paper"),
        "padim": ("default", "paper"),
    }
    for size in ("s", "m"):
        paper = configure(f"efficientad-{size}", "paper")
        assert isinstance(paper, EfficientADConfig)
        # Algorithm 1 of the paper, to the number.
        assert (paper.steps, paper.learning_rate, paper.weight_decay) == (70_000, 1e-4, 1e-5)
        assert (paper.schedule, paper.batch_size, paper.statistics) == ("step-95", 1, ("maximum",))
        assert (paper.hard_quantile, paper.low_quantile, paper.high_quantile) == (0.999, 0.9, 0.995)
        assert (paper.dropout, paper.penalty, paper.autoencoder, paper.padding) == (0.2, True, True, False)
        assert (paper.crop, paper.optimiser) == (0, "adam")
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

    assert (paper.anomalies, paper.noise_on_defects, paper.noise_on_unmasked) == ("perlin", False, False)
    # SimpleNet's paper: no upscaling, whole copies with noise, one loss, constant rates, the map's maximum.
    for wanted in ("default", "paper"):
        old = configure("simplenet", wanted)
        assert not old.upscale
        assert not old.classification_head
        assert not old.focal_loss
        assert old.anomalies == "whole"
    assert (old.backbone, old.batch_size, old.steps, old.epochs) == ("wide_resnet50_2", 8, 0, 160)
    assert (old.schedule, old.hidden_channels, old.noise) == ("constant", 1024, 0.015)
    assert old.statistics == ("maximum",)


def changed(one: Config, other: Config) -> dict[str, Any]:
    """Return the fields of `other` that differ from those of `one`, with their values."""
    values = dataclasses.asdict(other)
    return {name: values[name] for name, value in dataclasses.asdict(one).items() if value != values[name]}


LEARNS = {"classification_head": True, "stop_gradient": False, "clip_norm": 1.0, "statistics": ("head",)}
"""What learning from real defects changes in the default config; the presets have a head anyway."""
MASKED = {"perlin_threshold": 0.6, "raise_noise": False}
FASTER = {"adaptor_learning_rate": 1e-3, "head_learning_rate": 2e-3}
IN_PAPER = {"stop_gradient": False, "clip_norm": 1.0}


@pytest.mark.parametrize(
    ("preset", "supervision", "changes"),
    [
        ("default", "weak", LEARNS | FASTER),
        ("default", "mixed", LEARNS | FASTER | MASKED | BOTH),
        ("default", "full", LEARNS | FASTER | MASKED | BOTH),
        ("paper", "weak", IN_PAPER),
        ("paper", "mixed", IN_PAPER | MASKED),
        ("paper", "full", IN_PAPER | MASKED),
        ("journal", "weak", IN_PAPER),
        *(
            (
                "journal",
                known,
                IN_PAPER | MASKED | {"mask_dilation": 7, "distance_weights": True},
            )
            for known in ("mixed", "full")
        ),
    ],
)
def test_supervision_changes_what_the_paper_changes_with_it(
    preset: str, supervision: Supervision, changes: dict[str, Any]
) -> None:
    """Section 4: the gradient flows, its norm is 1 at most, masks are sparser where real ones are known."""
    without = method("supersimplenet").config if preset == "default" else configure("supersimplenet", preset)
    assert isinstance(without, SuperSimpleNetConfig)
    assert without.perlin_threshold == 0.2
    assert changed(without, configure("supersimplenet", preset, supervision=supervision)) == changes


def test_the_journal_extension_differs_from_the_paper_by_its_own_rules() -> None:
    base, journal = configure("supersimplenet", "paper"), configure("supersimplenet", "journal")
    assert changed(base, journal) == {"adapt_classification_features": False, "noise_on_unmasked": True}


@pytest.mark.parametrize("supervision", ["mixed", "full"])
def test_masks_change_in_simplenet_only_the_anomalies_that_it_does_not_draw(supervision: Supervision) -> None:
    for preset, changes in (("default", MASKED | FASTER), ("paper", MASKED)):
        without = method("simplenet").config if preset == "default" else configure("simplenet", preset)
        assert changed(without, configure("simplenet", preset, supervision=supervision)) == changes


def test_what_a_method_can_learn_from_is_listed_with_each_preset() -> None:
    able = {name: {tuple(each.regimes) for each in method(name).presets.values()} for name in METHODS}
    assert able == {
        "efficientad-s": {("none",)},
        "efficientad-m": {("none",)},
        "supersimplenet": {("none", "weak", "mixed", "full")},
        "simplenet": {("none", "mixed", "full")},
        "patchcore": {("none",)},
        "padim": {("none",)},
    }


def test_a_setting_overrides_what_supervision_sets() -> None:
    given = {"perlin_threshold": 0.3, "clip_norm": "0", "statistics": "maximum"}
    found = configure("supersimplenet", settings=given, supervision="full")
    assert (found.perlin_threshold, found.clip_norm, found.statistics) == (0.3, 0.0, ("maximum",))
    assert found.classification_head


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_without_the_head_that_supervision_brings_the_map_gives_the_score(preset: str) -> None:
    off = {"classification_head": False}
    found = configure("supersimplenet", preset, off, supervision="full")
    assert found.statistics == configure("supersimplenet").statistics
    asked = off | {"statistics": "head"}  # by name it is refused
    with pytest.raises(ConfigError, match="classification_head=true"):
        build("supersimplenet", configure("supersimplenet", preset, asked, supervision="full"), 0)


def test_a_setting_overrides_a_preset() -> None:
    assert configure("efficientad-s", "paper", {"steps": "5"}).steps == 5


def test_the_head_cannot_score_unless_it_is_built() -> None:
    with pytest.raises(ConfigError, match="classification_head=true"):
        build("supersimplenet", configure("supersimplenet", settings={"statistics": "head"}), 0)


@pytest.mark.parametrize("supervision", ["none", "full"])
def test_the_papers_schedule_is_the_papers_with_labels_too(supervision: Supervision) -> None:
    paper = configure("supersimplenet", "paper", supervision=supervision)
    usual = vars(configure("supersimplenet", supervision=supervision))
    ours = configure("supersimplenet", "default", with_schedule("supersimplenet", "paper", {}), supervision)
    for key, value in vars(ours).items():
        assert value == (vars(paper)[key] if key in paper.SCHEDULE else usual[key]), key
    rates = {"adaptor_learning_rate", "head_learning_rate"}
    assert {"steps", "epochs", "batch_size", "schedule"} | rates == paper.SCHEDULE


@pytest.mark.parametrize(("given", "length"), [({"steps": 500}, (500, 0)), ({"epochs": 7}, (0, 7))])
def test_a_length_that_is_set_goes_before_the_papers(given: dict[str, Any], length: tuple[int, int]) -> None:
    config = configure("supersimplenet", "default", with_schedule("supersimplenet", "paper", given))
    assert (config.steps, config.epochs) == length


# --- the methods and their configs ---


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_grouped_by_their_names(name: str) -> None:
    """A misspelt name would be in no group and no error."""
    config = method(name).config
    assert field_types(config).keys() >= config.SCHEDULE | config.FIXED
    assert not config.SCHEDULE & config.FIXED


def test_constants_of_a_config_are_no_settings() -> None:
    for name in ("SCHEDULE", "FIXED"):
        with pytest.raises(ConfigError, match=f"has no setting '{name}'"):
            configure("efficientad-s", settings={name: "steps"})


def test_methods_are_listed_by_a_setting_that_they_have() -> None:
    assert registry.methods_with_setting("logical_weight") == ["efficientad-s", "efficientad-m"]
    assert registry.methods_with_setting("hidden_channels") == ["supersimplenet", "simplenet"]
    assert registry.methods_with_setting("image_size") == list(METHODS)
    assert registry.methods_with_setting("image_sizes") == []


def test_a_method_is_listed_as_itself_or_by_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own = dataclasses.replace(
        method("simplenet"), config=dataclasses.replace(configure("simplenet"), steps=7)
    )
    monkeypatch.setitem(METHODS, "own", own)
    monkeypatch.setitem(METHODS, "elsewhere", "blemish.detectors.supersimplenet:SIMPLENET")
    assert method("own") is own
    assert configure("own").steps == 7
    assert method("elsewhere") is method("simplenet")
    assert isinstance(METHODS["elsewhere"], Method)  # imported on first use


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'simplnet'; did you mean 'simplenet'\?"):
        configure("simplnet")


def test_listing_the_methods_needs_no_torch() -> None:
    """Nor does refusing an unknown one."""
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom blemish.detectors import registry\n"
        "from blemish.errors import ConfigError\nprint(*registry.METHODS)\n"
        "try: registry.configure('simplnet')\nexcept ConfigError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, list(METHODS), "")
