"""The commands export and benchmark."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from blemish.cli.options import add_layout, check_outputs, chosen_settings
from blemish.detectors.registry import METHODS
from blemish.errors import ConfigError, DataError

REDUCED = 0.03
"""Default map error per cut of `--reduced`, in standard deviations of the maps of good images."""


def export_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `export`."""
    sub.add_argument("model", type=Path, metavar="F.blemish", help="a model file")
    sub.add_argument("--format", required=True, metavar="FORMAT", help="onnx or openvino")
    sub.add_argument("--precision", default="fp32", metavar="P", help="fp32, fp16, bf16 or int8 (fp32)")
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="file to write: a model file (.blemish), or a bare graph (.onnx, or .xml for OpenVINO)",
    )
    sub.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DATA",
        help="the training data set, for its held-out good images",
    )
    sub.add_argument(
        "--evaluation",
        type=Path,
        metavar="DATA",
        help="labelled images on which to compare the models as well",
    )
    sub.add_argument(
        "--reduced",
        type=float,
        nargs="?",
        const=REDUCED,
        default=0.0,
        metavar="ERROR",
        help=f"reduce channels, with at most this map error per cut, in standard deviations ({REDUCED})",
    )
    add_layout(sub)


def run_export(options: argparse.Namespace) -> int:
    """Export a model to another format or precision; return 1 if it differs too much from the original."""
    from blemish.cli.terminal import Terminal
    from blemish.errors import ExportError
    from blemish.exporting.pipeline import export

    names = ("out", "format", "precision", "reduced", "evaluation", "layout")
    given = {name: getattr(options, name) for name in names}
    try:
        export(options.model, options.data, report=Terminal(), **given)
    except ExportError as error:
        print(f"blemish: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


def benchmark_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `benchmark`."""
    who = sub.add_mutually_exclusive_group(required=True)
    who.add_argument(
        "file", nargs="?", metavar="F.blemish", help="a model file, run as the file says unless overridden"
    )
    who.add_argument(
        "--model", metavar="M", help=f"an untrained detector of this method: {', '.join(METHODS)}"
    )
    who.add_argument(
        "--compare",
        nargs="+",
        metavar="ENTRY",
        help="entries to compare: [plain:]F.blemish or METHOD[:BACKEND[:PRECISION]]",
    )
    sub.add_argument("--backend", default="", metavar="B", help="engine: onnxruntime, openvino or torch")
    sub.add_argument("--precision", default="", metavar="P", help="fp32, fp16 or bf16 (fp16 on a GPU)")
    sub.add_argument("--device", default="", metavar="D", help="cpu, cuda or tensorrt (as the file says)")
    sub.add_argument(
        "--plain", action="store_true", help="run the method's own network instead of the fused one"
    )
    sub.add_argument("--threads", type=int, default=0, metavar="N", help="number of CPU threads (all cores)")
    sub.add_argument(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="batch size for throughput (16); 1 skips throughput",
    )
    sub.add_argument(
        "--seconds", type=float, metavar="S", help="time limit per entry in seconds (10; none on a GPU)"
    )
    sub.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="number of rounds in which the entries take turns (5)",
    )
    sub.add_argument(
        "--image-size", metavar="HxW", help="input size of an untrained detector (its default square)"
    )
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of an untrained detector"
    )
    sub.add_argument(
        "--images", type=Path, metavar="FOLDER", help="also measure reading and judging these files"
    )
    sub.add_argument("--json", type=Path, metavar="F", help="write all results as JSON")


def run_benchmark(options: argparse.Namespace) -> int:
    """Measure the inference time of one or several models and print the results."""
    from blemish.benchmark import run as benchmark
    from blemish.benchmark import tables
    from blemish.benchmark.entries import prepare
    from blemish.cli.terminal import Terminal

    check_outputs(options.json)
    entries = requested_entries(options)
    plan = benchmark_plan(options)
    paths = image_files(options.images)
    chosen = chosen_settings(options.set, options.image_size)
    terminal = Terminal()
    contenders = [prepare(entry, options.device, chosen, terminal) for entry in entries]
    found = benchmark.run(contenders, plan, paths, report=terminal)
    print(tables.table(found))
    if options.json is not None:
        tables.write_json(found, options.json)
    return 0


def requested_entries(options: argparse.Namespace) -> list[Any]:
    """Return the requested entries, with unspecified fields filled in from the other options."""
    from dataclasses import replace

    from blemish.benchmark.entries import Entry, read_entry

    if options.compare is None:
        return [Entry(options.model or options.file, options.plain, options.backend, options.precision)]
    if options.plain:
        raise ConfigError("--plain cannot be combined with --compare; write plain:ENTRY instead")
    entries = [read_entry(text) for text in options.compare]
    return [
        replace(
            entry,
            backend=entry.backend or options.backend,
            precision=entry.precision or options.precision,
        )
        for entry in entries
    ]


def benchmark_plan(options: argparse.Namespace) -> Any:
    """Return the plan of threads, rounds, seconds and batch size; raise ConfigError for invalid numbers."""
    from blemish.benchmark.run import Plan
    from blemish.devices import cores

    for name, least in (("threads", 0), ("batch", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} {getattr(options, name)}: expected at least {least}")
    limit = options.seconds
    if limit is None:
        limit = 10.0 if options.device in ("", "cpu") else math.inf
    if not limit > 0:
        raise ConfigError(f"--seconds {limit:g}: expected more than 0")
    return Plan(options.threads or cores(), rounds=options.rounds, seconds=limit, batch=options.batch)


def image_files(folder: Path | None) -> list[Path]:
    """Return the images of a folder and its subfolders; raise DataError if there are none."""
    if folder is None:
        return []
    from blemish.images.reading import list_images

    paths = list_images(folder, recursive=True) if folder.is_dir() else []
    if not paths:
        raise DataError(f"no images in {folder}; expected a folder with images")
    return paths
