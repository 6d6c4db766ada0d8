"""Seconds per epoch and peak memory of training, with and without the cache of features.

    python benchmarks/cache.py DATA --image-size 640x256 --epochs 2 --memory 4
    python benchmarks/cache.py draw FOLDER --count 500 --size 1024     render parts to train on

Each row runs in a process of its own: `auto`; `auto` with so little memory that most features go into files
(`files`); a folder, first empty (`folder`) and then filled (`filled`); and `off`. An epoch's seconds run from
its first step to its last, so encoding beforehand is not among them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import blemish
from blemish import demo, images
from blemish.benchmark import machine


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train once in this process, timing steps; return seconds and the peak of resident memory."""
    marks: list[float] = []

    def mark(event: blemish.Event) -> None:
        if event.phase == "training":  # before the first step, and after each
            marks.append(time.monotonic())

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = blemish.train(
            options.data,
            model="supersimplenet",
            out=Path(folder) / "model.blemish",
            settings={"image_size": options.image_size, "backbone": options.backbone},
            weights=options.weights,
            epochs=options.epochs,
            memory=int(options.memory * 2**30),
            cache=options.cache,
            report=mark,
        )
    per_epoch = (len(marks) - 1) // options.epochs
    last = marks[-1] - marks[-1 - per_epoch]
    return {
        "seconds_per_epoch": round(last, 1),
        "seconds_per_step": round(last / per_epoch, 3),
        "seconds_in_all": round(time.monotonic() - begin, 1),
        "peak_gigabytes": round(machine.peak_resident() / 2**30, 2),
        "good_images": model.manifest.training.good_images,
    }


def draw(out: Path, count: int, size: int) -> None:
    """Render ten of the demo's good parts; shift and brighten them at random until there are `count`."""
    rng = np.random.default_rng(0)
    parts = [demo.draw_part((0, number), "good", size)[0] for number in range(min(10, count))]
    for number in range(count):
        moved = np.roll(parts[number % 10], rng.integers(-8, 9, 2), (0, 1)).astype(np.float32)
        images.write_png(
            out / f"{number:03}.png", np.clip(moved * rng.uniform(0.95, 1.05), 0, 255).astype(np.uint8)
        )


def main() -> None:
    """Render parts, or measure the rows and print a line of JSON for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", help="a data set, or draw and the folder to write")
    parser.add_argument("--count", type=int, default=500, help="parts to render (500)")
    parser.add_argument("--size", type=int, default=1024, help="their height and width (1024)")
    parser.add_argument("--image-size", default="256x256", metavar="HxW", help="of the network's input")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", type=Path, help="of the backbone, if they should not be looked up")
    parser.add_argument("--epochs", type=int, default=2, help="epochs to train; the last is timed (2)")
    parser.add_argument("--memory", type=float, default=4.0, metavar="GB", help="for features (4)")
    parser.add_argument("--cache", help="measure only this cache, in this process")
    parser.add_argument("--rows", default="auto,files,folder,filled,off", help="rows to measure")
    options = parser.parse_args()
    if options.data[0] == "draw":
        return draw(Path(options.data[1]), options.count, options.size)
    (options.data,) = options.data
    if options.cache:
        return print(json.dumps(measure(options)))
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            "auto": ("auto", options.memory),
            "files": ("auto", 0.005),
            "folder": (folder, options.memory),
            "filled": (folder, options.memory),
            "off": ("off", options.memory),
        }
        for name in options.rows.split(","):
            cache, memory = rows[name]
            command = [sys.executable, __file__, options.data, "--cache", cache, "--memory", str(memory)]
            for key in ("image_size", "backbone", "epochs", *(["weights"] if options.weights else [])):
                command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(name, done.stdout.strip(), flush=True)
    return None


if __name__ == "__main__":
    main()
