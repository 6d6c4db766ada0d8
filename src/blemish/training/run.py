"""From a data set to a model file: what the training loop needs, put together, and what it made, sealed."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from blemish import data, images
from blemish._version import __version__
from blemish.backbones import weights
from blemish.data.folds import Fold, record
from blemish.data.loading.batches import Batches, NaturalImages
from blemish.data.loading.cache import Memory, open_cache
from blemish.data.loading.masks import read_masks
from blemish.data.loading.sampling import FLIPS
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.detectors.base import Detector
from blemish.detectors.registry import build
from blemish.detectors.settings import as_json
from blemish.devices import choose_device, choose_precision, keep_freed_memory
from blemish.errors import ConfigError, ModelFileError
from blemish.files import check_writable, short_digest
from blemish.inference.bundle import Bundle
from blemish.inference.calibration import check_shares
from blemish.inference.predictor import Predictor
from blemish.progress import Progress, say
from blemish.training import loop
from blemish.training.finalise import seal
from blemish.training.fingerprint import digest_all, digest_samples, digest_start
from blemish.training.length import Length, check_length, seconds
from blemish.training.loop import Run
from blemish.training.plan import Labels, Settled, learned_from, open_natural, settle, try_out
from blemish.training.session import begin, checkpoint_path


def encode_all(batches: Batches) -> Iterator[tuple[Tensor, ...]]:
    """Run the frozen part over every entry of an epoch, and give those of good images as batches of one."""
    chosen = [
        (index, flip)
        for index, label in enumerate(batches.labels)
        for flip in range(batches.flips if label else 1)
    ]
    progress = Progress("encoding", len(chosen), unit="image")
    for number, (index, flip) in enumerate(chosen):
        entry = batches.encoded.batch([(index, flip)])
        progress.show(number + 1)
        if not batches.labels[index]:
            yield entry
    say(f"features kept: {batches.encoded.cache.describe()}")


def train(
    root: str | Path,
    *,
    out: str | Path,
    model: str | None = None,
    start: str | Path | None = None,
    layout: str = "auto",
    supervision: str = "auto",
    train_defects: str | float | None = None,
    train_masks: str | float | None = None,
    fold: Fold | None = None,
    weights_file: str | Path | None = None,
    natural_images: str | Path = "drawn",
    preset: str = "default",
    settings: Mapping[str, Any] | None = None,
    schedule: str = "default",
    steps: int | None = None,
    epochs: int | None = None,
    budget: float | str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    false_reject_rate: float = 0.01,
    memory: int = 4 << 30,
    cache: str | Path = "auto",
    resume: bool = False,
) -> Predictor:
    """Train a detector on a data set, calibrate it on held-out good images, and write the model file `out`.

    start: a model file to go on from, with its method and config, in a shorter run. supervision: what is
    learned of defects; auto takes what the training images tell. train_defects, a number or a share: how many
    defective images train, drawn by the seed, where the data set's own split should not say; train_masks: how
    many of them keep their masks. fold: the part of a cross-validation that does not train. weights_file: of
    the teacher or backbone, where the weights room should not choose. natural_images: for EfficientAD's
    pretraining penalty, "drawn", a folder of photographs, or "none" to switch it off. settings: fields of the
    method's config. schedule: "paper" for the paper's own length, rates and batches, under any preset. Give
    at most one of steps, epochs and budget (seconds, or text such as "10m"). memory: bytes for all decoded
    images, and as many for all encoded ones. cache: auto keeps encoded images beyond that in files beside
    `out` until the end, a folder keeps all of them for later runs, too, off keeps none.
    Raises a BlemishError that a user can fix, as early as it can be known.
    """
    started = time.monotonic()
    length = Length(steps, epochs, seconds(budget) if isinstance(budget, str) else budget)
    check_length(length)
    check_shares(false_reject_rate=false_reject_rate)
    device, out = choose_device(device), Path(out)
    check_writable(out)
    kept = checkpoint_path(out, resume)
    faithful = preset != "default"
    # The paper trained in float32, and its noise is close to bfloat16's rounding.
    dtype = choose_precision("fp32" if faithful and precision == "auto" else precision, device)
    keep_freed_memory()
    settled = settle(
        Path(root),
        model=model,
        preset=preset,
        settings=settings,
        schedule=schedule,
        layout=layout,
        labels=Labels(supervision, train_defects, train_masks, fold),
        length=length,
        seed=seed,
        start=start,
    )
    config, parts, samples = settled.config, settled.parts, settled.samples
    detector = build(settled.model, config, seed)
    pretrained = fill(detector, settled.start, Path(weights_file) if weights_file else None)
    detector.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward_seconds = try_out(detector, device)
    decoded = Memory(memory)
    natural = open_natural(natural_images, detector, decoded, seed)

    say(settled.sentence)
    say(f"reading {len(samples)} training and {len(parts.held_out)} held-out good images")
    store = ImageStore([sample.path for sample in samples], config.image_size, decoded).fill()
    held = ImageStore([sample.path for sample in parts.held_out], config.image_size, decoded).fill()
    masks = read_masks(samples, config.image_size, detector.label_rules)
    deepest = max([*store.maxima.values(), *held.maxima.values()], default=0)
    white = images.white_level(deepest) if deepest else images.FULL_SCALE
    features = open_cache(
        cache,
        out,
        memory,
        [torch.__version__, __version__, pretrained, *detector.encoding, *config.image_size, white, device],
    )
    encoded = EncodedStore(detector.encode, store, white, features, device)
    batches = Batches(
        samples,
        store,
        encoded,
        batch_size=config.batch_size,
        seed=seed,
        with_images=detector.wants_images,
        natural=natural,
        masks=masks,
        flips=FLIPS if detector.label_rules.flips else 1,
    )
    run = Run(
        detector=detector,
        optimizer=detector.optimizer(),
        batches=batches,
        held_out=EncodedStore(detector.encode, held, white, features, device),
        seed=seed,
        device=device,
        dtype=dtype,
        path=kept,
        clock=started,
        fingerprint=fingerprint(settled, natural)
        | {
            "seed": seed,
            "precision": str(dtype).removeprefix("torch."),
            "white": white,
            "device": device,
            "pretrained": pretrained,
        },
    )
    # Quantiles, the export's check (twice) and the thresholds score every held-out image; the export itself.
    reserve = 15.0 + 6 * forward_seconds * len(held.paths)
    begin(run, settled.length, resume, reserve, partial(prepare, run, batches, settled.start is not None))
    loop.loop(run)
    facts = loop.provenance(run) | {
        "data": Path(root).resolve().name,
        "good_images": batches.labels.count(0),
        "defective_images": batches.labels.count(1),
        "masked_images": len(masks),
        "held_out_images": len(held.paths),
        "fold": None if fold is None else record(fold, data.scan(Path(root), layout), Path(root)),
        "files": {
            "train": [short_digest(path) for path in store.paths],
            "held_out": [short_digest(path) for path in held.paths],
            "before": sorted(learned_from(settled.start)),
        },
    }
    opened = seal(out, detector, held, white, facts, false_reject_rate)
    run.path.unlink(missing_ok=True)
    features.clear()
    return opened


def fingerprint(settled: Settled, natural: NaturalImages | None) -> dict[str, Any]:
    """Sum up what a run is made of: its settings, its images with their labels, and the versions."""
    return {
        "model": settled.model,
        "preset": settled.preset,
        "supervision": settled.supervision,
        "config": as_json(settled.config),
        "images": digest_samples(settled.samples),
        "held_out": digest_all([sample.path for sample in settled.parts.held_out]),
        "natural_images": natural.digest if natural else "none",
        "from": digest_start(settled.start),
        "torch": torch.__version__,
        "blemish": __version__,
    }


def fill(detector: Detector, start: Bundle | None, given: Path | None) -> str:
    """Fill a detector's pretrained part, or with an earlier model all that they share; give a digest.

    What the earlier model lacks, such as a classification head, stays as it was drawn. Raises WeightsError
    for weights that are missing or do not fit, ModelFileError for a model that does not.
    """
    if start is None:
        source = weights.find(detector.pretrained_name, given)
        detector.load_pretrained(source)
        return digest_all([source])
    if given is not None:
        raise ConfigError(f"found --weights {given} beside --from: pretrained weights come from {start.path}")
    state, stored = detector.state_dict(), load_tensors(start.weights)
    earlier = {name: stored[name] for name in stored.keys() & state.keys() - detector.configured}
    for name, value in earlier.items():
        if state[name].shape != value.shape:
            raise ModelFileError(
                f"{name} in {start.path} is {tuple(value.shape)}; with these settings it would be "
                f"{tuple(state[name].shape)}"
            )
    detector.load_state_dict({name: earlier.get(name, value) for name, value in state.items()})
    return str(start.manifest["training"]["run"]["pretrained"])


def prepare(run: Run, batches: Batches, prepared: bool) -> None:
    """Encode all images, and let the detector learn what it must know of the good ones.

    prepared: it knows that already, from an earlier model.
    """
    entries = encode_all(batches)
    if prepared:
        collections.deque(entries, 0)  # for the cache alone
    elif note := run.detector.prepare(entries):
        run.notes.append(note)
        say(note)
