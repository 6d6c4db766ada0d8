"""The commands train, distill and weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blemish.cli.options import (
    DEFECT_HELP,
    RATE_HELP,
    add_layout,
    add_length,
    add_light_limit,
    add_machine,
    check_outputs,
    chosen_settings,
    gigabytes,
    settings,
    share_cores,
)
from blemish.detectors.registry import METHODS
from blemish.errors import ConfigError

if TYPE_CHECKING:
    from blemish.training.request import TrainingRequest

SHORTHANDS = (
    ("--structural-only", "structural_only", "autoencoder", False),
    ("--logical-weight", "logical_weight", "logical_weight", None),
)
"""Options for a single setting: option, attribute, setting, and its value, or None for that of the option."""


def train_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `train`."""
    sub.add_argument("data", type=Path, metavar="DATA", help="folder or manifest with good images")
    sub.add_argument(
        "--model",
        metavar="M[+M...]",
        help=f"method (default: the one that suits the data), or several joined: {', '.join(METHODS)}",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="F.blemish", help="the model file to write")
    sub.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="OLD.blemish",
        help="go on from an earlier model: add good images to those remembered, or train its weights for a "
        "shorter run",
    )
    label_arguments(sub)
    add_length(
        sub,
        epochs_help="number of epochs; each uses good images once or, with defects, every defect four times",
    )
    method_arguments(sub)
    sub.add_argument("--false-reject-rate", type=float, default=0.01, metavar="SHARE", help=RATE_HELP)
    sub.add_argument(
        "--light",
        metavar="L",
        help="off, or standardise: bring each image to the light of the training images (off, or as --from)",
    )
    add_light_limit(sub, default=0.0)
    add_machine(sub)
    sweep_arguments(sub)
    add_layout(sub)


def label_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `train` for labelled defects."""
    sub.add_argument(
        "--supervision",
        default="auto",
        help="auto (default), none, weak (no masks), mixed (some masks) or full (all masks)",
    )
    sub.add_argument(
        "--train-defects",
        metavar="N|SHARE",
        help="number or share of defective images to train on, sampled at random",
    )
    sub.add_argument(
        "--train-masks", metavar="N|SHARE", help="number or share of those whose masks are used (all)"
    )


def method_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `train` for the method."""
    sub.add_argument(
        "--image-size", metavar="HxW", help="size of the network's input (derived from the images' shape)"
    )
    sub.add_argument(
        "--scale", metavar="S|SYxSX", help="pixels of the network's input for one pixel of the image"
    )
    sub.add_argument("--defect-size", metavar="N", help=f"{DEFECT_HELP}, from which the size follows")
    halves = sub.add_mutually_exclusive_group()
    halves.add_argument(
        "--structural-only",
        action="store_true",
        help="leave out the autoencoder and its logical map (methods with a logical map only)",
    )
    halves.add_argument(
        "--logical-weight",
        type=float,
        metavar="W",
        help="weight of the logical map, 0 to 1 (0.5; methods with a logical map only)",
    )
    sub.add_argument(
        "--weights", type=Path, metavar="FILE", help="pretrained weights of the teacher or the backbone"
    )
    sub.add_argument(
        "--natural-images",
        default="drawn",
        metavar="DIR|drawn|none",
        help="images for the pretraining penalty: drawn (rendered, default), none, or a photo folder",
    )
    sub.add_argument(
        "--preset",
        default="default",
        help="default, paper (as published) or, for some methods, journal (as in the extended paper)",
    )
    sub.add_argument(
        "--schedule",
        default="default",
        help="default, or paper for the published length, optimiser and batch size",
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the method; of one of several: METHOD.KEY=VALUE or NUMBER.KEY=VALUE",
    )


def sweep_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `train` for sweeps over seeds and folds."""
    sub.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="number of seeds to train and evaluate with, from --seed upwards",
    )
    sub.add_argument("--folds", type=int, metavar="K", help="number of folds for cross-validation")
    sub.add_argument("--folds-file", type=Path, metavar="F.csv", help="file that assigns images to folds")
    sub.add_argument("--jobs", type=int, metavar="N", help="number of trials of a sweep to run in parallel")
    sub.add_argument("--json", type=Path, metavar="F", help="write all results of a sweep as JSON")


def run_train(options: argparse.Namespace) -> int:
    """Train, calibrate and write a model file, or run a sweep."""
    share_cores()
    from blemish.cli.terminal import Terminal, stop_requests
    from blemish.training import run

    request = request_of(options)
    if options.seeds is not None or options.folds is not None:
        return run_sweep(options, request)
    for name in ("folds_file", "jobs", "json"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} applies only to sweeps; expected --seeds or --folds"
            )
    with stop_requests() as stop:
        run.run(request, report=Terminal(), stop=stop)
    print(options.out)
    return 0


def request_of(options: argparse.Namespace) -> TrainingRequest:
    """Return the training request that the options describe."""
    from blemish.training.request import TrainingRequest

    names = (
        *("data", "model", "out", "start", "layout", "supervision", "train_defects", "train_masks"),
        *("weights", "natural_images", "preset", "schedule", "steps", "epochs", "budget", "seed"),
        *("device", "precision", "false_reject_rate", "light", "light_limit", "cache", "resume"),
        *("scale", "defect_size"),
    )
    given = {name: getattr(options, name) for name in names}
    return TrainingRequest(settings=settings_of(options), memory=gigabytes(options.memory), **given)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given by --set or by options of their own; raise ConfigError for conflicts."""
    from blemish.detectors import registry

    chosen: dict[str, Any] = dict(chosen_settings(options.set, options.image_size))
    for option, name, setting, value in SHORTHANDS:
        given = getattr(options, name)
        if given is None or given is False:
            continue
        able = registry.methods_with_setting(setting)
        if options.model in METHODS and options.model not in able:
            raise ConfigError(
                f"{option}: {options.model} has no logical map; expected --model {' or '.join(able)}"
            )
        if setting in chosen:
            raise ConfigError(f"{option} and --set {setting} were both given; expected one of them")
        chosen[setting] = given if value is None else value
    return chosen


