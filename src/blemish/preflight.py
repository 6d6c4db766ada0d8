"""What is asked for before a run begins, refused while refusing is cheap, and summed up."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blemish import data, images
from blemish.data.loading import ImageStore, Memory
from blemish.data.split import Split, split
from blemish.detectors.base import Config, Detector
from blemish.errors import ConfigError, DataError
from blemish.progress import say


@dataclass(frozen=True)
class Length:
    """How long to train: one of the three, or none for the method's own default."""

    steps: int | None = None
    epochs: int | None = None
    budget: float | None = None
    """Seconds of wall time for everything from reading the images to the finished model file."""


def seconds(text: str) -> float:
    """Read a duration such as 90s, 10m or 1.5h; raise ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not match or float(match[1]) == 0:
        raise ConfigError(f"budget {text!r}: expected a duration such as 90s, 10m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def check_length(length: Length) -> None:
    """Refuse more than one length, and none that is not positive."""
    given = {name: value for name, value in dataclasses.asdict(length).items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} were both given; expected one of them")
    for name, value in given.items():
        if value <= 0:
            raise ConfigError(f"{name} {value}: expected more than 0")


def choose_images(root: Path, layout: str) -> Split:
    """Scan and split a data set; raise DataError for too few good images to hold any out."""
    parts = split(data.scan(root, layout), root)
    if len(parts.held_out) < 2:
        good = len(parts.train) + len(parts.held_out)
        raise DataError(
            f"found {good} good images in {root}, {len(parts.held_out)} of them held out for the thresholds; "
            "expected at least 4, of which 2 are held out"
        )
    return parts


def open_natural(
    folder: str | Path | None, detector: Detector, config: Config, memory: Memory
) -> ImageStore | None:
    """Open the photographs for the pretraining penalty, or say that it is off."""
    if not detector.wants_natural_images:
        return None
    if folder is None:
        say("no --natural-images folder: the pretraining penalty is off")
        return None
    if not Path(folder).is_dir():
        raise ConfigError(f"no folder {folder}; expected photographs for the pretraining penalty")
    paths = images.list_images(Path(folder), recursive=True)
    if not paths:
        raise ConfigError(f"no images in {folder}, the folder of photographs for the pretraining penalty")
    return ImageStore(paths, config.image_size, memory, crop=True)


def try_out(detector: Detector, device: str) -> float:
    """Score one empty image, so that settings that do not go together are refused now; give its seconds."""
    height, width = detector.config.image_size
    begin = time.monotonic()
    try:
        with torch.no_grad():
            detector.eval()(torch.zeros(1, 3, height, width, device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"these settings do not go together at {height}x{width}: {reason}") from error
    return time.monotonic() - begin


def digest(paths: Sequence[Path]) -> str:
    """Sum up the contents of files, in their order, as one SHA-256."""
    each = (hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256("".join(each).encode()).hexdigest()


def digest_names(paths: Sequence[Path]) -> str:
    """Sum up the names and sizes of files, for those too many to read."""
    text = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
