"""From a folder of natural images to a teacher's file: the backbone's features, the run, what it explains."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from blemish import images, seeding
from blemish._version import __version__
from blemish.backbones import choose_layers, weights
from blemish.backbones.pdn import PDNS
from blemish.data.loading.cache import FeatureCache, Memory, open_cache
from blemish.data.loading.sampling import fewest_turns, flipped
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.detectors import ops
from blemish.detectors.settings import as_json, check, read_settings
from blemish.devices import PRECISIONS, choose_device, choose_precision, keep_freed_memory
from blemish.errors import ConfigError, DataError, ImageError
from blemish.files import check_writable, whole_file
from blemish.progress import Progress, say
from blemish.training import distributed, loop
from blemish.training.distillation.teacher import PAPER, Distillation, DistillationConfig, refuse_numbers
from blemish.training.fingerprint import digest_all, digest_names
from blemish.training.length import Length, check_length, seconds
from blemish.training.loop import Run
from blemish.training.session import begin, checkpoint_path
from blemish.types import AnyArray, Batch

FEWEST = 20
"""Images for each process without which there is no teacher to be had."""

HELD_OUT = 0.1
"""Share of the images that the network is measured on."""

MOST_HELD_OUT = 1000

STATISTICS = 10_000
"""Images that the target's channel moments are taken from, at most (algorithm 3)."""

MIRRORED, GREY = 1, 2
"""Bits of a view of an image."""

PRESETS: Mapping[str, Mapping[str, Any]] = {"default": {}, "paper": PAPER}


def seen(array: AnyArray, view: int) -> AnyArray:
    """Give a view of (..., 3, H, W) RGB values."""
    array = flipped(array, view & MIRRORED)
    if view & GREY:
        grey = np.tensordot(np.array(ops.LUMA, np.float32), array, (0, -3))
        array = np.ascontiguousarray(np.broadcast_to(grey[..., None, :, :], array.shape))
    return array


