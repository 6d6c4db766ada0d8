"""The battery: variants of the methods over categories, conditions and seeds, by which defaults are chosen.

    python benchmarks/battery.py run FOLDER... --variants patchcore padim --seeds 3 --out battery.jsonl
    python benchmarks/battery.py run FOLDER... --variants "patchcore place_weight=1 layers=stage3,stage5" ...
    python benchmarks/battery.py show battery.jsonl [--only bottle,pill] [--conditions clean] [--kinds]

A category is the folder of a data set, or "demo" for rendered parts. A variant is a method followed by
settings KEY=VALUE, or by options of a training that OPTIONS lists. Conditions:

    clean       as the data set is, but without training images that are also test images
    dirty5 ...  so many percent of the good training images are defective ones, taken from the test set
    few1 ...    only so many good training images, drawn by the seed
    light       trained on clean images; the test images are altered in light, sharpness and place

Each cell runs in a process of its own and is one line of JSON; cells that are in the file already are not
run again, and a training that was killed goes on from its checkpoint, in the folder OUT.unfinished. Nothing
is chosen here: `show` prints what was measured, the mean over the seeds with its standard deviation, and the
mean over all columns.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

import blemish
from blemish import data, seeding
from blemish.demo import dataset
from blemish.files import digest
from blemish.tables import aligned
from blemish.training.session import remains
from blemish.types import Evaluation, Sample

OPTIONS = ("light", "scale", "supervision", "preset", "steps", "budget")
"""Words of a variant that are options of a training rather than settings of a method."""

VALUES = {
    "image_auroc": ("image AUROC", 100.0),
    "image_ap": ("image AP", 100.0),
    "aupro": ("AUPRO", 100.0),
    "pixel_ap": ("pixel AP", 100.0),
    "false_rejects": ("good parts called defective", 100.0),
    "escapes": ("defects called good", 100.0),
    "promised": ("promised false rejects", 100.0),
    "seconds": ("seconds to train", 1.0),
    "milliseconds": ("milliseconds to judge", 1.0),
    "memory": ("peak memory, MiB", 1.0),
    "file": ("model file, MB", 1.0),
}
"""What is measured: its name in a table, and the factor it is printed with."""

BY_KIND = ("image_auroc", "aupro")
"""What is also measured on each kind of defect and the good images."""


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation."""

    category: str
    """Path of the data set, or "demo"."""
    condition: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the category."""
        return Path(self.category).name

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What identifies the cell."""
        return self.name, self.condition, self.variant, self.seed

    @property
    def file_name(self) -> str:
        """A name for the files of the cell."""
        return hashlib.sha256(repr(self.key).encode()).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cells, or show what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("categories", nargs="+", help='folders of data sets, or "demo"')
    run.add_argument("--variants", nargs="+", required=True)
    run.add_argument("--conditions", default="clean", help="separated by commas")
    run.add_argument("--seeds", default="1", help="how many, or a list such as 3,5 (one alone: 3,)")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--cache", default="off", help="folder of cached features")
    run.add_argument("--threads", type=int, default=0, help="threads of each cell; 0: all cores")
    show = commands.add_parser("show")
    show.add_argument("file", type=Path, nargs="+")
    show.add_argument("--only", default="", help="categories, separated by commas")
    show.add_argument("--conditions", default="")
    show.add_argument("--variants", nargs="*", default=[])
    show.add_argument("--values", default="image_auroc,aupro,seconds,memory")
    show.add_argument("--kinds", action="store_true", help=f"{' and '.join(BY_KIND)} of each kind of defect")
    cell = commands.add_parser("cell")
    cell.add_argument("cell")
    cell.add_argument("--cache", default="off")
    cell.add_argument("--unfinished", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.command == "cell":
        cell_asked = Cell(**json.loads(options.cell))
        print(json.dumps(measured(cell_asked, options.cache, options.unfinished)))
        return 0
    if options.command == "show":
        print(shown(options))
        return 0
    return run_all(options)


# --- running ---


def run_all(options: argparse.Namespace) -> int:
    """Run all cells that are not in the file yet; return the number of those that failed."""
    done = {Cell(**line["cell"]).key for line in read([options.out])} if options.out.exists() else set()
    failed = 0
    for cell in cells(options):
        if cell.key in done:
            continue
        print(*cell.key, flush=True)
        environment = dict(os.environ)
        if options.threads:
            environment["OMP_NUM_THREADS"] = str(options.threads)
        command = [sys.executable, __file__, "cell", json.dumps(asdict(cell)), "--cache", options.cache]
        command += ["--unfinished", f"{options.out}.unfinished"]
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if made.returncode:
            failed += 1
            print(made.stderr.strip().splitlines()[-1:], flush=True)
            continue
        line = made.stdout.strip().splitlines()[-1]
        with options.out.open("a") as file:
            file.write(line + "\n")
        found = json.loads(line)
        shown_at_once = ("image_auroc", "aupro", "seconds")
        print("   ", {name: found[name] and round(found[name], 4) for name in shown_at_once}, flush=True)
    return failed


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield every cell: all seeds of a variant on a category, one condition after the other."""
    seeds = [int(seed) for seed in options.seeds.split(",") if seed] if "," in options.seeds else None
    for condition in options.conditions.split(","):
        for variant in options.variants:
            for category in options.categories:
                for seed in seeds if seeds is not None else range(int(options.seeds)):
                    yield Cell(category, condition, variant, seed)


def measured(cell: Cell, cache: str, unfinished: Path) -> dict[str, Any]:
    """Train and evaluate one cell; return everything that was measured.

    unfinished: folder of the checkpoints of trainings that were killed, and of this one while it runs.
    """
    unfinished.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = category(cell, folder)
        manifest = write_manifest(root, cell, folder / "manifest.csv")
        out = unfinished / f"{cell.file_name}.blemish"
        options = trained(cell.variant)
        options |= {"resume": True} if remains(out, options["model"]) else {}
        started = time.monotonic()
        model = blemish.train(manifest, out=out, seed=cell.seed, cache=cache, **options)
        # A training that was resumed records what it took before, too.
        seconds = max(time.monotonic() - started, model.manifest.training.seconds)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        facts = {
            "cell": asdict(cell),
            "seconds": seconds,
            "memory": memory,
            "file": out.stat().st_size / 1e6,
            "promised": model.calibration.promised_rate,
            "notes": list(model.manifest.training.notes),
            "milliseconds": milliseconds(model),
            "image_size": list(model.image_size),
        }
        found = (
            in_other_light(model, root, folder)
            if cell.condition == "light"
            else with_kinds(blemish.evaluate(model, manifest))
        )
        out.unlink()
        return facts | found


def category(cell: Cell, folder: Path) -> Path:
    """Return the folder of a category; the demo's parts are rendered."""
    if cell.category != "demo":
        return Path(cell.category)
    dataset.draw(folder / "demo", 0)
    return folder / "demo"


def trained(variant: str) -> dict[str, Any]:
    """Return what a variant gives to `blemish.train`."""
    model, *words = variant.split()
    pairs = dict(word.split("=", 1) for word in words)
    options: dict[str, Any] = {name: pairs.pop(name) for name in OPTIONS if name in pairs}
    if "steps" in options:
        options["steps"] = int(options["steps"])
    return {"supervision": "none", "model": model, "settings": pairs} | options


def write_manifest(root: Path, cell: Cell, path: Path) -> Path:
    """Write which images are trained on and tested under a condition."""
    samples = data.scan(root, "auto")
    test = [sample for sample in samples if sample.split == "test"]
    tested = {digest(sample.path) for sample in test}
    train = [sample for sample in samples if sample.split != "test" and digest(sample.path) not in tested]
    good = [sample for sample in train if sample.label == 0]
    rest = [sample for sample in train if sample.label]
    word = cell.condition.rstrip("0123456789")
    amount = int(cell.condition.removeprefix(word) or 0)
    order = np.random.default_rng(seeding.initial_seed(cell.seed, cell.condition)).permutation
    dirty: list[Sample] = []
    if word == "few":
        good = [good[place] for place in sorted(order(len(good))[:amount])]
    elif word == "dirty":
        defects = [sample for sample in test if sample.label]
        dirty = [defects[place] for place in order(len(defects))[: round(amount / 100 * len(good))]]
    elif word not in ("clean", "light"):
        raise SystemExit(f"unknown condition {cell.condition}")
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("image", "label", "mask", "split", "kind"))
    hidden = {sample.path for sample in dirty}
    for sample in (*good, *dirty, *rest, *(one for one in test if one.path not in hidden)):
        bad = sample.label and sample.path not in hidden
        split = "train" if sample.path in hidden else sample.split or "train"
        masks = ";".join(str(mask.resolve()) for mask in sample.masks) if bad else ""
        label, kind = ("defect", sample.kind) if bad else ("good", "")
        table.writerow((sample.path.resolve(), label, masks, split, kind))
    path.write_text(text.getvalue())
    return path


