"""The model file: an uncompressed zip of manifest, weights and graph, checked by SHA-256. No pickle.

NAME.blemish
    manifest.json        format number, method, config, preprocessing, calibration, training, versions
    weights.safetensors  every parameter and buffer of the detector
    model.onnx           images (B, 3, H, W) in [0, 1] to anomaly maps and statistics

A file has format 1, or format 2 if a reader that knows only the first would judge wrongly. It then lists
under `requires` what its reader has to know; a reader refuses a file that lists anything else.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blemish.errors import ModelFileError
from blemish.files import atomic_file
from blemish.inference.manifest import Manifest

FORMATS = (1, 2)
KNOWN = ("light",)
"""What files of format 2 may require."""
MANIFEST, WEIGHTS, GRAPH = "manifest.json", "weights.safetensors", "model.onnx"

# What Python's zip reader raises on damaged files, found by trial. RuntimeError: a flipped "encrypted" bit.
_DAMAGE: tuple[type[Exception], ...] = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


@dataclass(frozen=True)
class Bundle:
    """The verified contents of a model file."""

    path: Path
    manifest: Manifest
    weights: bytes
    graph: bytes


def write(path: Path, manifest: Manifest, weights: bytes, graph: bytes) -> None:
    """Write a model file atomically; the digests of its members are added to the manifest here."""
    members = {WEIGHTS: weights, GRAPH: graph}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    required = manifest.requires
    head = {"format": 2, "requires": list(required)} if required else {"format": 1}
    record = head | manifest.to_json() | {"members": digests}
    text = json.dumps(record, indent=1, allow_nan=False)
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {MANIFEST: text.encode(), **members}.items():
            # A fixed date, so that the same model gives the same bytes.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)


def read(path: Path) -> Bundle:
    """Open and verify a model file; raise ModelFileError, which says what was found and what was expected."""
    if not path.is_file():
        raise ModelFileError(f"found no model file at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            record = _manifest(path, archive)
            manifest = Manifest.from_json(record, str(path))
            if record.get("requires", []) != list(manifest.requires):
                raise ModelFileError(f"{path} is damaged: what it requires and what it contains differ")
            data = {name: _member(path, archive, record, name) for name in (WEIGHTS, GRAPH)}
    except _DAMAGE as error:
        raise ModelFileError(f"{path} is not a model file, or is damaged: {error}") from error
    return Bundle(path, manifest, data[WEIGHTS], data[GRAPH])


def _manifest(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    names = archive.namelist()
    for name in names:
        if name not in (MANIFEST, WEIGHTS, GRAPH):
            raise ModelFileError(f"{path} has a member {name!r} that no model file has")
    if MANIFEST not in names:
        raise ModelFileError(f"{path} is not a model file: it has no {MANIFEST}")

    def finite(text: str) -> float:
        """Return a number; refuse NaN and the infinities, which no threshold can be."""
        if not math.isfinite(value := float(text)):
            raise ModelFileError(
                f"{path} is damaged: found {text} in its {MANIFEST}; expected finite numbers"
            )
        return value

    try:
        record = json.loads(archive.read(MANIFEST), parse_constant=finite, parse_float=finite)
        found = record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} is not a model file: its {MANIFEST} has no format number") from error
    if found not in FORMATS:
        raise ModelFileError(f"{path} has format {found}; this version of Blemish reads formats 1 and 2")
    _refuse_unknown(path, record)
    return dict(record)


def _refuse_unknown(path: Path, record: dict[str, Any]) -> None:
    """Raise ModelFileError for a file that requires what this version does not know."""
    required = record.get("requires", [])
    if not isinstance(required, list):
        raise ModelFileError(f"{path} is damaged: 'requires' in its {MANIFEST} is no list")
    for word in required:
        if word not in KNOWN:
            raise ModelFileError(f"{path} requires {word!r}, which this version of Blemish does not know")


def _member(path: Path, archive: zipfile.ZipFile, record: dict[str, Any], name: str) -> bytes:
    """Return a member, after checking its digest against the manifest."""
    if name not in archive.namelist():
        raise ModelFileError(f"{path} is damaged: it lacks {name}")
    members = record.get("members")
    expected = members.get(name) if isinstance(members, dict) else None
    if not isinstance(expected, str):
        raise ModelFileError(f"{path} is damaged: 'members' in its {MANIFEST} lacks {name!r}")
    data = archive.read(name)
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ModelFileError(
            f"{path} is damaged: {name} has SHA-256 {found[:12]}...; expected {expected[:12]}..."
        )
    return data
