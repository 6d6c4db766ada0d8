"""The layout `loco`, of the MVTec LOCO AD data set.

train/good/000.png              validation/good/000.png
test/good/000.png               test/KIND/000.png, KIND logical_anomalies or structural_anomalies
ground_truth/KIND/000/000.png   one file per defect of that image: 000.png, 001.png, ...
defects_config.json             pixel value and saturation threshold of each kind of defect
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blemish.data.layouts import folder, mvtec
from blemish.data.layouts.saturation import CONFIG, read_config
from blemish.errors import DataError
from blemish.images.reading import list_images
from blemish.types import Sample

KINDS = ("logical_anomalies", "structural_anomalies")


def matches(root: Path) -> bool:
    """Return whether `root` has the folders of MVTec AD, and LOCO's configuration or one of its kinds."""
    own = (root / CONFIG).is_file() or any((root / "test" / kind).is_dir() for kind in KINDS)
    return own and mvtec.matches(root)


def scan(root: Path) -> list[Sample]:
    """Return the samples below `root`; raise DataError for another layout or a malformed configuration."""
    if not mvtec.matches(root):
        raise DataError(f"{root} is not in the layout loco; expected {', '.join(mvtec.NEEDED)} inside it")
    config = root / CONFIG
    saturations = read_config(config) if config.is_file() else ()
    return [
        replace(sample, masks=_masks(sample, root), saturations=saturations) if sample.label else sample
        for sample in folder.scan(root)
    ]


def mask_files(root: Path) -> list[Path]:
    """Return the files in ground_truth."""
    return folder.mask_files(root)


def _masks(sample: Sample, root: Path) -> tuple[Path, ...]:
    of_image = root / "ground_truth" / sample.kind / sample.path.stem
    return tuple(list_images(of_image)) if of_image.is_dir() else ()
