"""What detectors on a frozen backbone share: which weights they need, and how images become features."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from typing_extensions import override

from blemish.backbones import Backbone, fill_backbone
from blemish.detectors.base import Detector
from blemish.detectors.cells import by_cells


class OnBackbone(Detector):
    """A detector whose frozen part is a backbone."""

    backbone: Backbone

    @property
    @override
    def pretrained_name(self) -> str:
        return self.backbone.name

    @override
    def load_pretrained(self, path: Path) -> None:
        fill_backbone(self.backbone, self.backbone.name, path)

    @property
    @override
    def encoding_key(self) -> tuple[str, ...]:
        return (self.backbone.name, *self.backbone.layers)

    @override
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the backbone's outputs as (B, h_i, w_i, C_i), those of the same size concatenated."""
        return by_cells(self.backbone(images))
