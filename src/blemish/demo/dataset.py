"""Render the demo's data set: parts with planted defects, so that everything can be tried without a download.

`part` renders the part. A defect changes the part's geometry before rendering, so that its mask is exact and
the same part can be rendered with and without it. Five kinds of defect are structural; a missing screw and an
extra one are logical anomalies.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from blemish import images
from blemish.demo.defects import DEFECTS
from blemish.demo.part import (
    draw_scene,
    expose,
    pose,
    render,
    sound,
)
from blemish.errors import ConfigError
from blemish.types import AnyArray, BoolArray

MARKER = "demo.json"
"""File that identifies an earlier demo, as opposed to a folder that must not be replaced."""

SMALLEST = 64
"""Smallest side of an image in pixels; below it, a small defect could fall between two pixels."""


def draw(
    out: Path, seed: int, *, train: int = 220, test_good: int = 40, per_kind: int = 14, size: int = 256
) -> None:
    """Render a data set in the `mvtec` layout into the folder `out`, which is unchanged if that fails.

    Images are size x size RGB. Each depends only on the seed, its folder and its number, not on how many
    there are. An earlier demo in `out` is replaced, together with anything else in the folder.
    Raises ConfigError for a folder that holds anything other than a demo, and for a number that is too small.
    """
    _refuse(out, seed, min(train, test_good, per_kind), size)
    out = out.absolute()  # so that it has a name and a parent
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        new = Path(temporary) / "new"
        for number, (split, kind, count) in enumerate(_folders(train, test_good, per_kind)):
            _draw_folder(new, split, kind, (seed, number), count, size)
        (new / MARKER).write_text(json.dumps({"drawn by": "blemish demo", "seed": seed, "size": size}) + "\n")
        if out.exists():
            out.rename(Path(temporary) / "old")
        new.rename(out)


def draw_part(entropy: tuple[int, ...], kind: str, size: int) -> tuple[AnyArray, BoolArray]:
    """Render one part; return its image (size, size, 3) uint8 and the mask of its defect (size, size).

    The same entropy gives the same part whatever its kind: "good" renders the good twin of a defective part.
    """
    scene_rng, surface_rng, flaw_rng = (np.random.default_rng([*entropy, stream]) for stream in range(3))
    part = pose(draw_scene(scene_rng), size)
    flaw = sound(part) if kind == "good" else DEFECTS[kind](part, flaw_rng)
    light = render(part, flaw, surface_rng)
    return expose(light, part.scene, surface_rng), flaw.mask


def _refuse(out: Path, seed: int, least: int, size: int) -> None:
    if seed < 0:
        raise ConfigError(f"the seed is {seed}; expected at least 0")
    if least < 1:
        raise ConfigError(f"the demo needs at least 1 image in each folder; found {least}")
    if size < SMALLEST:
        raise ConfigError(f"the demo needs images of at least {SMALLEST} pixels a side; found {size}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder to render the demo to")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ConfigError(
            f"{out} holds files that do not belong to a demo; expected an empty folder or an earlier demo"
        )


def _folders(train: int, test_good: int, per_kind: int) -> Iterator[tuple[str, str, int]]:
    yield "train", "good", train
    yield "test", "good", test_good
    for kind in DEFECTS:
        yield "test", kind, per_kind


def _draw_folder(root: Path, split: str, kind: str, entropy: tuple[int, ...], count: int, size: int) -> None:
    parts, masks = root / split / kind, root / "ground_truth" / kind
    parts.mkdir(parents=True)
    if kind != "good":
        masks.mkdir(parents=True)
    for i in range(count):
        image, mask = draw_part((*entropy, i), kind, size)
        (parts / f"{i:03}.png").write_bytes(images.png_bytes(image))
        if kind != "good":
            (masks / f"{i:03}_mask.png").write_bytes(
                images.png_bytes(np.where(mask, 255, 0).astype(np.uint8))
            )
