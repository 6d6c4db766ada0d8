"""From a folder of natural images to a teacher's file: the source's features, the run, the measurement."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from blemish import __version__, seeding
from blemish.backbones import choose_layers, weights
from blemish.backbones.pdn import PDNS
from blemish.data.loading.cache import Memory, open_cache
from blemish.detectors.settings import as_json, check, read_settings
from blemish.devices import PRECISIONS, choose_device, choose_precision, keep_freed_memory
from blemish.errors import ConfigError
from blemish.files import atomic_file, check_writable, digest
from blemish.progress import Report, Stop, never, silent
from blemish.training import distributed, loop
from blemish.training.distillation.measure import explained, measure_target, seconds_at_the_end
from blemish.training.distillation.pairs import Pairs, open_pairs
from blemish.training.distillation.teacher import PAPER, Distillation, DistillationConfig, check_numbers
from blemish.training.fingerprint import digest_all, digest_names
from blemish.training.loop import Run
from blemish.training.request import DistillationRequest
from blemish.training.session import checkpoint_path, start_or_resume

PRESETS: Mapping[str, Mapping[str, Any]] = {"default": {}, "paper": PAPER}


def distill(
    images: str | Path, *, out: str | Path, report: Report = silent, stop: Stop = never, **options: Any
) -> dict[str, Any]:
    """Distil a teacher for EfficientAD from the natural images in a folder, and write it to `out`.

    Pass the file to `train` as its weights. options: the other fields of `DistillationRequest`. report, stop:
    as for `train`. Under torchrun all processes share each step's batch. Returns the facts that the file
    records, among them the share of the held-out target's variance that the teacher explains; in processes
    other than the first, an empty dictionary. Raises a BlemishError for anything that a user can fix.
    """
    return run(DistillationRequest(images=Path(images), out=Path(out), **options), report=report, stop=stop)


def run(request: DistillationRequest, *, report: Report = silent, stop: Stop = never) -> dict[str, Any]:
    """Carry out a distillation; see `distill`."""
    started = time.monotonic()
    device, seed = choose_device(request.device), request.seed
    check_out(request.out)
    checkpoint = checkpoint_path(request.out, request.resume)
    if not request.images.is_dir():
        raise ConfigError(f"found no folder at {request.images}; expected a folder of natural images")
    config = configure(request.preset, request.size, request.source, request.settings)
    faithful = request.preset == "paper" and request.precision == "auto"
    dtype = choose_precision("fp32" if faithful else request.precision, device)
    keep_freed_memory()
    with distributed.joined(device):
        report = distributed.report_from_first(report)
        check_shares(config)
        pretrained = weights.find(config.source, request.weights)
        detector, whose = make(config, pretrained, seed, device), digest_all([digest(pretrained)])
        made_of = [str(torch.__version__), __version__, whose, *detector.encoding_key, *config.image_size]
        features = open_cache(request.cache, request.out, request.memory, [*made_of, str(dtype), device])
        decoded = Memory(request.memory)
        pairs, held_out = open_pairs(request.images, detector, features, seed, device, dtype, decoded, report)
        if distributed.count() > 1:
            detector.average_gradients()
        session = Run(
            detector=detector,
            optimizer=detector.optimizer(),
            batches=pairs,
            held_out=held_out.targets,
            seed=seed,
            device=device,
            dtype=dtype,
            path=checkpoint,
            clock=started,
            fingerprint=fingerprint_of(config, [*pairs.paths, *held_out.paths])
            | {"seed": seed, "precision": precision_name(dtype), "device": device, "pretrained": whose},
            report=report,
            stop=stop,
        )
        start_or_resume(
            session,
            request.length,
            request.resume,
            partial(seconds_at_the_end, detector, held_out),
            partial(
                measure_target, detector, pairs.targets, report, stop if distributed.count() == 1 else never
            ),
        )
        loop.loop(session)
        facts = conclude(session, detector, pairs, held_out, request)
        if distributed.rank() == 0:
            features.clear()
    return facts


def configure(preset: str, size: str, source: str | None, settings: Mapping[str, Any]) -> DistillationConfig:
    """Return the config of a distillation; raise ConfigError for unknown or contradictory settings."""
    if preset not in PRESETS:
        raise ConfigError(f"distillation has no preset {preset!r}; expected {' or '.join(PRESETS)}")
    named = {"size": size} | ({} if source is None else {"source": source})
    for name, value in named.items():
        if name in settings:
            raise ConfigError(f"{name} is given twice: {value} and the setting {name}={settings[name]}")
    changes = read_settings("distillation", DistillationConfig(), {**PRESETS[preset], **settings, **named})
    config = dataclasses.replace(DistillationConfig(), **changes)
    check(config)
    choose_layers(config.source, config.layers)
    check_numbers(config)
    return config


def fingerprint_of(config: DistillationConfig, paths: Sequence[Path]) -> dict[str, Any]:
    """Return what identifies a run: its settings, images, number of processes, and the versions."""
    return {
        "distilled": config.network,
        "config": as_json(config),
        "images": digest_names(paths),
        "processes": distributed.count(),
        "torch": str(torch.__version__),
        "blemish": __version__,
    }


def check_out(out: Path) -> None:
    """Raise a BlemishError for a file that cannot be written, or that `train` would not read."""
    check_writable(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")


def check_shares(config: DistillationConfig) -> None:
    """Raise ConfigError if the batch cannot be divided equally among the processes."""
    if config.batch_size % distributed.count():
        raise ConfigError(
            f"batch size {config.batch_size} for {distributed.count()} processes; expected a multiple of that"
        )


def make(config: DistillationConfig, pretrained: Path, seed: int, device: str) -> Distillation:
    """Build the network, initialised at random from the seed, and its source with the weights in a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.initial_seed(seed, "weights"))
        detector = Distillation(config)
    detector.load_pretrained(pretrained)
    for part in (detector, *detector.source):
        part.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return detector


