"""Whether every method trains and scores on a GPU as on the processor, and how fast: one command.

    python benchmarks/gpu.py --out gpu                     at most 8 minutes on one card
    python benchmarks/gpu.py --out gpu --minutes 30 --only efficientad --compile --distil
    python benchmarks/gpu.py --out trial --dry-run         everything at its smallest, on the processor

What is done, for each method of the registry:

1. It is trained or fitted on rendered parts (`blemish demo`) with its defaults, by `blemish.train`. A step is
   timed with and without loading its batch, and so is the loading; a method without steps is timed whole.
2. A few steps, or the fit, from the same weights and with the same random numbers on both devices in float32:
   losses, weights and maps are compared.
3. The model file judges images on the device in every precision, and in ONNX Runtime on the processor:
   scores, labels and maps are compared, by the limits of `blemish export`.
4. Inference is timed by the papers' protocol, as plain and as fused network and as the CUDA graph that
   `blemish.load` records; networks of other presets that differ from the default's, too.

The parts run one after the other, so that nothing is timed while something else is on the card, and share the
time that is left by their weights. One that takes three times its share, and more than 45 seconds, is ended,
and so is the run at its limit; half of the time meant for step 4 is kept for it. DIR/gpu.json and DIR/gpu.md
are written after each part. The exit status is 1 if a part failed, or a check in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import gpu_card
import gpu_checks
import gpu_job
import gpu_learning
import gpu_page
import gpu_times
import torch
from gpu_job import Job

from blemish import files
from blemish.detectors import registry

START_AND_END = 15.0
"""Seconds of the limit for what comes before the first part and after the last."""
OVERRUN, ALWAYS = 3.0, 45.0
"""A part is ended after so many times its share, but not before so many seconds."""
KEPT = 0.5
"""Share of the time first meant for the times of inference that no other part may take."""
Found = dict[str, Any]


class OutOfTimeError(BaseException):
    """Ends a part; no part catches it."""


@dataclass(frozen=True)
class Part:
    """One thing to do."""

    name: str
    weight: float
    """Its share of the time, relative to the other parts'."""
    work: Callable[[float], Any]
    """Does it within so many seconds, if it can, and returns JSON values."""
    place: tuple[str, ...]
    """Where in the JSON file its result belongs."""
    begun: Found | None = None
    """Its result as far as it got, if it keeps one and fills what time it is given."""
    most: float = ALWAYS
    """Seconds that it may take whatever its share."""


@dataclass
class Progress:
    """What has been found, and where it is written after each part."""

    found: Found
    folder: Path
    limit: float
    """Seconds, for all parts."""
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - (time.monotonic() - self.start)

    def put(self, place: Sequence[str], value: Any) -> None:
        """Keep a part's result."""
        found = self.found
        for name in place[:-1]:
            found = found.setdefault(name, {})
        found[place[-1]] = value

    def write(self) -> None:
        """Write both files."""
        self.found["about"]["seconds"] = round(time.monotonic() - self.start, 1)
        files.write_json(self.folder / "gpu.json", self.found)
        with printed_errors():  # the page can be made from the JSON, but not the run from the page
            files.write_text(self.folder / "gpu.md", gpu_page.page(files.to_json_types(self.found)))


@contextlib.contextmanager
def printed_errors() -> Iterator[None]:
    """Print what goes wrong, and go on."""
    try:
        yield
    except Exception:
        print(traceback.format_exc(), flush=True)


# --- parts ---


def parts(job: Job, methods: Sequence[str], options: argparse.Namespace) -> list[Part]:
    """List what is to be done: what cannot be shortened first; the times, which fill what is left, last."""
    listed: list[Part] = []
    for method in methods:
        listed += method_parts(job, method)
    for size in ("small", "medium") if options.distil else ():
        listed.append(Part(f"distillation, {size}", 2, partial(distilled, job, size), ("distillation", size)))
    forms = (*gpu_times.USUAL, *["searched"] * options.searched)
    for method in methods:
        for preset in gpu_times.networks(method):
            listed.append(timed(job, method, preset, "times", 6 if preset == "default" else 4, forms=forms))
    for method in methods if options.compile else ():
        compiled = {"forms": ("compiled",), "precisions": (job.half,)}
        listed.append(timed(job, method, "default", "compiled", 6, 240.0, **compiled))
    return listed


def method_parts(job: Job, method: str) -> list[Part]:
    """List the training of a method and its checks."""
    listed = [Part(f"{method}: training", 2, partial(trained, job, method), ("methods", method, "training"))]
    for name, compare in (("learning", gpu_checks.training), ("judging", gpu_checks.judging)):
        place = ("methods", method, "checks", name)
        listed.append(Part(f"{method}: checks of {name}", 2, partial(checked, job, method, compare), place))
    return listed


def timed(
    job: Job, method: str, preset: str, place: str, weight: float, most: float = ALWAYS, **options: Any
) -> Part:
    """Return the part that times one network."""
    begun: Found = {}
    work = partial(gpu_times.inference, job, method, preset, begun, **options)
    name = f"{method}, {preset}: {place}"
    return Part(name, weight, work, ("methods", method, place, preset), begun, most)


