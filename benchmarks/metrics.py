"""Time and peak memory of the pixel-level metrics on rendered maps, and how far a histogram is from exact.

    python benchmarks/metrics.py --rounds 5 --json metrics.json
    python benchmarks/metrics.py --images 100 --budget 0.2

First come maps that are in memory: the time from maps and masks to AUPRO, pixel AUROC and AP, and, if
scikit-learn is installed, the time of its AUROC and AP. Then `--images` maps are rendered one by one and
gathered twice, each time in a process of its own: within `--budget`, and with more memory than they need.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blemish.benchmark import machine
from blemish.evaluation import score_store
from blemish.evaluation.metrics import PixelScores
from blemish.types import AnyArray, BoolArray, FloatArray

SETS = ((83, 256), (40, 1024))
"""Maps that are held in memory: how many, and their height and width."""
METRICS: dict[str, Callable[[PixelScores], float]] = {
    "aupro": PixelScores.aupro,
    "pixel_auroc": PixelScores.auroc,
    "pixel_ap": PixelScores.average_precision,
}


def smooth(draw: np.random.Generator, size: int, grid: int) -> FloatArray:
    """Return random (size, size) noise, linear between the points of a grid, as an upsampled map is."""
    at = np.linspace(0, grid - 1, size)
    across = np.maximum(0, 1 - abs(at[:, None] - np.arange(grid))).astype(np.float32)
    noise = across @ draw.standard_normal((grid, grid), np.float32) @ across.T
    return noise.astype(np.float32, copy=False)


def drawn(count: int, size: int) -> Iterator[tuple[FloatArray, BoolArray]]:
    """Yield maps and masks of two to five discs, about 8 % of the pixels, where the map is higher."""
    draw = np.random.default_rng(0)
    fine, coarse = ([smooth(draw, size, grid) for _ in range(16)] for grid in (size // 4, 8))
    y, x = np.mgrid[:size, :size].astype(np.float32) / size

    def shifted(maps: list[FloatArray]) -> FloatArray:
        return np.roll(maps[draw.integers(16)], draw.integers(size, size=2), (0, 1))

    for _ in range(count):
        mask = np.zeros((size, size), np.bool_)
        for _ in range(draw.integers(2, 6)):
            top, left = draw.random(2)
            mask |= (y - top) ** 2 + (x - left) ** 2 < draw.uniform(0.03, 0.14) ** 2
        scale, lift = draw.uniform(0.9, 1.1), 1 + 1.5 * shifted(coarse)
        yield (shifted(fine) * scale + mask * lift).astype(np.float32), mask


def in_memory(count: int, size: int, rounds: int) -> dict[str, Any]:
    """Time the three metrics on maps in memory, and scikit-learn on the same pixels."""
    images = list(drawn(count, size))

    def ours() -> None:
        pixels = PixelScores(2**36)
        for map, mask in images:
            pixels.update(map, mask)
        for metric in METRICS.values():
            metric(pixels)

    figures = {
        "maps": count,
        "size": size,
        "anomalous_share": float(np.mean([mask.mean() for _, mask in images])),
        "seconds": [seconds(ours) for _ in range(rounds)],
    }
    theirs = peer(np.stack([mask for _, mask in images]), np.stack([map for map, _ in images]))
    return figures | ({"scikit_learn_seconds": [seconds(theirs)]} if theirs else {})


def peer(masks: AnyArray, maps: AnyArray) -> Callable[[], object] | None:
    """Return a function that computes AUROC and AP with scikit-learn; None where it is not installed."""
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError:
        return None
    truth, scores = masks.ravel(), maps.ravel()
    return lambda: (roc_auc_score(truth, scores), average_precision_score(truth, scores))


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def one_by_one(count: int, size: int, budget: int) -> dict[str, Any]:
    """Gather maps as they are rendered; return the metrics, peak memory, and seconds without rendering."""
    pixels, spent = PixelScores(budget), 0.0
    for map, mask in drawn(count, size):
        begin = time.perf_counter()
        pixels.update(map, mask)
        spent += time.perf_counter() - begin
    begin = time.perf_counter()
    values = {name: metric(pixels) for name, metric in METRICS.items()}
    return {
        "budget_gigabytes": budget / 2**30,
        "seconds": spent + time.perf_counter() - begin,
        "peak_gigabytes": machine.peak_resident() / 2**30,
        "values": values,
    }


def in_own_process(count: int, size: int, budget: int) -> dict[str, Any]:
    """Run `one_by_one` in a new process."""
    words = (sys.executable, __file__, "--one-by-one", str(count), str(size), str(budget))
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def streamed(count: int, size: int, budget: int) -> dict[str, Any]:
    """Compare the metrics within a budget with the exact ones."""
    within, exact = (in_own_process(count, size, bytes) for bytes in (budget, 2**36))
    apart = {name: abs(value - exact["values"][name]) for name, value in within["values"].items()}
    return {"maps": count, "size": size, "within": within, "exact": exact, "difference": apart}


def show(figures: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"{figures['threads']} threads, NumPy {figures['numpy']}; AUPRO, pixel AUROC and AP together")
    for row in figures["in_memory"]:
        line = (
            f"{row['maps']} maps of {row['size']} x {row['size']}: {statistics.median(row['seconds']):.3f} s"
        )
        line += f", {min(row['seconds']):.3f} to {max(row['seconds']):.3f} s in {len(row['seconds'])} rounds"
        if "scikit_learn_seconds" in row:
            line += f"; scikit-learn, AUROC and AP alone: {row['scikit_learn_seconds'][0]:.2f} s"
        print(line)
    for row in figures["one_by_one"]:
        print(f"{row['maps']} maps of {row['size']} x {row['size']}, one by one:")
        for name in ("within", "exact"):
            part = row[name]
            title = f"within {part['budget_gigabytes']:g} GB" if name == "within" else "exact"
            print(
                f"  {title:16}{part['seconds']:6.1f} s, peak of the process {part['peak_gigabytes']:.2f} GB"
            )
        print("  difference      ", ", ".join(f"{name} {by:.1e}" for name, by in row["difference"].items()))


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description="Time and peak memory of the pixel-level metrics.")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="repetitions with maps in memory (5)"
    )
    parser.add_argument(
        "--images", type=int, default=500, metavar="N", help="maps to gather one by one; 0: none (500)"
    )
    parser.add_argument("--size", type=int, default=1024, metavar="N", help="their height and width (1024)")
    parser.add_argument("--budget", type=float, default=1.0, metavar="GB", help="memory for their scores (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--one-by-one", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_by_one:
        print(json.dumps(one_by_one(*options.one_by_one)))
        return
    figures: dict[str, Any] = {"threads": score_store.THREADS, "numpy": np.__version__}
    figures["in_memory"] = [in_memory(*each, options.rounds) for each in SETS] if options.rounds else []
    stream = (options.images, options.size, int(options.budget * 2**30))
    figures["one_by_one"] = [streamed(*stream)] if options.images else []
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
