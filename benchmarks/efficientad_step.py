"""One optimiser step of EfficientAD: ours compared with a plain transcription of algorithm 1, gain by gain.

    python benchmarks/efficientad_step.py --json steps.json
    python benchmarks/efficientad_step.py --data PARTS --natural PHOTOGRAPHS --weights pdn_small.safetensors
    python benchmarks/efficientad_step.py --only "plain,ours" --steps 30 --rounds 7 --threads 2
    python benchmarks/efficientad_step.py --curves 500 --out curves    losses to curves.json and curves.svg

Each row runs in a process of its own, because memory and threads belong to a process:

    plain                 algorithm1.py without any of the gains
    plain + GAIN          with one of them
    every gain            with all of them
    every gain - GAIN     with all but one
    ours                  our own step, at the paper's settings, in bfloat16
    ours - GAIN           without one of the gains that lie outside the loss

All rows take turns in every round, so that a machine that slows down does so for all of them. In all rows the
training images are decoded beforehand, and a photograph is decoded for every step, as in a run with more
photographs than steps. A ratio is the median, over the rounds, of the ratios of a round's median steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NoReturn, TypeVar, cast
from unittest import mock

import torch
from algorithm1 import GAINS, Transcription
from safetensors.torch import save_file
from torch import nn
from typing_extensions import override

from blemish import demo, images, seeding
from blemish.data.loading.batches import Batches, Photographs
from blemish.data.loading.cache import Memory
from blemish.detectors.efficientad.detector import EfficientAD
from blemish.detectors.registry import build, configure
from blemish.files import write_atomically
from blemish.training import loop, run
from blemish.training.loop import Run

TERMS = ("hard", "penalty", "autoencoder", "student_autoencoder", "loss")
IN_LOSS = ("topk", "one pass")
"""Gains that lie inside our loss, where they cannot be switched off."""


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    gains: frozenset[str]
    product: bool = False
    """Whether the step is our own; otherwise it is the transcription's."""


EVERY = frozenset(GAINS)
VARIANTS = {
    "plain": Variant(frozenset()),
    **{f"plain + {gain}": Variant(frozenset({gain})) for gain in GAINS},
    "every gain": Variant(EVERY),
    **{f"every gain - {gain}": Variant(EVERY - {gain}) for gain in IN_LOSS},
    "ours": Variant(EVERY, product=True),
    **{f"ours - {gain}": Variant(EVERY - {gain}, product=True) for gain in GAINS if gain not in IN_LOSS},
}


# --- one row, in a process of its own ---


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    variant: str
    data: str
    """A folder in the layout mvtec."""
    natural: str
    weights: str
    model: str
    warm_up: int
    """Steps before those that are timed."""
    steps: int


Read = TypeVar("Read")


class BegunError(Exception):
    """Raised with a run that is about to take its first step."""

    def __init__(self, run: Run) -> None:
        self.run = run


class OnThisThread(ThreadPoolExecutor):
    """A pool that runs each task at once, on the thread that submits it."""

    @override
    def submit(self, fn: Callable[..., Read], /, *args: Any, **kwargs: Any) -> Future[Read]:
        """Run a task."""
        done: Future[Read] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def begin(job: Job) -> Run:
    """Set a run up to its first step, as `blemish train` does, without the gains that the variant lacks."""

    def hand_over(run: Run) -> NoReturn:
        raise BegunError(run)

    gains = VARIANTS[job.variant].gains
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "loop", hand_over))
        if "kept memory" not in gains:
            stack.enter_context(mock.patch.object(run, "keep_freed_memory"))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        try:
            run.train(
                job.data,
                model=job.model,
                out=Path(folder) / "model.blemish",
                layout="mvtec",
                weights=job.weights,
                natural_images=job.natural,
                preset="paper",
                settings={"batch_size": 1},
                steps=job.warm_up + job.steps,
                device="cpu",
                precision="bf16" if "bfloat16" in gains else "fp32",
                cache="auto" if "cached teacher" in gains else "off",
            )
        except BegunError as begun:
            return without(begun.run, EVERY - gains)
    raise RuntimeError("training ended without its loop")


def without(run: Run, left_out: Collection[str]) -> Run:
    """Switch gains off in a run that has been set up, and decode a photograph for every step."""
    batches = cast(Batches, run.batches)
    photographs = cast(Photographs, batches.natural).store
    photographs.memory, photographs.kept = Memory(0), {}
    if "prefetch" in left_out:
        batches.pool = OnThisThread(1)
    if "channels-last" in left_out:
        run.detector.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if "fused Adam" in left_out:
        for group in run.optimizer.param_groups:
            group["fused"] = None
    return run


