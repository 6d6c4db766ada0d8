"""The command line: one function per command, and what is heavy imported inside it.

Results go to standard output, what is said on the way to standard error. Exit status: 0 done; 1 the command
ran and the answer is no; 2 something the user can fix, in one line; anything else is a bug, with a traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blemish._version import __version__
from blemish.cli_inference import benchmark_arguments, export_arguments, run_benchmark, run_export
from blemish.cli_options import (
    METHODS,
    RATE_HELP,
    Command,
    Parser,
    add_layout,
    add_machine,
    gigabytes,
    refuse_outputs,
    settings,
)
from blemish.errors import BlemishError, ConfigError

EXTRAS = dict.fromkeys(("torch", "onnx", "onnxscript", "safetensors", "scipy"), "train") | {
    "openvino": "openvino"
}
"""What installs the packages that some commands need."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; give its exit status."""
    options = parser().parse_args(arguments)
    command: Command = options.command
    try:
        return command(options)
    except BlemishError as error:
        print("blemish:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        needed = f"this needs blemish[{EXTRAS[error.name]}]"
        print(f"blemish: {error.name} is not installed; {needed}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("blemish: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing is to be flushed at exit.
        sys.stderr.close()
        return 0


def parser() -> Parser:
    """Build the parser of all commands."""
    top = Parser(prog="blemish", description="Find defects on manufactured parts, from good images only.")
    top.add_argument("--version", action="version", version=f"blemish {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command, add, text in COMMANDS:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add(sub)
        sub.set_defaults(command=command)
    return top


def check_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `check` takes."""
    sub.add_argument("data", type=Path, metavar="DATA", help="folder or manifest of a data set")
    add_layout(sub)


def run_check(options: argparse.Namespace) -> int:
    """Say what is in a folder and what is wrong with it; 1 if anything is."""
    from blemish.data import check

    report = check.check(options.data, options.layout)
    print(check.format(report))
    return int(not report.passed)


def train_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `train` takes."""
    sub.add_argument("data", type=Path, metavar="DATA", help="folder or manifest with good images")
    sub.add_argument("--model", metavar="M", help=", ".join(METHODS))
    sub.add_argument("--out", type=Path, required=True, metavar="F.blemish", help="the model file to write")
    sub.add_argument(
        "--from", dest="start", type=Path, metavar="OLD.blemish", help="go on from a model, in a shorter run"
    )
    sub.add_argument(
        "--supervision", default="auto", help="auto, none, weak (no masks), mixed (some) or full (all masked)"
    )
    sub.add_argument(
        "--train-defects", metavar="N|SHARE", help="how many defective images train, drawn by the seed"
    )
    sub.add_argument("--train-masks", metavar="N|SHARE", help="how many of those keep their masks (all)")
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    length.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="times that every image has its turn, defects four times",
    )
    length.add_argument("--budget", metavar="TIME", help="wall time for everything, such as 90s, 10m or 2h")
    sub.add_argument("--image-size", metavar="HxW", help="size of the network's input (256x256)")
    halves = sub.add_mutually_exclusive_group()
    halves.add_argument(
        "--structural-only",
        action="store_true",
        help="without the autoencoder and its logical map (EfficientAD)",
    )
    halves.add_argument(
        "--logical-weight", type=float, metavar="W", help="of the logical map in the whole, 0 to 1 (0.5)"
    )
    sub.add_argument("--weights", type=Path, metavar="FILE", help="weights of the teacher or the backbone")
    sub.add_argument(
        "--natural-images",
        default="drawn",
        metavar="DIR|drawn|none",
        help="what EfficientAD's student is kept from imitating: photographs, drawn images, nothing (drawn)",
    )
    sub.add_argument(
        "--preset", default="default", help="default, paper for the method to the letter, or journal"
    )
    sub.add_argument(
        "--schedule", default="default", help="default, or paper for its length, rates and batches"
    )
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method"
    )
    sub.add_argument("--false-reject-rate", type=float, default=0.01, metavar="SHARE", help=RATE_HELP)
    add_machine(sub)
    sub.add_argument("--seeds", type=int, metavar="N", help="train and evaluate so often, from --seed on")
    sub.add_argument("--folds", type=int, metavar="K", help="cross-validate: train and evaluate K times")
    sub.add_argument("--folds-file", type=Path, metavar="F.csv", help="which image is in which fold")
    sub.add_argument("--jobs", type=int, metavar="N", help="trainings of a series beside each other")
    sub.add_argument("--json", type=Path, metavar="F", help="write every figure of a series")
    add_layout(sub)


def run_train(options: argparse.Namespace) -> int:
    """Train, calibrate and write a model file; or a series of them, evaluated and summed up."""
    chosen: dict[str, Any] = settings(options.set)
    if options.image_size:
        chosen["image_size"] = options.image_size
    add_halves(options, chosen)
    given = {
        "model": options.model,
        "start": options.start,
        "supervision": options.supervision,
        "train_defects": options.train_defects,
        "train_masks": options.train_masks,
        "weights_file": options.weights,
        "natural_images": options.natural_images,
        "preset": options.preset,
        "settings": chosen,
        "schedule": options.schedule,
        "steps": options.steps,
        "epochs": options.epochs,
        "budget": options.budget,
        "device": options.device,
        "precision": options.precision,
        "false_reject_rate": options.false_reject_rate,
        "memory": gigabytes(options.memory),
        "cache": options.cache,
    }
    if options.seeds is not None or options.folds is not None:
        return run_series(options, given)
    for name in ("folds_file", "jobs", "json"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for a series; expected --seeds or --folds with it"
            )
    from blemish.training import train

    train(
        options.data,
        out=options.out,
        layout=options.layout,
        seed=options.seed,
        resume=options.resume,
        **given,
    )
    print(options.out)
    return 0


def add_halves(options: argparse.Namespace, chosen: dict[str, Any]) -> None:
    """Put what is asked of the map's two halves among the settings; raise ConfigError where it cannot be."""
    for asked, option, name, value in (
        (options.structural_only, "--structural-only", "autoencoder", False),
        (options.logical_weight is not None, "--logical-weight", "logical_weight", options.logical_weight),
    ):
        if asked and options.model in METHODS and not options.model.startswith("efficientad"):
            raise ConfigError(
                f"{option}: {options.model} has no logical map; expected --model efficientad-s or -m"
            )
        if asked and name in chosen:
            raise ConfigError(f"{option} and --set {name} were both given; expected one of them")
        if asked:
            chosen[name] = value


def run_series(options: argparse.Namespace, given: dict[str, Any]) -> int:
    """Train and evaluate over seeds and folds, and print mean and deviation; 2 if images were skipped."""
    from blemish import trials

    refuse_outputs(options.json)
    planned = trials.plan(
        options.out,
        options.seed,
        1 if options.seeds is None else options.seeds,
        options.folds,
        options.folds_file,
    )
    jobs = trials.room(options.device) if options.jobs is None else options.jobs
    results = trials.run(planned, options.data, given, layout=options.layout, jobs=jobs)
    summary = trials.summarise(results)
    print(trials.table(summary))
    if options.json is not None:
        trials.write_json(summary, options.json, given)
    return 2 if any(found.skipped for _, found in results) else 0


def evaluate_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `evaluate` takes."""
    sub.add_argument("model", type=Path, metavar="F.blemish", help="a model file")
    sub.add_argument("data", type=Path, metavar="DATA", help="folder or manifest with labelled test images")
    sub.add_argument("--json", type=Path, metavar="F", help="write every figure")
    sub.add_argument("--csv", type=Path, metavar="F", help="write one row per image")
    sub.add_argument("--report", type=Path, metavar="F.html", help="write one self-contained page")
    sub.add_argument(
        "--memory", type=float, default=2.0, metavar="GB", help="for the scores of all pixels (2)"
    )
    add_layout(sub)


def run_evaluate(options: argparse.Namespace) -> int:
    """Measure a model on a labelled data set; 2 if some images could not be read."""
    from blemish import evaluation, report
    from blemish.runtime import load

    refuse_outputs(options.json, options.csv, options.report)
    found = evaluation.evaluate(
        load(options.model),
        options.data,
        layout=options.layout,
        memory=gigabytes(options.memory),
        exhibits=4 if options.report else 0,
    )
    print(evaluation.table(found))
    for write, path in (
        (report.write_json, options.json),
        (report.write_csv, options.csv),
        (report.write_html, options.report),
    ):
        if path is not None:
            write(found, path)
    if found.skipped:
        print(f"blemish: {len(found.skipped)} images could not be read, the others count", file=sys.stderr)
    return 2 if found.skipped else 0


def predict_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `predict` takes."""
    sub.add_argument("model", type=Path, metavar="F.blemish", help="a model file")
    sub.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE_OR_DIR", help="images, or folders of them"
    )
    sub.add_argument("--jsonl", type=Path, metavar="F", help="write the lines here, not to standard output")
    sub.add_argument("--maps", type=Path, metavar="DIR", help="write the raw anomaly maps")
    sub.add_argument("--map-format", choices=("tiff", "npy"), default="tiff", help="32-bit TIFF, or NPY")
    sub.add_argument("--overlays", type=Path, metavar="DIR", help="write images with what is odd in colour")
    sub.add_argument("--threads", type=int, default=0, metavar="N", help="for one image (all cores)")


