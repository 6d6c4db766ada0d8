"""SimpleNet: the settings of SuperSimpleNet's predecessor, which is a reduced form of the same network.

Liu, Zhou, Xu, Wang: "SimpleNet: A Simple Network for Image Anomaly Detection and Localization", CVPR 2023.
Features are not upscaled, there is no classification head, and the synthetic anomalies are noise on one whole
copy of the features and none on the other, with the truncated L1 loss only. Selecting the epoch that does
best on the test set, as the authors do, is not reproduced.
"""

from __future__ import annotations

from typing import Any

from blemish.detectors.supersimplenet.config import FASTER, FROM_GOOD, SuperSimpleNetConfig
from blemish.types import Supervision

DEFAULT = SuperSimpleNetConfig(upscale=False, anomalies="whole", focal_loss=False)

PAPER: dict[str, Any] = {
    "image_size": (256, 256),
    "backbone": "wide_resnet50_2",
    "batch_size": 8,
    "steps": 0,
    "epochs": 160,
    "schedule": "constant",
    "hidden_channels": 1024,
    "noise": 0.015,
    "statistics": ("maximum",),
}

MASKED: dict[str, Any] = {"perlin_threshold": 0.6, "raise_noise": False}
"""For SimpleNet with SuperSimpleNet's synthetic anomalies, as in the ablation."""

REGIMES: dict[Supervision, dict[str, Any]] = {"none": {}, "mixed": MASKED, "full": MASKED}
"""There is no "weak": without a classification head, nothing can be learned from an image label alone."""

DEFAULT_REGIMES = {name: (changes | FASTER) if changes else FROM_GOOD for name, changes in REGIMES.items()}
