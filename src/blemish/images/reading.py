"""Read image files and masks, and convert arrays to images.

Bit depth. An image is an (H, W, 3) RGB array: uint8 if the file has up to 8 bits per channel, uint16 if it
has more, grey or colour, without any loss of bits, stretching or clipping. Files from a 12-bit camera keep
their range 0..4095; `white_level` finds the white level of such data from the training images, and `to_input`
divides by it, so that a brighter image later on exceeds 1 instead of being clipped. Float files are refused,
because their white level is unknown, as are 32-bit files with values outside 0..65535.

Colour. Palettes are resolved, CMYK and YCbCr are converted without a colour profile (profiles and gamma are
ignored throughout), grey is repeated in three channels, and 1-bit images become 0 and 255. Alpha is dropped:
the colours stored beneath it are used as they are and never composited. EXIF orientation is applied.

Each file is one image: animations and multi-page files are refused; of a phone's multi-picture JPEG, the main
picture is read. Formats are recognised by content, not by file extension. A damaged or truncated file is an
error, never a half-decoded image (unless the host program has set Pillow's LOAD_TRUNCATED_IMAGES).
"""

from __future__ import annotations

import hashlib
import io
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from blemish.errors import DataError, ImageError
from blemish.images.resizing import FULL_SCALE
from blemish.types import AnyArray, BoolArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""File extensions that `list_images` accepts, in lower or upper case."""

MAX_PIXELS = 178_956_970
"""Largest number of pixels that is decoded, which is also Pillow's limit; enough for 150 megapixels."""

LOSSY_MASK_LEVEL = 128
"""Lowest value at which a pixel of a lossily compressed mask counts as marked."""

# Decoders by the file's first bytes. Using them directly rather than through `PIL.Image.open` keeps all other
# decoders away from the file and lets `_check_header` see the size before Pillow warns about it.
_FORMATS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"\xff\xd8\xff", JpegImageFile),
    (b"BM", BmpImageFile),
    (b"II*\x00", TiffImageFile),
    (b"MM\x00*", TiffImageFile),
    (b"II+\x00", TiffImageFile),
    (b"MM\x00+", TiffImageFile),
    (b"RIFF", WebPImageFile),
)

# What Pillow raises on damaged files, found by experiment. Warnings are raised only if the host asks for it.
_DAMAGE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError)

_DAMAGE += (ArithmeticError, struct.error, Image.DecompressionBombError, Warning)

_DEEP_COLOUR = ("RGB;16", "RGBA;16", "RGBX;16")

_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}

_BITS = {"1": 1, "I": 32, "F": 32}

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANAR, _ORIENTATION = 258, 262, 284, 274  # tag numbers


@dataclass(frozen=True)
class ImageInfo:
    """The properties of an image in its file's header."""

    size: tuple[int, int]
    """Height and width after EXIF orientation."""
    mode: str
    """Pillow's mode: "1", "L" (grey), "LA", "P" (palette), "RGB", "RGBA", "CMYK", ..."""
    bits: int
    """Bits per channel: 1, 8, 16 or 32."""


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """List the image files in `folder` by extension, sorted, without hidden files and folders.

    Raises DataError if there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"found no folder at {folder}; expected a folder of images")
    found = []
    for path in folder.rglob("*") if recursive else folder.iterdir():
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            found.append(path)
    return sorted(found, key=Path.as_posix)


def describe(path: Path) -> ImageInfo:
    """Read size, mode and bit depth from the header of `path`, without decoding the pixels.

    Raises ImageError for the same files as `read`, as far as the header shows it.
    """
    with _opened(path) as image:
        height, width = image.height, image.width
        # getexif of a PNG would decode the pixels. The size of a TIFF is already that after orientation.
        exif = Image.Image.getexif(image)
        if exif.get(_ORIENTATION) in (5, 6, 7, 8) and not isinstance(image, TiffImageFile):
            height, width = width, height
        raw_mode = _raw_mode(image)
        mode = "L" if image.mode[0] in "IF" else "LA" if raw_mode.startswith("LA") else image.mode
        bits = 16 if _is_deep_colour(raw_mode) or image.mode.startswith("I;16") else _BITS.get(image.mode, 8)
        return ImageInfo((height, width), mode, bits)


def read_digested(path: Path) -> tuple[AnyArray, str]:
    """Read a file once and return its image, as `read` does, and the SHA-256 of its content."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unopened(path, error) from error
    return read(path, data), hashlib.sha256(data).hexdigest()


