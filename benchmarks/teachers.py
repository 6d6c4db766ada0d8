"""Distil EfficientAD's teachers on one GPU in minutes, the source run at every step.

    python benchmarks/teachers.py PHOTOGRAPHS --size small --seconds 120 --out pdn_small.safetensors
    python benchmarks/teachers.py PHOTOGRAPHS --size medium --seconds 185 --out pdn_medium.safetensors
    python benchmarks/teachers.py PHOTOGRAPHS --device cpu --steps 2 --batch 2 --out t.safetensors    a trial

`blemish distill` keeps the source's features of a few views of each photograph. A GPU computes them faster
than they can be read, so here no view comes twice: squares of 256 pixels at the photograph's own scale (60 %)
or enlarged up to twice, half of them turned and mirrored, half of them in other light and colours, a tenth
grey. The source sees what the teacher sees, at twice the size: it describes nothing that the teacher cannot
see. Network, target, split and file are those of `blemish distill`; the share that is explained is that of
such views, where `blemish distill` measures whole photographs squeezed into a square, which comes out lower.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from blemish import __version__
from blemish.backbones import IMAGENET, Normalise, choose_layers, fill_backbone, weights
from blemish.backbones.pdn import CHANNELS, MARGIN, PDNS
from blemish.detectors.muon import Muon
from blemish.detectors.ops import LUMA
from blemish.detectors.schedules import one_cycle
from blemish.files import atomic_file, digest
from blemish.training.distillation.pairs import divide, list_readable
from blemish.training.distillation.run import half_precision
from blemish.training.distillation.teacher import Source
from blemish.training.fingerprint import digest_all, digest_names
from blemish.types import AnyArray

SIDE = 256
"""Pixels of a view's side."""
LONGEST = 384
"""Pixels of a photograph's side that are kept, from its middle."""
WEIGHT_DECAY = 1e-5
POINT = 100
"""Steps between two points of the loss curve."""


# --- photographs ---


