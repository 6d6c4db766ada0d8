"""From a model file and an image to a verdict. Imports no torch unless that is the chosen engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, TypeVar

import cc3d
import numpy as np

from blemish.errors import ConfigError, ImageError
from blemish.images import Preprocessing, as_image
from blemish.inference import bundle
from blemish.inference.calibration import image_scores, light_p_value, p_value, verdict_label
from blemish.inference.choice import Choice
from blemish.inference.engines import Engine, open_engine
from blemish.inference.manifest import Manifest
from blemish.inference.measure import Measured, run
from blemish.types import AnyArray, Calibration, FloatArray, Label, Reason, Region, Verdict

READERS = min(os.cpu_count() or 1, 8)
"""Threads that read images while others are being judged."""
AHEAD = READERS + 1
"""Images that a stream has read, or is reading, ahead of the one being judged."""


@dataclass(frozen=True)
class Prepared:
    """An image that has been read and converted to the inputs of the graph."""

    path: str
    """Empty for an image that was not given as a path."""
    image: AnyArray
    """(H, W, 3), upright RGB."""
    inputs: FloatArray
    """(N, 3, h, w), the network's inputs."""
    light: float | None = None
    """Light score; None if the model leaves light as it is."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True)
class Outcome:
    """One image of a stream: its source, and either its verdict or the reason why it could not be read."""

    source: Any
    """The item of the stream: a path, a PIL image or an array."""
    image: AnyArray | None
    """(H, W, 3) RGB, uint8, uint16 or float32; None if it could not be read."""
    verdict: Verdict | None
    error: ImageError | None


class Predictor:
    """A model file, ready to judge images. Safe to call from several threads at once.

    An image is a path, a PIL image, or an (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) array. `close`, or
    leaving a with block, releases the engine and its memory.
    """

    def __init__(
        self,
        opened: bundle.Bundle,
        choice: Choice | None = None,
        threads: int = 0,
        *,
        engine: Engine | None = None,
    ) -> None:
        self.path = opened.path
        self.manifest: Manifest = opened.manifest
        self.calibration: Calibration = opened.manifest.calibration
        self.preprocessing: Preprocessing = opened.manifest.preprocessing
        self.choice = choice or opened.manifest.engine
        self._engine: Engine | None = engine or open_engine(opened, self.choice, threads)

    @property
    def engine(self) -> Engine:
        """The engine that runs the graph; raises ConfigError after `close`."""
        if self._engine is None:
            raise ConfigError(f"the model {self.path} was closed; expected an open one")
        return self._engine

    def close(self) -> None:
        """Release the engine; its memory is freed once verdicts in progress are complete."""
        self._engine = None

    def __enter__(self) -> Predictor:
        """Return the predictor itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the predictor."""
        self.close()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return self.preprocessing.image_size

    def predict(self, image: Any, *, parts: bool = False, full_size: bool = False) -> Verdict:
        """Judge one image; with parts, the verdict includes the maps that its map was combined from.

        full_size: return the maps at the image's own size instead of the network's; nothing else is affected.
        Raises ImageError for an image that cannot be read.
        """
        return self.finish([self.prepare(image)], parts=parts, full_size=full_size)[0]

    def predict_batch(self, batch: Sequence[Any], *, full_size: bool = False) -> list[Verdict]:
        """Judge several images in one run of the graph; each gets the score that it would get alone.

        The images are read in parallel. full_size and errors: as for predict.
        """
        if not batch:
            return []
        with ThreadPoolExecutor(READERS) as pool:
            return self.finish(list(pool.map(self.prepare, batch)), full_size=full_size)

    def stream(self, images: Iterable[Any], *, full_size: bool = False) -> Generator[Outcome, None, None]:
        """Judge images one by one as they arrive, reading ahead in the meantime; yield outcomes in order.

        An outcome is yielded as soon as its image is judged, even if `images`, which is iterated on another
        thread, has not delivered the next one yet. An unreadable image yields its ImageError, and the others
        are still judged. An exception from `images` itself is raised here. full_size: as for predict.
        """

        def read(source: Any) -> tuple[Any, Prepared | ImageError]:
            try:
                return source, self.prepare(source)
            except ImageError as error:
                return source, error

        with closing(read_ahead(read, images)) as ready:
            for future in ready:
                source, prepared = future.result()
                if isinstance(prepared, ImageError):
                    yield Outcome(source, None, None, prepared)
                else:
                    (verdict,) = self.finish([prepared], full_size=full_size)
                    yield Outcome(source, prepared.image, verdict, None)

    def prepare(self, image: Any) -> Prepared:
        """Read one image and convert it to the network's inputs; raise ImageError if it cannot be read."""
        array = as_image(image, self.preprocessing.white)
        path = str(image) if isinstance(image, (str, Path)) else ""
        inputs, light = self.preprocessing.with_light_score(self.preprocessing.resized(array))
        return Prepared(path, array, inputs, light)

    def finish(
        self, batch: Sequence[Prepared], *, parts: bool = False, full_size: bool = False
    ) -> list[Verdict]:
        """Run prepared images through the graph and return their verdicts."""
        measured = run(self.engine, self.preprocessing, [image.inputs for image in batch])
        scores = image_scores(np.stack([found.statistics for found in measured]), self.calibration)
        verdicts = []
        for image, found, score in zip(batch, measured, scores.tolist(), strict=True):
            verdict = self.verdict(image, score, found, parts=parts)
            verdicts.append(self.at_full_size(verdict, image.size) if full_size else verdict)
        return verdicts

    def verdict(self, image: Prepared, score: float, found: Measured, *, parts: bool) -> Verdict:
        """Return the verdict on one image by its score and its map.

        Regions are found on the map at the network's resolution, because the pixel threshold was set there
        and resizing a map lowers its peaks.
        """
        inside = regions(found.map, self.calibration.pixel_threshold)
        height, width = found.map.shape
        label, light_p, reason = self.label(score, image.light)
        return Verdict(
            path=image.path,
            label=label,
            score=score,
            p_value=p_value(score, self.calibration),
            regions=tuple(self.in_image(region, (height, width), image.size) for region in inside),
            map=found.map,
            parts=found.parts if parts else {},
            light_p=light_p,
            reason=reason,
        )

    def label(self, score: float, light: float | None) -> tuple[Label, float | None, Reason]:
        """Return label, light p-value and reason for an image with these scores."""
        label, known = verdict_label(score, self.calibration), self.manifest.light_calibration
        if light is None or known is None:
            return label, None, ""
        light_p = light_p_value(light, known)
        if label == "ok" and light_p <= known.limit:
            return "review", light_p, "light"
        return label, light_p, ""

    def in_image(self, region: Region, map_size: tuple[int, int], size: tuple[int, int]) -> Region:
        """Convert a region from pixels of the map to pixels of the image; sizes are height and width.

        The box covers every pixel of the image that the region touches. The area is scaled and rounded, but
        is at least 1. The peak is at the image pixel under the centre of the map's peak pixel.
        """
        preprocessing = self.preprocessing
        return Region(
            box=preprocessing.to_image(region.box, map_size, size),
            area=preprocessing.area_to_image(region.area, map_size, size),
            peak=region.peak,
            peak_xy=preprocessing.point_to_image(region.peak_xy, map_size, size),
        )

    def at_full_size(self, verdict: Verdict, size: tuple[int, int]) -> Verdict:
        """Return a verdict with its maps resized bilinearly to the image's height and width."""
        resize = self.preprocessing.map_to_image
        parts = {name: resize(part, size) for name, part in verdict.parts.items()}
        return replace(verdict, map=resize(verdict.map, size), parts=parts)


