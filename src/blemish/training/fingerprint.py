"""Digests by which one run is told from another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from blemish.files import digest
from blemish.inference.bundle import Bundle
from blemish.types import Sample


def digest_all(paths: Sequence[Path]) -> str:
    """Sum up the contents of files, in their order, as one SHA-256."""
    return hashlib.sha256("".join(digest(path) for path in paths).encode()).hexdigest()


def digest_samples(samples: Sequence[Sample]) -> str:
    """Sum up images with their labels and masks, in their order, as one SHA-256."""
    each = ([sample.label, digest(sample.path), *map(digest, sample.masks)] for sample in samples)
    return hashlib.sha256(repr(list(each)).encode()).hexdigest()


def digest_start(opened: Bundle | None) -> str:
    """Sum up the weights of the model that a run goes on from; empty where there is none."""
    return hashlib.sha256(opened.weights).hexdigest() if opened else ""


def digest_names(paths: Sequence[Path]) -> str:
    """Sum up the names and sizes of files, for those too many to read."""
    text = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
