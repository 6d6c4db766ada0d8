"""Masks of training defects at the network's input size, with the weights of their pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage

from blemish import images
from blemish.types import BoolArray, FloatArray, LabelRules, Sample

LOG = logging.getLogger(__name__)

WEIGHT = 3.0
"""Weight of the pixel of a region that is furthest from its border."""


@dataclass(frozen=True)
class Mask:
    """The labelled pixels of one training defect."""

    defective: BoolArray
    """(H, W) at the network's input size."""
    weights: FloatArray | None
    """(H, W) weights of the defective pixels; None for equal weights."""


def read_masks(samples: Sequence[Sample], size: tuple[int, int], rules: LabelRules) -> dict[int, Mask]:
    """Read the masks of the defective samples that have any; return them by index.

    An empty mask does not show where the defect is: the image counts as unmasked, with a warning. Raises
    ImageError or DataError for a mask that cannot be read or differs in size from its image.
    """
    masked = [index for index, sample in enumerate(samples) if sample.label == 1 and sample.masks]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(masked, pool.map(lambda i: read_one(samples[i], size, rules), masked), strict=True))
    empty = [index for index in masked if found[index] is None]
    if empty:
        first = samples[empty[0]].path
        LOG.warning(
            "%d defective images have an empty mask and are treated as unmasked; the first is %s",
            len(empty),
            first,
        )
    return {index: mask for index, mask in found.items() if mask is not None}


def read_one(sample: Sample, size: tuple[int, int], rules: LabelRules) -> Mask | None:
    """Read one defect's mask, dilate and weight it at full size, then resize it; None if it is empty.

    A resized pixel is defective if at least half of its area is; if none is, every pixel that the defect
    touches.
    """
    mask = images.read_mask(sample.masks, images.describe(sample.path).size)
    if not mask.any():
        return None
    if rules.dilation > 1:
        mask = ndimage.maximum_filter(mask, rules.dilation, mode="constant")
    small = images.resize_map(mask.astype(np.float32), size)
    vanishes = not (small >= 0.5).any()
    defective = small > 0 if vanishes else small >= 0.5
    if not rules.weighted:
        return Mask(defective, None)
    if vanishes:
        return Mask(defective, np.full(size, WEIGHT, np.float32))
    return Mask(defective, images.resize_map(distance_weights(mask), size))


def distance_weights(mask: BoolArray) -> FloatArray:
    """Return (H, W) weights of 3 (d / d_max)^2, where d is the distance to the border of the pixel's region.

    SuperSimpleNet's journal extension, after SegDecNet (Bozic, Tabernik, Skocaj 2021). The edge of the image
    is not a border; a region that fills the image has no border, and all its pixels have weight 3.
    """
    if mask.all():  # SciPy would return distances to a corner
        return np.full(mask.shape, WEIGHT, np.float32)
    distance = ndimage.distance_transform_edt(mask)
    regions, count = cc3d.connected_components(mask, connectivity=8, return_N=True)
    largest = ndimage.maximum(distance, regions, np.arange(count + 1))
    share = distance / np.maximum(largest, 1)[regions]
    weights: FloatArray = (WEIGHT * share**2).astype(np.float32)
    return weights
