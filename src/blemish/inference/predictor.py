"""From a model file and an image to a verdict. Imports no torch unless that is the chosen engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, TypeVar

import cc3d
import numpy as np

from blemish import images
from blemish.errors import ImageError
from blemish.inference import bundle
from blemish.inference.calibration import image_scores, p_value, verdict_label
from blemish.inference.engines import Choice, Engine, open_engine, recorded
from blemish.types import Calibration, FloatArray, Region, Verdict

READERS = min(os.cpu_count() or 1, 8)
"""Threads that read images, while others are judged."""

AHEAD = READERS + 1
"""Images that a stream has read, or is reading, ahead of the one being judged."""


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

    def __init__(
        self,
        opened: bundle.Bundle,
        choice: Choice | None = None,
        threads: int = 0,
        *,
        engine: Engine | None = None,
    ) -> None:
        manifest = opened.manifest
        self.path = opened.path
        self.manifest: dict[str, Any] = manifest
        self.calibration: Calibration = opened.calibration
        self.image_size: tuple[int, int] = tuple(manifest["preprocessing"]["image_size"])
        self.white = float(manifest["preprocessing"]["white"])
        self.choice = choice or recorded(manifest)
        self.engine = engine or open_engine(opened, self.choice, threads)

    def predict(self, image: Any, *, parts: bool = False, full_size: bool = False) -> Verdict:
        """Judge one image; with parts, the maps that the map was joined from come along.

        full_size: give the maps at the image's own size, and not as they come from the network; nothing else
        depends on it. Raises ImageError for what is no readable image.
        """
        return self.finish([self.prepare(image)], parts=parts, full_size=full_size)[0]

    def predict_batch(self, batch: Sequence[Any], *, full_size: bool = False) -> list[Verdict]:
        """Judge several images in one run of the graph, each scoring as it would alone; threads read them.

        full_size and errors: as for predict.
        """
        if not batch:
            return []
        with ThreadPoolExecutor(READERS) as pool:
            return self.finish(list(pool.map(self.prepare, batch)), full_size=full_size)

    def predict_stream(
        self, stream: Iterable[Any], *, full_size: bool = False
    ) -> Iterator[Verdict | ImageError]:
        """Judge images one by one as they come, the next ones being read while one is judged.

        Each verdict comes as soon as its image is judged, however long the stream, which is asked on another
        thread, takes for its next one. An image that cannot be read comes as its ImageError, and the others
        are still judged; what the stream itself raises is raised here. full_size: as for predict.
        """
        with closing(read_ahead(self.prepare, stream)) as images_read:
            for ready in images_read:
                try:
                    prepared = ready.result()
                except ImageError as error:
                    yield error
                else:
                    yield self.finish([prepared], full_size=full_size)[0]

    def prepare(self, image: Any) -> Prepared:
        """Read one image and bring it into the network's size."""
        array = images.as_image(image, self.white)
        path = str(image) if isinstance(image, (str, Path)) else ""
        inputs = images.prepare(array, self.image_size, self.white)
        return Prepared(path, (array.shape[0], array.shape[1]), inputs)

    def finish(
        self, batch: Sequence[Prepared], *, parts: bool = False, full_size: bool = False
    ) -> list[Verdict]:
        """Run prepared images through the graph and decide."""
        found = self.engine.run(np.stack([image.inputs for image in batch]))
        scores = image_scores(found["statistics"], self.calibration)
        pieces = self.engine.outputs[2:] if parts else ()
        verdicts = []
        for row, image in enumerate(batch):
            maps = {name: found[name][row] for name in pieces}
            verdict = self.verdict(image, float(scores[row]), found["map"][row], maps)
            verdicts.append(at_full_size(verdict, image.size) if full_size else verdict)
        return verdicts

    def verdict(
        self, image: Prepared, score: float, anomaly_map: FloatArray, parts: dict[str, FloatArray]
    ) -> Verdict:
        """Decide on one image by its score and its map.

        Regions are found on the map as the network gives it: the pixel threshold was set there, and a larger
        map has lower peaks.
        """
        found = regions(anomaly_map, self.calibration.pixel_threshold)
        height, width = anomaly_map.shape
        return Verdict(
            path=image.path,
            label=verdict_label(score, self.calibration),
            score=score,
            p_value=p_value(score, self.calibration),
            regions=tuple(in_image(region, (height, width), image.size) for region in found),
            map=anomaly_map,
            parts=parts,
        )