def measure(job: Job) -> dict[str, Any]:
    """Take a variant's steps in this process.

    Returns the seconds of the steps after the warm-up, the losses of all steps, and the number of threads.
    """
    run, variant = begin(job), VARIANTS[job.variant]
    step: Callable[[int], dict[str, float]] = partial(loop.one_step, run)
    if not variant.product:
        step = partial(Transcription(cast(EfficientAD, run.detector), variant.gains).step, run)
    seconds, losses = [], []
    for number in range(run.steps):
        start = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[job.warm_up :], "losses": losses, "threads": torch.get_num_threads()}


def measure_apart(job: Job, threads: int | None) -> dict[str, Any]:
    """Measure in a new process that starts with glibc's default memory settings."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, __file__, "--measure", json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job.variant} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- what all rows share ---


def lay_out(options: argparse.Namespace, folder: Path) -> Job:
    """Put parts, photographs and a teacher into a folder for all processes; render what was not given."""
    parts = folder / "parts"
    for name in ("train/good", "test", "ground_truth"):
        (parts / name).mkdir(parents=True)
    if options.data:
        for path in images.list_images(options.data / "train" / "good")[: options.images]:
            shutil.copy(path, parts / "train" / "good")
    else:
        for number in range(options.images):
            part, _ = demo.draw_part((0, number), "good", 256)
            images.write_png(parts / f"train/good/{number:03}.png", part)
    for number in range(0 if options.natural else 8):
        photograph, _ = demo.draw_part((1, number), "good", 400)
        write_atomically(folder / f"photographs/{number}.jpg", images.jpeg_bytes(photograph, 90))
    return Job(
        variant="",
        data=str(parts),
        natural=str(options.natural or folder / "photographs"),
        weights=str(options.weights or draw_teacher(folder / "teacher.safetensors", options.model)),
        model=options.model,
        warm_up=options.warm_up,
        steps=options.steps,
    )


def draw_teacher(path: Path, model: str) -> Path:
    """Write a teacher with random weights (He et al.), which takes the same time as a distilled one."""
    teacher = cast(EfficientAD, build(model, configure(model), 0)).teacher
    draw = seeding.generator(0, "teacher")
    for parameter in teacher.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=draw)
    save_file(teacher.state_dict(), path)
    return path


# --- the table ---


def ratio(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return how many times as fast the second was: median, least and greatest over the rounds."""
    each = [median(one) / median(other) for one, other in zip(slow, fast, strict=True)]
    return median(each), min(each), max(each)


def table(seconds: Mapping[str, Sequence[Sequence[float]]]) -> list[str]:
    """Return a line for each variant, given the seconds of its steps in each round."""
    lines = []
    for name, rounds in seconds.items():
        middles = [median(one) for one in rounds]
        line = f"{name:28}{median(middles):7.3f} s ({min(middles):.3f} to {max(middles):.3f})"
        if "plain" in seconds:
            line += "   {:5.2f} times as fast as plain ({:.2f} to {:.2f})".format(
                *ratio(seconds["plain"], rounds)
            )
        if "ours" in seconds and name.startswith("ours - "):
            line += "   ours {:5.2f} times as fast ({:.2f} to {:.2f})".format(*ratio(rounds, seconds["ours"]))
        lines.append(line)
    return lines


def compare(options: argparse.Namespace, job: Job) -> None:
    """Let the variants take turns, print the table, and write the seconds of every step if asked."""
    names = options.only or list(VARIANTS)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    threads = None
    for number in range(options.rounds):
        for name in names:
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            found = measure_apart(dataclasses.replace(job, variant=name), options.threads)
            seconds[name].append(found["seconds"])
            threads = found["threads"]
    print(*table(seconds), sep="\n")
    if options.json:
        about = {"torch": torch.__version__, "threads": threads, "processor": processor()}
        settings = {"model": job.model, "warm_up": job.warm_up, "steps": job.steps, "rounds": options.rounds}
        write_atomically(options.json, json.dumps(about | settings | {"seconds": seconds}, indent=1).encode())


