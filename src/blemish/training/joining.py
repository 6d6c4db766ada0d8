"""Train joined methods: each part as it is alone, then scales and thresholds from the same good images.

Part k of a run that writes F is kept in F.part<k> until the run ends, and is not trained again by --resume.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from blemish import data
from blemish.backbones import weights
from blemish.data.loading.cache import Memory
from blemish.data.loading.stores import ImageStore
from blemish.detectors import registry
from blemish.detectors.base import Detector
from blemish.detectors.joined.config import JoinedConfig
from blemish.detectors.joined.detector import Joined, Scale
from blemish.detectors.settings import as_json
from blemish.detectors.sizing import written
from blemish.devices import choose_device
from blemish.errors import ConfigError, DataError, ModelFileError, StoppedError
from blemish.files import check_writable, short_digest
from blemish.images import Preprocessing
from blemish.inference import bundle, calibration
from blemish.inference.bundle import Bundle
from blemish.inference.engines.pytorch import restored
from blemish.inference.predictor import Predictor
from blemish.progress import Report, Stop, never, silent, tell, tracked
from blemish.training.expected import difference, expected
from blemish.training.finalise import COMPARED, finalise
from blemish.training.plan import Plan, plan
from blemish.training.request import TrainingRequest
from blemish.training.session import checkpoint_path, part_path, remains

TrainPart = Callable[..., Predictor]
"""Carries out the training request of one part: `run.run`."""

SCALED_BY = 100
"""Good images, at most, that the parts are brought to one scale by."""
SCORED = 1000
"""Good images, at most, that thresholds are set from."""


def run(
    request: TrainingRequest, train_part: TrainPart, *, report: Report = silent, stop: Stop = never
) -> Predictor:
    """Carry out the training request of joined methods; see `train`."""
    check_writable(request.out)
    requests = requests_of_parts(request)
    planned = [plan(each) for each in requests]
    refuse(request, requests, planned)
    try:
        parts = train_parts(request, requests, planned, train_part, report, stop)
        opened = join(request, parts, report, stop)
    except StoppedError as error:
        raise StoppedError(str(error).replace("command again", "command with --resume")) from error
    for asked in requests:
        asked.out.unlink(missing_ok=True)
    return opened


def train_parts(
    request: TrainingRequest,
    requests: Sequence[TrainingRequest],
    planned: Sequence[Plan],
    train_part: TrainPart,
    report: Report,
    stop: Stop,
) -> list[Bundle]:
    """Train the parts that are not there yet, those without steps first, and open all."""
    pairs = list(zip(requests, planned, strict=True))
    for asked, _ in pairs:
        if asked.out.exists():
            refuse_another_run(asked)
            tell(report, f"{asked.out.name}, {asked.model}: trained before")
    left = [(asked, wanted) for asked, wanted in pairs if not asked.out.exists()]
    left.sort(key=lambda pair: pair[1].method.has_steps)
    started, waiting = time.monotonic(), sum(wanted.method.has_steps for _, wanted in left)
    for asked, wanted in left:
        if wanted.method.has_steps and request.budget is not None:
            seconds = float(request.budget) - (time.monotonic() - started)
            asked = dataclasses.replace(asked, budget=max(seconds / waiting, 1.0))
            waiting -= 1
        tell(report, f"{asked.out.name}: {asked.model}")
        train_part(asked, report=report, stop=stop)
    return [bundle.read(asked.out) for asked in requests]


# --- what each part is asked for ---


def requests_of_parts(request: TrainingRequest) -> list[TrainingRequest]:
    """Return the request of each part; raise ConfigError for what joined methods do not support."""
    name = str(request.model)
    unsupported = {
        "--from": request.start is not None,
        "--weights": request.weights is not None,
        "--light standardise": request.light not in (None, "off"),
    }
    for option, given in unsupported.items():
        if given:
            raise ConfigError(f"{option}: joined methods ({name}) do not support it; leave it out")
    if request.natural_images != "drawn" and not any(
        registry.method(part).config.reads_natural_images for part in registry.parts_of(name)
    ):
        raise ConfigError(f"natural images {request.natural_images}: no part of {name} reads them")
    found: list[TrainingRequest] = []
    for number, (part, settings) in enumerate(
        zip(registry.parts_of(name), registry.settings_of_parts(name, request.settings), strict=True), 1
    ):
        asked = request_of_part(request, number, part, settings)
        if any((each.model, each.settings) == (asked.model, asked.settings) for each in found):
            raise ConfigError(f"{name}: two parts are the same; expected another method or other settings")
        found.append(asked)
    return found


def request_of_part(
    request: TrainingRequest, number: int, part: str, settings: dict[str, Any]
) -> TrainingRequest:
    """Return the request of one part: only a method with steps is given their number, a schedule, ..."""
    method = registry.method(part)
    changes: dict[str, Any] = {}
    if not method.has_steps:
        changes = {"steps": None, "epochs": None, "budget": None, "schedule": "default", "resume": False}
    if not method.config.reads_natural_images:
        changes["natural_images"] = "drawn"
    return dataclasses.replace(
        request, out=part_path(request.out, number), model=part, settings=settings, **changes
    )


def refuse(request: TrainingRequest, requests: Sequence[TrainingRequest], planned: Sequence[Plan]) -> None:
    """Raise a BlemishError for what would fail after some of the parts have been trained for nothing."""
    if request.length.given and not any(each.method.has_steps for each in planned):
        raise ConfigError(
            f"{' and '.join(request.length.given)}: {request.model} is fitted in one pass; expected none"
        )
    largest(str(request.model), [each.config.image_size for each in planned])
    left = remains(request.out, request.model)
    if left and not request.resume:
        raise ConfigError(
            f"{left[0]} belongs to an unfinished run: continue it with --resume, or delete the file"
        )
    known = {path for each in requests for path in (each.out, checkpoint_path(each.out, resume=True))}
    for path in left:
        if path not in known:
            raise ConfigError(f"{path} is no part of {request.model}; delete it, or choose another --out")
    for each in planned:
        detector = registry.build(each.model, each.config, request.seed)
        if detector.frozen:
            weights.find(detector.pretrained_name)


def largest(name: str, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size that images are read at for all parts; raise ConfigError if none is the largest."""
    height, width = max(sizes, key=math.prod)
    for size in sizes:
        if size[0] > height or size[1] > width:
            raise ConfigError(
                f"the parts of {name} see {written(size)} and {written((height, width))} pixels; expected "
                "one of them to be the larger in both directions"
            )
    return height, width