def canvas(path: Path) -> tuple[AnyArray, tuple[int, int]]:
    """Read a photograph into the corner of a (3, LONGEST, LONGEST) array; return its height and width, too.

    Its short side becomes 256 where it is shorter.
    """
    image = Image.open(path).convert("RGB")
    if min(image.size) < SIDE:
        factor = SIDE / min(image.size)
        width, height = (max(SIDE, round(length * factor)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (max(0, length - LONGEST) // 2 for length in pixels.shape[:2])
    pixels = pixels[top : top + LONGEST, left : left + LONGEST]
    made = np.zeros((3, LONGEST, LONGEST), np.uint8)
    made[:, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)
    return made, (pixels.shape[0], pixels.shape[1])


class Photographs:
    """All photographs on the device."""

    def __init__(self, paths: Sequence[Path], device: str) -> None:
        with ThreadPoolExecutor() as pool:
            made = list(pool.map(canvas, paths))
        self.pixels = torch.from_numpy(np.stack([pixels for pixels, _ in made])).to(device)
        self.sizes = torch.tensor([size for _, size in made], device=device)

    def views(self, chosen: Tensor, draw: torch.Generator, *, plain: bool = False) -> Tensor:
        """Return (B, 3, 256, 256) views in [0, 1]; plain: upright, in their own light."""
        count, device = len(chosen), chosen.device
        enlarged = random(draw, count) < 0.4
        zoom = torch.where(enlarged, 0.5 + 0.5 * random(draw, count), torch.ones(count, device=device))
        side = SIDE * zoom
        corner = random(draw, count, 2) * (self.sizes[chosen].float() - side[:, None])
        corner = torch.where(enlarged[:, None], corner, corner.floor())  # whole pixels stay sharp
        turn = torch.randint(8, (count,), generator=draw, device=device)
        turn = torch.zeros_like(turn) if plain else turn
        turn = torch.where(random(draw, count) < 0.5, turn % 2, turn)
        down, across = places(turn)
        down = (corner[:, 0, None, None] + down * side[:, None, None]) * 2 / LONGEST - 1
        across = (corner[:, 1, None, None] + across * side[:, None, None]) * 2 / LONGEST - 1
        grid = torch.stack([across, down], 3)
        seen = functional.grid_sample(
            self.pixels[chosen].float() / 255, grid, padding_mode="border", align_corners=False
        )
        return seen if plain else relit(seen, draw)


def random(draw: torch.Generator, *shape: int) -> Tensor:
    """Sample numbers from [0, 1)."""
    return torch.rand(shape, generator=draw, device=draw.device)


def places(turn: Tensor) -> tuple[Tensor, Tensor]:
    """Return where in a square, 0 to 1 down and across, a view's pixels lie, for each of 8 turns."""
    middle = (torch.arange(SIDE, device=turn.device) + 0.5) / SIDE
    down, across = (axis.expand(len(turn), -1, -1) for axis in torch.meshgrid(middle, middle, indexing="ij"))
    mirrored, flipped, swapped = ((turn >> bit & 1).bool()[:, None, None] for bit in range(3))
    across = torch.where(mirrored, 1 - across, across)
    down = torch.where(flipped, 1 - down, down)
    return torch.where(swapped, across, down), torch.where(swapped, down, across)


def grey(images: Tensor) -> Tensor:
    """Return the luma of (B, 3, H, W) images, (B, 1, H, W)."""
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def relit(images: Tensor, draw: torch.Generator) -> Tensor:
    """Change saturation, contrast and brightness of half of the images; turn a tenth grey."""
    count = len(images)

    def factor(low: float, high: float) -> Tensor:
        return (low + (high - low) * random(draw, count))[:, None, None, None]

    changed = (random(draw, count) < 0.5)[:, None, None, None]
    level = grey(images)
    other = level + (images - level) * factor(0.4, 1.4)
    mean = other.mean((1, 2, 3), keepdim=True)
    other = ((mean + (other - mean) * factor(0.6, 1.4)) * factor(0.6, 1.4)).clamp(0, 1)
    images = torch.where(changed, other, images)
    toned = (random(draw, count) < 0.1)[:, None, None, None]
    return torch.where(toned, grey(images).expand_as(images), images)


# --- the target ---


class Target:
    """The source's description of 256 x 256 views, normalised: (B, 384, 56, 56)."""

    def __init__(self, name: str, layers: Sequence[str], device: str) -> None:
        source = Source(name, layers).eval()
        fill_backbone(source.backbone, name)
        for module in list(source.backbone.network.modules()):
            for (before, layer), (place, norm) in pairwise(list(module.named_children())):
                if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, before, fuse_conv_bn_eval(layer, norm))
                    setattr(module, place, nn.Identity())
        self.dtype = torch.float16 if device == "cuda" else torch.float32
        self.source = source.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.source.backbone.network.to(self.dtype)
        self.mean = torch.zeros(CHANNELS, 1, 1, device=device)
        self.std = torch.ones(CHANNELS, 1, 1, device=device)

    @torch.no_grad()
    def raw(self, views: Tensor) -> Tensor:
        """Describe views as `blemish distill` does, but for the type that the source computes in."""
        large = functional.interpolate(views, scale_factor=2, mode="bilinear")
        backbone, parts = self.source.backbone, []
        large = backbone.normalise(large).contiguous(memory_format=torch.channels_last).to(self.dtype)
        for number, features in enumerate(backbone.network(large)):
            kernel = self.source.get_buffer(f"kernel{number}")
            part = functional.conv2d(features.float(), kernel, padding=1)
            if part.shape[-1] != SIDE // 4:
                part = functional.interpolate(part, (SIDE // 4, SIDE // 4), mode="bilinear")
            parts.append(part)
        return torch.stack(parts).sum(0)[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]

    def settle(self, photographs: Photographs, draw: torch.Generator, most: int = 2160) -> None:
        """Take the channel moments from a view of each photograph."""
        order = torch.randperm(len(photographs.sizes), generator=torch.Generator().manual_seed(1))[:most]
        moments = Moments()
        for part in torch.split(order.to(self.mean.device), 16):
            moments.add(self.raw(photographs.views(part, draw)))
        self.mean = moments.mean.float()[:, None, None]
        self.std = moments.variance.clamp_min(1e-12).sqrt().float()[:, None, None]

    def __call__(self, views: Tensor) -> Tensor:
        return (self.raw(views) - self.mean) / self.std


class Moments:
    """Mean and variance of each channel over (B, C, h, w) parts, summed in float64."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, part: Tensor) -> None:
        """Count a part in."""
        part = part.double()
        self.count += part[:, 0].numel()
        self.sums = self.sums.to(part.device) + part.sum((0, 2, 3))
        self.squares = self.squares.to(part.device) + part.square().sum((0, 2, 3))

    @property
    def mean(self) -> Tensor:
        """(C,) means."""
        return self.sums / self.count

    @property
    def variance(self) -> Tensor:
        """(C,) variances."""
        return self.squares / self.count - self.mean.square()


# --- the run ---


@dataclass(frozen=True)
class Learned:
    """A trained network and how it came about."""

    network: nn.Module
    steps: int
    seconds: float
    history: list[dict[str, float]]


def learn(target: Target, photographs: Photographs, options: argparse.Namespace) -> Learned:
    """Train a network for so many seconds or steps."""
    device, batch = options.device, options.batch
    torch.manual_seed(options.seed)
    network: nn.Module = PDNS[f"pdn_{options.size}"]()
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalise = Normalise(*IMAGENET).to(device)
    optimiser = Muon(network.parameters(), options.rate, WEIGHT_DECAY)
    draw = torch.Generator(device).manual_seed(options.seed)
    shuffle, queue = torch.Generator().manual_seed(options.seed), torch.empty(0, dtype=torch.long)
    history: list[dict[str, float]] = []
    losses: list[Tensor] = []
    step, start = 0, time.monotonic()
    while (progress := share_done(step, time.monotonic() - start, options)) < 1:
        if len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(len(photographs.sizes), generator=shuffle)])
        chosen, queue = queue[:batch].to(device), queue[batch:]
        for group in optimiser.param_groups:
            group["lr"] = options.rate * one_cycle(progress, rise=0.02, hold=0.4)
        views = photographs.views(chosen, draw)
        wanted = target(views)
        with torch.autocast(device, torch.bfloat16):
            described = network(normalise(views).contiguous(memory_format=torch.channels_last))
        loss = (described.float() - wanted).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        step += 1
        losses.append(loss.detach())
        if step % POINT == 0:  # asked for seldom: the answer waits for the device
            mean, losses = float(torch.stack(losses).mean()), []
            history.append({"step": float(step), "distance": mean, "loss": mean})
            print(f"step {step}, {time.monotonic() - start:.0f} s, loss {mean:.4f}", flush=True)
    return Learned(network, step, time.monotonic() - start, history)


def share_done(step: int, seconds: float, options: argparse.Namespace) -> float:
    """Return which share of the run is behind."""
    return float(step / options.steps if options.steps else seconds / options.seconds)


@torch.no_grad()
def explained(network: nn.Module, target: Target, photographs: Photographs) -> float:
    """Measure which share of the target's variance a network explains on a view of each photograph."""
    device = target.mean.device
    normalise, draw = Normalise(*IMAGENET).to(device), torch.Generator(device).manual_seed(7)
    moments, error, count = Moments(), 0.0, 0
    for part in torch.split(torch.arange(len(photographs.sizes), device=device), 16):
        views = photographs.views(part, draw, plain=True)
        wanted = target(views)
        described = network(normalise(views).contiguous(memory_format=torch.channels_last))
        error += float((described.double() - wanted.double()).square().mean()) * len(part)
        count += len(part)
        moments.add(wanted)
    return float(1 - error / count / moments.variance.mean())


def command(options: argparse.Namespace, layers: Sequence[str], steps: int) -> str:
    """Return the command that makes a like teacher again; a GPU's sums are not the same bytes twice."""
    words = ["python", "benchmarks/teachers.py", options.folder.resolve().name, "--size", options.size]
    words += ["--source", options.source, "--layers", *layers, "--steps", str(steps)]
    words += ["--batch", str(options.batch), "--rate", str(options.rate), "--seed", str(options.seed)]
    return shlex.join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="PHOTOGRAPHS")
    parser.add_argument("--out", type=Path, required=True, metavar="F.safetensors")
    parser.add_argument("--size", choices=("small", "medium"), default="small")
    parser.add_argument("--source", default="efficientnet_lite2")
    parser.add_argument("--layers", nargs="*", default=[], help="of the source; none: its usual ones")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training (120)")
    parser.add_argument("--steps", type=int, default=0, help="of training, instead of seconds")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="Muon's learning rate (0.002)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    layers = choose_layers(options.source, options.layers)
    train, held_out = divide(list_readable(options.folder), options.seed)
    photographs = Photographs(train, options.device)
    target = Target(options.source, layers, options.device)
    target.settle(photographs, torch.Generator(options.device).manual_seed(3))
    learned = learn(target, photographs, options)
    state = half_precision(learned.network)
    rounded = copy.deepcopy(learned.network).half().float()
    share = explained(rounded, target, Photographs(held_out, options.device))
    facts: dict[str, Any] = {
        "network": f"pdn_{options.size}",
        "explained_variance": round(share, 4),
        "source": options.source,
        "source_licence": weights.SOURCES[options.source].licence,
        "images": len(train),
        "held_out_images": len(held_out),
        "steps": learned.steps,
        "seconds": round(learned.seconds),
        "command": command(options, layers, learned.steps),
        "history": learned.history,
        "run": {
            "images": digest_names([*train, *held_out]),
            "layers": list(layers),
            "batch_size": options.batch,
            "learning_rate": options.rate,
            "seed": options.seed,
            "precision": "bfloat16",
            "device": options.device,
            "pretrained": digest_all([digest(weights.find(options.source))]),
            "torch": torch.__version__,
            "blemish": __version__,
        },
    }
    with atomic_file(options.out) as temporary:
        temporary.write_bytes(save(state, {"blemish": json.dumps(facts)}))
    print(f"{options.out}: explains {100 * share:.1f} % on {len(held_out)} photographs that were held out")


if __name__ == "__main__":
    main()