def processor() -> str:
    """Return the processor's name, where Linux tells it, and the instructions that torch uses on it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else 'unknown'}, {torch.backends.cpu.get_cpu_capability()}"


# --- the curves ---

POINTS = 100
"""At most this many points of a curve are drawn, each the mean of equally many steps."""
WIDTH, HEIGHT, LEFT, GAP = 300, 150, 52, 44
STYLES = {
    "plain": ("plain, float32", '#d9a441" stroke-width="5'),
    "ours": ("ours, bfloat16", '#0b4f6c" stroke-width="1.5'),
}


def thinned(values: Sequence[float]) -> list[float]:
    """Return the means of equal stretches of a curve; a shorter remainder at the end is left out."""
    stretch = -(-len(values) // POINTS)
    return [fmean(values[at : at + stretch]) for at in range(0, len(values) - stretch + 1, stretch)]


def panel(term: str, curves: Mapping[str, Sequence[float]], left: float, top: float) -> list[str]:
    """Return an SVG group with one loss term of both runs over the steps, on a logarithmic scale."""
    points = {name: [math.log10(value) for value in thinned(values)] for name, values in curves.items()}
    low, high = min(map(min, points.values())), max(map(max, points.values()))
    parts = [
        f'<g transform="translate({left} {top})"><text y="-8">{term}</text>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbbbbb"/>',
        f'<text x="-6" y="10" text-anchor="end">{10**high:.3g}</text>',
        f'<text x="-6" y="{HEIGHT}" text-anchor="end">{10**low:.3g}</text>',
        f'<text y="{HEIGHT + 15}">0</text>',
        f'<text x="{WIDTH}" y="{HEIGHT + 15}" text-anchor="end">{len(curves["plain"])} steps</text>',
    ]
    for name, heights in points.items():
        across, down = WIDTH / max(len(heights) - 1, 1), HEIGHT / ((high - low) or 1)
        line = " ".join(f"{across * i:.1f},{down * (high - value):.1f}" for i, value in enumerate(heights))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{STYLES[name][1]}"/>')
    return [*parts, "</g>"]


def chart(losses: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return an SVG with the losses of both runs overlaid, one panel for each term."""
    width, height = 2 * (LEFT + WIDTH) + 24, 3 * (HEIGHT + GAP) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    places = [(LEFT + x * (WIDTH + LEFT), 28 + y * (HEIGHT + GAP)) for y in range(3) for x in range(2)]
    for term, place in zip(TERMS, places, strict=False):
        curves = {name: [each[term] for each in losses[name]] for name in STYLES}
        parts += panel(term.replace("_", " and "), curves, *place)
    left, top = places[-1]
    for number, (name, stroke) in enumerate(STYLES.values()):
        y = top + 20 + 24 * number
        parts.append(
            f'<path d="M{left} {y}h40" stroke="{stroke}"/><text x="{left + 50}" y="{y + 4}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def overlay(options: argparse.Namespace, job: Job) -> None:
    """Train both with the same weights, images and random numbers; write and plot their losses."""
    job = dataclasses.replace(job, warm_up=0, steps=options.curves)
    losses = {
        name: measure_apart(dataclasses.replace(job, variant=name), options.threads)["losses"]
        for name in STYLES
    }
    write_atomically(options.out.with_suffix(".json"), json.dumps(losses).encode())
    write_atomically(options.out.with_suffix(".svg"), chart(losses).encode())
    last = -(-options.curves // 10)
    for term in TERMS:
        plain, ours = (fmean(each[term] for each in losses[name][-last:]) for name in STYLES)
        print(f"{term:20} mean of the last {last} steps: plain {plain:.4g}, ours {ours:.4g}")


def variants(text: str) -> list[str]:
    """Read names of variants, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"no variant {name!r}; there are {', '.join(VARIANTS)}")
    return names


def main() -> None:
    """Compare the variants, or plot the losses of two of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="with good parts in train/good; else parts are rendered"
    )
    parser.add_argument("--images", type=int, default=20, help="number of parts (20)")
    parser.add_argument("--natural", type=Path, metavar="DIR", help="photographs; else rendered parts")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the teacher; else random")
    parser.add_argument("--model", default="efficientad-s", choices=["efficientad-s", "efficientad-m"])
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row in a round (20)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those (3)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="else torch's default")
    parser.add_argument("--only", type=variants, metavar="NAMES", help="rows, separated by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the seconds of every step here")
    parser.add_argument("--curves", type=int, metavar="N", help="train N steps and plot the losses instead")
    parser.add_argument("--out", type=Path, default=Path("curves"), help="for --curves: OUT.json and OUT.svg")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return print(json.dumps(measure(Job(**options.measure))))
    with tempfile.TemporaryDirectory() as folder:
        job = lay_out(options, Path(folder))
        return overlay(options, job) if options.curves else compare(options, job)


if __name__ == "__main__":
    main()
