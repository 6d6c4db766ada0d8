"""How fast a training runs with one and two threads that spin or sleep while they wait, alone and in company.

    python benchmarks/threads.py PARTS --steps 60 --rounds 3
    python benchmarks/threads.py PARTS --model efficientad-s --steps 15 --ways "not set" passive

PARTS is a folder of good images, such as the one that `blemish demo` renders. Each row trains in a
process of its own, and the rows take turns; company is another process that keeps one core busy. Printed
are training steps per second, the median of the rounds with the least and the greatest.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blemish.detectors.registry import LABELLED
from blemish.tables import aligned

SETTINGS: dict[str, dict[str, str]] = {
    "not set": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spins {count:,} times": {"GOMP_SPINCOUNT": str(count)} for count in (1_000, 10_000, 100_000)},
}
"""What tells OpenMP's threads how to wait. Not set, GNU's spin 300,000 times before they sleep."""
TRAIN = """
import json, sys, time
import blemish
data, out, cache, model, steps = sys.argv[1:]
marks = []
def report(event):
    if event.phase == "training" and event.step:
        marks.append(time.perf_counter())
blemish.train(data, out=out, model=model, steps=int(steps), cache=cache, report=report)
first = len(marks) // 4
print(json.dumps((len(marks) - first - 1) / (marks[-1] - marks[first])))
"""
"""Trains and prints steps per second, after a quarter of them to warm up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", type=Path, metavar="PARTS")
    parser.add_argument("--model", default=LABELLED, metavar="M")
    parser.add_argument("--ways", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="WAY")
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    options = parser.parse_args()
    ways = [(1, "not set"), *((2, name) for name in options.ways)]
    rows = [(threads, way, busy) for busy in (False, True) for threads, way in ways]
    rates: dict[tuple[int, str, bool], list[float]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for threads, way, busy in rows:
                with company() if busy else contextlib.nullcontext():
                    rate = steps_per_second(options, Path(folder), threads, way)
                rates[threads, way, busy].append(rate)
    lines = [["threads", "waiting", "company", "steps/s", "least", "greatest"]]
    for (threads, way, busy), found in rates.items():
        figures = (statistics.median(found), min(found), max(found))
        shown = [f"{figure:.2f}" for figure in figures]
        lines.append([str(threads), way, "one busy process" if busy else "none", *shown])
    print(aligned(lines, left=(0, 1, 2)))


def steps_per_second(options: argparse.Namespace, folder: Path, threads: int, way: str) -> float:
    """Train in a process of its own."""
    chosen = {"OMP_NUM_THREADS": str(threads), **SETTINGS[way]}
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    out = folder / "model.blemish"
    given = (options.parts, out, folder / "cache", options.model, options.steps)
    arguments = [str(each) for each in given]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *arguments],
        env=usual | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    out.unlink()
    return float(json.loads(done.stdout))


@contextlib.contextmanager
def company() -> Iterator[None]:
    """Keep one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
