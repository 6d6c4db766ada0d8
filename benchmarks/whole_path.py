"""Where the time of an image goes from file to verdict, and what reading ahead hides of it.

    python benchmarks/whole_path.py mine.blemish IMAGES --threads 2
    python benchmarks/whole_path.py mine.blemish IMAGES --backend openvino --precision bf16 --json whole.json

First each stage on its own, one image after the other and on one thread, but for inference, which runs on
the threads that it is given. Then, taking turns, `predict_stream` over the files as a whole, and inference
alone on the same images, prepared before. The share that is not inference is 1 - inference alone / whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np

from blemish import images
from blemish.benchmark import machine
from blemish.errors import ImageError
from blemish.inference.calibration import image_scores
from blemish.inference.choice import BACKENDS, PRECISIONS
from blemish.inference.predictor import Predictor, Prepared, load

One = TypeVar("One")
Made = TypeVar("Made")
Timed = dict[str, list[float]]
"""Seconds for each image, by stage."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time each stage from file to verdict, and the whole.")
    parser.add_argument("model", type=Path, metavar="F.blemish")
    parser.add_argument("folder", type=Path, metavar="IMAGES")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of inference; 0: its own choice")
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--images", type=int, metavar="N", help="the first N; without it, all")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of the whole and inference alone")
    parser.add_argument("--json", type=Path, metavar="F")
    options = parser.parse_args()
    model = load(options.model, backend=options.backend, precision=options.precision, threads=options.threads)
    paths = images.list_images(options.folder, recursive=True)[: options.images]
    stages, inputs = by_stage(model, paths)
    show_stages(stages)
    rounds = [whole_and_alone(model, paths, inputs) for _ in range(options.rounds)]
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
    """Time each stage over all images before the next one; give the prepared images as well."""
    times: Timed = {}

    def timed(name: str, make: Callable[[One], Made], items: Iterable[One]) -> list[Made]:
        made, times[name] = [], []
        for item in items:
            begin = time.perf_counter()
            made.append(make(item))
            times[name].append(time.perf_counter() - begin)
        return made

    decoded = timed("decode", images.read, paths)
    resized = timed("resize", lambda image: images.resize(image, model.image_size), decoded)
    arrays = timed("to input", lambda image: images.to_input(image, model.white), resized)
    inputs = [
        Prepared(str(path), (image.shape[0], image.shape[1]), array)
        for path, image, array in zip(paths, decoded, arrays, strict=True)
    ]
    model.engine.run(arrays[0][None])  # to warm up
    found = timed("inference", lambda array: model.engine.run(array[None]), arrays)
    pairs = list(zip(inputs, found, strict=True))
    timed("map resize", lambda pair: images.resize_map(pair[1]["map"][0], pair[0].size), pairs)

    def decide(pair: tuple[Prepared, dict[str, np.ndarray]]) -> None:
        score = float(image_scores(pair[1]["statistics"], model.calibration)[0])
        model.verdict(pair[0], score, pair[1]["map"][0], {})

    timed("decide", decide, pairs)
    return times, inputs


def show_stages(stages: Timed) -> None:
    """Print the median of each stage and its share of their sum, without the map, resized only on request."""
    medians = {name: statistics.median(times) for name, times in stages.items()}
    total = sum(medians.values()) - medians["map resize"]
    for name, seconds in medians.items():
        note = "  only with full_size" if name == "map resize" else f"{seconds / total:8.1%}"
        print(f"{name:16}{1000 * seconds:9.2f} ms{note}")


def whole_and_alone(
    model: Predictor, paths: Sequence[Path], inputs: Sequence[Prepared]
) -> tuple[float, float]:
    """Give the seconds an image takes in a stream, and in inference alone."""
    begin = time.perf_counter()
    for outcome in model.predict_stream(paths):
        if isinstance(outcome, ImageError):
            raise outcome
    middle = time.perf_counter()
    for each in inputs:
        model.engine.run(each.inputs[None])
    end = time.perf_counter()
    return (middle - begin) / len(paths), (end - middle) / len(paths)


if __name__ == "__main__":
    main()
