"""PaDiM's settings, and the values used in the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import override

from blemish.detectors.settings import Config, Edges, refuse_numbers


@dataclass(frozen=True, kw_only=True)
class PaDiMConfig(Config):
    """The settings of PaDiM."""

    backbone: str = "efficientnet_lite0"
    layers: tuple[str, ...] = ("stage3", "stage5")
    """Names of the backbone outputs that are joined, finest first; empty: the backbone's default."""
    batch_size: int = 1
    place: Literal["each", "all"] = "each"
    """Whether each position has a Gaussian of its own, or all positions share one."""
    average: bool = True
    """Average features over 3 x 3 cells, and resize coarser layers bilinearly; else repeat the nearest."""
    reduction: Literal["principal", "random"] = "principal"
    """How features are reduced: to principal components, or to channels at random, as published."""
    dimensions: int = 48
    """Number of features that are kept, unless `place` is all; 0: all."""
    shrinkage: float = 0.0
    """Added to each variance, as published; 0: covariances are shrunk towards their mean variance, by as much
    as the number of images calls for."""
    top_share: float = 0.01
    """Share of the cells whose mean is the statistic `top_mean`."""
    edges: Edges = "cells"
    """What is done about places where good parts score high: nothing, level rings or each cell, or leave the
    rim blind (`detectors.edges`)."""
    blur_sigma: float = 4.0
    """Sigma of the blur of the final map, in pixels of the network's input."""

    @override
    def reconciled(self, changes: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Keep all features for a Gaussian of all positions, unless the user asked for a number."""
        if changes.get("place") == "all" and "dimensions" not in given:
            return changes | {"dimensions": 0}
        return changes

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        refuse_numbers((("top_share", self.top_share, 0 < self.top_share <= 1, "more than 0 and at most 1"),))


PAPER: dict[str, Any] = {
    "image_size": (224, 224),
    "backbone": "resnet18",
    "layers": ("layer1", "layer2", "layer3"),
    "average": False,
    "reduction": "random",
    "dimensions": 100,
    "shrinkage": 0.01,
    "edges": "none",
    "statistics": ("maximum",),
}
