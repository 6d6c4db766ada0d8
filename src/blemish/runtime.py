"""From a model file and an image to a verdict. Imports no torch unless that is the chosen engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cc3d
import numpy as np

from blemish import bundle, calibrate, images
from blemish.engines import Choice, open_engine, recorded
from blemish.errors import ImageError
from blemish.types import Calibration, FloatArray, Region, Verdict


@dataclass(frozen=True)
class Prepared:
    """An image on its way into the graph."""

    path: str
    """Empty for an image that came as an array."""
    size: tuple[int, int]
    """Its own height and width."""
    inputs: FloatArray
    """(3, H, W), the network's input."""


class Predictor:
    """A model file, ready to judge images.

    predict takes a path, a PIL image, or an (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) array.
    """

    def __init__(self, opened: bundle.Bundle, choice: Choice | None = None, threads: int = 0) -> None:
        manifest = opened.manifest
        self.path = opened.path
        self.manifest: dict[str, Any] = manifest
        self.calibration: Calibration = opened.calibration
        self.image_size: tuple[int, int] = tuple(manifest["preprocessing"]["image_size"])
        self.white = float(manifest["preprocessing"]["white"])
        self.choice = choice or recorded(manifest)
        self.engine = open_engine(opened, self.choice, threads)

    def predict(self, image: Any, *, parts: bool = False) -> Verdict:
        """Judge one image; with parts, the maps that the map was joined from come along.

        Raises ImageError for what is no readable image.
        """
        return self.judge([image], parts=parts)[0]

    def predict_batch(self, batch: Sequence[Any]) -> list[Verdict]:
        """Judge several images in one run of the graph; each scores as it would alone."""
        return self.judge(batch) if batch else []

    def predict_stream(self, stream: Iterable[Any]) -> Iterator[Verdict | ImageError]:
        """Judge images one by one as they come, the next ones being read while one is judged.

        One that cannot be read comes as its ImageError, and the others are still judged.
        """
        feed = iter(stream)
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self.prepare, image) for image in islice(feed, 2)]
            while ahead:
                waiting = ahead.pop(0)
                ahead += [pool.submit(self.prepare, image) for image in islice(feed, 1)]
                try:
                    ready = waiting.result()
                except ImageError as error:
                    yield error
                else:
                    yield self.finish([ready])[0]

    def judge(self, batch: Sequence[Any], *, parts: bool = False) -> list[Verdict]:
        """Read, run and decide."""
        return self.finish([self.prepare(image) for image in batch], parts=parts)

    def prepare(self, image: Any) -> Prepared:
        """Read one image and bring it into the network's size."""
        array = images.as_image(image, self.white)
        path = str(image) if isinstance(image, (str, Path)) else ""
        inputs = images.prepare(array, self.image_size, self.white)
        return Prepared(path, (array.shape[0], array.shape[1]), inputs)

    def finish(self, batch: Sequence[Prepared], *, parts: bool = False) -> list[Verdict]:
        """Run prepared images through the graph and decide."""
        found = self.engine.run(np.stack([each.inputs for each in batch]))
        scores = calibrate.image_scores(found["statistics"], self.calibration)
        pieces = self.engine.outputs[2:] if parts else ()
        return [
            self.verdict(
                each,
                float(scores[row]),
                found["map"][row],
                {name: images.resize_map(found[name][row], each.size) for name in pieces},
            )
            for row, each in enumerate(batch)
        ]

    def verdict(
        self, image: Prepared, score: float, anomaly_map: FloatArray, parts: dict[str, FloatArray]
    ) -> Verdict:
        """Decide on one image by its score and its map at the network's size."""
        whole = images.resize_map(anomaly_map, image.size)
        return Verdict(
            path=image.path,
            label=calibrate.verdict_label(score, self.calibration),
            score=score,
            p_value=calibrate.p_value(score, self.calibration),
            regions=regions(whole, self.calibration.pixel_threshold),
            map=whole,
            parts=parts,
        )


def regions(anomaly_map: FloatArray, threshold: float) -> tuple[Region, ...]:
    """List the 8-connected regions of an (H, W) map above a threshold, the highest peak first."""
    above = anomaly_map > threshold
    if not above.any():
        return ()
    labels = cc3d.connected_components(above, connectivity=8)
    # cc3d 4.1.1 leaves what its memory held in the background of arrays with an odd side (November 2026).
    labels[~above] = 0
    statistics = cc3d.statistics(labels)
    found = []
    for number in range(1, len(statistics["voxel_counts"])):
        rows, columns = statistics["bounding_boxes"][number][:2]
        inside = np.where(labels[rows, columns] == number, anomaly_map[rows, columns], -np.inf)
        y, x = np.unravel_index(int(inside.argmax()), inside.shape)
        found.append(
            Region(
                box=(int(columns.start), int(rows.start), int(columns.stop), int(rows.stop)),
                area=int(statistics["voxel_counts"][number]),
                peak=float(inside[y, x]),
                peak_xy=(int(columns.start + x), int(rows.start + y)),
            )
        )
    return tuple(sorted(found, key=lambda region: -region.peak))


def load(
    path: str | Path,
    *,
    backend: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    threads: int = 0,
) -> Predictor:
    """Open a model file; raise ModelFileError if it is none.

    What is not given is as the file says, which is what its thresholds were set with: backend onnxruntime,
    openvino or torch; precision fp32, fp16 or bf16 (int8 is made by `blemish export`); device cpu, cuda or
    tensorrt. threads: 0 lets the engine choose. Raises ConfigError for what this machine does not have.
    """
    opened = bundle.read(Path(path))
    wanted = {"backend": backend, "precision": precision, "device": device}
    given = {name: value for name, value in wanted.items() if value is not None}
    return Predictor(opened, replace(recorded(opened.manifest), **given), threads)
