"""SuperSimpleNet's settings, the values used in its papers, and what each supervision changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from blemish.detectors.settings import STATISTICS, Config, refuse_numbers
from blemish.errors import ConfigError

if TYPE_CHECKING:
    from blemish.types import Supervision


@dataclass(frozen=True, kw_only=True)
class SuperSimpleNetConfig(Config):
    """The settings of SuperSimpleNet."""

    SCHEDULE: ClassVar[frozenset[str]] = Config.SCHEDULE | {"adaptor_learning_rate", "head_learning_rate"}
    FIXED: ClassVar[frozenset[str]] = frozenset(
        {
            "backbone",
            "layers",
            "noise_ratio",
            "whitening",
            "components",
            "misplaced",
            "hidden_channels",
            "upscale",
        }
    )

    backbone: str = "efficientnet_lite0"
    layers: tuple[str, ...] = ()
    """Names of the backbone outputs that are joined, finest first; empty: the backbone's default."""
    batch_size: int = 8
    epochs: int = 0
    steps: int = 1000
    adaptor_learning_rate: float = 1e-4
    adaptor_weight_decay: float = 1e-2
    head_learning_rate: float = 2e-4
    head_weight_decay: float = 1e-5
    whitening: float = 0.0
    """Start the adaptor as a whitening of the good images' features, regularised by this share of their mean
    variance; 0: start it at random, as in the paper."""
    components: int = 0
    """Keep so many principal components of the last, coarsest layer when whitening; 0: all of them."""
    upscale: bool = True
    """Double the resolution of the finest layer."""
    hidden_channels: int = 0
    """Width of the segmentation head; 0: two thirds of the feature channels, as in the paper, at least
    256."""
    classification_head: bool = False
    adapt_classification_features: bool = True
    stop_gradient: bool = True
    """Keep the gradient of the classification head out of the segmentation map (good-only training)."""
    anomalies: Literal["perlin", "whole", "none"] = "perlin"
    """Synthetic anomalies: noise in Perlin masks, noise on a whole copy of the features (SimpleNet), or
    none."""
    noise: float = 0.0
    """Standard deviation of the synthetic noise; 0: as published for the backbone, else set by
    noise_ratio."""
    noise_ratio: float = 0.5
    """Noise level relative to the spread of the features."""
    differences: float = 0.0
    """Share of the noisy cells that are moved along the difference of two good cells instead of at random."""
    misplaced: float = 0.0
    """Good cells in a wrong place that count as anomalous, as a share of the cells of a batch. Above 0, the
    segmentation head also reads where a cell lies."""
    raise_noise: bool = True
    """Double a noise level that was not set if noisy and clean held-out cells cannot be told apart."""
    perlin_threshold: float = 0.2
    noise_on_defects: bool = False
    """Add synthetic noise inside the masks of real defects, too."""
    noise_on_unmasked: bool = False
    """Add synthetic noise to defective images without a mask, as in the journal extension."""
    flip_defects: bool = True
    """Also train on flipped copies of each defective image; turn off if all good parts have one
    orientation."""
    mask_dilation: int = 0
    """Side in image pixels, odd, of the square that dilates real masks; 0: none. The journal extension uses
    7."""
    distance_weights: bool = False
    """Weight cells of real defects by 3 (d / d_max)^2, d the distance to the region's border (extension)."""
    focal_loss: bool = True
    blur_sigma: float = 4.0
    """Sigma of the blur of the final map, in pixels of the network's input."""
    edges: Literal["none", "rings", "blind"] = "none"
    """What is done about the map's rim: nothing, level it by rings, or leave it blind (`detectors.edges`)."""
    statistics: tuple[str, ...] = ("maximum", "smoothed_maximum", "top_mean")

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range and for settings that contradict each other."""
        refuse_numbers(
            (
                ("whitening", self.whitening, 0 <= self.whitening < math.inf, "at least 0, and finite"),
                ("components", self.components, self.components >= 0, "at least 0"),
                ("differences", self.differences, 0 <= self.differences <= 1, "0 to 1"),
                ("misplaced", self.misplaced, 0 <= self.misplaced <= 1, "0 to 1"),
            )
        )
        if self.components and not self.whitening:
            raise ConfigError(
                f"components={self.components} with whitening=0: they are found while whitening; expected "
                "whitening above 0"
            )
        if self.differences and self.classification_head:
            raise ConfigError(
                f"differences={self.differences} with classification_head=true, which is shown noise alone; "
                "expected differences=0"
            )
        if self.components and self.classification_head and not self.adapt_classification_features:
            raise ConfigError(
                f"components={self.components} with adapt_classification_features=false: noise is drawn for "
                "what is kept only; expected components=0"
            )
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
        """Leave out of a preset what the user's settings contradict.

        Without a classification head the map is scored; with one, which the good-only defaults are not made
        for, and with another backbone than they name layers of, those defaults are left out.
        """
        headed = changes.get("classification_head", False)
        if not headed and "statistics" not in given and "head" in changes.get("statistics", ()):
            changes = changes | {"statistics": self.statistics}
        if not changes.keys() >= FROM_GOOD.keys():
            return changes
        out: set[str] = set()
        if headed:
            out = set(FROM_GOOD)
        elif not changes.get("backbone", self.backbone).startswith("efficientnet_lite"):
            out = {"layers", "components"}
        elif changes["layers"] != FROM_GOOD["layers"] or not changes["whitening"]:
            out = {"components"}
        return {key: value for key, value in changes.items() if key in given or key not in out}

    @override
    def refuse_supervision(self, supervision: Supervision) -> None:
        if supervision == "none" and self.anomalies == "none":
            raise ConfigError("with good images alone and anomalies=none there is nothing to learn from")
        if supervision == "weak" and not self.classification_head:
            raise ConfigError(
                "supervision weak needs the classification head; "
                "expected --set classification_head=true, or masks"
            )


PUBLISHED_NOISE = {"wide_resnet50_2": 0.015}
"""Standard deviation of the noise in the paper, by the backbone whose weights it was tuned for."""
PAPER: dict[str, Any] = {
    "image_size": (256, 256),
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
"""With masks, real defects determine what the map must show, and synthetic ones are few."""

REGIMES: dict[Supervision, dict[str, Any]] = {
    "none": {},
    "weak": LABELLED,
    "mixed": MASKED,
    "full": MASKED,
}
"""What each supervision changes, in every preset; section 4."""

FASTER = {"adaptor_learning_rate": 1e-3, "head_learning_rate": 2e-3}
"""Ten times the paper's rates, for runs of hundreds rather than thousands of steps (docs/papers.md,
Measured)."""

FROM_GOOD: dict[str, Any] = {
    "side": 512,
    "layers": ("stage3", "stage5", "stage6"),
    "upscale": False,
    "whitening": 0.1,
    "components": 96,
    "hidden_channels": 1024,
    "anomalies": "whole",
    "differences": 0.5,
    "misplaced": 0.25,
    "focal_loss": False,
    "batch_size": 2,
    "edges": "rings",
}
"""What both methods' defaults are for good images alone; docs/accuracy.md says what chose them."""

BOTH = {"statistics": ("head", *STATISTICS)}
"""With masks, the map knows defects as well as the head does, and errs about others (docs/labels.md)."""

DEFAULT_REGIMES: dict[Supervision, dict[str, Any]] = {
    "none": FROM_GOOD,
    "weak": LABELLED | FASTER,
    "mixed": MASKED | FASTER | BOTH,
    "full": MASKED | FASTER | BOTH,
}

JOURNAL_REGIMES = REGIMES | {
    name: REGIMES[name] | {"mask_dilation": 7, "distance_weights": True} for name in ("mixed", "full")
}
