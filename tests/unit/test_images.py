"""Every kind of file that cameras and annotators leave, drawn byte by byte where Pillow cannot write it."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageFile

from blemish import files, images
from blemish.errors import DataError, ImageError
from blemish.images import Preprocessing, reading
from blemish.images.reading import as_image, describe, list_images, mask_is_empty, read, read_mask
from blemish.images.resizing import resize, resize_map, to_input, white_level

Order = Literal["<", ">"]
ORDERS = {"<": b"II*\x00", ">": b"MM\x00*"}


def noise(height: int, width: int, channels: int, dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """Draw values in which every byte differs from its neighbours, so that a swapped byte shows."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype)


def png(array: np.ndarray, colour_type: int, *, extra: bytes = b"") -> bytes:
    """Encode (H, W, C) uint8 or uint16 as PNG, with rows filtered by None, Sub and Up in turn."""
    height, width, channels = array.shape
    depth = 8 * array.itemsize
    step = channels * array.itemsize
    rows = np.frombuffer(array.astype(array.dtype.newbyteorder(">")).tobytes(), np.uint8).reshape(height, -1)
    stream = b""
    for index, row in enumerate(rows):
        before = np.zeros_like(row)
        if index % 3 == 1:
            before[step:] = row[:-step]
        elif index % 3 == 2:
            before = rows[index - 1]
        stream += bytes([index % 3]) + (row - before).tobytes()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(stream))
        + chunk(b"IEND", b"")
    )


def literal_lzw(data: bytes) -> bytes:
    """Encode as TIFF's LZW without ever using a table entry: 9-bit literals, cleared before codes grow."""
    codes = [code for start in range(0, len(data), 200) for code in (256, *data[start : start + 200])]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


PACK: dict[int, Callable[[bytes], bytes]] = {1: lambda data: data, 5: literal_lzw, 8: zlib.compress}


def tiff(
    array: np.ndarray,
    order: Order = "<",
    *,
    compression: int = 1,
    photometric: int = 2,
    predictor: int = 1,
    planar: int = 1,
    strips: int = 1,
    extra_sample: int | None = None,
    orientation: int = 1,
    pages: int = 1,
) -> bytes:
    """Encode (H, W, C) unsigned integers as TIFF in the given byte order."""
    height, width, channels = array.shape
    values = array
    if predictor == 2:
        values = np.concatenate([array[:, :1], array[:, 1:] - array[:, :-1]], axis=1)
    parts = [values] if planar == 1 else [values[..., c : c + 1] for c in range(channels)]
    rows = -(-height // strips)
    blocks = [
        PACK[compression](part[top : top + rows].astype(array.dtype.newbyteorder(order)).tobytes())
        for part in parts
        for top in range(0, height, rows)
    ]
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * array.itemsize] * channels),
        259: ("H", [compression]),
        262: ("H", [photometric]),
        274: ("H", [orientation]),
        277: ("H", [channels]),
        278: ("I", [rows]),
        284: ("H", [planar]),
        317: ("H", [predictor]),
    }
    if extra_sample is not None:
        tags[338] = ("H", [extra_sample])
    offset = 8
    starts = []
    for block in blocks:
        starts.append(offset)
        offset += len(block)
    tags[273] = ("I", starts)
    tags[279] = ("I", [len(block) for block in blocks])
    body = b"".join(blocks)
    body += b"\0" * (len(body) % 2)
    first = 8 + len(body)
    for page in range(pages):
        body += directory(tags, order, 8 + len(body), last=page == pages - 1)
    return ORDERS[order] + struct.pack(order + "I", first) + body


def directory(tags: dict[int, tuple[str, list[int]]], order: str, start: int, *, last: bool) -> bytes:
    entries, tail = b"", b""
    after = start + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(packed) > 4:
            packed, tail = struct.pack(order + "I", after + len(tail)), tail + packed
        code = {"H": 3, "I": 4}[kind]
        entries += struct.pack(order + "HHI", tag, code, len(values)) + packed.ljust(4, b"\0")
    tail += b"\0" * (len(tail) % 2)
    following = 0 if last else after + len(tail)
    return struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", following) + tail


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def grey3(array: np.ndarray) -> np.ndarray:
    return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)


