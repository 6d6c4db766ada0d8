"""What an hour of training buys: a figure of AUROC and AUPRO over time, from results of battery.py.

    python benchmarks/battery.py run pill --variants patchcore "simplenet steps=250" ... \
        --threads 1 --out curves.jsonl
    python benchmarks/curves.py curves.jsonl curves.svg

Each length is a training of its own, since the schedule of the learning rate ends with it. A curve joins the
lengths of a method, with mean and range over the seeds; a method that is fitted in one pass is a point.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from battery import VALUES, read
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SHOWN = ("image_auroc", "aupro")
WIDTH, HEIGHT = 9.0, 4.0
"""Of the figure, in inches."""


def lengths(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Return the results by variant without its length, then by variant."""
    places = {(line["cell"]["category"], line["cell"]["condition"]) for line in lines}
    if len(places) != 1:
        raise SystemExit(f"found results on {len(places)} categories and conditions; expected those on one")
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        variant = line["cell"]["variant"]
        found[re.sub(r" steps=\d+", "", variant)][variant].append(line)
    return found


def draw(axes: Axes, value: str, found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Draw one value over the seconds of training, a curve for each method."""
    title, factor = VALUES[value]
    for method, results in found.items():
        points = []
        for lines in results.values():
            values = [factor * line[value] for line in lines]
            points.append((mean(line["seconds"] for line in lines), mean(values), min(values), max(values)))
        seconds, middle, low, high = zip(*sorted(points), strict=True)
        (line,) = axes.plot(seconds, middle, marker="o", label=method)
        axes.vlines(seconds, low, high, color=line.get_color(), alpha=0.5)
    axes.set(title=f"{title}, %", xlabel="seconds to train", xscale="log")
    axes.grid(alpha=0.3)


def figure(lines: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw the figure; each run draws the same bytes."""
    mpl.rcParams["svg.hashsalt"] = "curves"
    made = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    found = lengths(lines)
    for number, value in enumerate(SHOWN):
        draw(made.add_subplot(1, len(SHOWN), number + 1), value, found)
    made.axes[-1].legend(loc="lower right")
    made.savefig(out, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="lines of battery.py on one category")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    figure(read(options.results), options.out)


if __name__ == "__main__":
    main()
