"""Patch description networks with few channels, where one is needed and not its width."""

from torch import nn

from blemish.backbones.pdn import CHANNELS, PDN


def narrow_pdn(channels: int = CHANNELS, *, padding: bool = False) -> PDN:
    """Return a patch description network like the small one, with 8 channels inside."""
    pad = int(padding)
    return PDN(
        nn.Conv2d(3, 8, 4, padding=3 * pad),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(8, 8, 4, padding=3 * pad),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(8, 8, 3, padding=pad),
        nn.ReLU(),
        nn.Conv2d(8, channels, 4),
    )
