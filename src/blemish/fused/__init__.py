"""Networks for inference alone: a detector's own numbers from fewer operations.

A fused network gives what the detector's `forward` gives, to rounding; a test holds that for every method.
What is rewritten how is said at the top of each file.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from typing_extensions import override

from blemish.detectors.base import Detector
from blemish.detectors.efficientad import EfficientAD
from blemish.detectors.supersimplenet import SuperSimpleNet
from blemish.fused.efficientad import FusedEfficientAD
from blemish.fused.supersimplenet import FusedSuperSimpleNet


def fuse(detector: Detector) -> nn.Module:
    """Make the fused network of a trained detector, in float32: (B, 3, H, W) to the detector's outputs.

    It has copies of the weights. A detector that has no fused form is given back itself.
    """
    if isinstance(detector, EfficientAD):
        return FusedEfficientAD(detector).eval()
    if isinstance(detector, SuperSimpleNet):
        return FusedSuperSimpleNet(detector).eval()
    return detector.eval()


KEPT = ("down", "across", "offsets")
"""Buffers behind the last layers, where a map is made of their sums: always in float32."""


class Lowered(nn.Module):
    """A copy of a fused network whose layers compute in another type; it takes and gives float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.network = copy.deepcopy(network).to(dtype)
        for name in KEPT:
            if hasattr(network, name):
                setattr(self.network, name, getattr(network, name).clone())

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.float() for output in self.network(images.to(self.dtype)))
