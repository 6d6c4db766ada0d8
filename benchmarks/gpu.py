"""Whether the methods train and score on a GPU as they do on the processor, and how fast.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --only efficientad --seconds 2 --rounds 3
    python benchmarks/gpu.py --device cpu --steps 2 --runs 3 --rounds 1 --no-compile    tries the script out

Each row trains a method for a few steps on rendered parts (`blemish demo`), with `blemish.train`. Its model
file is then opened in ONNX Runtime on the processor and in PyTorch on the device, there in every precision,
and all judge the same images.

Times follow the papers' protocol (EfficientAD's supplement): one image of 256 x 256 that lies resized on the
host; a run copies it to the device, computes, and copies map and statistics back, which waits for the device.
1,000 runs to warm up, then 1,000 timed ones, five times, or as many as fit a limit of seconds; the variants
take turns in every round. The throughput is that of batches. With the default limit a model takes about three
minutes. The variants:

    plain       the method's own network, as a peer ships it, each operation launched by itself
    fused       the network that a model file runs, launched operation by operation
    graph       that, as one recorded CUDA graph: what `blemish.load(..., device="cuda")` runs
    searched    that graph, recorded with the fastest of cuDNN's algorithms (torch.backends.cudnn.benchmark)
    compiled    that graph, with kernels made by torch.compile

in float32 with and without TF32, float16 and bfloat16. "tf32" allows TF32 in convolutions and in products of
matrices; PyTorch's own default, in convolutions alone, is what model files run in at precision fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import blemish
from blemish.benchmark import machine
from blemish.demo import dataset
from blemish.detectors.fusing import Lowered
from blemish.errors import BlemishError
from blemish.inference import bundle
from blemish.inference.engines.pytorch import restored
from blemish.progress import Event

SIZE = (256, 256)
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What the layers of a variant compute in; "fp32" and "tf32" differ in a switch of PyTorch's."""
VARIANTS = (
    *("plain:fp32", "plain:tf32", "plain:fp16", "plain:bf16"),
    *("fused:fp32", "fused:tf32", "fused:fp16", "fused:bf16"),
    *("graph:fp32", "graph:tf32", "graph:fp16", "graph:bf16"),
    *("searched:tf32", "searched:fp16", "searched:bf16"),
    "compiled:fp16",
)
REFERENCE = "plain:tf32"
"""Ratios are to this variant."""
Images = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Case:
    """One method under one supervision."""

    model: str
    supervision: str = "none"
    timed: bool = True
    """Whether its inference is timed; that of another case would be the same."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """More of `blemish.train`'s."""


DEFECTS: dict[str, Any] = {"train_defects": 8}
CASES = {
    "efficientad-s": Case("efficientad-s"),
    "efficientad-m": Case("efficientad-m"),
    "supersimplenet": Case("supersimplenet"),
    "supersimplenet weak": Case("supersimplenet", "weak", False, DEFECTS),
    "supersimplenet mixed": Case("supersimplenet", "mixed", False, DEFECTS | {"train_masks": 4}),
    "supersimplenet full": Case("supersimplenet", "full", True, DEFECTS),
    "simplenet": Case("simplenet"),
}


# --- training ---


