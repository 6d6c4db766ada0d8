"""Digests that identify a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from blemish.files import digest
from blemish.inference.bundle import Bundle
from blemish.types import Sample


def digest_all(digests: Iterable[str]) -> str:
    """Combine the digests of files, in order, into one SHA-256."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def digest_samples(samples: Sequence[Sample], of: Callable[[Path], str] = digest) -> str:
    """Combine images with their labels and masks, in order, into one SHA-256.

    of: returns the digest of an image file.
    """
    each = [[sample.label, of(sample.path), *map(digest, sample.masks)] for sample in samples]
    return hashlib.sha256(repr(each).encode()).hexdigest()


def digest_start(opened: Bundle | None) -> str:
    """Return the SHA-256 of the weights that a warm start begins with; empty for a new model."""
    return hashlib.sha256(opened.weights).hexdigest() if opened else ""


def digest_names(paths: Sequence[Path]) -> str:
    """Combine the names and sizes of files into one SHA-256, for files that are too many to read."""
    text = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
