"""The size of the defects that masks mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

from blemish.types import BoolArray

SMALL = 0.1
"""Quantile of the regions' shorter sides that stands for the smallest defects."""


@dataclass(frozen=True)
class DefectSizes:
    """The shorter sides of the marked regions of a data set, in image pixels."""

    regions: int
    small: int
    """The 10 % quantile: at least nine of ten regions are this large."""
    median: float


def shorter_sides(mask: BoolArray) -> tuple[int, ...]:
    """Return the shorter side, in pixels, of the box around each 8-connected region of an (H, W) mask."""
    if not mask.any():
        return ()
    labels = cc3d.connected_components(mask, connectivity=8)
    labels[~mask] = 0  # cc3d 4.1.1 leaves the background of arrays with an odd side uninitialised
    boxes = cc3d.statistics(labels)["bounding_boxes"][1:]
    return tuple(min(int(side.stop - side.start) for side in box[:2]) for box in boxes)


def summarise(sides: Sequence[int]) -> DefectSizes | None:
    """Summarise the shorter sides of all regions; None if there are none."""
    if not sides:
        return None
    small = int(np.quantile(sides, SMALL, method="lower"))
    return DefectSizes(len(sides), small, float(np.median(sides)))
