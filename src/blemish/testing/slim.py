"""Patch description networks with fewer channels, where their shape is needed and not their size."""

from collections.abc import Callable

from torch import nn

from blemish.backbones.pdn import CHANNELS, PDN


def slimmer(pdn: Callable[..., PDN], by: int) -> Callable[..., PDN]:
    """Return a patch description network like `pdn` whose inner layers have 1 / by of its channels."""

    def thin(channels: int = CHANNELS, *, padding: bool = False) -> PDN:
        def width(count: int) -> int:
            return count if count in (3, channels) else count // by

        return PDN(
            *(
                nn.Conv2d(
                    width(layer.in_channels),
                    width(layer.out_channels),
                    layer.kernel_size,  # type: ignore[arg-type]
                    padding=layer.padding,  # type: ignore[arg-type]
                )
                if isinstance(layer, nn.Conv2d)
                else layer
                for layer in pdn(channels, padding=padding)
            )
        )

    return thin
