"""SuperSimpleNet and SimpleNet step by step, as the papers show them and other libraries implement them.

The backbone's outputs are upscaled, concatenated and averaged over 3 x 3 cells. A 1 x 1 convolution adapts
them, the heads run one after the other on all cells, and the map is blurred in two dimensions at once. All
tensors are (B, C, H, W). The weights come from one of our detectors, and the outputs equal that detector's up
to rounding: it reorders linear operations, even in training.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish.detectors import edges, ops
from blemish.detectors.base import Detector
from blemish.detectors.cells import places
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.detectors.supersimplenet.heads import SLOPE


class PlainSuperSimpleNet(nn.Module):
    """Maps (B, 3, H, W) images in [0, 1] to the outputs of `SuperSimpleNet.forward`."""

    ring_gain: Tensor
    ring_shift: Tensor

    def __init__(self, detector: SuperSimpleNet) -> None:
        super().__init__()
        self.config = detector.config
        self.backbone = detector.backbone
        self.adaptor = one_by_one(detector.adaptor)
        head = detector.segmentation
        norm = nn.BatchNorm2d(head.norm.num_features)
        norm.load_state_dict(head.norm.state_dict())
        first = one_by_one(head.first)
        self.placed = head.place is not None
        if head.place is not None:  # the place of a cell is two more channels
            weights = [first.weight.data, one_by_one(head.place).weight.data]
            first.weight = nn.Parameter(torch.cat(weights, 1))
        self.segmentation = nn.Sequential(first, norm, nn.LeakyReLU(SLOPE), one_by_one(head.last))
        self.register_buffer("ring_gain", detector.ring_gain)
        self.register_buffer("ring_shift", detector.ring_shift)
        self.margin = detector.blind_margin
        self.classification = detector.classification
        kernel = torch.outer(detector.kernel, detector.kernel)
        self.register_buffer("kernel", kernel[None, None])
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        """Join the backbone's outputs into (B, C, h, w), at the size of the finest one or twice that."""
        outputs = self.backbone(images)
        factor = 2 if self.config.upscale else 1
        size = [factor * length for length in outputs[0].shape[2:]]
        resized = [functional.interpolate(x, size, mode="bilinear", align_corners=True) for x in outputs]
        return functional.avg_pool2d(torch.cat(resized, 1), 3, stride=1, padding=1)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return (B, H, W) maps and (B, K) statistics."""
        features = self.features(images)
        adapted = self.adaptor(features)
        size, seen = adapted.shape[2:], adapted
        if self.placed:
            place = places(*size).to(adapted).permute(2, 0, 1).expand(len(adapted), -1, -1, -1)
            seen = torch.cat([adapted, place], 1)
        cells = self.segmentation(seen)
        gain, shift = (edges.by_cell(each, size) for each in (self.ring_gain, self.ring_shift))
        shown = edges.treated(cells[:, 0], self.config.edges, gain, shift, self.margin)
        maps = functional.interpolate(shown[:, None], images.shape[2:], mode="bilinear")
        if self.config.blur_sigma:
            kernel = cast(Tensor, self.kernel)
            maps = functional.conv2d(
                functional.pad(maps, (kernel.shape[-1] // 2,) * 4, mode="reflect"), kernel
            )
        seen = adapted if self.config.adapt_classification_features else features
        statistics = ops.map_statistics(
            maps[:, 0], shown, self.config.statistics, head=lambda: self.score(seen, cells)
        )
        return maps[:, 0], statistics

    def score(self, features: Tensor, cells: Tensor) -> Tensor:
        """Return the (B,) logits of the classification head."""
        head = self.classification
        if head is None:
            raise ValueError("no classification head")
        seen = head.convolution(torch.cat([features, cells], 1))
        pooled = [seen.amax((2, 3)), seen.mean((2, 3)), cells.amax((2, 3)), cells.mean((2, 3))]
        return cast(Tensor, head.linear(torch.cat(pooled, 1)))[:, 0]


def one_by_one(layer: nn.Linear) -> nn.Conv2d:
    """Turn a linear layer on cells into a 1 x 1 convolution."""
    made = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    made.weight.data = layer.weight.data[:, :, None, None].clone()
    if made.bias is not None:
        made.bias.data = layer.bias.data.clone()
    return made


def plain(detector: Detector) -> nn.Module:
    """Return a detector's network as other libraries ship it; for EfficientAD that is the detector's own."""
    return PlainSuperSimpleNet(detector) if isinstance(detector, SuperSimpleNet) else detector