class Pairs:
    """The images and targets of every step, as a pure function of the seed and the step's number.

    A step's images are those of all processes together; each of them reads its own part.
    """

    def __init__(
        self, small: ImageStore, targets: EncodedStore, config: DistillationConfig, seed: int
    ) -> None:
        self.small, self.targets, self.config, self.seed = small, targets, config, seed
        self.paths = small.paths
        self.batch_size = config.batch_size
        self.per_epoch = -(-len(small.paths) // self.batch_size)

    def entries(self, step: int) -> list[tuple[int, int]]:
        """Give the positions and views of a step's images."""
        chosen = fewest_turns(len(self.small.paths), self.seed, step * self.batch_size, self.batch_size)
        draw = torch.rand((2, self.batch_size), generator=seeding.generator(self.seed, "view", step))
        views = MIRRORED * (draw[0] < self.config.mirror) + GREY * (draw[1] < self.config.grey)
        return list(zip(chosen, views.tolist(), strict=True))

    def at(self, step: int) -> Batch:
        """Give this process's part of a step's batch on the device."""
        entries = self.entries(step)[distributed.rank() :: distributed.count()]
        arrays = [
            seen(images.to_input(self.small.resized(index), images.FULL_SCALE), view)
            for index, view in entries
        ]
        device, none = self.targets.device, torch.zeros(len(entries))
        return Batch(
            torch.from_numpy(np.stack(arrays)).to(device), self.targets.batch(entries), none, none > 0
        )


def distill(
    folder: str | Path,
    *,
    out: str | Path,
    size: str = "small",
    source: str | None = None,
    weights_file: str | Path | None = None,
    preset: str = "default",
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    budget: float | str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    memory: int = 4 << 30,
    cache: str | Path = "auto",
    resume: bool = False,
) -> dict[str, Any]:
    """Distil a teacher for EfficientAD from the natural images in a folder, and write it to `out`.

    Give the file to `train` as its weights. size: small or medium. source: the backbone whose features are
    learned, wide_resnet101_2 as in the paper; weights_file: its weights, where the weights room should not
    choose. preset: default, or paper for algorithm 3 to the letter. settings: fields of DistillationConfig.
    Give at most one of steps, epochs and budget. Target features are kept as `train` keeps encoded images, by
    memory and cache. Under torchrun all processes share each step's batch. Returns what the file says of
    itself, the share of the held-out target's variance that it explains among it; nothing in other processes
    than the first. Raises a BlemishError that a user can fix.
    """
    started = time.monotonic()
    length = Length(steps, epochs, seconds(budget) if isinstance(budget, str) else budget)
    check_length(length)
    folder, out, device = Path(folder), Path(out), choose_device(device)
    check_out(out)
    kept = checkpoint_path(out, resume)
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; expected one of natural images")
    config = configure(preset, size, source, settings or {})
    dtype = choose_precision("fp32" if preset == "paper" and precision == "auto" else precision, device)
    keep_freed_memory()
    with distributed.joined(device):
        check_shares(config)
        pretrained = weights.find(config.source, Path(weights_file) if weights_file else None)
        detector, whose = make(config, pretrained, seed, device), digest_all([pretrained])
        made_of = [torch.__version__, __version__, whose, *detector.encoding, *config.image_size]
        features = open_cache(cache, out, memory, [*made_of, str(dtype), device])
        pairs, held_out = open_pairs(folder, detector, features, seed, device, dtype, Memory(memory))
        if distributed.count() > 1:
            detector.share()
        run = Run(
            detector=detector,
            optimizer=detector.optimizer(),
            batches=pairs,
            held_out=held_out.targets,
            seed=seed,
            device=device,
            dtype=dtype,
            path=kept,
            clock=started,
            fingerprint=fingerprint(config, [*pairs.paths, *held_out.paths])
            | {
                "seed": seed,
                "precision": str(dtype).removeprefix("torch."),
                "device": device,
                "pretrained": whose,
            },
        )
        reserve = seconds_at_the_end(detector, held_out) if length.budget else 0.0
        begin(run, length, resume, reserve, partial(measure_target, detector, pairs.targets))
        loop.loop(run)
        facts = conclude(run, detector, pairs, held_out, folder, out)
        if distributed.rank() == 0:
            features.clear()
    return facts


def configure(preset: str, size: str, source: str | None, settings: Mapping[str, Any]) -> DistillationConfig:
    """Make the config of a distillation; raise ConfigError for what does not exist or go together."""
    if preset not in PRESETS:
        raise ConfigError(f"distilling has no preset {preset!r}; expected {' or '.join(PRESETS)}")
    named = {"size": size} | ({} if source is None else {"source": source})
    for name, value in named.items():
        if name in settings:
            raise ConfigError(f"{name} {value} beside the setting {name}={settings[name]}: expected it once")
    changes = read_settings("distilling", DistillationConfig(), {**PRESETS[preset], **settings, **named})
    config = dataclasses.replace(DistillationConfig(), **changes)
    check(config)
    choose_layers(config.source, config.layers)
    refuse_numbers(config)
    return config


def fingerprint(config: DistillationConfig, paths: Sequence[Path]) -> dict[str, Any]:
    """Sum up what a run is made of: its settings, its images, its processes, and the versions."""
    return {
        "distilled": config.network,
        "config": as_json(config),
        "images": digest_names(paths),
        "processes": distributed.count(),
        "torch": torch.__version__,
        "blemish": __version__,
    }


def check_out(out: Path) -> None:
    """Refuse a file that could not be written, or that `train` would not read."""
    check_writable(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")


def check_shares(config: DistillationConfig) -> None:
    """Refuse a batch that does not deal the same number of images to every process."""
    if config.batch_size % distributed.count():
        raise ConfigError(
            f"batch size {config.batch_size} for {distributed.count()} processes; expected a multiple of that"
        )


def list_readable(folder: Path) -> list[Path]:
    """List all images below a folder that can be read, in order; raise DataError for too few."""
    fewest = FEWEST * distributed.count()
    paths = images.list_images(folder, recursive=True)
    with ThreadPoolExecutor() as pool:
        readable = [path for path, good in zip(paths, pool.map(can_be_read, paths), strict=True) if good]
    if len(readable) < fewest:
        raise DataError(f"found {len(readable)} readable images in {folder}; expected at least {fewest}")
    if len(readable) < len(paths):
        say(f"images that cannot be read, left out: {len(paths) - len(readable)} of {len(paths)}")
    return readable


def can_be_read(path: Path) -> bool:
    """Say whether an image can be read."""
    try:
        images.read(path)
    except ImageError:
        return False
    return True


def divide(paths: Sequence[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """Draw which images train, and which the network is measured on."""
    order = torch.randperm(len(paths), generator=seeding.generator(seed, "held out")).tolist()
    held = min(MOST_HELD_OUT, round(HELD_OUT * len(paths)))
    return [paths[place] for place in sorted(order[held:])], [paths[place] for place in sorted(order[:held])]


def open_pairs(
    folder: Path,
    detector: Distillation,
    features: FeatureCache,
    seed: int,
    device: str,
    dtype: torch.dtype,
    decoded: Memory,
) -> tuple[Pairs, Pairs]:
    """Pair the training images below a folder with their targets, and the held-out ones with theirs."""
    config = detector.config
    train, held_out = divide(list_readable(folder), seed)
    say(f"distilling {config.source} into {config.network}: {len(train)} images, {len(held_out)} held out")
    height, width = config.image_size

    def encode(large: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return detector.encode(large.to(memory_format=torch.channels_last))

    def paired(paths: Sequence[Path]) -> Pairs:
        large = ImageStore(paths, (2 * height, 2 * width), Memory(0))
        targets = EncodedStore(encode, large, images.FULL_SCALE, features, device, view=seen)
        return Pairs(ImageStore(paths, config.image_size, decoded), targets, config, seed)

    return paired(train), paired(held_out)


def make(config: DistillationConfig, pretrained: Path, seed: int, device: str) -> Distillation:
    """Build the network with weights drawn from the seed, and its source with those of a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.generator(seed, "weights").initial_seed())
        detector = Distillation(config)
    detector.load_pretrained(pretrained)
    for part in (detector, *detector.source):
        part.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return detector


def measure_target(detector: Distillation, targets: EncodedStore) -> None:
    """Take the target's channel moments from the training images, each process from its share of them."""
    chosen = distributed.share(min(STATISTICS, len(targets.store.paths)))
    progress = Progress("measuring the target", len(chosen), unit="image")

    def parts() -> Iterator[Tensor]:
        for number, index in enumerate(chosen, 1):
            yield targets.batch([(index, 0)])[0]
            progress.show(number)

    detector.settle(*moments_of_all(parts(), targets.device))
    say(f"features kept: {targets.cache.describe()}")


def moments_of_all(parts: Iterable[Tensor], device: str) -> tuple[Tensor, Tensor]:
    """Take the channel moments of every process's parts, as `ops.channel_moments` does of one's."""
    elements = 0

    def counted() -> Iterator[Tensor]:
        nonlocal elements
        for part in parts:
            elements += part[:, 0].numel()
            yield part

    mean, variance = ops.channel_moments(counted())
    own = torch.stack([mean, variance, torch.full_like(mean, elements)]).to(device)
    means, variances, counts = distributed.gathered(own).cpu().unbind(1)
    return ops.merged_moments(counts[:, 0], means, variances)


def conclude(
    run: Run, detector: Distillation, pairs: Pairs, held_out: Pairs, folder: Path, out: Path
) -> dict[str, Any]:
    """Measure what was learned and write the teacher's file; give what it says of itself.

    All processes measure, the first one writes. The others are told nothing.
    """
    config, state = detector.config, half_precision(detector.network)
    share = explained(detector, with_weights(config, state), held_out)
    if distributed.rank() > 0:
        distributed.wait()
        return {}
    facts = {
        "network": config.network,
        "explained_variance": round(share, 4),
        "source": config.source,
        "source_licence": weights.SOURCES[config.source].licence,
        "images": len(pairs.paths),
        "held_out_images": len(held_out.paths),
        "steps": run.steps,
        "seconds": round(run.seconds),
        "command": command(config, folder, run),
        "history": run.history,
        "run": run.fingerprint,
    }
    with whole_file(out) as temporary:
        temporary.write_bytes(save_tensors(state, {"blemish": json.dumps(facts)}))
    run.path.unlink(missing_ok=True)
    distributed.wait()
    return facts


def half_precision(network: nn.Module) -> dict[str, Tensor]:
    """Give a network's parameters as a teacher's file holds them."""
    return {name: value.half().cpu().contiguous() for name, value in network.state_dict().items()}


def with_weights(config: DistillationConfig, state: Mapping[str, Tensor]) -> nn.Sequential:
    """Build the network of a teacher's file."""
    network = PDNS[config.network](padding=config.padding)
    network.load_state_dict({name: value.float() for name, value in state.items()})
    return network


def explained(detector: Distillation, network: nn.Module, pairs: Pairs) -> float:
    """Measure which share of the target's variance a network explains, over all channels together.

    Each process measures its share of the images, whose targets are all of one size.
    """
    chosen, errors, device = distributed.share(len(pairs.paths)), [], pairs.targets.device
    progress = Progress("measuring on held-out images", len(chosen), unit="image")
    network.to(device)

    def targets() -> Iterator[Tensor]:
        for number, index in enumerate(chosen, 1):
            target, described = compare(detector, network, pairs, index)
            errors.append(float((described - target).square().mean()))
            yield target
            progress.show(number)

    _, variance = moments_of_all(targets(), device)
    own = torch.tensor([sum(errors), len(errors)], dtype=torch.float64, device=device)
    error, count = distributed.gathered(own).sum(0).tolist()
    return float(1 - error / count / variance.mean())


def compare(detector: Distillation, network: nn.Module, pairs: Pairs, index: int) -> tuple[Tensor, Tensor]:
    """Give the normalised target of an image, (1, C, h, w), and what a network makes of the image."""
    target = detector.normalised(pairs.targets.batch([(index, 0)])[0])
    image = pairs.small.batch([index], images.FULL_SCALE).to(pairs.targets.device)
    with torch.no_grad():
        return target, network(detector.normalise(image))


def seconds_at_the_end(detector: Distillation, held_out: Pairs) -> float:
    """Estimate how long measuring on the held-out images will take, from its second image."""
    for index in range(2):
        started = time.monotonic()
        compare(detector, detector.network, held_out, index)
    return 10.0 + (time.monotonic() - started) * len(distributed.share(len(held_out.paths)))


def command(config: DistillationConfig, folder: Path, run: Run) -> str:
    """Write the command that makes the same teacher again, from images and weights of the same names."""
    given, usual = as_json(config), as_json(DistillationConfig())
    words = ["blemish", "distill", folder.resolve().name, "--size", given.pop("size")]
    words += ["--source", given.pop("source"), "--steps", str(run.steps), "--seed", str(run.seed)]
    words += ["--precision", next(name for name, kind in PRECISIONS.items() if kind == run.dtype)]
    for key, value in given.items():
        if value != usual[key] and key != "steps":
            words += ["--set", f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"]
    return shlex.join(words)
