"""SuperSimpleNet's settings, those of its papers, and what each supervision changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from blemish.detectors.settings import STATISTICS, Config
from blemish.errors import ConfigError

if TYPE_CHECKING:
    from blemish.types import Supervision


@dataclass(frozen=True, kw_only=True)
class SuperSimpleNetConfig(Config):
    """SuperSimpleNet's settings."""

    SCHEDULE: ClassVar[frozenset[str]] = Config.SCHEDULE | {"adaptor_learning_rate", "head_learning_rate"}
    FIXED: ClassVar[frozenset[str]] = frozenset({"backbone", "layers", "noise_ratio"})

    backbone: str = "efficientnet_lite0"
    layers: tuple[str, ...] = ()
    """Backbone outputs that are joined, finest first; empty: the backbone's default."""
    batch_size: int = 8
    epochs: int = 0
    steps: int = 1000
    adaptor_learning_rate: float = 1e-4
    adaptor_weight_decay: float = 1e-2
    head_learning_rate: float = 2e-4
    head_weight_decay: float = 1e-5
    upscale: bool = True
    """Double the finest layer's resolution."""
    hidden_channels: int = 0
    """Of the segmentation head; 0: two thirds of the features' channels, as in the paper, at least 256."""
    classification_head: bool = False
    adapt_classification_features: bool = True
    stop_gradient: bool = True
    """Keep the classification head's gradient out of the segmentation map (good-only training)."""
    anomalies: Literal["perlin", "whole", "none"] = "perlin"
    """Synthetic ones: noise under Perlin masks; SimpleNet's noise on a whole copy of the features; none."""
    noise: float = 0.0
    """Standard deviation of the synthetic noise; 0: the backbone's published one, else by noise_ratio."""
    noise_ratio: float = 0.5
    """Noise in shares of the features' own spread."""
    raise_noise: bool = True
    """Double noise whose level is not given, if held-out noisy cells are not told from clean ones."""
    perlin_threshold: float = 0.2
    noise_on_defects: bool = False
    """Draw synthetic noise where a real defect's mask is, too."""
    noise_on_unmasked: bool = False
    """Draw synthetic noise on defective images without a mask, as the extension does."""
    flip_defects: bool = True
    """Show each defective image flipped, too; turn off where good parts always lie alike, left from right."""
    mask_dilation: int = 0
    """Widen real masks by a square of this side, odd, in pixels of the image; the extension has 7."""
    distance_weights: bool = False
    """Weight cells of real defects by 3 (d / d_max)^2, d from the region's border (extension)."""
    focal_loss: bool = True
    blur_sigma: float = 4.0
    """Of the finished map, in pixels of the network's input."""
    statistics: tuple[str, ...] = ("maximum", "smoothed_maximum", "top_mean")

    def __post_init__(self) -> None:
        """Raise ConfigError for settings that contradict each other."""
        if "head" in self.statistics and not self.classification_head:
            raise ConfigError("the statistic 'head' needs --set classification_head=true")
        if self.mask_dilation < 0 or (self.mask_dilation and self.mask_dilation % 2 == 0):
            raise ConfigError(f"mask dilation {self.mask_dilation}: expected an odd number of pixels, or 0")

    @property
    @override
    def known_statistics(self) -> tuple[str, ...]:
        return (*STATISTICS, "head")

    @override
    def reconciled(self, changes: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Score by the map where a preset scores by the classification head and the user turned that off."""
        headless = "statistics" not in given and not changes.get("classification_head")
        if headless and "head" in changes.get("statistics", ()):
            return changes | {"statistics": self.statistics}
        return changes

    @override
    def refuse_supervision(self, supervision: Supervision) -> None:
        if supervision == "none" and self.anomalies == "none":
            raise ConfigError("with good images alone and anomalies=none there is nothing to learn from")
        if supervision == "weak" and not self.classification_head:
            raise ConfigError("supervision weak is learned by the classification head; expected it, or masks")


PAPER: dict[str, Any] = {
    "backbone": "wide_resnet50_2",
    "batch_size": 32,
    "steps": 0,
    "epochs": 300,
    "schedule": "step-80-90",
    "classification_head": True,
    "hidden_channels": 1024,
    "noise": 0.015,
    "statistics": ("head",),
}

JOURNAL = PAPER | {"adapt_classification_features": False, "noise_on_unmasked": True}

LABELLED: dict[str, Any] = {
    "classification_head": True,
    "stop_gradient": False,
    "clip_norm": 1.0,
    "statistics": ("head",),
}

MASKED: dict[str, Any] = LABELLED | {"perlin_threshold": 0.6, "raise_noise": False}
"""With masks, real defects say what the map must tell, and synthetic ones are few."""

REGIMES: dict[Supervision, dict[str, Any]] = {
    "none": {},
    "weak": LABELLED,
    "mixed": MASKED,
    "full": MASKED,
}
"""What each kind of supervision changes, in every preset; section 4."""

FASTER = {"adaptor_learning_rate": 1e-3, "head_learning_rate": 2e-3}
"""Ten times the paper's, for runs of hundreds of steps and not of thousands (docs/papers.md, Measured)."""

DEFAULT_REGIMES = {name: changes | (FASTER if changes else {}) for name, changes in REGIMES.items()}

JOURNAL_REGIMES = REGIMES | {
    name: REGIMES[name] | {"mask_dilation": 7, "distance_weights": True} for name in ("mixed", "full")
}