def refuse_another_run(asked: TrainingRequest) -> None:
    """Raise ModelFileError for a part that was trained before, but by another run."""
    if text := difference(bundle.read(asked.out).manifest.to_json(), expected(asked), ""):
        raise ModelFileError(f"{asked.out} belongs to another run: {text}")


def expected_of_parts(request: TrainingRequest) -> dict[str, Any]:
    """Return what is known of the model file of joined methods before they are trained."""
    planned = [plan(each) for each in requests_of_parts(request)]
    parts = [{"method": each.model, "config": as_json(each.config)} for each in planned]
    return {
        "training": {
            "run": {"model": request.model, "seed": request.seed, "config": {"parts": parts}},
        },
        "calibration": {"false_reject_rate": request.false_reject_rate},
    }


# --- joining them ---


def join(request: TrainingRequest, parts: Sequence[Bundle], report: Report, stop: Stop) -> Predictor:
    """Bring trained parts to one scale, set thresholds, and write the file of all."""
    preprocessing = common(request, parts)
    config = JoinedConfig(
        image_size=preprocessing.image_size,
        parts=tuple({"method": each.manifest.method, "config": each.manifest.config} for each in parts),
    )
    device = choose_device(request.device)
    detector = Joined(config, [restored(each) for each in parts]).eval().to(device)
    digests = scored_images(parts)
    paths = paths_of(request, digests)
    store = ImageStore(paths, preprocessing, Memory(request.memory))
    remembered = [
        ImageStore(paths, each.manifest.preprocessing, Memory(request.memory))
        if each.manifest.calibration.left_out
        else None
        for each in parts
    ]

    def outputs(indices: Sequence[int], phase: str) -> Iterator[list[Tensor]]:
        for index in tracked(indices, len(indices), report, phase, stop=stop):
            with torch.no_grad():
                seen = detector.average.seen(store.batch([index]).to(device))
                found = [
                    part(each) if own is None else left_out(part, own, index, device)
                    for part, own, each in zip(detector.detectors, remembered, seen, strict=True)
                ]
            yield [each[0] for each in found]

    everything = range(len(store.paths))
    some = everything[:: -(-len(everything) // SCALED_BY)]
    detector.average.set_scales(scales(outputs(some, "scaling")))
    statistics, maxima = [], []
    for found in outputs(everything, "scoring"):
        maps, values, *_ = detector.average(found)
        statistics.append(values.cpu().numpy())
        maxima.append(float(maps.amax()))
    thresholds = calibration.fit(
        np.concatenate(statistics),
        np.array(maxima),
        config.statistics,
        false_reject_rate=request.false_reject_rate,
        left_out=any(each is not None for each in remembered),
    )
    compared = store.without(frozenset(everything[COMPARED:]))
    facts = facts_of(request, config, parts, digests)
    return finalise(request.out, detector, compared, facts, lambda graph: thresholds, report=report)


def common(request: TrainingRequest, parts: Sequence[Bundle]) -> Preprocessing:
    """Return how images are read for all parts; raise ConfigError if they differ in more than their size."""
    found = [part.manifest.preprocessing for part in parts]
    size = largest(str(request.model), [each.image_size for each in found])
    first, *rest = [dataclasses.replace(each, image_size=size) for each in found]
    for each in rest:
        if each != first:
            raise ConfigError(
                f"the parts of {request.model} read images differently, as {each} and {first}; expected "
                "parts that were trained on one data set"
            )
    return first


def scored_images(parts: Sequence[Bundle]) -> list[str]:
    """Return short digests of the good images that no part has learned from, or all can leave out."""
    files = [(part.manifest.calibration.left_out, part.manifest.training.files) for part in parts]
    held = [set(used.held_out) for left_out, used in files if used is not None and not left_out]
    learned = [set(used.train) for left_out, used in files if used is not None and left_out]
    return sorted(set.intersection(*(held or learned)))[:SCORED]


def paths_of(request: TrainingRequest, digests: Sequence[str]) -> list[Path]:
    """Return the paths of the good images with these digests; raise DataError unless all are there."""
    if not digests:
        raise DataError(
            f"the parts of {request.model} have no good image in common to set thresholds from; expected "
            "parts that were trained on one data set"
        )
    wanted, found = set(digests), dict[str, Path]()
    for sample in data.scan(request.data, request.layout):
        if not sample.label and (digest := short_digest(sample.path)) in wanted:
            found.setdefault(digest, sample.path)
    if len(found) < len(wanted):
        raise DataError(
            f"found {len(found)} of {len(wanted)} good images in {request.data} that the parts were trained "
            "with; expected the data set as it was"
        )
    return [found[digest] for digest in digests]


def left_out(part: Detector, store: ImageStore, index: int, device: str) -> tuple[Tensor, ...]:
    """Return the outputs of a part for an image that it was fitted to, as if it had not been.

    What it was fitted to are features in half precision, of the image at the part's own size.
    """
    encoded = tuple(each.half().float() for each in part.encode(store.batch([index]).to(device)))
    return part.leave_out(encoded, [store.digest(index)])


def scales(outputs: Iterable[Sequence[Tensor]]) -> list[Scale]:
    """Return the scale of each part, by its maps of several good images."""
    levels, peaks = [], []
    for maps in outputs:
        levels.append([float(each.median()) for each in maps])
        peaks.append([float(each.amax()) for each in maps])
    return [
        Scale(float(level), float(peak))
        for level, peak in zip(np.median(levels, axis=0), np.median(peaks, axis=0), strict=True)
    ]


def facts_of(
    request: TrainingRequest, config: JoinedConfig, parts: Sequence[Bundle], scored_on: Sequence[str]
) -> dict[str, Any]:
    """Return what the file records about its training: of the part that saw most defects, and of all."""
    records = [part.manifest.training for part in parts]
    fullest = max(records, key=lambda record: (record.defective_images, record.steps))
    facts: dict[str, Any] = msgspec.to_builtins(fullest)
    held = [] if all(part.manifest.calibration.left_out for part in parts) else list(scored_on)
    used = [each.files for each in records if each.files is not None]
    train = {digest for each in used for digest in each.train} - set(held)
    names = {digest: name for each in used for digest, name in each.names.items()}
    before = {digest for each in used for digest in each.all} - train - set(held)
    facts["run"] |= {
        "model": str(request.model),
        "config": as_json(config),
        "pretrained": " ".join(each.run.pretrained for each in records),
    }
    return facts | {
        "pretrained": "+".join(each.pretrained for each in records),
        "steps": sum(each.steps for each in records),
        "seconds": round(sum(each.seconds for each in records), 1),
        "notes": [
            f"{part.manifest.method}: {note}" for part in parts for note in part.manifest.training.notes
        ],
        "good_images": max(each.good_images for each in records),
        "held_out_images": len(held),
        "files": {
            "train": sorted(train),
            "held_out": held,
            "before": sorted(before),
            "names": names,
        },
    }
