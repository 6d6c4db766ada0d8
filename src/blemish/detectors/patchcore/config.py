"""PatchCore's settings, and the values used in the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from typing_extensions import override

from blemish.detectors.settings import STATISTICS, Config, Edges, refuse_numbers
from blemish.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PatchCoreConfig(Config):
    """The settings of PatchCore."""

    FIXED: ClassVar[frozenset[str]] = frozenset(
        {"image_size", "backbone", "layers", "aggregation", "place_weight", "whitening", "dimensions"}
        | {"choice", "neighbours", "support", "squared", "top_share", "edges", "blur_sigma", "statistics"}
    )

    side: int = 384
    backbone: str = "efficientnet_lite0"
    layers: tuple[str, ...] = ("stage3", "stage5")
    """Names of the backbone outputs that are joined, finest first; empty: the backbone's default."""
    batch_size: int = 1
    aggregation: Literal["mean", "published"] = "mean"
    """How the features of a neighbourhood become one vector: their mean, or the paper's pooling of 3 x 3
    cells and neighbouring channels to 1,024 numbers."""
    place_weight: float = 1.0
    """Weight of a cell's place, from -1 to 1 along each axis, beside its features, whose length is 1 on
    average; 0: features alone."""
    whitening: float = 0.0
    """Regularisation of the whitening of the features, as a share of their mean variance; 0: no whitening."""
    dimensions: int = 0
    """Number of principal components kept of the features, with the length of the rest as one more number;
    0: all features."""
    bank_size: int = 3000
    """Number of cells remembered; 0: see bank_share."""
    bank_share: float = 0.0
    """Share of the candidates remembered."""
    candidates: int = 120_000
    """Number of cells, as many from each image, among which those to remember are chosen; 0: all cells."""
    choice: Literal["cover", "published", "random"] = "cover"
    """How they are chosen: so that the farthest candidate is as near as possible; by the published
    approximation of this; or at random."""
    copies: int = 0
    """Number of altered copies of each good image that are remembered as well (`data.loading.altering`)."""
    trim: float = 0.0
    """Share of the candidates left out before the choice: those least like the other images' cells."""
    neighbours: int = 1
    """Number of remembered cells whose mean distance counts."""
    support: int = 9
    """Number of remembered cells, the nearest one included, that the statistic `reweighted` looks at."""
    squared: bool = False
    """Map squared distances, as published, instead of distances."""
    top_share: float = 0.01
    """Share of the cells whose mean is the statistic `top_mean`."""
    edges: Edges = "cells"
    """What is done about places where good parts score high: nothing, level rings or each cell, or leave the
    rim blind (`detectors.edges`)."""
    blur_sigma: float = 4.0
    """Sigma of the blur of the final map, in pixels of the network's input."""

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range and for settings that contradict each other."""
        if self.aggregation == "published" and (self.whitening or self.dimensions):
            raise ConfigError("aggregation=published: expected it without whitening and dimensions")
        refuse_numbers(
            (
                ("bank_size", self.bank_size, self.bank_size > 0 or self.bank_share > 0, "more than 0"),
                ("bank_share", self.bank_share, 0 <= self.bank_share <= 1, "0 to 1"),
                (
                    "place_weight",
                    self.place_weight,
                    0 <= self.place_weight < math.inf,
                    "at least 0, and finite",
                ),
                ("whitening", self.whitening, 0 <= self.whitening < math.inf, "at least 0, and finite"),
                ("dimensions", self.dimensions, self.dimensions >= 0, "at least 0"),
                ("candidates", self.candidates, self.candidates >= 0, "at least 0"),
                ("copies", self.copies, self.copies >= 0, "at least 0"),
                ("trim", self.trim, 0 <= self.trim < 1, "at least 0 and less than 1"),
                ("neighbours", self.neighbours, self.neighbours >= 1, "at least 1"),
                ("support", self.support, self.support >= 1, "at least 1"),
                ("top_share", self.top_share, 0 < self.top_share <= 1, "more than 0 and at most 1"),
            )
        )

    @property
    @override
    def altered_copies(self) -> int:
        return self.copies

    @property
    @override
    def known_statistics(self) -> tuple[str, ...]:
        return (*STATISTICS, "cell_maximum", "reweighted")


PAPER: dict[str, Any] = {
    "image_size": (224, 224),
    "backbone": "wide_resnet50_2",
    "layers": ("layer2", "layer3"),
    "aggregation": "published",
    "place_weight": 0.0,
    "bank_size": 0,
    "bank_share": 0.1,
    "candidates": 0,
    "choice": "published",
    "squared": True,
    "edges": "none",
    "statistics": ("cell_maximum",),
}
