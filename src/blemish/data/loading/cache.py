"""What the frozen network makes of images, kept: in memory while it fits, in files beyond."""

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

from blemish.files import check_folder, whole_file

Encoded = tuple[Tensor, ...]


class Memory:
    """A budget in bytes that several stores share, from several threads."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.lock = Lock()

    def take(self, size: int) -> bool:
        """Take some bytes, if there are as many left."""
        with self.lock:
            fits = size <= self.left
            self.left -= size if fits else 0
        return fits


class FeatureCache:
    """Entries of half-precision tensors, by name.

    folder: where entries go that memory does not take, a safetensors file each, mapped to be read;
    None: nowhere. With shared, every entry goes there, for runs to come. A file is written whole or
    not at all, so a run that was killed leaves nothing but good entries.
    """

    def __init__(self, memory: Memory, folder: Path | None = None, *, shared: bool = False) -> None:
        self.memory, self.folder, self.shared = memory, folder, shared
        self.kept: dict[str, Encoded] = {}
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0

    def get(self, name: str) -> Encoded | None:
        """Give an entry, or None where it is not kept."""
        if name in self.kept or self.folder is None:
            return self.kept.get(name)
        try:
            parts = load_file(self.folder / name)
            entry = tuple(parts[str(number)] for number in range(len(parts)))
        except (FileNotFoundError, SafetensorError, KeyError):  # damaged or foreign: computed once more
            return None
        if self.shared:
            self.remember(name, entry)
        return entry

    def put(self, name: str, entry: Encoded) -> None:
        """Keep an entry; raise OutputError where the disk does not take it."""
        if (not self.remember(name, entry) or self.shared) and self.folder is not None:
            with whole_file(self.folder / name) as temporary:
                # not save_file: a full disk is an error of its own there, of no known number
                temporary.write_bytes(save({str(number): part for number, part in enumerate(entry)}))
            self.bytes_on_disk += sum(part.nbytes for part in entry)

    def remember(self, name: str, entry: Encoded) -> bool:
        """Keep an entry in memory, if it fits."""
        size = sum(part.nbytes for part in entry)
        if not self.memory.take(size):
            return False
        self.kept[name] = tuple(part.clone() for part in entry)
        self.bytes_in_memory += size
        return True

    def clear(self) -> None:
        """Forget everything, and remove the files unless they are shared."""
        self.kept = {}
        if self.folder is not None and not self.shared and self.folder.is_dir():
            shutil.rmtree(self.folder)
            with suppress(OSError):  # something else lies beside it, which is not ours to remove
                self.folder.parent.rmdir()

    def describe(self) -> str:
        """Say how much is kept, and where."""
        places = [f"{self.bytes_in_memory / 2**20:.0f} MB in memory"]
        if self.bytes_on_disk:
            places.append(f"{self.bytes_on_disk / 2**20:.0f} MB in {self.folder}")
        return " and ".join(places)


def open_cache(cache: str | Path, out: Path, memory: int, made_of: Sequence[Any]) -> FeatureCache:
    """Open the cache of encoded images; what entries are made of, besides the images, names their folder."""
    if cache == "off":
        return FeatureCache(Memory(0))
    own = cache == "auto"
    folder = out.with_name(out.name + ".features") if own else Path(cache)
    check_folder(folder)
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return FeatureCache(Memory(memory), folder / key[:16], shared=not own)
