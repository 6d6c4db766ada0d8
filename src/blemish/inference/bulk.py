"""Judge many files: JSON lines, maps and overlays. An unreadable image does not stop the others."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np

from blemish import images
from blemish.errors import DataError
from blemish.files import atomic_file
from blemish.images import overlays
from blemish.inference.predictor import Predictor
from blemish.progress import Report, silent, tracked
from blemish.types import AnyArray, Nearest, Verdict

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """Where results are written; None: nowhere, except that JSON lines then go to the caller's `write`."""

    jsonl: Path | None = None
    maps: Path | None = None
    map_format: Literal["tiff", "npy"] = "tiff"
    overlays: Path | None = None


@dataclass(frozen=True)
class File:
    """An image to judge, and the name of its results."""

    path: Path
    name: PurePath
    """Path relative to the folder in which it was found."""


def gather(inputs: Sequence[Path]) -> list[File]:
    """List the images among files and folders; folders are searched recursively.

    Raises DataError for a path that does not exist, for a folder without images, and for two images whose
    results would have the same name.
    """
    files: list[File] = []
    for path in inputs:
        if path.is_dir():
            found = images.list_images(path, recursive=True)
            if not found:
                raise DataError(f"no images in {path}")
            files += [File(image, image.relative_to(path)) for image in found]
        elif path.exists():
            files.append(File(path, PurePath(path.name)))
        else:
            raise DataError(f"found nothing at {path}; expected an image or a folder of images")
    names: dict[PurePath, Path] = {}
    for file in files:
        other = names.setdefault(file.name.with_suffix(""), file.path)
        if other != file.path:
            raise DataError(f"the results of {other} and {file.path} would have the same name {file.name}")
    return files


def run(
    model: Predictor,
    files: Sequence[File],
    outputs: Outputs,
    *,
    write: Callable[[str], None],
    explain: Callable[[AnyArray], Nearest] | None = None,
    report: Report = silent,
) -> dict[str, int]:
    """Judge files in order and write the results; return the number of images by label or unreadable.

    write: receives each JSON line, unless `outputs` names a file for them. explain: returns what the most
    anomalous place of an (H, W, 3) image is most like; its answer joins the image's line.
    """
    counts = {"ok": 0, "review": 0, "defect": 0, "unreadable": 0}
    pictures = outputs.maps is not None or outputs.overlays is not None
    outcomes = model.stream((file.path for file in files), full_size=pictures)
    with lines(outputs.jsonl, write) as write_line:
        for file, outcome in zip(files, tracked(outcomes, len(files), report, "predicting"), strict=True):
            if outcome.verdict is None or outcome.image is None:
                counts["unreadable"] += 1
                LOG.warning("%s", outcome.error)
                record: dict[str, Any] = {"path": str(file.path), "error": str(outcome.error)}
            else:
                counts[outcome.verdict.label] += 1
                write_pictures(model, file, outcome.image, outcome.verdict, outputs)
                record = as_record(outcome.verdict)
                if explain is not None:
                    record["nearest"] = asdict(explain(outcome.image))
            write_line(json.dumps(record))
    return counts


@contextlib.contextmanager
def lines(path: Path | None, write: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Yield a function that takes JSON lines: `write`, or one that writes a file atomically."""
    if path is None:
        yield write
        return
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield lambda line: print(line, file=stream)


def as_record(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain values, without its map; of its light if the model standardises it."""
    light = {} if verdict.light_p is None else {"light_p": verdict.light_p, "reason": verdict.reason}
    return {
        "path": verdict.path,
        "score": verdict.score,
        "label": verdict.label,
        "p_value": verdict.p_value,
        **light,
        "regions": [asdict(region) for region in verdict.regions],
    }


def write_pictures(model: Predictor, file: File, image: AnyArray, verdict: Verdict, outputs: Outputs) -> None:
    """Write the requested map and overlay of an image; the verdict's map must have the image's size."""
    if outputs.maps is not None:
        target = outputs.maps / file.name.with_suffix(f".{outputs.map_format}")
        if outputs.map_format == "tiff":
            images.write_tiff(target, verdict.map)
        else:
            with atomic_file(target) as temporary, temporary.open("wb") as stream:
                np.save(stream, verdict.map, allow_pickle=False)
    if outputs.overlays is not None:
        shown = overlays.to_display(image, model.preprocessing.white)
        overlay = overlays.overlay(shown, verdict.map, model.calibration)
        images.write_png(outputs.overlays / file.name.with_suffix(".png"), overlay)
