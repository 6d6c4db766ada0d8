"""Where an image's time goes between file and verdict, and how much of it reading ahead hides.

    python benchmarks/whole_path.py mine.blemish IMAGES --threads 2
    python benchmarks/whole_path.py mine.blemish IMAGES --backend openvino --precision bf16 --json whole.json

First, each stage is timed by itself, one image after the other on one thread; only inference uses the
threads that it is given. Then two measurements take turns: `Predictor.stream` over all files, and inference
alone on the same images, which were prepared beforehand. The share of the whole that is not inference is
1 - inference alone / whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

from blemish import images
from blemish.benchmark import machine
from blemish.inference import measure
from blemish.inference.calibration import image_scores
from blemish.inference.choice import BACKENDS, PRECISIONS
from blemish.inference.measure import Measured
from blemish.inference.predictor import Predictor, Prepared, load

One = TypeVar("One")
Made = TypeVar("Made")
Timed = dict[str, list[float]]
"""Seconds of each image, by stage."""


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description="Time each stage from file to verdict, and all of them.")
    parser.add_argument("model", type=Path, metavar="F.blemish")
    parser.add_argument("folder", type=Path, metavar="IMAGES")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of inference; 0 lets the engine choose"
    )
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--images", type=int, metavar="N", help="take the first N images (all)")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="of stream and inference alone (5)"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures here")
    options = parser.parse_args()
    model = load(options.model, backend=options.backend, precision=options.precision, threads=options.threads)
    paths = images.list_images(options.folder, recursive=True)[: options.images]
    stages, prepared = by_stage(model, paths)
    show_stages(stages)
    rounds = [whole_and_alone(model, paths, prepared) for _ in range(options.rounds)]
    whole, alone = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"{'whole':16}{1000 * whole:9.2f} ms, {1 / whole:.1f} images a second; inference alone "
        f"{1000 * alone:.2f} ms: {1 - alone / whole:.1%} of the whole is not inference "
        f"(median of {options.rounds} rounds)"
    )
    if options.json:
        found = {
            "machine": asdict(machine.describe()),
            "model": {"file": options.model.name, "threads": options.threads, **asdict(model.choice)},
            "images": len(paths),
            "stages_ms": {name: 1000 * statistics.median(times) for name, times in stages.items()},
            "rounds_ms": [[1000 * each for each in pair] for pair in rounds],
            "share_not_inference": 1 - alone / whole,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def by_stage(model: Predictor, paths: Sequence[Path]) -> tuple[Timed, list[Prepared]]:
    """Time each stage over all images before the next stage; return the times and the prepared images."""
    times: Timed = {}

    def timed(name: str, make: Callable[[One], Made], items: Iterable[One]) -> list[Made]:
        made, times[name] = [], []
        for item in items:
            begin = time.perf_counter()
            made.append(make(item))
            times[name].append(time.perf_counter() - begin)
        return made

    decoded = timed("decode", images.read, paths)
    resized = timed("resize", model.preprocessing.resized, decoded)
    inputs = timed("to input", model.preprocessing.scaled, resized)
    prepared = [
        Prepared(str(path), image, each) for path, image, each in zip(paths, decoded, inputs, strict=True)
    ]
    infer(model, prepared[0])  # to warm up
    found = timed("inference", partial(infer, model), prepared)
    pairs = list(zip(prepared, found, strict=True))
    timed("map resize", lambda pair: model.preprocessing.map_to_image(pair[1].map, pair[0].size), pairs)

    def decide(pair: tuple[Prepared, Measured]) -> None:
        (score,) = image_scores(pair[1].statistics[None], model.calibration)
        model.verdict(pair[0], float(score), pair[1], parts=False)

    timed("decide", decide, pairs)
    return times, prepared


def infer(model: Predictor, image: Prepared) -> Measured:
    """Run one image through the graph."""
    (found,) = measure.run(model.engine, model.preprocessing, [image.inputs])
    return found


def show_stages(stages: Timed) -> None:
    """Print each stage's median and its share of their sum.

    Resizing the map is left out of the sum, because it is done on request only.
    """
    medians = {name: statistics.median(times) for name, times in stages.items()}
    total = sum(medians.values()) - medians["map resize"]
    for name, seconds in medians.items():
        note = "  only with full_size" if name == "map resize" else f"{seconds / total:8.1%}"
        print(f"{name:16}{1000 * seconds:9.2f} ms{note}")


def whole_and_alone(
    model: Predictor, paths: Sequence[Path], prepared: Sequence[Prepared]
) -> tuple[float, float]:
    """Return the seconds that an image takes in a stream, and in inference alone."""
    begin = time.perf_counter()
    for outcome in model.stream(paths):
        if outcome.error is not None:
            raise outcome.error
    middle = time.perf_counter()
    for image in prepared:
        infer(model, image)
    end = time.perf_counter()
    return (middle - begin) / len(paths), (end - middle) / len(paths)


if __name__ == "__main__":
    main()
