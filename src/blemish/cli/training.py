"""Commands that train: train, distill, weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from blemish.cli.options import (
    METHODS,
    RATE_HELP,
    add_layout,
    add_machine,
    gigabytes,
    refuse_outputs,
    settings,
)
from blemish.errors import ConfigError


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
    from blemish.training.run import train

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
    from blemish.sweeps import local, repeats, summary

    refuse_outputs(options.json)
    planned = repeats.plan(
        options.out,
        options.seed,
        1 if options.seeds is None else options.seeds,
        options.folds,
        options.folds_file,
    )
    jobs = local.room(options.device) if options.jobs is None else options.jobs
    results = repeats.run(planned, options.data, given, layout=options.layout, jobs=jobs)
    found = summary.summarise(results)
    print(summary.table(found))
    if options.json is not None:
        summary.write_json(found, options.json, given)
    return 2 if any(each.skipped for _, each in results) else 0


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
    from blemish.training.distillation.run import distill

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
