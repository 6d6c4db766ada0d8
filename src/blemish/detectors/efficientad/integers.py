"""A fused EfficientAD that loses less in int8, by two rewrites, both exact.

- The same range for every channel, so that one scale for a whole tensor quantises each of them well. Where
  only ReLU and pooling lie between two layers with weights, a channel may be divided by a number before and
  multiplied by it after (Nagel et al., ICCV 2019, section 4.1, here for activations instead of weights).
- Pooling as a convolution: its output then has a scale of its own. It is also fast in ONNX Runtime, whose
  8-bit average pooling takes a fifth of the time of the whole network.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from blemish.detectors.efficientad.fused import FusedEfficientAD


def ready_for_integers(network: nn.Module, batches: Sequence[Tensor]) -> FusedEfficientAD:
    """Return the copy of a network that quantisation starts from; batches are (B, 3, H, W) good images."""
    made = copy.deepcopy(cast(FusedEfficientAD, network))
    equalise(made, batches)
    made.pool = convolved(made.pool, made.first.out_channels)
    for trunk in made.trunks:
        channels = 0
        for number, layer in enumerate(trunk):
            if isinstance(layer, nn.Conv2d):
                channels = layer.out_channels
            trunk[number] = convolved(layer, channels)
    return made


def equalise(network: FusedEfficientAD, batches: Sequence[Tensor]) -> None:
    """Equalise the ranges of all channels between the convolutions of teacher and student, in place."""
    trunks = [[layer for layer in trunk if isinstance(layer, nn.Conv2d)] for trunk in network.trunks]
    last = [layer for layer in (network.structural, network.logical) if layer is not None]
    measured = before_pooling(network) | {layer: layer for layer in last}
    found = largest(network, list(measured.values()), batches)
    seen = {layer: found[at] for layer, at in measured.items()}
    for trunk, half in zip(trunks, found[network.pool].chunk(2), strict=True):
        seen[trunk[0]] = half
    with torch.no_grad():
        divide_outputs(network.first, torch.cat([seen[trunk[0]] for trunk in trunks]))
        for trunk in trunks:
            for before, after in pairwise(trunk):
                divide_outputs(before, seen[after])
        widths = [trunk[-1].out_channels for trunk in trunks]
        for trunk, ranges in zip(trunks, torch.split(seen[network.structural], widths), strict=True):
            divide_outputs(trunk[-1], ranges)
        for layer, ranges in seen.items():
            layer.weight *= ranges[:, None, None]
        if network.judges_image:
            network.imitate *= seen[network.structural][widths[0] :, None, None]


def before_pooling(network: FusedEfficientAD) -> dict[nn.Conv2d, nn.Module]:
    """Return, for each convolution of the trunks, the pooling that it reads, or itself if it reads none.

    Values are largest, and rounded first, before the pooling.
    """
    found: dict[nn.Conv2d, nn.Module] = {}
    for trunk in network.trunks:
        pooling: nn.Module | None = network.pool
        for layer in trunk:
            if isinstance(layer, nn.Conv2d):
                found[layer] = pooling or layer
            pooling = layer if isinstance(layer, nn.AvgPool2d) else None
    return found


def largest(
    network: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Tensor]
) -> dict[nn.Module, Tensor]:
    """Return the largest magnitude of each channel that the layers read; 1 where it is always zero."""
    found: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        peaks = inputs[0].abs().amax((0, 2, 3))
        found[layer] = torch.maximum(found.get(layer, peaks), peaks)

    hooks = [layer.register_forward_pre_hook(note) for layer in set(layers)]
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for hook in hooks:
        hook.remove()
    return {layer: torch.where(ranges > 0, ranges, 1.0).clone() for layer, ranges in found.items()}


def divide_outputs(layer: nn.Conv2d, ranges: Tensor) -> None:
    """Divide each output channel of a convolution by its range, in place."""
    layer.weight /= ranges[:, None, None, None]
    if layer.bias is not None:
        layer.bias /= ranges


def convolved(layer: nn.Module, channels: int) -> nn.Module:
    """Return an average pooling without padding as a depthwise convolution, and any other layer unchanged."""
    if not isinstance(layer, nn.AvgPool2d) or layer.padding not in (0, (0, 0)):
        return layer
    side = int(layer.kernel_size)  # type: ignore[arg-type]
    made = nn.Conv2d(channels, channels, side, stride=side, groups=channels, bias=False)
    made.weight = nn.Parameter(torch.full_like(made.weight, 1 / side**2), requires_grad=False)
    return made
