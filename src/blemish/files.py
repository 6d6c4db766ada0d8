"""Write files atomically, compute digests, and check that output paths are writable."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blemish.errors import OutputError

REFUSALS = {
    getattr(errno, name)
    for name in (
        "EACCES",
        "EDQUOT",
        "EEXIST",
        "EISDIR",
        "ENAMETOOLONG",
        "ENOSPC",
        "ENOTDIR",
        "EPERM",
        "EROFS",
    )
}
"""Error numbers of writes that fail because of the folder or the disk, which become OutputError."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that is renamed to it on success and removed on failure.

    Missing parent folders are created. The data is flushed to disk before the rename. Raises OutputError if
    the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_text(path: Path, text: str) -> None:
    r"""Write `text` to `path` atomically, as UTF-8; undecodable bytes of file names become \udc.. escapes."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, record: object) -> None:
    """Write a record atomically as indented JSON, its values converted by `to_json_types`."""
    write_text(path, json.dumps(to_json_types(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def to_json_types(value: Any) -> Any:
    """Convert a value to types that JSON supports.

    Dataclasses and mappings become objects, tuples become arrays, NumPy scalars become Python scalars,
    non-finite numbers become null, and anything else, such as a path, becomes its string.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json_types(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json_types(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_types(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


SHORT_DIGEST = 16
"""Number of hexadecimal digits of a SHA-256 that suffice to tell millions of images apart."""


def digest(path: Path) -> str:
    """Return the SHA-256 digest of a file's content as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_digest(path: Path) -> str:
    """Return the first SHORT_DIGEST hexadecimal digits of a file's SHA-256 digest."""
    return digest(path)[:SHORT_DIGEST]


def check_writable(path: Path) -> None:
    """Check before any work starts that a file can be written; raise OutputError, and create nothing."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; expected the name of a file")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Check that a folder is writable or can be created; raise OutputError, and create nothing."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"cannot write to {folder}: {nearest} is a file; expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {folder}: no permission for {nearest}")
