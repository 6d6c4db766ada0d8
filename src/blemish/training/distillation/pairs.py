"""The images of a distillation, each with its target: the source's output for the image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blemish import images, seeding
from blemish.data.loading.cache import FeatureCache, Memory
from blemish.data.loading.sampling import fewest_turns, flipped
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.detectors import ops
from blemish.errors import DataError, ImageError
from blemish.images import Preprocessing
from blemish.progress import Report, tell
from blemish.training import distributed
from blemish.training.distillation.teacher import Distillation, DistillationConfig
from blemish.types import AnyArray, Batch

LOG = logging.getLogger(__name__)

FEWEST = 20
"""Smallest number of images for each process."""
HELD_OUT = 0.1
"""Share of the images held out to measure the network on."""
MOST_HELD_OUT = 1000
MIRRORED, GREY = 1, 2
"""Bits of a view, which is how an image is shown."""


def apply_view(array: AnyArray, view: int) -> AnyArray:
    """Return a view of (..., 3, H, W) RGB images."""
    array = flipped(array, view & MIRRORED)
    if view & GREY:
        grey = np.tensordot(np.array(ops.LUMA, np.float32), array, (0, -3))
        array = np.ascontiguousarray(np.broadcast_to(grey[..., None, :, :], array.shape))
    return array


class Pairs:
    """The images and targets of every step, as a pure function of the seed and the step's number.

    The images of a step are shared by all processes; each reads its own share.
    """

    def __init__(
        self, small: ImageStore, targets: EncodedStore, config: DistillationConfig, seed: int
    ) -> None:
        self.small, self.targets, self.config, self.seed = small, targets, config, seed
        self.paths = small.paths
        self.batch_size = config.batch_size
        self.per_epoch = -(-len(small.paths) // self.batch_size)

    def entries(self, step: int) -> list[tuple[int, int]]:
        """Return the indices and views of a step's images."""
        chosen = fewest_turns(len(self.small.paths), self.seed, step * self.batch_size, self.batch_size)
        draw = torch.rand((2, self.batch_size), generator=seeding.generator(self.seed, "view", step))
        views = MIRRORED * (draw[0] < self.config.mirror) + GREY * (draw[1] < self.config.grey)
        return list(zip(chosen, views.tolist(), strict=True))

    def at(self, step: int) -> Batch:
        """Return this process's share of a step's batch, on the device."""
        entries = self.entries(step)[distributed.rank() :: distributed.count()]
        arrays = [apply_view(self.small.inputs(index)[0], view) for index, view in entries]
        device, none = self.targets.device, torch.zeros(len(entries))
        return Batch(
            torch.from_numpy(np.stack(arrays)).to(device), self.targets.batch(entries), none, none > 0
        )


def list_readable(folder: Path) -> list[Path]:
    """List all readable images in a folder, recursively and in order; raise DataError for too few."""
    fewest = FEWEST * distributed.count()
    paths = images.list_images(folder, recursive=True)
    with ThreadPoolExecutor() as pool:
        readable = [path for path, good in zip(paths, pool.map(can_be_read, paths), strict=True) if good]
    if len(readable) < fewest:
        raise DataError(f"found {len(readable)} readable images in {folder}; expected at least {fewest}")
    if len(readable) < len(paths):
        LOG.warning(
            "leaving out %d of %d images, which cannot be read", len(paths) - len(readable), len(paths)
        )
    return readable


def can_be_read(path: Path) -> bool:
    """Return whether an image can be read."""
    try:
        images.read(path)
    except ImageError:
        return False
    return True


def divide(paths: Sequence[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """Split the images at random into those that train and those that the network is measured on."""
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
    report: Report,
) -> tuple[Pairs, Pairs]:
    """Return the training images in a folder with their targets, and the held-out ones with theirs."""
    config = detector.config
    train, held_out = divide(list_readable(folder), seed)
    tell(
        report,
        f"distilling {config.source} into {config.network}: {len(train)} images, {len(held_out)} held out",
    )
    height, width = config.image_size

    def encode(large: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return detector.encode(large.to(memory_format=torch.channels_last))

    def paired(paths: Sequence[Path]) -> Pairs:
        large = ImageStore(paths, Preprocessing((2 * height, 2 * width), images.FULL_SCALE), Memory(0))
        targets = EncodedStore(encode, large, features, device, view=apply_view)
        return Pairs(
            ImageStore(paths, Preprocessing(config.image_size, images.FULL_SCALE), decoded),
            targets,
            config,
            seed,
        )

    return paired(train), paired(held_out)