def metrics(found: Evaluation) -> dict[str, float | None]:
    """Return the metrics of an evaluation, and how many parts its thresholds judge wrongly."""
    row = found.rows[0]
    good = [image.label == "defect" for image in found.images if not image.truth]
    bad = [image.label == "ok" for image in found.images if image.truth]
    names = ("image_auroc", "image_ap", "aupro", "pixel_ap")
    return {name: getattr(row, name) for name in names} | {
        "false_rejects": sum(good) / max(len(good), 1),
        "escapes": sum(bad) / max(len(bad), 1),
    }


def with_kinds(found: Evaluation) -> dict[str, Any]:
    """Return the metrics of an evaluation, with those of each kind of defect by its name."""
    return metrics(found) | {
        "kinds": {row.kind: {name: getattr(row, name) for name in BY_KIND} for row in found.rows[1:]}
    }


def in_other_light(model: blemish.Predictor, root: Path, folder: Path) -> dict[str, Any]:
    """Evaluate on altered test images: the mean over the alterations, and each by its name."""
    from light_variants import VARIANTS, altered_copy

    root = in_mvtec_layout(root, folder / "as mvtec")
    each: dict[str, Mapping[str, float | None]] = {}
    for name, alter in VARIANTS.items():
        each[name] = metrics(blemish.evaluate(model, altered_copy(root, folder / name, alter)))
    names = next(iter(each.values()))
    means: dict[str, float | None] = {}
    for name in names:
        values = [value for one in each.values() if (value := one[name]) is not None]
        means[name] = mean(values) if values else None
    return means | {"each": each}


