"""EfficientAD for inference: teacher, student and autoencoder as one network that computes their differences.

Exact rewrites of algorithm 2, equal to the plain networks up to rounding:
- teacher and student read the image through one first convolution with the kernels of both;
- the normalisation of the image is folded into the first convolutions, that of the teacher's output into its
  last one;
- what pooling without padding drops at the far edges is not computed;
- the difference of two last convolutions is one convolution on the features of both networks;
- the scale of each half of the map is folded into those convolutions: a half is a sum of squares less an
  offset;
- the mean of the student's output over all places, for the statistic `whole_image`, is computed from means of
  its last convolution's input;
- the map is padded and resized by one matrix product for each axis.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish.backbones import Normalise
from blemish.backbones.pdn import CELL, CHANNELS
from blemish.detectors import ops
from blemish.detectors.efficientad.detector import Autoencoder, EfficientAD
from blemish.detectors.fusing import Fused, enlarge, enlarging_matrix


class FusedEfficientAD(Fused):
    """Map (B, 3, H, W) images in [0, 1] to the outputs of `EfficientAD.forward`."""

    full_precision: tuple[str, ...] = ("down", "across", "offsets")
    mean: Tensor
    offsets: Tensor
    down: Tensor
    across: Tensor
    imitate: Tensor
    image_shift: Tensor
    image_factor: Tensor

    def __init__(self, detector: EfficientAD) -> None:
        super().__init__()
        self.config, self.surround = detector.config, detector.surround
        height, width = (
            enlarging_matrix(length // CELL - 2 * detector.margin, length, detector.margin)
            for length in detector.config.image_size
        )
        self.register_buffer("down", height)
        self.register_buffer("across", width)
        self.register_buffer("mean", detector.normalise.mean.clone())
        teacher, student = detector.teacher, detector.student
        self.windows = [window(layer) for layer in teacher if not isinstance(layer, nn.ReLU)]
        self.first = stacked([absorb(network.entrance, detector.normalise) for network in (teacher, student)])
        self.pool = teacher.pool
        self.teacher = copy.deepcopy(teacher.trunk)
        self.student = copy.deepcopy(student.trunk)
        low, high = detector.quantiles.view(2, 2).unbind(1)
        gains = (0.1 / (CHANNELS * (high - low))).sqrt()
        self.register_buffer("offsets", 0.1 * low / (high - low))
        imitate, rebuild = detector.student_heads()
        described = normalised(teacher.last, detector.teacher_mean, detector.teacher_std)
        self.structural = scaled(difference(described, convolution(*imitate)), gains[0])
        self.judges_image = "whole_image" in self.config.statistics
        if self.judges_image:
            weight, bias = imitate
            self.register_buffer("imitate", weight.detach().clone())
            self.register_buffer(
                "image_shift", cast(Tensor, bias).detach()[:, None] - detector.image_mean[:, None]
            )
            self.register_buffer("image_factor", detector.image_factor.clone())
            self.full_precision += ("imitate", "image_shift", "image_factor")
        self.logical: nn.Conv2d | None = None
        self.autoencoder: Autoencoder | None = None
        if detector.autoencoder is not None:
            self.logical = scaled(convolution(*rebuild), -gains[1])
            self.autoencoder = copy.deepcopy(detector.autoencoder)
            self.autoencoder.replace_entrance(absorb(self.autoencoder.entrance, detector.normalise))
            self.autoencoder.last = scaled(self.autoencoder.last, gains[1])

    @property
    def trunks(self) -> tuple[nn.Sequential, nn.Sequential]:
        """Teacher and student without their first and last convolutions."""
        return self.teacher, self.student

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of algorithm 2."""
        described, imitated = self.deep(images)
        cells, *parts = self.combined(self.vectors(images, described, imitated))
        maps = enlarge(cells, self.down, self.across)
        distance = partial(self.image_distance, imitated)
        statistics = ops.map_statistics(maps, cells, self.config.statistics, whole_image=distance)
        return (maps, statistics, *(parts if len(parts) > 1 else ()))

    def cells(self, images: Tensor) -> list[Tensor]:
        """Return the (B, h, w) map at the networks' resolution, then the halves that it is combined from."""
        return self.combined(self.halves(images))

    def combined(self, halves: Sequence[Tensor]) -> list[Tensor]:
        """Return the map and its halves, given vectors whose squared lengths are the halves."""
        raw = [half.float().square().sum(1) for half in halves]
        parts = [cells - offset for cells, offset in zip(raw, self.offsets, strict=False)]
        weight = self.config.logical_weight
        joined = parts[0] if len(parts) == 1 else (1 - weight) * parts[0] + weight * parts[1]
        return [joined, *parts]

    def halves(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return (B, C, h, w) vectors whose squared lengths are the structural and the logical map."""
        return self.vectors(images, *self.deep(images))

    def vectors(self, images: Tensor, described: Tensor, imitated: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors of both halves, given what `deep` returns."""
        structural = self.structural(torch.cat([described, imitated], 1))
        if self.logical is None or self.autoencoder is None:
            return (structural,)
        return structural, self.autoencoder(images - self.mean) + self.logical(imitated)

    def image_distance(self, imitated: Tensor) -> Tensor:
        """Return the (B,) distances of the statistic `whole_image`, given the student's trunk.

        The mean of a convolution's output is that of its input, one for each place of the kernel. Matrices
        are left operands, as in `enlarge`: they stay in floating point.
        """
        places = zip(imitated.shape[2:], self.imitate.shape[2:], strict=True)
        down, across = (length - kernel + 1 for length, kernel in places)
        # One axis after the other: long sums would be rounded off.
        rows = functional.avg_pool2d(imitated.float(), (1, across), stride=1)
        means = functional.avg_pool2d(rows, (down, 1), stride=1).flatten(1)[:, :, None]
        apart = self.image_factor @ (self.imitate.flatten(1) @ means + self.image_shift)
        distances: Tensor = torch.linalg.vector_norm(apart.flatten(1), dim=1)
        return distances

    def deep(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the last convolutions of teacher and student."""
        described, imitated = self.shallow(images).chunk(2, 1)
        return self.teacher(described), self.student(imitated)

    def shallow(self, images: Tensor) -> Tensor:
        """Return the outputs of the first convolutions and their pooling, the teacher's half first."""
        padded = self.first.padding != (0, 0)
        seen = self.surround(images - self.mean if padded else images)  # zero padding is the mean colour
        if not padded:
            height, width = (used(length, self.windows) for length in seen.shape[2:])
            seen = seen[:, :, :height, :width]
        pooled: Tensor = self.pool(torch.relu(self.first(seen)))
        return pooled


def window(layer: nn.Module) -> tuple[int, int]:
    """Return the side and the stride of a square convolution or pooling."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size[0], 1
    return 2, 2


def used(length: int, windows: Sequence[tuple[int, int]]) -> int:
    """Return how many of `length` pixels are read by unpadded layers with these sides and strides.

    >>> used(256, [(4, 1), (2, 2), (4, 1), (2, 2), (3, 1), (4, 1)])
    253
    """
    for side, stride in windows:
        length = (length - side) // stride + 1
    for side, stride in reversed(windows):
        length = (length - 1) * stride + side
    return length


def convolution(weight: Tensor, bias: Tensor | None, like: nn.Conv2d | None = None) -> nn.Conv2d:
    """Return a convolution with a copy of these weights, and the stride and padding of `like`."""
    stride, padding = (like.stride, like.padding) if like else ((1, 1), (0, 0))
    made = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=stride,  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        bias=bias is not None,
    )
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def absorb(entrance: nn.Conv2d, normalise: Normalise) -> nn.Conv2d:
    """Return the convolution that reads the image with the image's normalisation folded into it.

    If it pads, only the division is folded in: its zeros stand for the mean colour, so it reads centred
    images.
    """
    weight, bias = entrance.weight / normalise.std, cast(Tensor, entrance.bias)
    if entrance.padding == (0, 0):
        bias = bias - (weight * normalise.mean).sum((1, 2, 3))
    return convolution(weight, bias, entrance)


def stacked(layers: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Return one convolution with the outputs of several that have the same input, in order."""
    weights, biases = zip(*((layer.weight, cast(Tensor, layer.bias)) for layer in layers), strict=True)
    return convolution(torch.cat(weights), torch.cat(biases), layers[0])


def normalised(last: nn.Conv2d, mean: Tensor, std: Tensor) -> nn.Conv2d:
    """Return a convolution whose outputs are normalised by a mean and a deviation, both (C, 1, 1)."""
    bias = (cast(Tensor, last.bias) - mean.flatten()) / std.flatten()
    return convolution(last.weight / std[..., None], bias, last)


def difference(minuend: nn.Conv2d, subtrahend: nn.Conv2d) -> nn.Conv2d:
    """Return the difference of two convolutions as one, whose input is the inputs of both in this order."""
    weight = torch.cat([minuend.weight, -subtrahend.weight], 1)
    return convolution(weight, cast(Tensor, minuend.bias) - cast(Tensor, subtrahend.bias), minuend)


def scaled(layer: nn.Conv2d, gain: Tensor) -> nn.Conv2d:
    """Return a convolution whose outputs are multiplied by a number."""
    return convolution(layer.weight * gain, cast(Tensor, layer.bias) * gain, layer)
