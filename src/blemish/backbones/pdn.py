"""Patch description networks: small fully convolutional networks whose output vectors describe patches.

EfficientAD (Batzner, Heckler, König, WACV 2024), tables 1 and 5 of its supplement.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

CHANNELS = 384
"""Length of the output vectors of a teacher."""
CELL = 4
"""Side of one cell of the output map, in image pixels."""
MARGIN = 4
"""Number of cells that a network without padding loses at each edge of the map."""


class PDN(nn.Sequential):
    """A patch description network: first convolution and pooling, trunk, last convolution.

    Parameters are named by position, as in all published weights.
    """

    @property
    def entrance(self) -> nn.Conv2d:
        """The first convolution, which reads the image."""
        return cast(nn.Conv2d, self[0])

    @property
    def pool(self) -> nn.Module:
        """The pooling after the first convolution and its ReLU."""
        return self[2]

    @property
    def trunk(self) -> nn.Sequential:
        """The layers between the first pooling and the last convolution."""
        return nn.Sequential(*list(self)[3:-1])

    @property
    def last(self) -> nn.Conv2d:
        """The last convolution, which outputs the description."""
        return cast(nn.Conv2d, self[-1])

    def features(self, images: Tensor) -> Tensor:
        """Return the input of the last convolution."""
        for layer in list(self)[:-1]:
            images = layer(images)
        return images


def pdn_small(channels: int = CHANNELS, *, padding: bool = False) -> PDN:
    """Build a network from (B, 3, H, W) to (B, channels, H/4 - 8, W/4 - 8), or to H/4, W/4 with padding.

    The receptive field of an output vector is 33 x 33 pixels. Padding is used to distil a teacher; the
    published results of anomaly detection are reached without it.
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
    """Build the larger network, with the input and output sizes of `pdn_small`."""
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