# Reading: 16 bits


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_16_bit_png_loses_no_bit(tmp_path: Path, colour_type: int) -> None:
    array = noise(7, 5, {0: 1, 2: 3, 4: 2, 6: 4}[colour_type])
    image = read(saved(tmp_path / "a.png", png(array, colour_type)))
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, grey3(array[..., 0]) if colour_type in (0, 4) else array[..., :3])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("compression", "predictor"), [(1, 1), (5, 1), (5, 2), (8, 1), (8, 2)])
@pytest.mark.parametrize("strips", [1, 3])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_tiff_loses_no_bit(
    tmp_path: Path, order: Order, compression: int, predictor: int, strips: int, channels: int
) -> None:
    array = noise(7, 5, channels)
    data = tiff(
        array,
        order,
        compression=compression,
        predictor=predictor,
        strips=strips,
        photometric=1 if channels == 1 else 2,
        extra_sample=2 if channels == 4 else None,
    )
    image = read(saved(tmp_path / "a.tif", data))
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, grey3(array) if channels == 1 else array[..., :3])


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_with_an_unused_channel_loses_no_bit(tmp_path: Path, order: Order) -> None:
    array = noise(7, 5, 4)
    image = read(saved(tmp_path / "a.tif", tiff(array, order, extra_sample=0)))
    np.testing.assert_array_equal(image, array[..., :3])


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (tiff(noise(4, 4, 3), planar=2), "separate planes"),
        (tiff(noise(4, 4, 3), planar=2, compression=8), "separate planes"),
        (tiff(noise(4, 4, 1), planar=2, photometric=1), "separate planes"),
        (tiff(noise(4, 4, 4), extra_sample=1), "RGBa;16"),
        (tiff(noise(4, 4, 4), photometric=5), "CMYK;16"),
        (tiff(noise(4, 4, 1), photometric=0), "0 is white"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "float"),
        (encoded(Image.new("I", (4, 4), 65536), "TIFF"), "65536"),
        (encoded(Image.new("I", (4, 4), -1), "TIFF"), "-1"),
        (tiff(noise(4, 4, 3, "uint8"), photometric=8), "CIELAB"),
    ],
)
def test_what_cannot_be_read_without_loss_is_refused(tmp_path: Path, data: bytes, found: str) -> None:
    with pytest.raises(ImageError, match=rf"a\.tif.*{found}"):
        read(saved(tmp_path / "a.tif", data))


def test_32_bit_values_that_fit_16_bits_are_read(tmp_path: Path) -> None:
    image = read(saved(tmp_path / "a.tif", encoded(Image.new("I", (2, 3), 65535), "TIFF")))
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, np.full((3, 2, 3), 65535))


def test_12_bit_data_is_neither_stretched_nor_clipped(tmp_path: Path) -> None:
    array = noise(4, 4, 1) >> 4
    image = read(saved(tmp_path / "a.png", png(array, 0)))
    np.testing.assert_array_equal(image, grey3(array))
    np.testing.assert_allclose(to_input(image, 4095.0)[0], array[..., 0] / 4095, rtol=1e-6)


# Reading: 8 bits and less


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_8_bit_colour(tmp_path: Path, suffix: str) -> None:
    array = noise(6, 9, 3, "uint8")
    path = tmp_path / f"a{suffix}"
    Image.fromarray(array).save(path, lossless=True)
    assert read(path).dtype == np.uint8
    assert read(path).flags.writeable  # torch warns of others
    assert resize(read(path), (3, 3)).flags.writeable
    np.testing.assert_array_equal(read(path), array)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".jpg"])
