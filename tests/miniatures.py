"""Published data sets in miniature, rendered with exactly the files that each of them has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from blemish.types import AnyArray

SIZE = (12, 20)


def render_image(path: Path, size: tuple[int, int] = SIZE) -> None:
    """Write a grey image unlike any other."""
    save(path, np.random.default_rng(list(str(path).encode())).integers(1, 200, size, np.uint8))


def render_mask(path: Path, value: int = 255, size: tuple[int, int] = SIZE) -> None:
    """Write a mask in which 4 x 5 pixels in two pieces, from row 2 and column 3 on, have one value."""
    pixels = np.zeros(size, np.uint8)
    pixels[2:6, [3, 4, 9, 10, 11]] = value
    save(path, pixels)


def save(path: Path, pixels: AnyArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


CONFIG = [
    {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 6, "relative_saturation": False},
    {"defect_name": "broken", "pixel_value": 254, "saturation_threshold": 0.33, "relative_saturation": True},
]


def render_loco(root: Path) -> Path:
    for part, count in (("train", 12), ("validation", 3), ("test", 2)):
        for number in range(count):
            render_image(root / f"{part}/good/{number:03}.png")
    for kind in ("logical_anomalies", "structural_anomalies"):
        for number in range(2):
            render_image(root / f"test/{kind}/{number:03}.png")
            render_mask(root / f"ground_truth/{kind}/{number:03}/000.png", 255)
    render_mask(root / "ground_truth/structural_anomalies/001/001.png", 254)
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


def render_visa(root: Path) -> Path:
    """Render a category beside another one, in a root that holds the table of both."""
    lines = ["object,split,label,image,mask"]
    for category in (root, root.parent / "other"):
        notes = ["image,label,mask"]
        for number in range(15):
            name = f"Data/Images/Normal/{number:04}.JPG"
            render_image(category / name)
            part = "test" if number % 5 == 4 else "train"
            lines.append(f"{category.name},{part},normal,{category.name}/{name},")
            notes.append(f"{category.name}/{name},normal,")
        for number in range(3):
            name, marks = f"Data/Images/Anomaly/{number:03}.JPG", f"Data/Masks/Anomaly/{number:03}.png"
            render_image(category / name)
            render_mask(category / marks, number + 1)
            lines.append(f"{category.name},test,anomaly,{category.name}/{name},{category.name}/{marks}")
            notes.append(f'{category.name}/{name},"stuck together,melt",{category.name}/{marks}')
        (category / "image_anno.csv").write_text("\n".join(notes) + "\n")
    table = root.parent / "split_csv/1cls.csv"
    table.parent.mkdir()
    table.write_text("\n".join(lines) + "\n")
    return root


def render_visa_alone(root: Path) -> Path:
    render_visa(root)
    (root.parent / "split_csv/1cls.csv").unlink()
    return root


def render_ksdd2(root: Path) -> Path:
    for part, start, good in (("train", 10000, 11), ("test", 20000, 3)):
        for number in range(start, start + good + 2):
            render_image(root / f"{part}/{number}.png")
            render_mask(root / f"{part}/{number}_GT.png", 0 if number < start + good else 255)
    # The published archive has these.
    render_image(root / "train/10001 (copy).png")
    render_mask(root / "train/10001_GT (copy).png", 0)
    return root


def render_sensum(root: Path) -> Path:
    for number in range(15):
        render_image(root / f"negative/data/{number:03}.png")
    for number in range(3):
        render_image(root / f"positive/data/{number:03}.png")
        render_mask(root / f"positive/annotation/{number:03}.png")
    return root


@dataclass(frozen=True)
class Miniature:
    """How to render a data set, what is in it, and where a test plants its problems."""

    layout: str
    render: Callable[[Path], Path]
    counts: dict[tuple[str, str, int], int]
    """Samples by split, kind and number of masks."""
    mask: str
    stray: str
    """A mask file that belongs to no image."""


MINIATURES = {
    "loco": Miniature(
        "loco",
        render_loco,
        {
            ("train", "good", 0): 12,
            ("validation", "good", 0): 3,
            ("test", "good", 0): 2,
            ("test", "logical_anomalies", 1): 2,
            ("test", "structural_anomalies", 1): 1,
            ("test", "structural_anomalies", 2): 1,
        },
        "ground_truth/logical_anomalies/001/000.png",
        "ground_truth/logical_anomalies/009/000.png",
    ),
    "visa": Miniature(
        "visa",
        render_visa,
        {("train", "good", 0): 12, ("test", "good", 0): 3, ("test", "anomaly", 1): 3},
        "Data/Masks/Anomaly/001.png",
        "Data/Masks/Anomaly/009.png",
    ),
    "visa without its table": Miniature(
        "visa",
        render_visa_alone,
        {("", "good", 0): 15, ("", "anomaly", 1): 3},
        "Data/Masks/Anomaly/001.png",
        "Data/Masks/Anomaly/009.png",
    ),
    "ksdd2": Miniature(
        "ksdd2",
        render_ksdd2,
        {
            ("train", "good", 0): 11,
            ("train", "defect", 1): 2,
            ("test", "good", 0): 3,
            ("test", "defect", 1): 2,
        },
        "test/20003_GT.png",
        "test/20099_GT.png",
    ),
    "sensum": Miniature(
        "sensum",
        render_sensum,
        {("", "good", 0): 15, ("", "positive", 1): 3},
        "positive/annotation/001.png",
        "positive/annotation/009.png",
    ),
}
REFUSE_A_MISSING_MASK = ("visa", "ksdd2")
"""Where a missing mask contradicts something else, and the data set is refused."""