Read = TypeVar("Read")


def read_ahead(read: Callable[[Any], Read], feed: Iterable[Any]) -> Generator[Future[Read], None, None]:
    """Read the items of a feed in parallel, ahead of use; yield futures of the results, in order.

    The feed is iterated on a thread of its own, so that a slow one does not delay earlier images; it is at
    most AHEAD items ahead of those taken. An exception from the feed is raised here.
    """
    room, waiting, left = Semaphore(AHEAD - 1), SimpleQueue[Future[Read] | BaseException | None](), Event()

    def hand_over(_kind: object, error: BaseException | None, _trace: object) -> bool:
        """Pass on the exception that ended the feed, to be raised again; None is a regular end."""
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

    # A daemon thread: a camera that has stopped delivering images must not keep the program running.
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
    """Return the 8-connected regions of a map above a threshold, in map pixels, highest peak first."""
    above = anomaly_map > threshold
    if not above.any():
        return ()
    labels = cc3d.connected_components(above, connectivity=8)
    # cc3d 4.1.1 leaves the background of arrays with an odd side uninitialised (November 2026).
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
    compiled: bool | None = None,
    threads: int = 0,
) -> Predictor:
    """Open a model file; raise ModelFileError if it is not one.

    Options that are not given are those in the file, with which its thresholds were set: backend onnxruntime,
    openvino or torch; precision fp32, fp16 or bf16 (int8 is made by `export`); device cpu, cuda or tensorrt;
    compiled, whether torch.compile generates kernels. threads: 0 lets the engine choose. Raises ConfigError
    for what is not available on this machine.
    """
    opened = bundle.read(Path(path))
    wanted = {"backend": backend, "precision": precision, "device": device, "compiled": compiled}
    given: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    return Predictor(opened, replace(opened.manifest.engine, **given), threads)
