"""Test images under other light and other optics: what a day at the line does to good parts.

    python benchmarks/light_variants.py DATA OUT [--only "gain 0.7,ramp"]

writes OUT/NAME for each alteration: a data set in the layout mvtec with the same good images for training and
altered test images, for `blemish evaluate F.blemish OUT/NAME`. Nothing is trained on altered images.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from blemish import images
from blemish.errors import ConfigError, DataError
from blemish.types import AnyArray

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3), RGB; for `shift` also (H, W)."""
Alter = Callable[[Pixels], Pixels]

SHIFT = 4
"""Pixels of the image."""


def gain(image: Pixels, factor: float) -> Pixels:
    """Multiply all values, as longer exposure does; what exceeds white stays white."""
    return rounded(image * np.float32(factor))


def gamma(image: Pixels, exponent: float) -> Pixels:
    """Raise all values, as shares of white, to a power; below 1 the image gets brighter."""
    table = rounded(255 * (np.arange(256, dtype=np.float32) / 255) ** np.float32(exponent))
    altered: Pixels = table[image]
    return altered


def ramp(image: Pixels, share: float = 0.15) -> Pixels:
    """Let the light fall evenly by this share from the left edge to the right, as beside a single lamp."""
    factors = np.linspace(1, 1 - share, image.shape[1], dtype=np.float32)
    return rounded(image * factors[None, :, None])


def jpeg(image: Pixels, quality: int = 75) -> Pixels:
    """Compress as JPEG, with halved resolution of colour as encoders do by default, and read it again."""
    with Image.open(io.BytesIO(images.jpeg_bytes(image, quality))) as opened:
        return np.asarray(opened.convert("RGB"))


def blur(image: Pixels, sigma: float = 1.0) -> Pixels:
    """Convolve with a Gaussian, sigma in pixels of the image, cut off at 4 sigma; edges are repeated."""
    reach = int(np.ceil(4 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    found = image.astype(np.float32)
    for axis in (0, 1):
        size, width = found.shape[axis], [(0, 0)] * 3
        width[axis] = (reach, reach)
        padded = np.pad(found, width, mode="edge")
        taken = [np.take(padded, range(k, k + size), axis) for k in range(len(kernel))]
        found = sum(weight * part for weight, part in zip(kernel, taken, strict=True))
    return rounded(found)


def shift(image: Pixels, pixels: int = SHIFT) -> Pixels:
    """Move an image or a mask to the right; its left column is repeated."""
    width = [(0, 0)] * image.ndim
    width[1] = (pixels, 0)
    altered: Pixels = np.pad(image, width, mode="edge")[:, : image.shape[1]]
    return altered


def tint(image: Pixels, channel: int, factor: float) -> Pixels:
    """Multiply one channel, 0 red to 2 blue, alone: a part of another colour, or a lamp of another one."""
    factors = np.ones(3, np.float32)
    factors[channel] = factor
    return rounded(image * factors)


def rounded(values: AnyArray) -> Pixels:
    """Return values from 0 to 255 as whole numbers, those outside at the nearer end."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


VARIANTS: dict[str, Alter] = {
    "gain 0.7": partial(gain, factor=0.7),
    "gain 0.85": partial(gain, factor=0.85),
    "gain 1.15": partial(gain, factor=1.15),
    "gain 1.3": partial(gain, factor=1.3),
    "gamma 0.85": partial(gamma, exponent=0.85),
    "gamma 1.15": partial(gamma, exponent=1.15),
    "ramp": ramp,
    "jpeg": jpeg,
    "blur": blur,
    "shift": shift,
}
"""The battery: alterations of test images that change neither what is good nor what is defective."""

TINTS: dict[str, Alter] = {
    f"{name} {factor}": partial(tint, channel=channel, factor=factor)
    for channel, name in enumerate(("red", "green", "blue"))
    for factor in (0.85, 1.15)
}
"""Alterations that make a good part one of the wrong colour."""


def altered_copy(data: Path, out: Path, alter: Alter) -> Path:
    """Write a data set in the layout mvtec whose test images are altered, as PNG; return its folder.

    The training images are linked and the masks copied, shifted where `alter` is `shift`. Raises DataError
    for another layout, for images of more than 8 bits, and for a folder that is already there.
    """
    if out.exists():
        raise DataError(f"found something at {out}; expected a new folder to write altered images to")
    if not all((data / name).is_dir() for name in ("train/good", "test", "ground_truth")):
        raise DataError(f"{data} has no train/good, test and ground_truth; expected the layout mvtec")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:  # a copy that was cut short is no copy
        folder = Path(name) / out.name
        write_test(data, folder, alter)
        write_masks(data / "ground_truth", folder / "ground_truth", shift if alter is shift else None)
        (folder / "train").symlink_to((data / "train").resolve(), target_is_directory=True)
        folder.rename(out)
    return out


def write_test(data: Path, out: Path, alter: Alter) -> None:
    """Write altered test images as PNG; raise DataError for one of more than 8 bits."""
    for path in images.list_images(data / "test", recursive=True):
        image = images.read(path)
        if image.dtype != np.uint8:
            raise DataError(f"{path} has more than 8 bits; expected images of 8 bits")
        images.write_png(out / path.relative_to(data).with_suffix(".png"), alter(image))


def write_masks(folder: Path, out: Path, alter: Alter | None) -> None:
    """Copy a folder of masks, each altered where there is an alteration of masks."""
    if alter is None:
        shutil.copytree(folder, out)
        return
    for path in images.list_images(folder, recursive=True):
        with Image.open(path) as mask:
            images.write_png(out / path.relative_to(folder), alter(np.asarray(mask.convert("L"))))


def main() -> None:
    """Write the altered copies that are not there yet, and print their folders."""
    parser = argparse.ArgumentParser(description="Write copies of a data set with altered test images.")
    parser.add_argument("data", type=Path, help="a data set in the layout mvtec")
    parser.add_argument("out", type=Path, help="the folder to write a folder for each alteration to")
    parser.add_argument("--only", help="names of alterations, separated by commas (the whole battery)")
    options = parser.parse_args()
    known = VARIANTS | TINTS
    chosen = list(VARIANTS) if options.only is None else options.only.split(",")
    for name in chosen:
        if name not in known:
            raise ConfigError(f"unknown alteration {name!r}; expected one of {', '.join(known)}")
        folder = options.out / name.replace(" ", "-")
        if not folder.exists():
            altered_copy(options.data, folder, known[name])
        print(folder)


if __name__ == "__main__":
    main()
