"""Backbones for inference: batch norms and the image's deviation folded into the convolutions."""

from __future__ import annotations

import copy
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from blemish.backbones import Backbone


def without_norms(backbone: Backbone) -> Backbone:
    """Return a copy of a backbone with batch norms and the image's deviation folded into its convolutions."""
    made = copy.deepcopy(backbone)
    for module in list(made.modules()):
        for (before, layer), (name, norm) in pairwise(list(module.named_children())):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, before, fuse_conv_bn_eval(layer, norm))
                setattr(module, name, nn.Identity())
    entrance = next(layer for layer in made.modules() if isinstance(layer, nn.Conv2d))
    entrance.weight.data /= made.normalise.std
    made.normalise.std.fill_(1.0)
    return made