def test_grey_is_repeated_in_three_channels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.new("L", (5, 4), 77).save(path)
    np.testing.assert_array_equal(read(path), np.full((4, 5, 3), 77, np.uint8))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_one_bit_images_are_black_and_white(tmp_path: Path, suffix: str) -> None:
    bits = noise(5, 11, 1, "uint8")[..., 0] > 127
    path = tmp_path / f"a{suffix}"
    Image.fromarray(bits).save(path)
    np.testing.assert_array_equal(read(path), grey3(bits.astype(np.uint8) * 255))


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".png", "RGBA"), (".png", "LA"), (".tif", "RGBA"), (".webp", "RGBA")]
)
def test_alpha_is_dropped_and_not_composited(tmp_path: Path, suffix: str, mode: str) -> None:
    array = noise(6, 6, len(mode), "uint8")
    array[..., -1] = np.arange(6) * 51  # from fully transparent to opaque
    path = tmp_path / f"a{suffix}"
    Image.fromarray(array, mode).save(path, lossless=True, exact=True)
    np.testing.assert_array_equal(read(path), grey3(array[..., 0]) if mode == "LA" else array[..., :3])


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palettes_are_resolved(tmp_path: Path, transparency: int | bytes | None) -> None:
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 255]], np.uint8)
    indices = noise(6, 7, 1, "uint8")[..., 0] % 3
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    path = tmp_path / "a.png"
    given: dict[str, Any] = {} if transparency is None else {"transparency": transparency}
    image.save(path, **given)
    np.testing.assert_array_equal(read(path), colours[indices])


def test_cmyk_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=95)
    np.testing.assert_allclose(read(path), np.broadcast_to([255, 0, 0], (16, 16, 3)), atol=2)


def test_an_image_comes_with_the_digest_of_its_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "a.tif"):  # 16-bit colour is decoded twice
        path = saved(tmp_path / name, WHOLE[name])
        image, digest = images.read_digested(path)
        np.testing.assert_array_equal(image, read(path))
        assert digest == files.digest(path)
    with pytest.raises(ImageError, match=r"none\.png cannot be opened"):
        images.read_digested(tmp_path / "none.png")


