"""Seconds an epoch and peak memory of training, with the cache of features and without.

    python benchmarks/cache.py DATA --image-size 640x256 --epochs 2 --memory 4
    python benchmarks/cache.py draw FOLDER --count 500 --size 1024     parts to train on

Each row is a process of its own. The rows: `auto`; `auto` with so little memory that most features lie in
files; a folder, empty and then filled; `off`. Seconds of an epoch are those of its steps, without encoding.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from blemish import demo, images


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train once in this process, timing steps; give seconds and the peak of resident memory."""
    from blemish.training import loop, run

    times: list[float] = []
    plain = loop.one_step

    def timed(run: loop.Run, step: int) -> dict[str, float]:
        begin = time.monotonic()
        losses = plain(run, step)
        times.append(time.monotonic() - begin)
        return losses

    loop.one_step = timed
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = run.train(
            options.data,
            model="supersimplenet",
            out=Path(folder) / "model.blemish",
            settings={"image_size": options.image_size, "backbone": options.backbone},
            weights=options.weights,
            epochs=options.epochs,
            memory=int(options.memory * 2**30),
            cache=options.cache,
        )
    per_epoch = len(times) // options.epochs
    return {
        "seconds_per_epoch": round(sum(times[-per_epoch:]), 1),
        "seconds_per_step": round(sum(times[-per_epoch:]) / per_epoch, 3),
        "seconds_in_all": round(time.monotonic() - begin, 1),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "good_images": model.manifest["training"]["good_images"],
    }


def draw(out: Path, count: int, size: int) -> None:
    """Draw good parts: ten of the demo's, shifted and brightened differently until there are enough."""
    rng = np.random.default_rng(0)
    parts = [demo.draw_part((0, number), "good", size)[0] for number in range(min(10, count))]
    for number in range(count):
        moved = np.roll(parts[number % 10], rng.integers(-8, 9, 2), (0, 1)).astype(np.float32)
        images.write_png(
            out / f"{number:03}.png", np.clip(moved * rng.uniform(0.95, 1.05), 0, 255).astype(np.uint8)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--image-size", default="256x256")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--memory", type=float, default=4.0)
    parser.add_argument("--cache", help="measure this one alone, in this process")
    parser.add_argument("--rows", default="auto,files,folder,filled,off")
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