def run_predict(options: argparse.Namespace) -> int:
    """Judge images, one JSON line each; 2 if some could not be read."""
    from blemish import predict
    from blemish.runtime import load

    refuse_outputs(options.jsonl, folders=(options.maps, options.overlays))
    outputs = predict.Outputs(options.jsonl, options.maps, options.map_format, options.overlays)
    files = predict.gather(options.images)
    counts = predict.run(load(options.model, threads=options.threads), files, outputs)
    print(", ".join(f"{count} {label}" for label, count in counts.items()), file=sys.stderr)
    return 2 if counts["unreadable"] else 0


def calibrate_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `calibrate` takes."""
    sub.add_argument("model", type=Path, metavar="F.blemish", help="a model file")
    sub.add_argument("images", type=Path, metavar="GOOD_IMAGES", help="folder of good images, not trained on")
    sub.add_argument("--false-reject-rate", type=float, default=0.01, metavar="SHARE", help=RATE_HELP)
    sub.add_argument("--out", type=Path, required=True, metavar="F2.blemish", help="the model file to write")


def run_calibrate(options: argparse.Namespace) -> int:
    """Set a model's thresholds anew from good images, without training."""
    from blemish import bundle, calibrate, images
    from blemish.files import short_digest
    from blemish.predict import measure
    from blemish.runtime import Predictor

    calibrate.check_shares(false_reject_rate=options.false_reject_rate)
    refuse_outputs(options.out)
    opened = bundle.read(options.model)
    if not options.images.is_dir():
        raise ConfigError(f"no folder {options.images}; expected one of good images")
    paths = images.list_images(options.images, recursive=True)
    statistics, maxima = measure(Predictor(opened), paths)
    calibration = calibrate.calibrate(
        statistics, maxima, opened.calibration.statistics, false_reject_rate=options.false_reject_rate
    )
    bundle.recalibrate(opened, calibration, options.out, [short_digest(path) for path in paths])
    print(calibrate.describe(calibration))
    return 0


