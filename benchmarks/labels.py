"""What labels gain: supervised and unsupervised runs on a labelled data set, one line of JSON for each.

    python benchmarks/labels.py ladder   DATA --image-size 640x256 --steps 300 --seeds 3 --out ladder.jsonl
    python benchmarks/labels.py growth   DATA --counts 0,2,5,10,20,34 ...
    python benchmarks/labels.py ablation DATA --supervision full ...
    python benchmarks/labels.py rules    DATA ...        the rules of the 2024 paper and of its extension
    python benchmarks/labels.py show     FILE...         mean and deviation of each row
    python benchmarks/labels.py figure   FILE.jsonl F.svg   average precision by number of labelled defects
    python benchmarks/labels.py clean    DATA FOLDER     a copy without training images that are also in test

Runs that are already in the file are not repeated, so a series that was stopped continues. All series take
--backbone NAME --weights FILE --cache DIR --set KEY=VALUE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import blemish
from blemish import images
from blemish.cli.terminal import Terminal
from blemish.detectors import registry
from blemish.detectors.supersimplenet.config import FROM_GOOD

METRICS = ("image_auroc", "image_ap", "pixel_ap", "aupro")
NO_HEAD: dict[str, Any] = {"classification_head": False}
OLD_TRAINING: dict[str, Any] = {"focal_loss": False, "schedule": "constant"}
GRADIENT_RULES: dict[str, dict[str, Any]] = {
    "none": {"stop_gradient": False},
    "full": {"stop_gradient": True, "clip_norm": 0.0},
}
ABLATION: dict[str, tuple[str, dict[str, Any]]] = {
    "SuperSimpleNet": ("supersimplenet", {}),
    "without upscaling": ("supersimplenet", {"upscale": False}),
    "without the classification head": ("supersimplenet", NO_HEAD),
    "... and with SimpleNet's anomalies": ("supersimplenet", NO_HEAD | {"anomalies": "whole"}),
    "old training": ("supersimplenet", OLD_TRAINING),
    "noise also on real defects": ("supersimplenet", {"noise_on_defects": True}),
    "SimpleNet's anomalies": ("supersimplenet", {"anomalies": "whole"}),
    "no synthetic anomalies": ("supersimplenet", {"anomalies": "none"}),
    "SimpleNet with these anomalies": ("simplenet", {"anomalies": "perlin"}),
    "SimpleNet": ("simplenet", {}),
}
RULES: dict[str, dict[str, Any]] = {
    "2024": {},
    "noise on unmasked": {"noise_on_unmasked": True},
    "dilation": {"mask_dilation": 7},
    "distance weights": {"distance_weights": True},
    "dilation and distance weights": {"mask_dilation": 7, "distance_weights": True},
    "features before the adaptor": {"adapt_classification_features": False},
    "2025": {
        "noise_on_unmasked": True,
        "mask_dilation": 7,
        "distance_weights": True,
        "adapt_classification_features": False,
    },
}


def ladder(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what each row, one for each supervision, gives to `blemish.train`."""
    regimes: dict[str, dict[str, Any]] = {
        "none": {"supervision": "none"},
        "weak": {"supervision": "weak"},
        "mixed": {"supervision": "mixed", "train_masks": "50%"},
        "full": {"supervision": "full"},
    }
    chosen = options.regimes.split(",") if options.regimes else list(regimes)
    return {name: regimes[name] for name in chosen}