def test_a_jpeg_with_another_ending_is_read(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG")
    np.testing.assert_array_equal(read(saved(tmp_path / "a.png", data)), np.full((8, 8, 3), 9))


# Orientation: stored pixels and how they look upright, by the EXIF standard's words

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", sorted(TURNS))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    array = noise(4, 6, 3, "uint8")
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(array).save(path, exif=exif)
    expected = TURNS[orientation](array)
    np.testing.assert_array_equal(read(path), expected)
    assert describe(path).size == expected.shape[:2]
    with Image.open(path) as image:
        np.testing.assert_array_equal(as_image(image), expected)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("compression", [1, 8])
def test_orientation_of_a_16_bit_tiff_is_applied(
    tmp_path: Path, orientation: int, channels: int, compression: int
) -> None:
    array = noise(4, 6, channels)
    data = tiff(
        array, orientation=orientation, photometric=1 if channels == 1 else 2, compression=compression
    )
    path = saved(tmp_path / "a.tif", data)
    expected = TURNS[orientation](grey3(array) if channels == 1 else array)
    np.testing.assert_array_equal(read(path), expected)
    assert describe(path).size == expected.shape[:2]


# Bad input


def test_a_missing_file_a_folder_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nothing\.png cannot be opened \(No such file"):
        read(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="cannot be opened"):
        read(tmp_path)
    with pytest.raises(ImageError, match=r"a\.png is empty"):
        read(saved(tmp_path / "a.png", b""))


@pytest.mark.parametrize(
    "data", [b"hello, world", b"GIF89a\x01\x00\x01\x00\x00\x00\x00", b"RIFF\0\0\0\0WAVEfmt "]
)
def test_what_is_no_image_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ImageError, match=r"a\.png begins with .*; expected a PNG"):
        read(saved(tmp_path / "a.png", data))


WHOLE = {
    "a.png": encoded(Image.fromarray(noise(40, 40, 3, "uint8")), "PNG"),
    "b.png": png(noise(40, 40, 3), 2),
    "c.png": png(noise(40, 40, 2), 4),
    "a.jpg": encoded(Image.fromarray(noise(40, 40, 3, "uint8")), "JPEG"),
    "p.jpg": encoded(Image.fromarray(noise(40, 40, 3, "uint8")), "JPEG", progressive=True),
    "a.bmp": encoded(Image.fromarray(noise(40, 40, 3, "uint8")), "BMP"),
    "a.tif": tiff(noise(40, 40, 3)),
    "b.tif": tiff(noise(40, 40, 3), compression=8, strips=4),
    "c.tif": encoded(Image.fromarray(noise(40, 40, 3, "uint8")), "TIFF"),
    "d.tif": encoded(Image.fromarray(noise(40, 40, 3, "uint8")), "TIFF", compression="tiff_lzw"),
    "a.webp": encoded(Image.fromarray(noise(40, 40, 3, "uint8")), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    data = WHOLE[name]
    path = saved(tmp_path / name, data)
    whole = read(path)
    for length in [1, 3, 10, 30, *range(60, len(data), max(1, len(data) // 23)), len(data) - 40]:
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=name):
            read(path)
    for length in range(len(data) - 30, len(data)):
        path.write_bytes(data[:length])
        try:
            image = read(path)
        except ImageError:
            continue
        np.testing.assert_array_equal(image, whole)  # only the end mark was missing


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_damage_anywhere_is_an_image_error_or_an_image(tmp_path: Path, name: str) -> None:
    generator = np.random.default_rng(1)
    for _ in range(40):
        data = bytearray(WHOLE[name])
        for position in generator.integers(0, min(len(data), 400), 3):
            data[position] = generator.integers(0, 256)
        try:
            image = read(saved(tmp_path / name, bytes(data)))
        except ImageError:
            continue
        assert image.shape[2] == 3


def test_a_huge_image_is_refused_by_its_header(tmp_path: Path) -> None:
    data = bytearray(png(noise(2, 2, 3, "uint8"), 2))
    data[16:24] = struct.pack(">II", 2**20, 2**20)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path = saved(tmp_path / "a.png", bytes(data))
    for function in (read, describe):
        with pytest.raises(ImageError, match=r"1048576 x 1048576 pixels .*; expected at most 178956970"):
            function(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp", "a.tif"])
def test_a_large_image_is_read_without_a_warning(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(reading, "MAX_PIXELS", 2000)
    path = saved(tmp_path / name, WHOLE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path).shape == (40, 40, 3)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_several_frames_are_refused(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(noise(8, 8, 3, "uint8", seed)) for seed in range(3)]
    path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    for function in (read, describe):
        with pytest.raises(ImageError, match="holds 3 images"):
            function(path)


def test_the_main_picture_of_a_multi_picture_jpeg_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (value, value, value)) for value in (50, 200)]
    path = tmp_path / "a.jpg"
    frames[0].save(path, "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read(path), np.full((8, 8, 3), 50))


# Arrays and PIL images


def test_as_image_takes_paths_and_pil_images(tmp_path: Path) -> None:
    array = noise(5, 6, 3, "uint8")
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    for image in (path, str(path), Image.fromarray(array)):
        np.testing.assert_array_equal(as_image(image), array)
    grey = noise(5, 6, 1)[..., 0]
    np.testing.assert_array_equal(as_image(Image.fromarray(grey)), grey3(grey))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2"])
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_as_image_takes_arrays(dtype: str, channels: int) -> None:
    array = noise(5, 6, max(channels, 1), np.dtype(dtype).newbyteorder("=").name).astype(dtype)
    image = as_image(array[..., 0] if channels == 0 else array)
    assert image.dtype == np.dtype(dtype).newbyteorder("=")
    assert image.flags.c_contiguous
    assert image.flags.writeable
    np.testing.assert_array_equal(image, grey3(array) if channels < 3 else array[..., :3])


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGBX", (10, 20, 30, 40), (10, 20, 30)),
        ("RGBa", (50, 25, 0, 128), (99, 49, 0)),
        ("La", (50, 128), (99, 99, 99)),
        ("YCbCr", (150, 128, 128), (150, 150, 150)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ],
)
def test_as_image_takes_pil_images_of_every_mode(
    mode: str, pixel: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    image = as_image(Image.frombytes(mode, (2, 2), bytes(pixel) * 4))
    np.testing.assert_array_equal(image, np.broadcast_to(expected, (2, 2, 3)))


def test_as_image_takes_a_palette_with_alpha() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 0])
    np.testing.assert_array_equal(as_image(image.convert("PA")), np.full((2, 2, 3), [200, 100, 0]))


def test_as_image_takes_bool_as_black_and_white() -> None:
    np.testing.assert_array_equal(as_image(np.eye(3, dtype=bool)), grey3(np.eye(3, dtype=np.uint8) * 255))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("white", [65535.0, 4095.0])
def test_a_float_array_of_shares_of_white_arrives_as_such(dtype: str, white: float) -> None:
    array = np.random.default_rng(0).random((5, 6, 3)).astype(dtype)
    image = as_image(array, white)
    assert image.dtype == np.float32
    np.testing.assert_allclose(to_input(image, white), array.transpose(2, 0, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.full((4, 4), 1.5), "1.5"),
        (np.full((4, 4), -0.1), "-0.1"),
        (np.full((4, 4), np.nan), "nan"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(1, 4, 4, 3\)"),
        (np.zeros((0, 4), np.uint8), r"\(0, 4\)"),
        ([[1, 2]], "list"),
        (Image.new("F", (4, 4)), "float"),
    ],
)
def test_as_image_refuses_the_rest(image: object, found: str) -> None:
    with pytest.raises(ImageError, match=found):
        as_image(image)  # type: ignore[arg-type]


def test_a_damaged_pil_image_is_an_image_error() -> None:
    with Image.open(io.BytesIO(WHOLE["a.jpg"][:900])) as image, pytest.raises(ImageError, match="PIL image"):
        as_image(image)


# Resizing and model input


def test_resize_keeps_uint8_and_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    array = noise(60, 40, 3, "uint8")
    small = resize(array, (17, 31))
    assert small.dtype == np.uint8
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(array).permute(2, 0, 1)[None].double(), (17, 31), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(small, expected[0].permute(1, 2, 0), atol=1)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_resize_neither_rounds_nor_clips_16_bit_data(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    array = noise(60, 40, 3).astype(dtype)
    small = resize(array, (17, 31))
    assert small.dtype == np.float32
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(array.astype(np.float64)).permute(2, 0, 1)[None],
        (17, 31),
        mode="bilinear",
        antialias=True,
    )
    np.testing.assert_allclose(small, expected[0].permute(1, 2, 0), rtol=1e-5)


def test_resize_to_the_same_size_returns_the_image() -> None:
    array = noise(6, 7, 3)
    assert resize(array, (6, 7)) is array


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_to_input_is_planar_contiguous_and_leaves_its_argument(dtype: str) -> None:
    array = np.ascontiguousarray(noise(6, 7, 3, "uint8").astype(dtype).transpose(2, 0, 1)).transpose(1, 2, 0)
    before = array.copy()
    ready = to_input(array, 1000.0)
    assert ready.dtype == np.float32
    assert ready.flags.c_contiguous
    np.testing.assert_array_equal(array, before)
    scale = 255.0 if dtype == "uint8" else 1000.0
    np.testing.assert_allclose(ready, array.transpose(2, 0, 1) / scale, rtol=1e-6)


def test_a_value_above_white_is_not_clipped() -> None:
    assert to_input(np.full((1, 1, 3), 5000, np.uint16), 4095.0).max() > 1.2


def test_an_8_and_a_16_bit_copy_prepare_alike() -> None:
    small = noise(30, 30, 3, "uint8")
    deep = small.astype(np.uint16) * 257
    preprocessing = Preprocessing((10, 12), 65535.0)
    inputs = preprocessing.inputs(small)
    assert inputs.shape == (1, 3, 10, 12)
    np.testing.assert_allclose(inputs, preprocessing.inputs(deep), atol=1.1 / 255)


@pytest.mark.parametrize(
    ("maximum", "white"),
    [
        (0, 255),
        (255, 255),
        (256, 1023),
        (1023, 1023),
        (1024, 4095),
        (4095, 4095),
        (4096, 16383),
        (16384, 65535),
    ],
)
def test_white_level_is_the_smallest_depth_that_holds_the_maximum(maximum: int, white: float) -> None:
    assert white_level(maximum) == white
    assert white_level(65535) == 65535


def test_white_level_of_no_16_bit_value_is_an_error() -> None:
    for maximum in (-1, 65536):
        with pytest.raises(ValueError, match=str(maximum)):
            white_level(maximum)


@pytest.mark.parametrize("size", [(16, 16), (64, 48), (16, 33), (17, 16), (40, 90)])
def test_resize_map_upwards_agrees_with_torch(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    small = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(small)[None, None], size, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(resize_map(small, size), expected[0, 0], atol=1e-5)


def test_resize_map_downwards_lowers_a_peak_but_never_skips_it() -> None:
    small = np.zeros((64, 64), np.float32)
    small[1, 1] = 1
    assert resize_map(small, (16, 16)).sum() == pytest.approx(1 / 16, rel=0.2)


# Masks


def test_read_mask_is_the_union_of_all_non_zero_pixels(tmp_path: Path) -> None:
    grey, colour = np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.uint8)
    grey[0, 0], colour[3, 4, 2] = 1, 7
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(colour).save(tmp_path / "b.png")
    mask = read_mask((tmp_path / "a.png", tmp_path / "b.png"), (4, 5))
    assert mask.dtype == np.bool_
    assert [(int(y), int(x)) for y, x in np.argwhere(mask)] == [(0, 0), (3, 4)]


def test_read_mask_of_nothing_is_empty() -> None:
    assert read_mask((), (4, 5)).shape == (4, 5)
    assert not read_mask((), (4, 5)).any()


def test_a_deep_mask_is_not_cut_to_8_bits(tmp_path: Path) -> None:
    assert read_mask((saved(tmp_path / "a.png", png(np.ones((2, 2, 1), np.uint16), 0)),), (2, 2)).all()


def test_noise_around_the_edges_of_a_jpeg_mask_does_not_count(tmp_path: Path) -> None:
    square = np.zeros((64, 64), np.uint8)
    square[19:45, 21:43] = 255
    Image.fromarray(square).save(tmp_path / "a.jpg", quality=60)
    assert ((read(tmp_path / "a.jpg")[..., 0] > 0) & (square == 0)).any()
    np.testing.assert_array_equal(read_mask((tmp_path / "a.jpg",), (64, 64)), square > 0)


def test_a_mask_is_empty_where_read_mask_finds_nothing(tmp_path: Path) -> None:
    one = np.zeros((4, 5), np.uint8)
    one[2, 3] = 1
    black_under_alpha = Image.fromarray(np.dstack([0 * one] * 3 + [1 - one]))
    palette = Image.new("P", (5, 4))
    palette.putpalette([9, 9, 9])
    drawn = {
        "black.png": (Image.fromarray(0 * one), True),
        "grey.png": (Image.fromarray(one), False),
        "bit.png": (Image.fromarray(one > 0), False),
        "no bit.png": (Image.fromarray(one > 1), True),
        "blue.png": (Image.fromarray(np.dstack([0 * one, 0 * one, one])), False),
        "deep.png": (Image.fromarray(one.astype(np.uint16)), False),
        "alpha.png": (black_under_alpha, True),
        "palette.png": (palette, False),
        "noise.jpg": (Image.fromarray(100 * one), True),
        "marked.jpg": (Image.fromarray(np.full((4, 5), 200, np.uint8)), False),
    }
    for name, (mask, empty) in drawn.items():
        mask.save(tmp_path / name)
        assert read_mask((tmp_path / name,), (4, 5)).any() != empty, name
        assert mask_is_empty(tmp_path / name) == empty, name
    with pytest.raises(ImageError, match=r"none\.png"):
        mask_is_empty(tmp_path / "none.png")


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    Image.new("L", (5, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png is 4 x 5 pixels .* expected its image's 5 x 4"):
        read_mask((tmp_path / "a.png",), (5, 4))


# Writing, describing, listing


@pytest.mark.parametrize("channels", [0, 3])
def test_written_png_comes_back(tmp_path: Path, channels: int) -> None:
    array = noise(4, 5, max(1, channels), "uint8")
    array = array[..., 0] if channels == 0 else array
    images.write_png(tmp_path / "new" / "a.png", array)
    with Image.open(tmp_path / "new" / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), array)


def test_written_tiff_keeps_every_bit(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    images.write_tiff(tmp_path / "a.tiff", array)
    with Image.open(tmp_path / "a.tiff") as image:
        np.testing.assert_array_equal(np.asarray(image), array)


def test_jpeg_bytes_follow_the_quality() -> None:
    array = noise(32, 32, 3, "uint8")
    assert len(images.jpeg_bytes(array, 30)) < len(images.jpeg_bytes(array, 90))
    with Image.open(io.BytesIO(images.jpeg_bytes(array, 90))) as image:
        assert (image.format, image.size) == ("JPEG", (32, 32))


@pytest.mark.parametrize(
    ("data", "mode", "bits"),
    [
        (encoded(Image.new("1", (5, 4)), "PNG"), "1", 1),
        (encoded(Image.new("L", (5, 4)), "PNG"), "L", 8),
        (encoded(Image.new("P", (5, 4)), "PNG"), "P", 8),
        (encoded(Image.new("RGB", (5, 4)), "JPEG"), "RGB", 8),
        (encoded(Image.new("RGB", (5, 4)), "WEBP"), "RGB", 8),
        (png(noise(4, 5, 1), 0), "L", 16),
        (png(noise(4, 5, 2), 4), "LA", 16),
        (png(noise(4, 5, 3), 2), "RGB", 16),
        (png(noise(4, 5, 4), 6), "RGBA", 16),
        (tiff(noise(4, 5, 3), ">", compression=8), "RGB", 16),
        (tiff(noise(4, 5, 1), ">", photometric=1), "L", 16),
        (encoded(Image.new("F", (5, 4)), "TIFF"), "L", 32),
    ],
)
def test_describe_tells_size_mode_and_bits(tmp_path: Path, data: bytes, mode: str, bits: int) -> None:
    assert describe(saved(tmp_path / "a", data)) == images.ImageInfo((4, 5), mode, bits)


def test_a_5_6_5_bmp_is_no_16_bit_image(tmp_path: Path) -> None:
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + header + masks + struct.pack("<HH", 0xF800, 0x1F)
    path = saved(tmp_path / "a.bmp", data)
    assert describe(path).bits == 8
    np.testing.assert_array_equal(read(path), [[[255, 0, 0], [0, 0, 255]]])


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_describe_leaves_the_pixels_undecoded(tmp_path: Path, name: str) -> None:
    assert describe(saved(tmp_path / name, WHOLE[name][:700])).size == (40, 40)


def test_list_images_goes_by_ending_and_skips_what_is_hidden(tmp_path: Path) -> None:
    names = ["b.PNG", "a.jpg", "c.tiff", "sub/d.bmp", "sub/e.webp", ".hidden.png", ".git/f.png", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert list_images(tmp_path) == [tmp_path / name for name in ("a.jpg", "b.PNG", "c.tiff")]
    found = list_images(tmp_path, recursive=True)
    assert found == [tmp_path / name for name in ("a.jpg", "b.PNG", "c.tiff", "sub/d.bmp", "sub/e.webp")]
    assert all(a < b for a, b in pairwise(found))
    with pytest.raises(DataError, match=r"nowhere"):
        list_images(tmp_path / "nowhere")


def test_truncated_images_stay_refused_by_default() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