def train(case: Case, parts: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train a case and write its model file; return the time of a step and the loss's course."""
    marks: list[float] = []

    def note(event: Event) -> None:
        if event.phase == "training":
            marks.append(time.perf_counter())  # a step has waited for the device: its losses are numbers

    start = time.perf_counter()
    blemish.train(
        parts,
        out=out,
        report=note,
        model=case.model,
        layout="mvtec",
        supervision=case.supervision,
        steps=options.steps,
        device=options.device,
        seed=options.seed,
        natural_images=options.natural,
        **case.options,
    )
    seconds = [after - before for before, after in pairwise(marks)]
    manifest = bundle.read(out).manifest
    losses = [point["loss"] for point in manifest.training.history]
    tenth = max(1, len(losses) // 10)
    return {
        "step_ms": 1e3 * statistics.median(seconds[len(seconds) // 4 :]),
        "first_step_ms": 1e3 * seconds[0],
        "steps": len(seconds),
        "seconds": time.perf_counter() - start,
        "batch_size": manifest.config["batch_size"],
        "precision": manifest.training.run.precision,
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
    }


def same_twice(case: Case, parts: Path, first: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train a case once more; return whether its weights are the same bytes, and how far apart they are."""
    from safetensors.torch import load

    again = first.with_name(f"again_{first.name}")
    train(case, parts, again, options)
    one, other = (load(bundle.read(path).weights) for path in (first, again))
    gaps = [
        float((one[name].double() - other[name].double()).norm() / (one[name].double().norm() + 1e-12))
        for name in one
    ]
    return {"same": all(torch.equal(one[name], other[name]) for name in one), "largest_gap": max(gaps)}


# --- agreement ---


def agreement(path: Path, files: Sequence[Path], device: str) -> dict[str, Any]:
    """Compare verdicts of a model file on the processor with those of PyTorch on the device.

    Differences of maps and scores are in standard deviations of the processor's.
    """
    expected = blemish.load(path).predict_batch(files)
    spread = float(np.std([verdict.map for verdict in expected]))
    scores = np.array([verdict.score for verdict in expected])
    found: dict[str, Any] = {}
    for name, precision in (("fp32", "fp32"), ("tf32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")):
        with products(name):
            model = blemish.load(path, backend="torch", device=device, precision=precision)
            together = model.predict_batch(files)
            alone = [model.predict(file) for file in files]
        pairs = list(zip(together, expected, strict=True))
        found[name] = {
            "map_largest": max(float(np.abs(a.map - b.map).max()) for a, b in pairs) / spread,
            "map_rms": float(np.sqrt(np.mean([np.square(a.map - b.map).mean() for a, b in pairs]))) / spread,
            "score_largest": float(
                np.abs(np.array([a.score for a in together]) - scores).max() / scores.std()
            ),
            "labels_changed": sum(a.label != b.label for a, b in pairs),
            "alone_and_in_a_batch": max(
                float(np.abs(a.map - b.map).max()) for a, b in zip(alone, together, strict=True)
            )
            / spread,
            "images": len(files),
        }
    return found


@contextlib.contextmanager
def products(name: str) -> Iterator[None]:
    """Let float32 compute in TF32 unless a variant is named fp32, and cuDNN search where it says so."""
    convolutions, matrices = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, matrices.allow_tf32, convolutions.benchmark
    convolutions.allow_tf32 = matrices.allow_tf32 = not name.endswith("fp32")
    convolutions.benchmark = name.startswith("searched")
    try:
        yield
    finally:
        convolutions.allow_tf32, matrices.allow_tf32, convolutions.benchmark = before


# --- inference ---


def runner(name: str, path: Path, device: str) -> Callable[[Images], Any]:
    """Return what runs (B, 3, H, W) images through a model file as a variant does, outputs copied back."""
    kind, precision = name.split(":")
    if kind in ("graph", "searched", "compiled"):
        opened = blemish.load(
            path,
            backend="torch",
            device=device,
            precision="fp32" if precision == "tf32" else precision,
            compiled=kind == "compiled",
        )
        return opened.engine.run
    detector = restored(bundle.read(path)).eval()
    network = detector if kind == "plain" else detector.fused()
    layout = torch.contiguous_format if kind == "plain" else torch.channels_last
    lowered = Lowered(network, DTYPES[precision])
    ready: nn.Module = lowered.eval().to(device).to(memory_format=layout)  # type: ignore[call-overload]

    def run(inputs: Images) -> list[Images]:
        with torch.inference_mode():
            found = ready(torch.from_numpy(inputs).to(device).contiguous(memory_format=layout))
            return [np.asarray(tensor.cpu()) for tensor in found]

    return run


def times(path: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Time every variant of a model file: latency of one image, throughput of a batch."""
    rng = np.random.default_rng(0)
    one = rng.random((1, 3, *SIZE), np.float32)
    many = rng.random((options.batch, 3, *SIZE), np.float32)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable[[Images], Any]] = {}
    for name in variants(options):
        try:
            with products(name):
                start = time.perf_counter()
                run = runner(name, path, options.device)
                for inputs in (one, many):
                    run(inputs)
                found[name] = {"open_seconds": time.perf_counter() - start, "latency": [], "batches": []}
                clocked(run, one, options.warm_up, options.seconds)
            ready[name] = run
        except (RuntimeError, BlemishError, TypeError) as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    for _ in range(options.rounds):
        for name, run in ready.items():
            with products(name):
                clocked(run, one, options.warm_up // 10, options.seconds / 10)
                found[name]["latency"] += clocked(run, one, options.runs, options.seconds)
                clocked(run, many, 2, options.seconds / 10)
                found[name]["batches"] += clocked(run, many, options.runs // 10, options.seconds)
    for row in found.values():
        if "error" not in row:
            latency, batches = np.array(row.pop("latency")), np.array(row.pop("batches"))
            row["median_ms"], row["p99_ms"] = (1e3 * float(np.quantile(latency, q)) for q in (0.5, 0.99))
            row["mean_ms"], row["runs"] = 1e3 * float(latency.mean()), len(latency)
            row["images_a_second"] = options.batch / float(np.median(batches))
    return found


def variants(options: argparse.Namespace) -> list[str]:
    """List the variants that the device has and the options ask for."""
    return [
        name
        for name in VARIANTS
        if (options.device != "cpu" or name.startswith(("plain:fp32", "fused:fp32")))
        and not (options.no_compile and name.startswith("compiled"))
    ]


def clocked(run: Callable[[Images], Any], inputs: Images, runs: int, limit: float) -> list[float]:
    """Return the seconds of each of so many runs, at least one, fewer where they take longer than a limit."""
    seconds: list[float] = []
    while not seconds or (len(seconds) < runs and sum(seconds) < limit):
        start = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - start)
    return seconds


# --- the whole ---


def measure(name: str, case: Case, parts: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train, compare and time one case; return what was found, and the error where one ended it."""
    path = folder / f"{name.replace(' ', '_')}.blemish"
    found: dict[str, Any] = {"case": name}
    files = sorted((parts / "test").glob("*/*.png"))[: options.images]
    stages: dict[str, Callable[[], Any]] = {
        "training": lambda: train(case, parts, path, options),
        "agreement": lambda: agreement(path, files, options.device),
    }
    if case.timed and not options.no_times:
        stages["times"] = lambda: times(path, options)
    if options.twice:
        stages["twice"] = lambda: same_twice(case, parts, path, options)
    for stage, work in stages.items():
        start = time.perf_counter()
        try:
            found[stage] = work()
        except (RuntimeError, BlemishError, TypeError) as error:
            found["error"] = f"{stage}: {type(error).__name__}: {error}"
            print(f"{name}: {found['error']}", flush=True)
            if stage == "training":
                break
        finally:
            found[f"{stage}_wall"] = round(time.perf_counter() - start, 1)
    return found


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows as text."""
    lines = ["Training", f"{'':24}{'ms a step':>10}{'batch':>7}  {'precision':10}{'loss':>18}"]
    for row in rows:
        if t := row.get("training"):
            losses = f"{t['loss_first']:.3f} to {t['loss_last']:.3f}"
            lines.append(
                f"{row['case']:24}{t['step_ms']:10.2f}{t['batch_size']:7}  {t['precision']:10}{losses:>18}"
            )
    lines += ["", "Agreement with ONNX Runtime on the processor, in standard deviations", ""]
    lines.append(f"{'':24}{'':6}{'map, largest':>14}{'map, rms':>12}{'score':>12}{'labels':>8}")
    for row in rows:
        for precision, each in row.get("agreement", {}).items():
            lines.append(
                f"{row['case']:24}{precision:6}{each['map_largest']:14.1e}{each['map_rms']:12.1e}"
                f"{each['score_largest']:12.1e}{each['labels_changed']:8}"
            )
    lines += ["", f"Inference; ratios to {REFERENCE}", ""]
    lines.append(f"{'':24}{'':16}{'median ms':>10}{'p99 ms':>9}{'ratio':>7}{'images/s':>10}{'ratio':>7}")
    for row in rows:
        timed = row.get("times", {})
        base = timed.get(REFERENCE, {})
        for variant, each in timed.items():
            if "error" in each:
                lines.append(f"{row['case']:24}{variant:16}{each['error']}")
                continue
            ratios = ("", "")
            if "median_ms" in base:
                ratios = (
                    f"{base['median_ms'] / each['median_ms']:.2f}",
                    f"{each['images_a_second'] / base['images_a_second']:.2f}",
                )
            lines.append(
                f"{row['case']:24}{variant:16}{each['median_ms']:10.3f}{each['p99_ms']:9.3f}{ratios[0]:>7}"
                f"{each['images_a_second']:10.0f}{ratios[1]:>7}"
            )
    lines += ["", *(f"{row['case']}: {row['error']}" for row in rows if "error" in row)]
    lines += [f"{row['case']} trained twice: {row['twice']}" for row in rows if "twice" in row]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="PART", help="cases with this in their names"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=40, help="of training, for each case (40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--natural",
        default="drawn",
        metavar="FOLDER",
        help="photographs for EfficientAD's penalty (rendered)",
    )
    parser.add_argument("--images", type=int, default=24, help="that both engines judge (24)")
    parser.add_argument(
        "--warm-up", type=int, default=1000, metavar="N", help="runs before the timed ones (1000)"
    )
    parser.add_argument("--runs", type=int, default=1000, help="timed runs of one image in a round (1000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="for a variant's runs in a round, at most (0.5)"
    )
    parser.add_argument("--batch", type=int, default=16, help="images in a run for the throughput (16)")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes minutes"
    )
    parser.add_argument("--no-times", action="store_true", help="train and compare alone")
    parser.add_argument("--twice", action="store_true", help="train each case twice and compare the weights")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    rows = []
    about: dict[str, Any] = {"gpu": gpu, "machine": asdict(machine.describe())}
    about["options"] = {key: str(value) for key, value in vars(options).items()}
    with tempfile.TemporaryDirectory() as temporary:
        parts = Path(temporary) / "parts"
        dataset.draw(parts, options.seed, train=60, test_good=12, per_kind=4, size=SIZE[0])
        for name, case in CASES.items():
            if not options.only or any(part in name for part in options.only):
                rows.append(measure(name, case, parts, Path(temporary), options))
                if options.json:
                    options.json.write_text(json.dumps(about | {"rows": rows}, indent=1))
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    print(f"{gpu}, PyTorch {torch.__version__}, cuDNN {cudnn}", tables(rows), sep="\n\n")


if __name__ == "__main__":
    main()
