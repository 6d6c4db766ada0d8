"""ResNets and Wide ResNets with torchvision's parameter names, built up to any of their four stages.

He et al., CVPR 2016; Zagoruyko and Komodakis, BMVC 2016. In the original version of ResNet-50, the stride of
a stage is in its first 1x1 convolution; torchvision moved it to the 3x3 convolution. Weights of one version
load into the other without an error but give meaningless results, so the version is part of the backbone's
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override


@dataclass(frozen=True)
class Form:
    """The configuration of one ResNet."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool = True
    width: int = 64
    """Channels of the 3x3 convolutions of the bottlenecks in the first stage."""
    stride_in_first: bool = False
    """True for the original version, with the stride in conv1 of a bottleneck instead of conv2."""


FORMS = {
    "resnet18": Form((2, 2, 2, 2), bottleneck=False),
    "resnet50": Form((3, 4, 6, 3)),
    "resnet50_v1": Form((3, 4, 6, 3), stride_in_first=True),
    "wide_resnet50_2": Form((3, 4, 6, 3), width=128),
    "wide_resnet101_2": Form((3, 4, 23, 3), width=128),
}
LAYERS = ("layer1", "layer2", "layer3", "layer4")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, inputs, H, W) to (B, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    @override
    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(residual + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: (B, inputs, H, W) to (B, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, stride_in_first: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_first else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=second, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    @override
    def forward(self, x: Tensor) -> Tensor:
        residual = torch.relu(self.bn1(self.conv1(x)))
        residual = torch.relu(self.bn2(self.conv2(residual)))
        return torch.relu(self.bn3(self.conv3(residual)) + self.downsample(x))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Build the shortcut of a block: a projection, or empty if the shapes agree."""
    if inputs == outputs and stride == 1:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


def stage(form: Form, index: int, inputs: int) -> tuple[nn.Sequential, int]:
    """Build stage `index` (0 to 3); return it with its number of output channels."""
    stride = 1 if index == 0 else 2
    plain = 64 * 2**index
    outputs = 4 * plain if form.bottleneck else plain
    blocks: list[nn.Module] = []
    for number in range(form.blocks[index]):
        first = stride if number == 0 else 1
        source = inputs if number == 0 else outputs
        if form.bottleneck:
            blocks.append(Bottleneck(source, form.width * 2**index, outputs, first, form.stride_in_first))
        else:
            blocks.append(BasicBlock(source, outputs, first))
    return nn.Sequential(*blocks), outputs


class ResNet(nn.Module):
    """Map normalised (B, 3, H, W) images to the outputs of the named stages.

    layer1 to layer4 have strides of 4, 8, 16 and 32. Stages after the last requested one are not built.
    """

    def __init__(self, form: Form, layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, widths = 64, {}
        self.stages = LAYERS[: 1 + max(LAYERS.index(name) for name in layers)]
        for index, name in enumerate(self.stages):
            built, channels = stage(form, index, channels)
            self.add_module(name, built)
            widths[name] = channels
        self.channels = tuple(widths[name] for name in self.layers)

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = {}
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = outputs[name] = self.get_submodule(name)(x)
        return tuple(outputs[name] for name in self.layers)
