"""EfficientAD's settings, and the values used in the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import override

from blemish.backbones.pdn import CELL
from blemish.detectors.settings import STATISTICS, Config, refuse_numbers
from blemish.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EfficientADConfig(Config):
    """The settings of EfficientAD."""

    SCHEDULE: ClassVar[frozenset[str]] = Config.SCHEDULE | {"optimiser", "crop", "learning_rate"}
    FIXED: ClassVar[frozenset[str]] = frozenset({"size", "padding", "edges", "autoencoder"})
    LEAST: ClassVar[int] = 256
    NEED: ClassVar[int] = 8

    size: Literal["small", "medium"] = "small"
    padding: bool = False
    """Zero-pad inside the networks, which then cover the border but learn its zeros."""
    edges: Literal["blind", "reflect"] = "blind"
    """What fills the margin that unpadded networks lose: zeros in the map, or a rim of reflected pixels."""
    batch_size: int = 2
    steps: int = 2000
    learning_rate: float = 2e-3
    weight_decay: float = 1e-5
    hard_quantile: float = 0.9
    """The student learns only from errors at or above this quantile; 0: from all of them."""
    penalty: bool = True
    """Penalise the student for imitating the teacher on natural images."""
    autoencoder: bool = True
    """Use the autoencoder and its half of the map."""
    logical_weight: float = 0.5
    """Weight of that half in the map; it has no effect on training."""
    map_normalisation: bool = True
    """Scale the two halves by quantiles of held-out maps before they are combined."""
    low_quantile: float = 0.9
    high_quantile: float = 0.995
    dropout: float = 0.2
    crop: int = 128
    """Side in pixels of the random square that the student sees of each image in a step; 0: the whole
    image."""
    optimiser: Literal["adam", "muon"] = "muon"

    @property
    @override
    def known_statistics(self) -> tuple[str, ...]:
        return (*STATISTICS, "whole_image")

    @property
    @override
    def reads_natural_images(self) -> bool:
        return self.penalty

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range and for settings that contradict each other."""
        refuse_numbers(
            (
                (
                    "learning_rate",
                    self.learning_rate,
                    0 < self.learning_rate < math.inf,
                    "more than 0, and finite",
                ),
                (
                    "weight_decay",
                    self.weight_decay,
                    0 <= self.weight_decay < math.inf,
                    "at least 0, and finite",
                ),
                ("logical_weight", self.logical_weight, 0 <= self.logical_weight <= 1, "0 to 1"),
                ("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and less than 1"),
                (
                    "hard_quantile",
                    self.hard_quantile,
                    0 <= self.hard_quantile < 1,
                    "at least 0 and less than 1",
                ),
                (
                    "low_quantile",
                    self.low_quantile,
                    0 <= self.low_quantile < self.high_quantile,
                    "less than high_quantile",
                ),
                ("high_quantile", self.high_quantile, self.high_quantile <= 1, "at most 1"),
            )
        )
        if self.padding and self.edges != "blind":
            raise ConfigError(
                f"edges={self.edges} with padding=true: both fill the margin; expected one of them"
            )
        if self.padding and self.crop:
            raise ConfigError(
                f"crop={self.crop} with padding=true: padded networks need whole images; expected crop=0"
            )
        if self.crop and (self.crop % CELL or not 36 <= self.crop <= 256):
            raise ConfigError(f"crop={self.crop}: expected 0, or a multiple of {CELL} from 36 to 256")
        if not self.autoencoder and self.logical_weight != 0.5:
            raise ConfigError(
                f"logical_weight={self.logical_weight} with autoencoder=false: "
                "there is no logical map to weight"
            )


PAPER = {
    "image_size": (256, 256),
    "steps": 70_000,
    "batch_size": 1,
    "crop": 0,
    "optimiser": "adam",
    "learning_rate": 1e-4,
    "hard_quantile": 0.999,
    "schedule": "step-95",
    "statistics": ("maximum",),
}