def in_mvtec_layout(root: Path, out: Path) -> Path:
    """Return a data set in the layout mvtec: itself, or a folder of links to its images."""
    if (root / "train" / "good").is_dir():
        return root
    for number, sample in enumerate(data.scan(root, "auto")):
        kind = "defect" if sample.label else "good"
        links = [(Path(sample.split or "train", kind, f"{number}{sample.path.suffix}"), sample.path)]
        links += [
            (Path("ground_truth", kind, f"{number}_mask{mask.suffix}"), mask)
            for mask in sample.masks
            if sample.split == "test"
        ]
        for link, target in links:
            (out / link).parent.mkdir(parents=True, exist_ok=True)
            (out / link).symlink_to(target.resolve())
    return out


def milliseconds(model: blemish.Predictor, rounds: int = 15) -> float:
    """Return the median time of the graph on one image that lies ready."""
    height, width = model.image_size
    inputs = np.random.default_rng(0).random((1, 3, height, width), np.float32)
    taken = []
    for _ in range(3 + rounds):
        started = time.perf_counter()
        model.engine.run(inputs)
        taken.append(time.perf_counter() - started)
    return 1000 * float(np.median(taken[3:]))


# --- showing ---


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the lines of result files."""
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line]


def shown(options: argparse.Namespace) -> str:
    """Format what was measured: a table for each value, one row for each variant."""
    lines = read(options.file)
    only, conditions = (
        {word for word in text.split(",") if word} for text in (options.only, options.conditions)
    )
    columns: dict[str, None] = {}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        cell = Cell(**line["cell"])
        unwanted = (
            (only and cell.name not in only)
            or (conditions and cell.condition not in conditions)
            or (options.variants and cell.variant not in options.variants)
        )
        if unwanted:
            continue
        name = cell.name if cell.condition == "clean" else f"{cell.name} {cell.condition}"
        measured_on = {name: line}
        if options.kinds:
            measured_on = {f"{name}: {kind}": values for kind, values in line.get("kinds", {}).items()}
        for column, values in measured_on.items():
            columns[column] = None
            found.setdefault(cell.variant, {}).setdefault(column, []).append(values)
    if options.kinds and not columns:
        raise SystemExit(
            "these results say nothing of kinds of defect; expected those of clean or few images"
        )
    values_asked = BY_KIND if options.kinds else options.values.split(",")
    return "\n\n".join(table(name, list(columns), found) for name in values_asked)


def table(
    value: str,
    columns: Sequence[str],
    found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
) -> str:
    """Format one value: mean and deviation over the seeds in each column, and the mean over the columns."""
    title, factor = VALUES[value]
    rows = [[title, *columns, "mean"]]
    for variant, measured_cells in found.items():
        row, means = [variant], []
        for column in columns:
            values = [
                factor * line[value] for line in measured_cells.get(column, ()) if line[value] is not None
            ]
            if values:
                means.append(mean(values))
            row.append(spread(values))
        complete = len(means) == len(columns)
        rows.append([*row, f"{mean(means):.2f}" if complete else "-"])
    return aligned(rows)


def spread(values: Sequence[float]) -> str:
    """Format a mean and, of several values, their standard deviation."""
    if not values:
        return "-"
    return f"{mean(values):.2f}" + (f" ({stdev(values):.2f})" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