def growth(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what each row, one for each number of labelled defects, gives to `blemish.train`."""
    return {
        count: {"train_defects": count} if int(count) else {"supervision": "none"}
        for count in options.counts.split(",")
    }


def ablation(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what each row, one for each part that is taken away, gives to `blemish.train`."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (model, settings) in ABLATION.items():
        if options.supervision == "none" and name in ("no synthetic anomalies", "noise also on real defects"):
            continue
        if name == "old training":
            settings = settings | GRADIENT_RULES[options.supervision]
        if options.supervision == "none":  # the paper's form, not what the defaults for good images are
            plain = registry.method(model).config
            settings = {key: getattr(plain, key) for key in FROM_GOOD} | settings
        if model == "supersimplenet" and settings.get("classification_head", True):
            settings = {"classification_head": True, "statistics": ("head",)} | settings
        rows[name] = {"model": model, "settings": settings, "supervision": options.supervision}
    return rows


def rules(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what each row, one for each rule and supervision, gives to `blemish.train`."""
    return {
        f"{regime}, {name}": {"settings": settings} | given
        for regime, given in ladder(options).items()
        if regime != "none"
        for name, settings in RULES.items()
    }


SERIES = {"ladder": ladder, "growth": growth, "ablation": ablation, "rules": rules}


def run(options: argparse.Namespace, name: str, given: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train and evaluate once; return the row's record."""
    settings = {"image_size": options.image_size, "backbone": options.backbone}
    settings |= dict(text.split("=", 1) for text in options.set) | given.get("settings", {})
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = blemish.train(
            options.data,
            model=given.get("model", "supersimplenet"),
            out=(options.keep or Path(folder)) / f"{options.out.stem}.{name}.{seed}.blemish",
            weights=options.weights,
            settings=settings,
            steps=options.steps,
            seed=seed,
            cache=options.cache,
            report=Terminal(),
            **{key: value for key, value in given.items() if key not in ("model", "settings")},
        )
        seconds = time.monotonic() - begin
        found = blemish.evaluate(model, options.data, exhibits=0, report=Terminal())
    row = found.rows[0]
    return {
        "series": options.series,
        "data": found.data,
        "row": name,
        "seed": seed,
        "backbone": options.backbone,
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "good": row.good,
        "defective": row.defective,
        **{metric: getattr(row, metric) for metric in METRICS},
    }


def clean(root: Path, out: Path) -> None:
    """Copy a data set in the layout ksdd2, leaving out training images whose pixels are also in test."""
    test = {image_digest(path) for path in (root / "test").glob("*[0-9].png")}
    for part in ("train", "test"):
        (out / part).mkdir(parents=True)
        for path in sorted((root / part).glob("*[0-9].png")):
            if part == "train" and image_digest(path) in test:
                print(f"left out: {path}", file=sys.stderr)
                continue
            for name in (path.name, f"{path.stem}_GT.png"):
                shutil.copy(root / part / name, out / part / name)


def image_digest(path: Path) -> str:
    """Return the SHA-256 of an image's pixels."""
    return hashlib.sha256(images.read(path).tobytes()).hexdigest()


def show(files: list[Path]) -> None:
    """Print each row's mean and standard deviation over the seeds."""
    rows: defaultdict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        for line in file.read_text().splitlines():
            record = json.loads(line)
            key = (record["data"], record["series"], record["backbone"], str(record["steps"]), record["row"])
            rows[key].append(record)
    for names, records in rows.items():
        cells = []
        for metric in METRICS:
            values = [100 * record[metric] for record in records]
            spread = f" ({stdev(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{metric} {mean(values):5.1f}{spread}")
        print(f"{', '.join(names)} x{len(records)}: " + "  ".join(cells))


WIDTH, HEIGHT, LEFT, BOTTOM = 640, 360, 56, 48
CURVES = {"image_ap": ("detection", "#0b6e99"), "pixel_ap": ("localisation", "#c2571a")}


def figure(file: Path, out: Path) -> None:
    """Plot mean and range of both average precisions over the number of labelled defects."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    counts = sorted({int(record["row"]) for record in records})
    last = max(counts)

    def x(count: int) -> float:  # its square root: the first labels matter most
        return LEFT + (WIDTH - LEFT - 24) * math.sqrt(count / last)

    def y(value: float) -> float:
        return 16 + (HEIGHT - BOTTOM - 16) * (1 - value)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="white"/>'
    ]
    for tenth in range(0, 11, 2):
        value = tenth / 10
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - 24}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    for count in counts:
        parts.append(
            f'<text x="{x(count):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{count}</text>'
        )
    middle = (LEFT + WIDTH - 24) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">labelled defects in training</text>'
    )
    for metric, (name, colour) in CURVES.items():
        values = {c: [r[metric] for r in records if int(r["row"]) == c] for c in counts}
        points = " ".join(f"{x(count):.1f},{y(mean(values[count])):.1f}" for count in counts)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        for count in counts:
            low, high = y(min(values[count])), y(max(values[count]))
            parts.append(f'<path d="M{x(count):.1f} {low:.1f}V{high:.1f}" stroke="{colour}" opacity="0.5"/>')
            parts.append(
                f'<circle cx="{x(count):.1f}" cy="{y(mean(values[count])):.1f}" r="4" fill="{colour}"/>'
            )
        end = y(mean(values[last]))
        parts.append(
            f'<text x="{WIDTH - 28}" y="{end + 20:.1f}" text-anchor="end" fill="{colour}">{name}</text>'
        )
    out.write_text("\n".join([*parts, "</svg>", ""]))


def main() -> None:
    """Run a series, or work on the files of earlier ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("series", choices=[*SERIES, "show", "figure", "clean"])
    parser.add_argument("data", nargs="+", type=Path, help="a data set, or files as shown above")
    parser.add_argument("--out", type=Path, default=Path("labels.jsonl"), help="where lines are added")
    parser.add_argument("--image-size", default="256x256")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the model files here")
    parser.add_argument("--cache", default="auto")
    parser.add_argument("--counts", default="0,2,5,10,20,34", help="labelled defects of growth")
    parser.add_argument("--regimes", default="", help="some of none,weak,mixed,full (all)")
    parser.add_argument("--supervision", default="none", choices=["none", "full"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.series == "show":
        return show(options.data)
    if options.series == "figure":
        return figure(*options.data)
    if options.series == "clean":
        return clean(*options.data)
    (options.data,) = options.data
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {(record["series"], record["row"], record["seed"]) for record in map(json.loads, lines)}
    for seed in range(options.seeds):
        for name, given in SERIES[options.series](options).items():
            if (options.series, name, seed) in done:
                continue
            print(f"--- {name}, seed {seed}", file=sys.stderr, flush=True)
            record = run(options, name, given, seed)
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    return show([options.out])


if __name__ == "__main__":
    main()