def conclude(
    run: Run, detector: Distillation, pairs: Pairs, held_out: Pairs, request: DistillationRequest
) -> dict[str, Any]:
    """Measure what was learned and write the teacher's file; return the facts that it records.

    All processes measure, and the first one writes. The others return an empty dictionary.
    """
    config, state = detector.config, half_precision(detector.network)
    share = explained(detector, with_weights(config, state), held_out, run.report)
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
        "command": command(config, request.images, run),
        "history": run.history,
        "run": run.fingerprint,
    }
    with atomic_file(request.out) as temporary:
        temporary.write_bytes(save_tensors(state, {"blemish": json.dumps(facts)}))
    run.path.unlink(missing_ok=True)
    distributed.wait()
    return facts


def half_precision(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's parameters in half precision, as a teacher's file stores them."""
    return {name: value.half().cpu().contiguous() for name, value in network.state_dict().items()}


def with_weights(config: DistillationConfig, state: Mapping[str, Tensor]) -> nn.Sequential:
    """Return the network of a teacher's file."""
    network = PDNS[config.network](padding=config.padding)
    network.load_state_dict({name: value.float() for name, value in state.items()})
    return network


def command(config: DistillationConfig, folder: Path, run: Run) -> str:
    """Return the command that reproduces the teacher, from images and weights of the same names."""
    given, usual = as_json(config), as_json(DistillationConfig())
    words = ["blemish", "distill", folder.resolve().name, "--size", given.pop("size")]
    words += ["--source", given.pop("source"), "--steps", str(run.steps), "--seed", str(run.seed)]
    words += [
        "--precision",
        next(name for name, kind in PRECISIONS.items() if kind == precision_name(run.dtype)),
    ]
    for key, value in given.items():
        if value != usual[key] and key != "steps":
            words += ["--set", f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"]
    return shlex.join(words)


def precision_name(dtype: torch.dtype) -> str:
    """Return torch's name for a type."""
    return str(dtype).removeprefix("torch.")
