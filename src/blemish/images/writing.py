"""Encode and write images."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from blemish.files import write_atomically
from blemish.types import AnyArray, FloatArray


def png_bytes(array: AnyArray) -> bytes:
    """Encode a uint8 (H, W) or (H, W, 3) array as PNG."""
    return _encoded(array, "PNG")


def jpeg_bytes(array: AnyArray, quality: int) -> bytes:
    """Encode a uint8 (H, W) or (H, W, 3) array as JPEG with `quality` from 1 to 95."""
    return _encoded(array, "JPEG", quality)


def write_png(path: Path, array: AnyArray) -> None:
    """Write a uint8 (H, W) or (H, W, 3) array to `path` as PNG, atomically."""
    write_atomically(path, png_bytes(array))


def write_tiff(path: Path, array: FloatArray) -> None:
    """Write a float32 (H, W) array to `path` losslessly as a 32-bit TIFF, atomically."""
    write_atomically(path, _encoded(array, "TIFF"))


def _encoded(array: AnyArray, format_name: str, quality: int = 75) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format_name, quality=quality)
    return stream.getvalue()