def trained(job: Job, method: str, seconds: float) -> Found:
    """Train a method, whatever time it takes."""
    return gpu_learning.train(job, method)


def distilled(job: Job, size: str, seconds: float) -> Found:
    """Distil a teacher, whatever time it takes."""
    return gpu_learning.distillation(job, size)


def checked(
    job: Job, method: str, compare: Callable[[Job, str], list[gpu_checks.Check]], seconds: float
) -> list[Found]:
    """Compare the devices, whatever time it takes."""
    return [check.to_json() for check in compare(job, method)]


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in what takes longer, where the system has alarms."""

    def end(*_: object) -> NoReturn:
        raise OutOfTimeError

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)  # again, if something swallows it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def carry_out(todo: Sequence[Part], progress: Progress, device: str, *, patient: bool = False) -> None:
    """Do one part after the other within the limit, and write what there is after each of them.

    patient: let every part take what is left, not only its share.
    """
    whole = sum(part.weight for part in todo)
    for number, part in enumerate(todo):
        left, rest = progress.left, todo[number + 1 :]
        share = max(0.0, left) * part.weight / (part.weight + sum(each.weight for each in rest))
        kept = KEPT * progress.limit * sum(each.weight for each in rest if each.begun is not None) / whole
        if patient:
            most = left
        else:
            most = min(left if part.begun is not None else left - kept, max(part.most, OVERRUN * share))
        record: Found = {"part": part.name, "share_seconds": round(share, 1), "state": "not reached"}
        start = time.monotonic()
        if most > 0:
            print(f"{progress.limit - left:5.0f} s  {part.name}, {share:.0f} s", flush=True)
            record |= outcome(part, share, most, progress)
        record["seconds"] = round(time.monotonic() - start, 1)
        progress.found["parts"].append(record)
        gpu_times.release(device)
        progress.write()


def outcome(part: Part, share: float, most: float, progress: Progress) -> Found:
    """Do a part and keep its result; return how it ended.

    Whatever goes wrong in it is recorded: it must not cost the parts after it.
    """
    try:
        with ended_after(most):
            progress.put(part.place, part.work(share))
    except OutOfTimeError:
        if part.begun:
            progress.put(part.place, part.begun)
        return {"state": "cut off"}
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        return {"state": "failed", "error": gpu_job.in_a_line(error), "trace": traceback.format_exc()}
    return {"state": "done"}


def failed(found: Mapping[str, Any]) -> list[str]:
    """Return what failed: parts, and checks in float32."""
    names = [f"{each['part']}: {each['error']}" for each in found["parts"] if each["state"] == "failed"]
    for method, about in found["methods"].items():
        for checks in about["checks"].values():
            names += [
                f"{method}: {each['check']} is {each['value']}, at most {each['limit']}"
                for each in checks or ()
                if each["passed"] is False and each["precision"] == "fp32"
            ]
    return names


# --- the whole ---


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole run, at most (8)")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="PART", help="methods with one of these in their names"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--natural", default="drawn", metavar="FOLDER", help="photographs for a penalty")
    parser.add_argument("--compile", action="store_true", help="time torch.compile, which takes minutes")
    parser.add_argument("--searched", action="store_true", help="time cuDNN's fastest algorithms")
    parser.add_argument(
        "--distil", action="store_true", help="time a step of distilling EfficientAD's teachers"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="do everything at its smallest, on the processor"
    )
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device; --dry-run tries everything out on the processor")
    return options


def nothing_yet(job: Job, methods: Sequence[str], options: argparse.Namespace, card: Found) -> Found:
    """Return what is written before the first part: what is known, and a place for what is to be found."""
    own = {"minutes": options.minutes, "command": gpu_card.command(options.out), "half": job.half}
    return {
        "about": card | own | {"dry_run": job.dry},
        "methods": {
            name: {
                "has_steps": registry.method(name).has_steps,
                "training": None,
                "checks": {"learning": None, "judging": None},
                "times": dict.fromkeys(gpu_times.networks(name)),
            }
            for name in methods
        },
        "distillation": {},
        "published": gpu_page.published(),
        "parts": [],
    }


def main() -> int:
    options = read_options()
    card = gpu_card.describe(dry=options.dry_run)  # before this process is on the card itself
    methods = [
        name for name in registry.METHODS if not options.only or any(part in name for part in options.only)
    ]
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        job = Job("cuda", Path(temporary), seed=options.seed, natural=options.natural)
        if options.dry_run:
            torch.set_num_threads(1)
            stack.enter_context(gpu_job.narrow())
            job = Job.smallest(Path(temporary), options.seed)
        progress = Progress(
            nothing_yet(job, methods, options, card), options.out, 60 * options.minutes - START_AND_END
        )
        progress.write()
        gpu_job.lay_out(job)
        carry_out(parts(job, methods, options), progress, job.device, patient=options.dry_run)
    print((options.out / "gpu.md").read_text(encoding="utf-8"))
    problems = failed(progress.found)
    print(*problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
