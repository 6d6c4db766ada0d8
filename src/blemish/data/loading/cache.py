"""The feature cache: outputs of the frozen part, in memory up to a budget and in files beyond it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from blemish.files import atomic_file, check_folder

Encoded = tuple[Tensor, ...]


class Memory:
    """A memory budget in bytes, shared by several stores; safe to use from several threads."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.lock = Lock()

    def take(self, size: int) -> bool:
        """Reserve `size` bytes; return whether that many were left."""
        with self.lock:
            fits = size <= self.left
            self.left -= size if fits else 0
        return fits


class FeatureCache:
    """Cache entries, each a tuple of half-precision tensors, by name.

    folder: where entries are written that exceed the memory budget, each as one memory-mapped safetensors
    file; None to drop them. If `shared`, every entry is written there, for use by later runs. Files are
    written atomically, so that a killed run leaves only valid entries.
    """

    def __init__(self, memory: Memory, folder: Path | None = None, *, shared: bool = False) -> None:
        self.memory, self.folder, self.shared = memory, folder, shared
        self.kept: dict[str, Encoded] = {}
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0

    def get(self, name: str) -> Encoded | None:
        """Return an entry, or None if it is not cached."""
        if name in self.kept or self.folder is None:
            return self.kept.get(name)
        try:
            parts = load_file(self.folder / name)
            entry = tuple(parts[str(number)] for number in range(len(parts)))
        except (FileNotFoundError, SafetensorError, KeyError):  # damaged or foreign: compute it again
            return None
        if self.shared:
            self.remember(name, entry)
        return entry

    def put(self, name: str, entry: Encoded) -> None:
        """Store an entry; raise OutputError if its file cannot be written."""
        if (not self.remember(name, entry) or self.shared) and self.folder is not None:
            with atomic_file(self.folder / name) as temporary:
                # not save_file, which reports a full disk as an error of its own, without errno
                temporary.write_bytes(save({str(number): part for number, part in enumerate(entry)}))
            self.bytes_on_disk += sum(part.nbytes for part in entry)

    def remember(self, name: str, entry: Encoded) -> bool:
        """Keep a copy of an entry in memory; return False if it does not fit."""
        size = sum(part.nbytes for part in entry)
        if not self.memory.take(size):
            return False
        self.kept[name] = tuple(part.clone() for part in entry)
        self.bytes_in_memory += size
        return True

    def clear(self) -> None:
        """Empty the cache, and delete its files unless they are shared."""
        self.kept = {}
        if self.folder is not None and not self.shared and self.folder.is_dir():
            shutil.rmtree(self.folder)
            with suppress(OSError):  # not empty: it holds files that are not ours
                self.folder.parent.rmdir()

    def describe(self) -> str:
        """Return a summary of how much is cached, and where."""
        places = [f"{self.bytes_in_memory / 2**20:.0f} MiB in memory"]
        if self.bytes_on_disk:
            places.append(f"{self.bytes_on_disk / 2**20:.0f} MiB in {self.folder}")
        return " and ".join(places)


def check_cache(cache: str) -> None:
    """Raise OutputError for a cache that could not be written, before any work starts."""
    if cache not in ("auto", "off"):
        check_folder(Path(cache))


def open_cache(cache: str | Path, out: Path, memory: int, made_of: Sequence[Any]) -> FeatureCache:
    """Open the feature cache that `cache` selects: off, auto (a folder beside `out`) or a shared folder.

    memory: budget in bytes. made_of: everything besides the images that determines the entries; its digest
    names the folder of the entries. Raises OutputError if the folder cannot be written to.
    """
    if cache == "off":
        return FeatureCache(Memory(0))
    own = cache == "auto"
    folder = out.with_name(out.name + ".features") if own else Path(cache)
    check_folder(folder)
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return FeatureCache(Memory(memory), folder / key[:16], shared=not own)