def run_sweep(options: argparse.Namespace, request: TrainingRequest) -> int:
    """Train and evaluate over seeds and folds and print a summary; return 2 if images were skipped."""
    from blemish.cli.terminal import Terminal, stop_requests
    from blemish.sweeps import local, repeats, summary

    check_outputs(options.json)
    seeds = 1 if options.seeds is None else options.seeds
    trials = repeats.plan(options.out, options.seed, seeds, options.folds, options.folds_file)
    jobs = local.default_jobs(options.device) if options.jobs is None else options.jobs
    with stop_requests() as stop:
        results = repeats.run(trials, request, jobs=jobs, report=Terminal(), stop=stop)
    found = summary.summarise(results)
    print(summary.table(found))
    if options.json is not None:
        summary.write_json(found, options.json, request)
    return 2 if any(evaluation.skipped for _, evaluation in results) else 0


def weights_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `weights`."""
    actions = sub.add_subparsers(required=True, metavar="ACTION", dest="action")
    actions.add_parser("list", help="list the pretrained weights on this machine")
    add = actions.add_parser("add", help="check a file of weights and copy it to the user's cache")
    add.add_argument("name", metavar="NAME", help="network, as in `blemish weights list`")
    add.add_argument("file", type=Path, metavar="FILE", help="safetensors file or torch checkpoint")
    fetch = actions.add_parser("fetch", help="download weights from their publisher")
    fetch.add_argument("name", metavar="NAME", help="network, as in `blemish weights list`")


def run_weights(options: argparse.Namespace) -> int:
    """List, add or fetch pretrained weights."""
    from blemish.backbones import skeleton, weights

    if options.action == "list":
        for name in weights.SOURCES:
            path = weights.find_local(name)
            made = weights.metadata(path) if path else {}
            origin = (
                f" (from {made['source']}, {made['explained_variance']:.0%} of variance explained)"
                if "source" in made
                else ""
            )
            print(f"{name:20}{path or 'not on this machine'}{origin}")
        return 0
    if options.name not in weights.SOURCES:
        raise ConfigError(f"unknown weights {options.name!r}; expected one of {', '.join(weights.SOURCES)}")
    if options.action == "add":
        print(
            weights.store_in_cache(
                options.name, weights.find(options.name, options.file), skeleton(options.name)
            )
        )
    else:
        print(weights.fetch(options.name, skeleton(options.name)))
    return 0


def distill_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `distill`."""
    sub.add_argument("images", type=Path, metavar="IMAGES", help="folder of photographs of any subject")
    sub.add_argument("--size", required=True, metavar="S", help="size of the teacher: small or medium")
    sub.add_argument(
        "--out", type=Path, required=True, metavar="F.safetensors", help="the weights file to write"
    )
    sub.add_argument(
        "--source", metavar="BACKBONE", help="backbone whose features are distilled (wide_resnet101_2)"
    )
    sub.add_argument("--weights", type=Path, metavar="FILE", help="pretrained weights of the backbone")
    add_length(sub, epochs_help="number of passes over the images")
    sub.add_argument(
        "--preset", default="default", help="default, or paper (algorithm 3 exactly as published)"
    )
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the distillation"
    )
    add_machine(sub)


def run_distill(options: argparse.Namespace) -> int:
    """Distil a teacher and print the share of variance that it explains."""
    share_cores()
    from blemish.cli.terminal import Terminal, stop_requests
    from blemish.training.distillation.run import run
    from blemish.training.request import DistillationRequest

    names = (
        *("images", "out", "size", "source", "weights", "preset", "steps", "epochs", "budget", "seed"),
        *("device", "precision", "cache", "resume"),
    )
    given = {name: getattr(options, name) for name in names}
    request = DistillationRequest(settings=settings(options.set), memory=gigabytes(options.memory), **given)
    with stop_requests() as stop:
        facts = run(request, report=Terminal(), stop=stop)
    if facts:
        print(
            f"{options.out}: explains {100 * facts['explained_variance']:.1f} % of the target's variance on "
            f"{facts['held_out_images']} held-out images"
        )
    return 0
