"""What fusing, the engine and the precision gain over the plain networks that other libraries ship.

    python benchmarks/inference.py efficientad-s --threads 2 --seconds 20
    python benchmarks/inference.py model.blemish --exports int8.blemish mixed.blemish --json rows.json
    python benchmarks/inference.py supersimplenet --set backbone=resnet50
    python benchmarks/inference.py supersimplenet --set backbone=efficientnet_lite0 --only openvino

The rows are the plain network in float32 (in PyTorch with its channels first, as it is shipped, and last; in
ONNX Runtime; in OpenVINO), ours in every engine and precision that runs on a CPU, and exported files. Plain
SuperSimpleNet is `plain_supersimplenet.py`, plain EfficientAD the detector's own three networks. All rows run
one image at a time. After the tables, the last lines say how many times as fast as the best plain row each of
ours was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from plain_supersimplenet import plain

from blemish.benchmark import run as benchmark
from blemish.benchmark import tables
from blemish.benchmark.entries import Contender, Entry, prepare, with_work_and_graph
from blemish.benchmark.run import Benchmark, Plan
from blemish.cli.options import settings
from blemish.cli.terminal import Terminal
from blemish.progress import silent

PLAIN = (("torch", False), ("torch", True), ("onnxruntime", False), ("openvino", False))
"""Engine, and whether the channels come last."""
OURS = (
    *(("torch", "fp32"), ("onnxruntime", "fp32"), ("openvino", "fp32")),
    *(("torch", "bf16"), ("openvino", "bf16")),
)


def rows(source: str, exports: Sequence[str], chosen: dict[str, str], only: Sequence[str]) -> list[Contender]:
    """Return the contenders; with `only`, those whose names contain one of its parts."""
    names = [f"plain:{backend}:fp32{' channels last' * last}" for backend, last in PLAIN]
    made = []
    for name, (backend, last) in zip(names, PLAIN, strict=True):
        if wanted(name, only):
            entry = prepare(Entry(source, backend="torch", precision="fp32"), "cpu", chosen)
            choice = replace(entry.choice, backend=backend)
            peer = replace(entry, name=name, choice=choice, network=plain, channels_last=last)
            made.append(with_work_and_graph(peer, silent))
    for backend, precision in OURS:
        if wanted(f"ours:{backend}:{precision}", only):
            entry = prepare(Entry(source, False, backend, precision), "cpu", chosen)
            made.append(replace(entry, name=f"ours:{backend}:{precision}"))
    return made + [prepare(Entry(path)) for path in exports]


def wanted(name: str, only: Sequence[str]) -> bool:
    """Return whether a name contains one of the parts; without parts, every name does."""
    return not only or any(part in name for part in only)


def against_best(found: Benchmark) -> list[str]:
    """Return lines that say how many times as fast as the best plain row each row of ours was."""
    peers = [row for row in found.rows if row.contender.network is not None]
    if not peers:
        return []
    best = min(peers, key=lambda row: tables.figures(row, 1)["median_ms"])
    lines = [f"Times as fast as the best plain row, {best.contender.name} (over rounds):"]
    for row in found.rows:
        if row.contender.network is None:
            middle, least, most = tables.ratio(best, row)
            lines.append(f"  {row.contender.name:32} {middle:.2f} ({least:.2f} to {most:.2f})")
    return lines


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description="Compare plain networks with ours in every engine and precision."
    )
    parser.add_argument("source", help="a model file or a method")
    parser.add_argument(
        "--exports", nargs="*", default=[], metavar="F.blemish", help="exported files, a row each"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method"
    )
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="PART", help="only rows whose names contain this"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each row (10)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    options = parser.parse_args()
    contenders = rows(options.source, options.exports, settings(options.set), options.only)
    plan = Plan(options.threads, rounds=options.rounds, seconds=options.seconds, batch=1)
    found = benchmark.run(contenders, plan, report=Terminal())
    print(tables.table(found))
    print("", *against_best(found), sep="\n")
    if options.json:
        tables.write_json(found, options.json)


if __name__ == "__main__":
    main()
