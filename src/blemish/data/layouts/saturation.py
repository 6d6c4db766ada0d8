"""Input of the saturated PRO metric: masks as regions, each with the area at which it saturates.

Bergmann et al., "Beyond Dents and Scratches" (MVTec LOCO AD), section 4: where the anomalous pixels are
ambiguous (a missing part could have been in any of several places), finding some of them is enough.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blemish import images
from blemish.errors import DataError
from blemish.types import BoolArray, Sample, Saturation

CONFIG = "defects_config.json"


@dataclass(frozen=True)
class Regions:
    """The defect regions of one image, in the form expected by `PixelScores.update`."""

    masks: BoolArray
    """(R, H, W); a region may be disconnected and may overlap others."""
    areas: tuple[float, ...]
    """R saturation areas in pixels."""


def read_config(path: Path) -> tuple[Saturation, ...]:
    """Read a `defects_config.json`, a list of the pixel value and the saturation of each kind of defect.

    Raises DataError with the file and the entry.
    """
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected a list of defects in JSON") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} holds no list of defects; expected one entry for each kind")
    found: dict[int, Saturation] = {}
    for number, entry in enumerate(entries, 1):
        saturation = _saturation(entry, f"{path}, entry {number}")
        value = saturation.pixel_value
        if found.setdefault(value, saturation) is not saturation:
            raise DataError(f"{path}, entry {number}: found the pixel_value {value} again; expected it once")
    return tuple(found.values())


def regions(sample: Sample, size: tuple[int, int]) -> Regions:
    """Read each mask file of an image of `size` (height, width) as one region.

    A relative area is rounded down to whole pixels, as in the authors' evaluation code, but to at least 1.
    Raises ImageError and DataError as `read_mask` does, and DataError for a mask that is empty or has a value
    that the data set's configuration does not define.
    """
    known = {saturation.pixel_value: saturation for saturation in sample.saturations}
    masks, areas = [], []
    for path in sample.masks:
        mask = images.read_mask((path,), size)
        values = np.unique(images.read(path)[mask]).tolist()
        if not values:
            raise DataError(f"the mask {path} marks no pixel; expected a defect in {sample.path}")
        if len(values) > 1 or values[0] not in known:
            found = ", ".join(map(str, values[:4])) + ", ..." * (len(values) > 4)
            raise DataError(f"the mask {path} has the value {found}; expected one that {CONFIG} names")
        saturation = known[values[0]]
        area = max(1, int(saturation.threshold * mask.sum())) if saturation.relative else saturation.threshold
        masks.append(mask)
        areas.append(area)
    return Regions(np.array(masks, np.bool_).reshape(len(masks), *size), tuple(areas))


def _saturation(entry: Any, where: str) -> Saturation:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: found {entry!r}; expected names and values in braces")
    value: Any = entry.get("pixel_value")
    threshold: Any = entry.get("saturation_threshold")
    relative: Any = entry.get("relative_saturation")
    # In Python, bool is a subclass of int, so compare the types rather than use isinstance.
    if type(value) is not int or not 1 <= value <= 255:
        raise DataError(f"{where}: found the pixel_value {value!r}; expected a whole number from 1 to 255")
    if type(relative) is not bool:
        raise DataError(f"{where}: found the relative_saturation {relative!r}; expected true or false")
    number = type(threshold) in (int, float)
    if not number or not (0 < threshold <= 1 if relative else 1 <= threshold < float("inf")):
        expected = "a share above 0 and at most 1" if relative else "a number of pixels from 1 on"
        raise DataError(f"{where}: found the saturation_threshold {threshold!r}; expected {expected}")
    return Saturation(value, threshold, relative)
