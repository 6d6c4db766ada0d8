"""The entries of a benchmark: a model file or an untrained method, and how it is run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blemish.errors import ConfigError, ModelFileError
from blemish.images import FULL_SCALE, Preprocessing
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
"""The extra of Blemish that installs each backend's package."""


@dataclass(frozen=True)
class Entry:
    """An entry as the user gives it; empty fields are determined by the source."""

    source: str
    """A model file or a method's name."""
    plain: bool = False
    """Whether to run the method's own network instead of the fused one."""
    backend: str = ""
    precision: str = ""

    @property
    def is_file(self) -> bool:
        """Whether the source is a model file."""
        return self.source.endswith(".blemish") or Path(self.source).is_file()


@dataclass(frozen=True)
class Work:
    """What a network computes for one image. A multiply-add counts as two FLOPs."""

    parameters: int
    """Those of the detector; its fused network may have fewer or more."""
    flops: int
    """Those of the network that runs."""
    plain_flops: int
    """Those of the detector's own network, before it is fused."""


@dataclass(frozen=True)
class Contender:
    """One row of a benchmark, ready to be opened in a process of its own."""

    name: str
    opened: Bundle
    """The model file, or the equivalent for an untrained detector, without thresholds."""
    choice: Choice
    network: Rewrite | None = None
    """Builds the plain network of a detector; None: the model file runs as in normal use."""
    channels_last: bool = False
    """Whether a plain network in PyTorch uses the channels-last layout."""
    trained: bool = True
    work: Work | None = None
    """None if torch is not installed, or if the weights are of an earlier version."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return self.opened.manifest.preprocessing.image_size


def read_entry(text: str) -> Entry:
    """Parse [plain:]SOURCE[:backend[:precision]]; raise ConfigError if it does not fit.

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
    """Open or build what an entry names, and choose how it runs; raise ConfigError or ModelFileError.

    device: "" for that of the file. On a GPU the precision is half unless another is given. settings: those
    of an untrained method, whose weights are random, since they do not affect the timing.
    """
    if entry.is_file and settings:
        raise ConfigError(
            f"settings {', '.join(settings)} for {entry.source}: a model file has its own; expected none"
        )
    opened = bundle.read(Path(entry.source)) if entry.is_file else untrained(entry.source, settings or {})
    choice = choose(entry, device, opened)
    network = plain_network if entry.plain else None
    name = f"{'plain:' * entry.plain}{Path(entry.source).name}:{choice.backend}:{choice.precision}"
    return with_work_and_graph(Contender(name, opened, choice, network, trained=entry.is_file), report)


def choose(entry: Entry, device: str, opened: Bundle) -> Choice:
    """Choose backend, precision and device; raise ConfigError for what the machine or the graph lacks.

    ONNX Runtime computes in the precision of the graph, so half precision on CUDA runs in PyTorch by default.
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
    """Build a method with random weights as the contents of a model file, without graph and thresholds."""
    from safetensors.torch import save

    from blemish.detectors import registry
    from blemish.detectors.settings import as_json

    detector = registry.build(name, registry.configure(name, settings=settings), seed=0)
    manifest = Manifest.untrained(
        name,
        as_json(detector.config),
        Preprocessing(detector.config.image_size, FULL_SCALE),
        detector.outputs,
    )
    state = {key: value.contiguous() for key, value in detector.state_dict().items()}
    return Bundle(Path(name), manifest, save(state), b"")


def plain_network(detector: Detector) -> nn.Module:
    """Return the detector itself, which is its own network."""
    return detector


def with_work_and_graph(contender: Contender, report: Report) -> Contender:
    """Count a contender's work, and trace its graph if the model file has none that fits."""
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
        tell(report, f"not counting FLOPs: {error}")  # a graph of an earlier version runs nevertheless
        return contender
    size, export = contender.image_size, contender.opened.manifest.export
    network = contender.network(detector) if contender.network else detector.fused()
    plain = flops(detector, size) if contender.network is None else 0
    count = flops(network, size)
    if contender.network is None and contender.choice.backend != "torch" and export is not None:
        count = export.flops  # fewer with reduced channels
    work = Work(sum(each.numel() for each in detector.parameters()), count, plain or count)
    opened = contender.opened
    if traced:
        opened = replace(opened, graph=onnx_graph.export_network(network, size, detector.outputs))
    return replace(contender, opened=opened, work=work)


def open_contender(contender: Contender, threads: int) -> Engine:
    """Prepare a contender for running; raise ConfigError or ModelFileError."""
    if contender.network is None:
        return open_engine(contender.opened, contender.choice, threads)
    outputs = contender.opened.manifest.outputs
    if contender.choice.backend != "torch":
        return open_graph(contender.opened.graph, outputs, contender.choice, threads)
    from blemish.inference.engines.plain import PlainTorch
    from blemish.inference.engines.pytorch import restored

    network = contender.network(restored(contender.opened))
    return PlainTorch(network, outputs, contender.choice, threads, channels_last=contender.channels_last)
