"""Pretrained networks that map images to feature maps, all listed in `BACKBONES`.

A backbone includes the normalisation with which its weights were trained, so that detectors need not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from blemish.backbones import efficientnet_lite, pdn, resnet, weights
from blemish.errors import ConfigError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)


@dataclass(frozen=True)
class Entry:
    """The properties of one backbone."""

    build: Callable[[Sequence[str]], nn.Module]
    layers: tuple[str, ...]
    """Names of the layers whose outputs are available."""
    default: tuple[str, ...]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    """Per-channel mean and standard deviation, for RGB in [0, 1]."""


def _resnet(name: str) -> Entry:
    build = partial(resnet.ResNet, resnet.FORMS[name])
    return Entry(build, resnet.LAYERS, ("layer2", "layer3"), IMAGENET)


def _lite(name: str) -> Entry:
    build = partial(efficientnet_lite.EfficientNetLite, efficientnet_lite.FORMS[name])
    return Entry(build, efficientnet_lite.LAYERS, ("stage3", "stage4", "stage5"), LITE)


BACKBONES = {
    **{name: _lite(name) for name in efficientnet_lite.FORMS},
    "resnet18": _resnet("resnet18"),
    "resnet50": _resnet("resnet50"),
    "resnet50_v1": _resnet("resnet50_v1"),
    "wide_resnet50_2": _resnet("wide_resnet50_2"),
    "wide_resnet101_2": _resnet("wide_resnet101_2"),
}


class Normalise(nn.Module):
    """Subtract a per-channel mean and divide by a per-channel standard deviation, (B, C, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    @override
    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Backbone(nn.Module):
    """A frozen pretrained network with its normalisation; maps (B, 3, H, W) in [0, 1] to layer outputs."""

    def __init__(self, name: str, layers: Sequence[str]) -> None:
        super().__init__()
        entry = BACKBONES[name]
        self.name, self.layers = name, tuple(layers)
        self.normalise = Normalise(*entry.normalisation)
        self.network = entry.build(layers)
        self.channels: tuple[int, ...] = tuple(self.network.channels)  # type: ignore[arg-type]
        self.requires_grad_(False).eval()

    @override
    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode, since the batch statistics of a frozen network must not change."""
        return super().train(False)

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features: tuple[Tensor, ...] = self.network(self.normalise(x))
        return features


def choose_layers(name: str, layers: Sequence[str]) -> tuple[str, ...]:
    """Return the requested layers, or the defaults if none; raise ConfigError for an unknown name."""
    if name not in BACKBONES:
        raise ConfigError(f"unknown backbone {name!r}; expected one of {', '.join(BACKBONES)}")
    known = BACKBONES[name].layers
    for layer in layers:
        if layer not in known:
            raise ConfigError(f"{name} has no layer {layer!r}; expected one of {', '.join(known)}")
    return tuple(layers) or BACKBONES[name].default


def fill_backbone(backbone: Backbone, name: str, path: Path | None = None) -> None:
    """Load the weights of a backbone from `path` or else as found by `weights.find`; raise WeightsError."""
    weights.fill(backbone.network, weights.find(name, path), whole=skeleton(name))


def skeleton(name: str) -> nn.Module:
    """Build the complete network on the meta device: parameter names and shapes without memory."""
    with torch.device("meta"):
        return pdn.PDNS[name]() if name in pdn.PDNS else BACKBONES[name].build(BACKBONES[name].layers)