def read(path: Path, data: bytes | None = None) -> AnyArray:
    """Read an image file as an upright (H, W, 3) RGB array, uint8 or uint16.

    data: the file's content, if it has already been read; `path` then only serves for messages. Raises
    ImageError if the file is missing, empty, not an image, damaged, too large, has several frames, or is of
    a kind that cannot be read without loss.
    """
    with _opened(path, data) as image:
        raw_mode = _raw_mode(image)
        if not _is_deep_colour(raw_mode):
            ImageOps.exif_transpose(image, in_place=True)
            return _pixels(image, str(path))
    if raw_mode == "LA;16B":
        # Pillow would keep only the high bytes. Decoded as RGBA, a pixel's four bytes are its two values.
        four = _decode_as(path, data, "RGBA")
        return np.repeat(_join(four[..., :1], four[..., 1:2]), 3, axis=2)
    if raw_mode[:-1] not in _DEEP_COLOUR:
        raise ImageError(
            f"{path} stores 16-bit colour as {raw_mode}; expected RGB or RGBA with straight alpha"
        )
    # Pillow keeps the high byte of each value; with the byte order swapped, it keeps the low byte.
    high = _decode_as(path, data, raw_mode)
    low = _decode_as(path, data, raw_mode[:-1] + _SWAPPED[raw_mode[-1]])
    return _join(high[..., :3], low[..., :3])


def as_image(image: str | Path | Image.Image | AnyArray, white: float = FULL_SCALE) -> AnyArray:
    """Convert a path, a PIL image or an array to an (H, W, 3) array such as `read` returns.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), whose fourth channel is dropped, and uint8, uint16,
    bool (which becomes 0 or 255) or float. Float arrays range from 0 (black) to 1 (white) and become float32
    in the units of 16-bit data: multiplied by `white`, which must equal that passed to `to_input`. Pillow
    reduces 16-bit colour to 8 bits, so pass the path of such a file rather than a PIL image.
    Raises ImageError for anything else.
    """
    if isinstance(image, str | Path):
        return read(Path(image))
    if isinstance(image, Image.Image):
        with _damage_as_image_error("the PIL image"):
            return _pixels(ImageOps.exif_transpose(image), "the PIL image")
    if not isinstance(image, np.ndarray):
        raise ImageError(
            f"a {type(image).__name__} is not an image; expected a path, a PIL image or an array"
        )
    channels = image[..., None] if image.ndim == 2 else image
    if channels.ndim != 3 or channels.shape[2] not in (1, 3, 4) or channels.size == 0:
        raise ImageError(
            f"an array of shape {image.shape} is not an image; expected (H, W) or (H, W, 1, 3 or 4)"
        )
    values = _array_values(channels[..., :3], white)
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else np.ascontiguousarray(values)


def read_mask(paths: tuple[Path, ...], size: tuple[int, int]) -> BoolArray:
    """Return the union of mask files as an (H, W) bool array; without files, no pixel is marked.

    A pixel is marked if any colour channel is non-zero, which includes grey edges and any numbering of
    defects; alpha is ignored. JPEG and WebP files have noise around edges; there a pixel is marked from 128.
    Raises ImageError for a file that cannot be read, DataError for one whose height and width are not `size`.
    """
    union = np.zeros(size, dtype=np.bool_)
    for path in paths:
        mask = read(path)
        if mask.shape[:2] != tuple(size):
            raise DataError(
                f"mask {path} is {mask.shape[0]} x {mask.shape[1]} pixels (height x width); "
                f"expected its image's {size[0]} x {size[1]}"
            )
        union |= (mask >= (LOSSY_MASK_LEVEL if _is_lossy(path) else 1)).any(axis=2)
    return union


def mask_is_empty(path: Path) -> bool:
    """Return whether a mask file marks no pixel, as `read_mask` counts; raise ImageError as `read` does."""
    with _opened(path) as image:
        if image.mode in ("1", "L") and not isinstance(image, JpegImageFile):  # the usual case
            return image.getbbox() is None  # eight times as fast
    return not read_mask((path,), describe(path).size).any()


@contextmanager
def _opened(path: Path, data: bytes | None = None) -> Iterator[ImageFile]:
    """Open an image file and check its header; damage found within the block is raised as ImageError."""
    with _damage_as_image_error(str(path)):
        try:
            file: BinaryIO = path.open("rb") if data is None else io.BytesIO(data)
        except OSError as error:
            raise _unopened(path, error) from error
        with file:
            image = _format(file, path)(file)
            _check_header(image, path)
            with _no_size_warning(image):
                yield image


