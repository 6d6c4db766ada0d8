"""Write files whole or not at all, and know them by their content."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
"""What a place or a disk says when it does not take a file."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its name when the block ends well, else vanishes.

    Missing parent folders are made. The bytes are on the disk before the name changes. Raises OutputError
    where the place or the disk does not allow it.
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


def write_whole(path: Path, data: bytes | str) -> None:
    """Write `data` to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def digest(path: Path) -> str:
    """Give the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def short_digest(path: Path) -> str:
    """Give 16 digits of a file's SHA-256: enough to know an image by among millions."""
    return digest(path)[:16]


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before work goes into it; raise OutputError, make nothing."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder, expected the name of a file")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Refuse a folder that could not be made or written into; raise OutputError, make nothing."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"cannot write into {folder}: {nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write into {folder}: {nearest} does not allow it")