Read = TypeVar("Read")


def read_ahead(read: Callable[[Any], Read], feed: Iterable[Any]) -> Generator[Future[Read], None, None]:
    """Read what a feed gives on other threads; give the results to wait for, in order.

    The feed has a thread of its own, so that one that gives its images slowly holds up none that came before,
    and is asked for at most AHEAD images more than were taken. What it raises is raised here.
    """
    room, waiting, left = Semaphore(AHEAD - 1), SimpleQueue[Future[Read] | BaseException | None](), Event()

    def hand_over(_kind: object, error: BaseException | None, _trace: object) -> bool:
        """Pass on what ended the feed, None being its end, to where it is raised again."""
        waiting.put(error)
        return True

    def ask() -> None:
        with ExitStack() as ending, ThreadPoolExecutor(READERS) as pool:
            ending.push(hand_over)
            for image in feed:
                waiting.put(pool.submit(read, image))
                room.acquire()
                if left.is_set():
                    return

    # A daemon: a camera that gives no more images must not keep the program from ending.
    Thread(target=ask, daemon=True).start()
    try:
        while isinstance(ready := waiting.get(), Future):
            room.release()
            yield ready
    finally:
        left.set()
        room.release()
    if ready is not None:
        raise ready


def regions(anomaly_map: FloatArray, threshold: float) -> tuple[Region, ...]:
    """List the 8-connected regions of a map above a threshold, in its pixels, the highest peak first."""
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


def in_image(region: Region, map_size: tuple[int, int], size: tuple[int, int]) -> Region:
    """Turn a region in pixels of the map into one in pixels of its image; both sizes are height and width.

    The box covers every pixel of the image that the region touches. The area is scaled and rounded, but is at
    least 1. The peak is at the image's pixel under the middle of the map's.
    """
    (h, w), (height, width) = map_size, size
    x0, y0, x1, y1 = region.box
    x, y = region.peak_xy
    return Region(
        box=(x0 * width // w, y0 * height // h, -(-x1 * width // w), -(-y1 * height // h)),
        area=max(1, round(region.area * width * height / (w * h))),
        peak=region.peak,
        peak_xy=((2 * x + 1) * width // (2 * w), (2 * y + 1) * height // (2 * h)),
    )


def at_full_size(verdict: Verdict, size: tuple[int, int]) -> Verdict:
    """Bring a verdict's maps to its image's height and width, bilinearly."""
    parts = {name: images.resize_map(part, size) for name, part in verdict.parts.items()}
    return replace(verdict, map=images.resize_map(verdict.map, size), parts=parts)


def load(
    path: str | Path,
    *,
    backend: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    compiled: bool | None = None,
    threads: int = 0,
) -> Predictor:
    """Open a model file; raise ModelFileError if it is none.

    What is not given is as the file says, which is what its thresholds were set with: backend onnxruntime,
    openvino or torch; precision fp32, fp16 or bf16 (int8 is made by `blemish export`); device cpu, cuda or
    tensorrt; compiled, whether torch.compile makes kernels of its own. threads: 0 lets the engine choose.
    Raises ConfigError for what this machine does not have.
    """
    opened = bundle.read(Path(path))
    wanted = {"backend": backend, "precision": precision, "device": device, "compiled": compiled}
    given: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    return Predictor(opened, replace(recorded(opened.manifest), **given), threads)