def _unopened(path: Path, error: OSError) -> ImageError:
    return ImageError(f"{path} cannot be opened ({error.strerror}); expected an image file")


@contextmanager
def _damage_as_image_error(name: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name} is damaged or truncated ({reason}); expected a whole image") from error


def _format(file: BinaryIO, path: Path) -> type[ImageFile]:
    """Return the decoder for `file`, chosen by its first bytes, and rewind the file."""
    start = file.read(16)
    file.seek(0)
    if not start:
        raise ImageError(f"{path} is empty; expected an image file")
    for signature, plugin in _FORMATS:
        if start.startswith(signature) and (signature != b"RIFF" or start[8:12] == b"WEBP"):
            return plugin
    raise ImageError(f"{path} begins with {start[:8]!r}; expected a PNG, JPEG, BMP, TIFF or WebP image")


def _check_header(image: ImageFile, path: Path) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{path} is {image.height} x {image.width} pixels (height x width); expected at most {MAX_PIXELS}"
        )
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        raise ImageError(f"{path} holds {frames} images, pages or animation frames; expected one")
    if isinstance(image, TiffImageFile) and max(image.tag_v2.get(_TIFF_BITS, (1,))) > 8:
        # Pillow silently misdecodes these two kinds.
        if image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0:
            raise ImageError(f"{path} is a 16-bit TIFF in which 0 is white; expected one in which 0 is black")
        if image.tag_v2.get(_TIFF_PLANAR, 1) != 1:
            raise ImageError(f"{path} is a 16-bit TIFF in separate planes; expected interleaved channels")


@contextmanager
def _no_size_warning(image: ImageFile) -> Iterator[None]:
    """Suppress Pillow's warning about large TIFFs while decoding: `_check_header` has accepted the size."""
    if image.width * image.height <= MAX_PIXELS // 2:  # catch_warnings is not thread-safe, so used rarely
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _raw_mode(image: ImageFile) -> str:
    """Return Pillow's raw mode, the name of the pixel layout in the file."""
    arguments = image.tile[0].args if image.tile else None  # WebP has no tiles until it is loaded
    return arguments if isinstance(arguments, str) else str((arguments or (image.mode,))[0])


def _is_deep_colour(raw_mode: str) -> bool:
    """Return whether a raw mode has several channels of 16 bits; "BGR;16" is the 5-6-5 format of BMP."""
    return raw_mode.endswith((";16B", ";16L", ";16N")) and not raw_mode.startswith("I")


def _decode_as(path: Path, data: bytes | None, raw_mode: str) -> AnyArray:
    """Decode `path` with another raw mode than its own, as an upright (H, W, 3 or 4) uint8 array."""
    with _opened(path, data) as image:
        image.tile = [
            tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *(tile.args or ())[1:]))
            for tile in image.tile
        ]
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image)


def _join(high: AnyArray, low: AnyArray) -> AnyArray:
    return high.astype(np.uint16) << 8 | low


def _pixels(image: Image.Image, name: str) -> AnyArray:
    """Convert a PIL image of any mode to an (H, W, 3) uint8 or uint16 array."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(f"{name} has values from {grey.min()} to {grey.max()}; expected 0 to 65535")
        return np.repeat(grey.astype(np.uint16)[..., None], 3, axis=2)
    if image.mode in ("F", "LAB"):
        raise ImageError(
            f"{name} has {'float' if image.mode == 'F' else 'CIELAB'} pixels; expected whole numbers"
        )
    # Convert by way of alpha: Pillow cannot convert these modes directly, or warns about transparent entries.
    straight = {"La": "LA", "P": "RGBA"}.get(image.mode, image.mode)
    for mode in (straight, "RGB"):
        if image.mode != mode:  # otherwise Pillow would make a copy
            image = image.convert(mode)
    return np.array(image)


def _array_values(values: AnyArray, white: float) -> AnyArray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return values.astype(np.uint16)
    if values.dtype.kind != "f":
        raise ImageError(
            f"an array of {values.dtype} is not an image; expected uint8, uint16, bool or float in [0, 1]"
        )
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise ImageError(
            f"a float array has values from {low} to {high}; expected [0, 1], or uint8 or uint16"
        )
    return values.astype(np.float32) * np.float32(white)


def _is_lossy(path: Path) -> bool:
    with path.open("rb") as file:
        return _format(file, path) in (JpegImageFile, WebPImageFile)
