"""Who takes part in a benchmark: a model file or an untrained method, and what runs it how."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blemish.errors import ConfigError, ModelFileError
from blemish.images import Preprocessing
from blemish.inference import bundle
from blemish.inference.bundle import Bundle
from blemish.inference.choice import BACKENDS, PRECISIONS, Choice, refuse_precision
from blemish.inference.engines import Engine, open_engine, open_graph
from blemish.inference.manifest import Manifest
from blemish.progress import Report, silent, tell

if TYPE_CHECKING:
    from torch import nn

    from blemish.detectors.base import Detector

Rewrite = Callable[["Detector"], "nn.Module"]

PACKAGES = {"torch": "train", "openvino": "openvino"}
"""Which of a backend's packages comes with which extra of ours."""


@dataclass(frozen=True)
class Entry:
    """Who is asked to take part, and what was said of how: "" and None are up to the source."""

    source: str
    """A model file or a method's name."""
    plain: bool = False
    """Whether the method's own network runs, and not the fused one."""
    backend: str = ""
    precision: str = ""

    @property
    def is_file(self) -> bool:
        """Whether the source is a model file."""
        return self.source.endswith(".blemish") or Path(self.source).is_file()


@dataclass(frozen=True)
class Work:
    """What a network computes for one image. FLOPs count a multiply-add as two."""

    parameters: int
    """Of the detector, whose fused network may have fewer or more."""
    flops: int
    """Of the network that runs."""
    plain_flops: int
    """Of the detector's own network, before it is fused."""


@dataclass(frozen=True)
class Contender:
    """One row of a benchmark, ready to be opened in a process of its own."""

    name: str
    opened: Bundle
    """The model file, or what one of an untrained detector would hold; without thresholds then."""
    choice: Choice
    network: Rewrite | None = None
    """Makes the plain network of a detector; None: the model file runs as it does in use."""
    channels_last: bool = False
    """Of a plain network in PyTorch."""
    trained: bool = True
    work: Work | None = None
    """None where torch is not installed, or the weights are of an earlier version."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return self.opened.manifest.preprocessing.image_size


def read_entry(text: str) -> Entry:
    """Read [plain:]SOURCE[:backend[:precision]]; raise ConfigError.

    >>> read_entry("plain:efficientad-s:openvino:bf16")
    Entry(source='efficientad-s', plain=True, backend='openvino', precision='bf16')
    >>> read_entry(r"C:\\parts.blemish:torch").source
    'C:\\\\parts.blemish'
    """
    form = re.fullmatch(r"(plain:)?(.+\.blemish|[^:]+)(?::([^:]+))?(?::([^:]+))?", text)
    if form is None:
        raise ConfigError(f"found {text!r}; expected [plain:]F.blemish|METHOD[:BACKEND[:PRECISION]]")
    plain, source, backend, precision = form.groups(default="")
    for name, value, known in (("backend", backend, BACKENDS), ("precision", precision, PRECISIONS)):
        if value and value not in known:
            raise ConfigError(f"unknown {name} {value!r} in {text!r}; expected {', '.join(known)}")
    return Entry(source, bool(plain), backend, precision)


def prepare(
    entry: Entry,
    device: str = "",
    settings: Mapping[str, Any] | None = None,
    report: Report = silent,
) -> Contender:
    """Find or build what an entry speaks of, and choose how it runs; raise ConfigError or ModelFileError.

    device: "" as the file says. On a GPU the precision is half unless something says otherwise. settings:
    of an untrained method; its weights are drawn, since time does not depend on them.
    """
    if entry.is_file and settings:
        raise ConfigError(
            f"settings {', '.join(settings)} for {entry.source}: a model file has its own; expected none"
        )
    opened = bundle.read(Path(entry.source)) if entry.is_file else untrained(entry.source, settings or {})
    choice = choose(entry, device, opened)
    network = unchanged if entry.plain else None
    name = f"{'plain:' * entry.plain}{Path(entry.source).name}:{choice.backend}:{choice.precision}"
    return complete(Contender(name, opened, choice, network, trained=entry.is_file), report)


def choose(entry: Entry, device: str, opened: Bundle) -> Choice:
    """Settle backend, precision and device; raise ConfigError for what the machine or the graph has not.

    ONNX Runtime computes in what the graph holds, so half precision on CUDA is PyTorch's by default.
    """
    start = Choice() if entry.plain else opened.manifest.engine
    quantised = start.precision == "int8"
    moved = device == "cuda" != start.device and not quantised
    backend = entry.backend or ("torch" if moved else start.backend)
    precision = entry.precision or ("fp16" if moved and backend == "torch" else start.precision)
    made = replace(start, backend=backend, precision=precision, device=device or start.device)
    refuse_precision(made, start, entry.source)
    if backend in PACKAGES and find_spec(backend) is None:
        raise ConfigError(
            f"backend {backend} is not installed; expected blemish[{PACKAGES[backend]}], or another backend"
        )
    return made


def untrained(name: str, settings: Mapping[str, Any]) -> Bundle:
    """Build a method with random weights, as a model file would hold it: without a graph or thresholds."""
    from safetensors.torch import save

    from blemish.detectors import registry
    from blemish.detectors.settings import as_json

    detector = registry.build(name, registry.configure(name, settings=settings), seed=0)
    manifest = Manifest.untrained(
        name, as_json(detector.config), Preprocessing(detector.config.image_size), detector.outputs
    )
    state = {key: value.contiguous() for key, value in detector.state_dict().items()}
    return Bundle(Path(name), manifest, save(state), b"")


def unchanged(detector: Detector) -> nn.Module:
    """Return the detector's own network."""
    return detector


def complete(contender: Contender, report: Report) -> Contender:
    """Count a contender's work, and trace its graph where the model file has none that fits."""
    traced = contender.choice.backend != "torch" and (contender.network or not contender.trained)
    if not traced and find_spec("torch") is None:
        return contender
    from blemish.detectors import onnx_graph
    from blemish.detectors.fusing import flops
    from blemish.inference.engines.pytorch import restored

    try:
        detector = restored(contender.opened)
    except ModelFileError as error:
        if traced or contender.choice.backend == "torch":
            raise
        tell(report, f"not counting FLOPs: {error}")  # a graph of an earlier version runs all the same
        return contender
    size, export = contender.image_size, contender.opened.manifest.export
    network = contender.network(detector) if contender.network else detector.fused()
    plain = flops(detector, size) if contender.network is None else 0
    count = flops(network, size)
    if contender.network is None and contender.choice.backend != "torch" and export is not None:
        count = export.flops  # fewer, with fewer channels
    work = Work(sum(each.numel() for each in detector.parameters()), count, plain or count)
    opened = contender.opened
    if traced:
        opened = replace(opened, graph=onnx_graph.traced(network, size, detector.outputs))
    return replace(contender, opened=opened, work=work)


def open_contender(contender: Contender, threads: int) -> Engine:
    """Make a contender ready to run; raise ConfigError or ModelFileError."""
    if contender.network is None:
        return open_engine(contender.opened, contender.choice, threads)
    outputs = contender.opened.manifest.outputs
    if contender.choice.backend != "torch":
        return open_graph(contender.opened.graph, outputs, contender.choice, threads)
    from blemish.inference.engines.plain import PlainTorch
    from blemish.inference.engines.pytorch import restored

    network = contender.network(restored(contender.opened))
    return PlainTorch(network, outputs, contender.choice, threads, channels_last=contender.channels_last)
