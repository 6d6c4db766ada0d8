"""Patch description networks: small fully convolutional networks whose output vectors describe patches.

EfficientAD (Batzner, Heckler, König, WACV 2024), tables 1 and 5 of its supplement.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

CHANNELS = 384
"""Length of the teacher's description of a patch."""
CELL = 4
"""Pixels of the image on each side of a cell of the map."""
MARGIN = 4
"""Cells that an unpadded network loses on each side of the map."""


class PDN(nn.Sequential):
    """A patch description network: an entrance with its pooling, a trunk, and a last convolution.

    Parameters are named by their position, as in every published file of weights.
    """

    @property
    def entrance(self) -> nn.Conv2d:
        """The convolution that reads the image."""
        return cast(nn.Conv2d, self[0])

    @property
    def pool(self) -> nn.Module:
        """The pooling behind the entrance and its ReLU."""
        return self[2]

    @property
    def trunk(self) -> nn.Sequential:
        """The layers between the first pooling and the last convolution."""
        return nn.Sequential(*list(self)[3:-1])

    @property
    def last(self) -> nn.Conv2d:
        """The convolution that gives the description."""
        return cast(nn.Conv2d, self[-1])

    def features(self, images: Tensor) -> Tensor:
        """Return what the last convolution reads."""
        for layer in list(self)[:-1]:
            images = layer(images)
        return images


def pdn_small(channels: int = CHANNELS, *, padding: bool = False) -> PDN:
    """Map (B, 3, H, W) to (B, channels, H/4 - 8, W/4 - 8), or to H/4, W/4 with padding.

    One output vector sees 33 x 33 pixels. The paddings serve the distillation of a teacher; for anomaly
    detection the published numbers are reached without them.
    """
    pad = int(padding)
    return PDN(
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


def pdn_medium(channels: int = CHANNELS, *, padding: bool = False) -> PDN:
    """Map (B, 3, H, W) to (B, channels, H/4 - 8, W/4 - 8), or to H/4, W/4 with padding; see `pdn_small`."""
    pad = int(padding)
    return PDN(
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
