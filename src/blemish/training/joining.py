"""Train joined methods: each part as it is alone, then scales and thresholds from the same good images.

Part k of a run that writes F is kept in F.part<k> until the run ends, and is not trained again by --resume.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from blemish import data
from blemish.data.loading.cache import Memory
from blemish.data.loading.stores import ImageStore
from blemish.detectors import registry
from blemish.detectors.base import Detector
from blemish.detectors.joined.config import JoinedConfig
from blemish.detectors.joined.detector import Joined, Scale
from blemish.detectors.settings import as_json
from blemish.detectors.sizing import written
from blemish.errors import ConfigError, DataError, ModelFileError
from blemish.files import check_writable, short_digest
from blemish.images import Preprocessing
from blemish.inference import bundle, calibration
from blemish.inference.bundle import Bundle
from blemish.inference.engines.pytorch import restored
from blemish.inference.predictor import Predictor
from blemish.progress import Report, Stop, never, silent, tell, tracked
from blemish.training.finalise import COMPARED, finalise
from blemish.training.plan import Plan, plan
from blemish.training.request import TrainingRequest
from blemish.training.session import part_path
from blemish.types import Calibration, Sample

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
    wanted = [plan(each) for each in requests]
    refuse_lengths(request, wanted)
    largest(str(request.model), [each.config.image_size for each in wanted])
    refuse_remains(request, requests)
    for each in wanted:  # before another part is trained for nothing
        registry.build(each.model, each.config, request.seed)
    made: dict[int, Bundle] = {}
    order = sorted(range(len(requests)), key=lambda number: wanted[number].method.has_steps)
    started, waiting = time.monotonic(), sum(each.method.has_steps for each in wanted)
    for number in order:
        asked, name = requests[number], wanted[number].model
        if asked.out.exists():
            made[number] = finished(asked)
            tell(report, f"part {number + 1}, {name}: trained before")
            continue
        if wanted[number].method.has_steps and request.budget is not None:
            left = float(request.budget) - (time.monotonic() - started)
            asked = dataclasses.replace(asked, budget=max(left / waiting, 1.0))
        waiting -= wanted[number].method.has_steps
        tell(report, f"part {number + 1} of {len(requests)}: {name}")
        train_part(asked, report=report, stop=stop)
        made[number] = bundle.read(asked.out)
    parts = [made[number] for number in range(len(requests))]
    opened = join(request, parts, report, stop)
    for asked in requests:
        asked.out.unlink(missing_ok=True)
    return opened


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
    found = []
    for number, (part, settings) in enumerate(
        zip(registry.parts_of(name), registry.settings_of_parts(name, request.settings), strict=True), 1
    ):
        found.append(request_of_part(request, number, part, settings))
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


def refuse_lengths(request: TrainingRequest, planned: Sequence[Plan]) -> None:
    """Raise ConfigError for a length where no part has steps."""
    if request.length.given and not any(each.method.has_steps for each in planned):
        raise ConfigError(
            f"{' and '.join(request.length.given)}: {request.model} is fitted in one pass; expected none"
        )


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


def refuse_remains(request: TrainingRequest, requests: Sequence[TrainingRequest]) -> None:
    """Raise ConfigError for parts of an unfinished run, unless this run goes on from them."""
    found = next((each.out for each in requests if each.out.exists()), None)
    if found is not None and not request.resume:
        raise ConfigError(
            f"{found} belongs to an unfinished run: continue it with --resume, or delete the file"
        )


def finished(asked: TrainingRequest) -> Bundle:
    """Open a part that was trained before; raise ModelFileError if it belongs to another run."""
    made = bundle.read(asked.out)
    record, wanted = made.manifest.training.run, plan(asked)
    known: dict[str, Any] = {
        name: getattr(record, name) for name in ("model", "preset", "supervision", "seed")
    }
    due: dict[str, Any] = {"model": wanted.model, "preset": wanted.preset, "seed": asked.seed}
    due |= {"supervision": wanted.supervision, **as_json(wanted.config)}
    for name, expected in due.items():
        if (found := (record.config | known).get(name)) != expected:
            raise ModelFileError(f"{asked.out} belongs to another run: its {name} is {found}, not {expected}")
    return made


# --- joining them ---


def join(request: TrainingRequest, parts: Sequence[Bundle], report: Report, stop: Stop) -> Predictor:
    """Bring trained parts to one scale, set thresholds, and write the file of all."""
    preprocessing = common(request, parts)
    detectors = [restored(each) for each in parts]
    config = JoinedConfig(
        image_size=preprocessing.image_size,
        parts=tuple({"method": each.manifest.method, "config": each.manifest.config} for each in parts),
    )
    detector = Joined(config, detectors).eval()
    digests = scored_images(parts)
    store = store_of(request, digests, preprocessing)
    without = [each.manifest.calibration.left_out for each in parts]

    def outputs(indices: Sequence[int], phase: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
        for index in tracked(indices, len(indices), report, phase, stop=stop):
            with torch.no_grad():
                seen = detector.sum.seen(store.batch([index]))
                found = scored(detectors, without, seen, store.digest(index))
            yield found

    everything = range(len(store.paths))
    some = everything[:: -(-len(everything) // SCALED_BY)]
    detector.sum.measure(scales(parts, list(outputs(some, "scaling"))))
    statistics, maxima = [], []
    for found in outputs(everything, "scoring"):
        maps, values, *_ = detector.sum([one for one, _ in found], [values for _, values in found])
        statistics.append(values.numpy())
        maxima.append(float(maps.amax()))
    thresholds = calibration.fit(
        np.concatenate(statistics),
        np.array(maxima),
        config.statistics,
        false_reject_rate=request.false_reject_rate,
        left_out=any(without),
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


def store_of(request: TrainingRequest, digests: Sequence[str], preprocessing: Preprocessing) -> ImageStore:
    """Return a store of the good images with these digests; raise DataError if some are missing."""
    wanted, found = set(digests), dict[str, Path]()
    for sample in data.scan(request.data, request.layout):
        if is_good(sample) and (digest := short_digest(sample.path)) in wanted:
            found.setdefault(digest, sample.path)
    if len(found) < len(wanted):
        raise DataError(
            f"found {len(found)} of {len(wanted)} good images in {request.data} that the parts were trained "
            "with; expected the data set as it was"
        )
    paths = [found[digest] for digest in digests]
    return ImageStore(paths, preprocessing, Memory(request.memory))


def is_good(sample: Sample) -> bool:
    """Return whether a sample is a good one."""
    return sample.label == 0


def scored(
    detectors: Sequence[Detector], without: Sequence[bool], seen: Sequence[Tensor], digest: str
) -> list[tuple[Tensor, Tensor]]:
    """Return each part's maps and statistics of a good image, of which it sees (1, 3, H_i, W_i) inputs.

    without: whether the part remembers this image, and must leave it out.
    """
    found = []
    for detector, images, leave_out in zip(detectors, seen, without, strict=True):
        if leave_out:
            outputs = detector.leave_out(detector.encode(images), [digest] * len(images))
        else:
            outputs = detector(images)
        found.append((outputs[0], outputs[1]))
    return found


def scales(parts: Sequence[Bundle], outputs: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[Scale]:
    """Return the scale of each part, by its outputs for each of several good images."""
    found = []
    for number, part in enumerate(parts):
        known: Calibration = part.manifest.calibration
        maps = [each[number][0] for each in outputs]
        statistics = np.concatenate([each[number][1].numpy() for each in outputs])
        scores = calibration.image_scores(statistics, known)
        (center,), (scale,) = calibration.centers_and_scales(scores[:, None])
        level = float(np.median([float(each.median()) for each in maps]))
        peak = float(np.median([float(each.amax()) for each in maps]))
        found.append(Scale(known.centers, known.scales, (center, scale), level, peak))
    return found


def facts_of(
    request: TrainingRequest, config: JoinedConfig, parts: Sequence[Bundle], scored_on: Sequence[str]
) -> dict[str, Any]:
    """Return what the file records about its training: of the part with most steps, and of all parts."""
    records = [part.manifest.training for part in parts]
    longest = max(records, key=lambda record: record.steps)
    facts: dict[str, Any] = msgspec.to_builtins(longest)
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
        "held_out_images": len(held),
        "files": {
            "train": sorted(train),
            "held_out": held,
            "before": sorted(before),
            "names": names,
        },
    }
