"""SuperSimpleNet for inference: successive linear layers are multiplied into one beforehand.

Exact rewrites, equal to the plain network up to rounding:
- the batch norms of the backbone are folded into its convolutions, and the division by the image's deviation
  into the first of them;
- the adaptor and the batch norm of the segmentation head are folded into the head's first layer, which runs
  on the backbone's outputs before they are upscaled and averaged (`heads`);
- the adaptor and the batch norm of the classification head are folded into that head's kernel;
- the gain and shift of the map's rings are one product and one sum, with constants for each cell;
- the map is resized and blurred by one matrix product for each axis.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from blemish.backbones.folding import without_norms
from blemish.detectors import edges, ops
from blemish.detectors.cells import by_cells, cell_parts, places
from blemish.detectors.fusing import Fused, enlarge, enlarging_matrix
from blemish.detectors.supersimplenet.detector import SuperSimpleNet
from blemish.detectors.supersimplenet.heads import SLOPE, spread, spread_shifted


class FusedSuperSimpleNet(Fused):
    """Map (B, 3, H, W) images in [0, 1] to the outputs of `SuperSimpleNet.forward`."""

    full_precision = ("down", "across", "gain", "shift")
    down: Tensor
    across: Tensor
    gain: Tensor
    shift: Tensor
    along: Tensor
    bias: Tensor
    vector: Tensor

    def __init__(self, detector: SuperSimpleNet) -> None:
        super().__init__()
        self.config, self.feature_size = detector.config, detector.feature_size
        self.backbone = without_norms(detector.backbone)
        kernel = detector.kernel if self.config.blur_sigma else None
        parts = cell_parts(detector.backbone, self.config.image_size)
        size, self.margin = self.feature_size(parts), detector.blind_margin
        down, across = (
            enlarging_matrix(cells, length, kernel=kernel)
            for cells, length in zip(size, self.config.image_size, strict=True)
        )
        self.register_buffer("down", down)
        self.register_buffer("across", across)
        self.register_buffer("gain", edges.by_cell(detector.ring_gain, size))
        self.register_buffer("shift", edges.by_cell(detector.ring_shift, size))
        head, norm = detector.segmentation, detector.segmentation.norm
        gain, shift = affine(norm)
        weight = gain[:, None] * (head.first.weight @ detector.adaptor.weight)
        bias = gain * functional.linear(detector.adaptor.bias, head.first.weight, head.first.bias) + shift
        columns = torch.split(weight, [part.shape[3] for part in parts], 1)
        self.hidden = nn.ModuleList([linear(each) for each in columns])
        self.register_buffer("bias", bias.detach().clone())
        self.placed = head.place is not None
        if head.place is not None:  # a sum of what the row adds and what the column adds
            slopes, axes = gain[:, None] * head.place.weight, places(*size)
            self.register_buffer("bias", (bias + axes[:, :1, :1] * slopes[:, 0]).detach().clone())
            self.register_buffer("along", (axes[:1, :, 1:] * slopes[:, 1]).detach().clone())
        self.register_buffer("vector", head.last.weight[0].detach().clone())
        self.classification = None if detector.classification is None else FusedClassification(detector)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the map, which is the logits resized and blurred (section 3.4), and the statistics."""
        encoded = by_cells(self.backbone(images))
        parts = [layer(x) for x, layer in zip(encoded, self.hidden, strict=True)]
        hidden = spread(parts, self.feature_size(encoded)) + self.bias
        if self.placed:
            hidden = hidden + self.along
        cells = (functional.leaky_relu(hidden, SLOPE) @ self.vector).float()
        shown = edges.treated(cells, self.config.edges, self.gain, self.shift, self.margin)
        maps = enlarge(shown, self.down, self.across)
        head = {} if self.classification is None else {"head": partial(self.classification, encoded, cells)}
        return maps, ops.map_statistics(maps, shown, self.config.statistics, **head)


class FusedClassification(nn.Module):
    """The classification head with its batch norm and the adaptor folded into its kernel."""

    own: Tensor
    constant: Tensor
    shift: Tensor

    def __init__(self, detector: SuperSimpleNet) -> None:
        super().__init__()
        head, adaptor = detector.classification, detector.adaptor
        if head is None:
            raise ValueError("no classification head")
        gain, shift = affine(head.norm)
        features, own = head.weights()
        features, own = features * gain[:, None], own * gain[:, None, None, None]
        adapted = detector.config.adapt_classification_features
        constant = features @ adaptor.bias if adapted else features.new_zeros(features.shape[:3])
        rows = (features @ adaptor.weight if adapted else features).flatten(0, 2)
        self.taps, self.feature_size = len(features), detector.feature_size
        channels = [part.shape[3] for part in cell_parts(detector.backbone, detector.config.image_size)]
        self.layers = nn.ModuleList([linear(each) for each in torch.split(rows, channels, 1)])
        self.register_buffer("own", own.detach().clone())
        self.register_buffer("constant", constant.permute(2, 0, 1)[:, None].detach().clone())
        shift = gain * cast(Tensor, head.kernel.bias) + shift
        self.register_buffer("shift", shift.detach().clone())
        self.linear = copy.deepcopy(head.linear)

    @override
    def forward(self, encoded: tuple[Tensor, ...], segmentation: Tensor) -> Tensor:
        """Return (B,) logits from (B, h_i, w_i, C_i) features and the (B, h, w) segmentation."""
        size, half = self.feature_size(encoded), self.taps // 2
        parts = [layer(x).chunk(self.taps, 3) for x, layer in zip(encoded, self.layers, strict=True)]
        maps = segmentation[:, None].to(self.own.dtype)
        everywhere = torch.ones(1, 1, *size, device=maps.device, dtype=maps.dtype)
        seen = spread_shifted(parts, size, self.taps).permute(0, 3, 1, 2)
        seen = seen + functional.conv2d(maps, self.own, padding=half)
        # independent of the image: every runtime computes it once, when it loads the graph
        seen = seen + functional.conv2d(everywhere, self.constant, self.shift, padding=half)
        seen = torch.relu(seen)
        pooled = [x.amax((2, 3)) for x in (seen, maps)], [x.mean((2, 3)) for x in (seen, maps)]
        (highest, peak), (mean, level) = pooled
        score: Tensor = self.linear(torch.cat([highest, mean, peak, level], 1))
        return score[:, 0]


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the (C,) gain and shift that a batch norm applies in evaluation mode."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_var is None:
        raise ValueError(f"{norm} has no running statistics")
    gain: Tensor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return gain, norm.bias - gain * cast(Tensor, norm.running_mean)


def linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer without bias, with a copy of these (outputs, inputs) weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer
