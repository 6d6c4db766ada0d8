"""Patch description networks: small fully convolutional networks whose output vectors describe patches.

EfficientAD (Batzner, Heckler, König, WACV 2024), tables 1 and 5 of its supplement.
"""

from __future__ import annotations

from torch import nn

CHANNELS = 384
"""Length of the teacher's description of a patch."""


def pdn_small(channels: int = CHANNELS, *, padding: bool = False) -> nn.Sequential:
    """Map (B, 3, H, W) to (B, channels, H/4 - 8, W/4 - 8), or to H/4, W/4 with padding.

    One output vector sees 33 x 33 pixels. The paddings serve the distillation of a teacher; for anomaly
    detection the published numbers are reached without them.
    """
    pad = int(padding)
    return nn.Sequential(
        nn.Conv2d(3, 128, 4, padding=3 * pad),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(128, 256, 4, padding=3 * pad),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(256, 256, 3, padding=pad),
        nn.ReLU(),
        nn.Conv2d(256, channels, 4),
    )


def pdn_medium(channels: int = CHANNELS, *, padding: bool = False) -> nn.Sequential:
    """Map (B, 3, H, W) to (B, channels, H/4 - 8, W/4 - 8), or to H/4, W/4 with padding; see `pdn_small`."""
    pad = int(padding)
    return nn.Sequential(
        nn.Conv2d(3, 256, 4, padding=3 * pad),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(256, 512, 4, padding=3 * pad),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(512, 512, 1),
        nn.ReLU(),
        nn.Conv2d(512, 512, 3, padding=pad),
        nn.ReLU(),
        nn.Conv2d(512, channels, 4),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1),
    )


PDNS = {"pdn_small": pdn_small, "pdn_medium": pdn_medium}