def weights_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `weights` takes."""
    actions = sub.add_subparsers(required=True, metavar="ACTION", dest="action")
    actions.add_parser("list", help="say which pretrained weights are on this machine")
    add = actions.add_parser("add", help="keep a file of weights in the user's cache, if it fits")
    add.add_argument("name", metavar="NAME")
    add.add_argument("file", type=Path, metavar="FILE")
    fetch = actions.add_parser("fetch", help="download weights from their publisher")
    fetch.add_argument("name", metavar="NAME")


def run_weights(options: argparse.Namespace) -> int:
    """List, add or fetch pretrained weights."""
    from blemish.backbones import skeleton, weights

    if options.action == "list":
        for name in weights.SOURCES:
            path = weights.available(name)
            made = weights.facts(path) if path else {}
            origin = (
                f" (from {made['source']}, explains {made['explained_variance']:.0%})"
                if "source" in made
                else ""
            )
            print(f"{name:20}{path or 'not on this machine'}{origin}")
        return 0
    if options.name not in weights.SOURCES:
        raise ConfigError(f"unknown weights {options.name!r}; there are {', '.join(weights.SOURCES)}")
    if options.action == "add":
        print(weights.keep(options.name, weights.find(options.name, options.file), skeleton(options.name)))
    else:
        print(weights.fetch(options.name, skeleton(options.name)))
    return 0


def distill_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `distill` takes."""
    sub.add_argument("images", type=Path, metavar="IMAGES", help="folder of natural images of anything")
    sub.add_argument("--size", required=True, metavar="S", help="small or medium: EfficientAD-S or -M")
    sub.add_argument(
        "--out", type=Path, required=True, metavar="F.safetensors", help="the teacher's file to write"
    )
    sub.add_argument("--source", metavar="BACKBONE", help="whose features are learned (wide_resnet101_2)")
    sub.add_argument("--weights", type=Path, metavar="FILE", help="weights of the source")
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    length.add_argument("--epochs", type=int, metavar="N", help="times that every image has its turn")
    length.add_argument("--budget", metavar="TIME", help="wall time for everything, such as 90s, 10m or 2h")
    sub.add_argument("--preset", default="default", help="default, or paper for algorithm 3 to the letter")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting")
    add_machine(sub)


