"""The model file: a stored zip of a manifest, weights and a graph, every member under a SHA-256. No pickle.

NAME.blemish
    manifest.json        format number, method, config, preprocessing, calibration, training, versions
    weights.safetensors  every parameter and buffer of the detector
    model.onnx           images (B, 3, H, W) in [0, 1] to anomaly maps and statistics
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blemish.errors import ModelFileError
from blemish.files import whole_file
from blemish.types import Calibration

FORMAT = 1

MANIFEST, WEIGHTS, GRAPH = "manifest.json", "weights.safetensors", "model.onnx"

REQUIRED: dict[str, tuple[str, ...]] = {
    "method": (),
    "config": (),
    "preprocessing": ("image_size", "white"),
    "outputs": (),
    "calibration": tuple(field.name for field in dataclasses.fields(Calibration)),
    "training": (),
    "versions": (),
    "members": (WEIGHTS, GRAPH),
}
"""What a manifest must say, and what must be in it."""

# What Python's zip reader raises on damaged files, by trial. RuntimeError: a wrong bit says "encrypted".
_DAMAGE: tuple[type[Exception], ...] = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


@dataclass(frozen=True)
class Bundle:
    """An opened model file, verified."""

    path: Path
    manifest: dict[str, Any]
    weights: bytes
    graph: bytes

    @property
    def calibration(self) -> Calibration:
        """The thresholds and what they stand on."""
        stored = self.manifest["calibration"]
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
        }
        return Calibration(**values)


def write(path: Path, manifest: Mapping[str, Any], weights: bytes, graph: bytes) -> None:
    """Write a model file, whole or not at all; the members' digests are added to the manifest here."""
    members = {WEIGHTS: weights, GRAPH: graph}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    text = json.dumps({"format": FORMAT} | dict(manifest) | {"members": digests}, indent=1, allow_nan=False)
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {MANIFEST: text.encode(), **members}.items():
            # A fixed date: the same model gives the same bytes.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)


def read(path: Path) -> Bundle:
    """Open and verify a model file; raise ModelFileError with what was found and what was expected."""
    if not path.is_file():
        raise ModelFileError(f"no model file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(path, archive)
            data = {name: _member(path, archive, manifest, name) for name in (WEIGHTS, GRAPH)}
    except _DAMAGE as error:
        raise ModelFileError(f"{path} is no model file, or a damaged one: {error}") from error
    return Bundle(path, manifest, data[WEIGHTS], data[GRAPH])


def _manifest(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    names = archive.namelist()
    for name in names:
        if name not in (MANIFEST, WEIGHTS, GRAPH):
            raise ModelFileError(f"{path} has a member {name!r} that no model file has")
    if MANIFEST not in names:
        raise ModelFileError(f"{path} is no model file: it has no {MANIFEST}")
    try:
        manifest = json.loads(archive.read(MANIFEST))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} is no model file: its {MANIFEST} has no format number") from error
    if found != FORMAT:
        raise ModelFileError(f"{path} has format {found}; this version of Blemish reads format {FORMAT}")
    for key, parts in REQUIRED.items():
        if key not in manifest:
            raise ModelFileError(f"{path} is damaged: its {MANIFEST} lacks {key!r}")
        for part in parts:
            if not isinstance(manifest[key], dict) or part not in manifest[key]:
                raise ModelFileError(f"{path} is damaged: {key!r} in its {MANIFEST} lacks {part!r}")
    return dict(manifest)


def _member(path: Path, archive: zipfile.ZipFile, manifest: dict[str, Any], name: str) -> bytes:
    if name not in archive.namelist():
        raise ModelFileError(f"{path} is damaged: it lacks {name}")
    data = archive.read(name)
    found, expected = hashlib.sha256(data).hexdigest(), manifest["members"][name]
    if found != expected:
        raise ModelFileError(
            f"{path} is damaged: {name} has SHA-256 {found[:12]}..., expected {expected[:12]}..."
        )
    return data


def recalibrate(bundle: Bundle, calibration: Calibration, path: Path, used: Sequence[str]) -> None:
    """Write a model file again with another calibration; used: short digests of the images behind it.

    They are its held-out images from now on. The earlier ones stay known, for no evaluation counts them.
    """
    manifest = bundle.manifest | {"calibration": dataclasses.asdict(calibration)}
    training = manifest["training"]
    if "files" in training:
        files = training["files"]
        before = sorted({*files["before"], *files["held_out"]})
        manifest["training"] = training | {"files": files | {"held_out": list(used), "before": before}}
    write(path, manifest, bundle.weights, bundle.graph)
