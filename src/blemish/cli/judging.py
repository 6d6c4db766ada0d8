"""The commands evaluate, predict and calibrate."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from blemish.cli.options import (
    RATE_HELP,
    add_layout,
    add_light_limit,
    check_outputs,
    gigabytes,
)


def evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `evaluate`."""
    sub.add_argument("model", type=Path, metavar="F.blemish", help="a model file")
    sub.add_argument("data", type=Path, metavar="DATA", help="folder or manifest with labelled test images")
    sub.add_argument("--json", type=Path, metavar="F", help="write all results as JSON")
    sub.add_argument("--csv", type=Path, metavar="F", help="write one row per image as CSV")
    sub.add_argument("--report", type=Path, metavar="F.html", help="write a self-contained HTML report")
    sub.add_argument("--memory", type=float, default=2.0, metavar="GB", help="memory for pixel scores (2)")
    add_layout(sub)


def run_evaluate(options: argparse.Namespace) -> int:
    """Evaluate a model on a labelled data set; return 2 if some images could not be read."""
    from blemish.cli.terminal import Terminal
    from blemish.evaluation import report
    from blemish.evaluation.run import evaluate, table
    from blemish.inference.predictor import load

    check_outputs(options.json, options.csv, options.report)
    found = evaluate(
        load(options.model),
        options.data,
        layout=options.layout,
        memory=gigabytes(options.memory),
        exhibits=4 if options.report else 0,
        report=Terminal(),
    )
    print(table(found))
    for write, path in (
        (report.write_json, options.json),
        (report.write_csv, options.csv),
        (report.write_html, options.report),
    ):
        if path is not None:
            write(found, path)
    if found.skipped:
        print(f"blemish: {len(found.skipped)} images could not be read and were skipped", file=sys.stderr)
    return 2 if found.skipped else 0


def predict_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `predict`."""
    sub.add_argument("model", type=Path, metavar="F.blemish", help="a model file")
    sub.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE_OR_DIR", help="images, or folders of them"
    )
    sub.add_argument(
        "--jsonl", type=Path, metavar="F", help="write the JSON lines to this file instead of standard output"
    )
    sub.add_argument("--maps", type=Path, metavar="DIR", help="write the raw anomaly maps to this folder")
    sub.add_argument(
        "--map-format",
        choices=("tiff", "npy"),
        default="tiff",
        help="format of the maps: 32-bit TIFF (default) or NPY",
    )
    sub.add_argument(
        "--overlays", type=Path, metavar="DIR", help="write each image with its anomaly map in colour over it"
    )
    sub.add_argument(
        "--why",
        action="store_true",
        help="name the good image and place that the most anomalous place is most like (for a model that "
        "remembers good images; needs the extra train)",
    )
    sub.add_argument("--threads", type=int, default=0, metavar="N", help="number of threads (all cores)")


def run_predict(options: argparse.Namespace) -> int:
    """Judge images and write one JSON line for each; return 2 if some could not be read."""
    from blemish.cli.terminal import Terminal
    from blemish.inference import bulk
    from blemish.inference.predictor import load

    check_outputs(options.jsonl, folders=(options.maps, options.overlays))
    outputs = bulk.Outputs(options.jsonl, options.maps, options.map_format, options.overlays)
    files = bulk.gather(options.images)
    report = Terminal(progress=options.jsonl is not None)
    model = load(options.model, threads=options.threads)
    write, explain = partial(print, flush=True), None
    if options.why:
        from blemish.inference import bundle
        from blemish.inference.engines.pytorch import Explainer

        explain = Explainer(bundle.read(options.model))
    counts = bulk.run(model, files, outputs, write=write, explain=explain, report=report)
    print(", ".join(f"{count} {label}" for label, count in counts.items()), file=sys.stderr)
    return 2 if counts["unreadable"] else 0


def calibrate_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `calibrate`."""
    sub.add_argument("model", type=Path, metavar="F.blemish", help="a model file")
    sub.add_argument(
        "images",
        type=Path,
        metavar="GOOD_IMAGES",
        help="folder of good images that the model was not trained on",
    )
    sub.add_argument("--false-reject-rate", type=float, default=0.01, metavar="SHARE", help=RATE_HELP)
    add_light_limit(sub, default=None)
    sub.add_argument("--out", type=Path, required=True, metavar="F2.blemish", help="the model file to write")


def run_calibrate(options: argparse.Namespace) -> int:
    """Set a model's thresholds anew from good images, without training."""
    from blemish.cli.terminal import Terminal
    from blemish.inference.calibration import describe
    from blemish.inference.recalibration import calibrate

    calibration = calibrate(
        options.model,
        options.images,
        out=options.out,
        false_reject_rate=options.false_reject_rate,
        light_limit=options.light_limit,
        report=Terminal(),
    )
    print(describe(calibration))
    return 0