def run_distill(options: argparse.Namespace) -> int:
    """Distil a teacher for EfficientAD, and say what it explains."""
    from blemish.distill import distill

    facts = distill(
        options.images,
        out=options.out,
        size=options.size,
        source=options.source,
        weights_file=options.weights,
        preset=options.preset,
        settings=settings(options.set),
        steps=options.steps,
        epochs=options.epochs,
        budget=options.budget,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
        memory=gigabytes(options.memory),
        cache=options.cache,
        resume=options.resume,
    )
    if facts:
        print(
            f"{options.out}: explains {100 * facts['explained_variance']:.1f} % of the target's variance on "
            f"{facts['held_out_images']} held-out images"
        )
    return 0


def demo_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare what `demo` takes."""
    sub.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="where everything goes (demo)"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawing and the training (0)")
    sub.add_argument("--steps", type=int, metavar="N", help="optimiser steps")


def run_demo(options: argparse.Namespace) -> int:
    """Draw parts, train, evaluate, write a report, and say where everything is."""
    from blemish import demo, evaluation, report
    from blemish.training import train

    parts, file, page = options.out / "parts", options.out / "demo.blemish", options.out / "report.html"
    print(f"drawing parts into {parts}", file=sys.stderr)
    demo.draw(parts, options.seed)
    model = train(parts, model="supersimplenet", out=file, seed=options.seed, steps=options.steps)
    found = evaluation.evaluate(model, parts)
    report.write_html(found, page)
    print(evaluation.table(found))
    print(
        f"\nparts   {parts}\nmodel   {file}\nreport  {page}\n\n"
        "With your own images, a folder of good ones to begin with:\n"
        "  blemish check MY_IMAGES\n"
        "  blemish train MY_IMAGES --model supersimplenet --out mine.blemish\n"
        "  blemish predict mine.blemish NEW_IMAGES --overlays overlays"
    )
    return 0


COMMANDS: tuple[tuple[str, Command, Callable[[argparse.ArgumentParser], None], str], ...] = (
    ("check", run_check, check_arguments, "say what is in a folder of images, and what is wrong with it"),
    ("train", run_train, train_arguments, "train a model on good images, calibrate it, write a model file"),
    ("evaluate", run_evaluate, evaluate_arguments, "measure a model on labelled images, with a report"),
    (
        "predict",
        run_predict,
        predict_arguments,
        "judge images: score, label, p-value, regions, maps, overlays",
    ),
    ("calibrate", run_calibrate, calibrate_arguments, "set a model's thresholds anew from good images"),
    ("export", run_export, export_arguments, "write a model in another format or precision, if it agrees"),
    ("benchmark", run_benchmark, benchmark_arguments, "measure how long models take, side by side"),
    ("weights", run_weights, weights_arguments, "list, add or fetch pretrained weights"),
    ("distill", run_distill, distill_arguments, "make a teacher for EfficientAD from a backbone"),
    ("demo", run_demo, demo_arguments, "draw parts, train, evaluate, report: no download, no images needed"),
)


if __name__ == "__main__":
    sys.exit(main())
