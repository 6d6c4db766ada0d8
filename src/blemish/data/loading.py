"""From samples to batches: images decoded once, the frozen part run once, every draw from the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from blemish import images, ops
from blemish.errors import DataError, ImageError
from blemish.types import AnyArray, Batch, Sample

Encode = Callable[[Tensor], tuple[Tensor, ...]]


class Memory:
    """A budget in bytes that several stores share, from several threads."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.lock = Lock()

    def take(self, size: int) -> bool:
        """Take some bytes, if there are as many left."""
        with self.lock:
            fits = size <= self.left
            self.left -= size if fits else 0
        return fits


class ImageStore:
    """Images at the network's size, decoded once and kept while they fit into memory.

    Kept as they come out of the one resize of the product: bytes for 8-bit files, float32 for deeper ones.
    With crop, an image is resized to twice the size and its centre is taken.
    """

    def __init__(
        self, paths: Sequence[Path], size: tuple[int, int], memory: Memory, *, crop: bool = False
    ) -> None:
        self.paths, self.size, self.memory, self.crop = list(paths), size, memory, crop
        self.kept: dict[int, AnyArray] = {}
        self.maxima: dict[int, int] = {}
        """Largest value of each image read so far from a file of more than 8 bits."""

    def fill(self) -> ImageStore:
        """Decode every image once, in parallel; raise ImageError for the first that cannot be read."""
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(self.resized, range(len(self.paths))):
                pass
        return self

    def resized(self, index: int) -> AnyArray:
        """Give one image at the store's size, in the file's units."""
        if index in self.kept:
            return self.kept[index]
        image = images.read(self.paths[index])
        if image.dtype == np.uint16:
            self.maxima[index] = int(image.max())
        height, width = self.size
        if self.crop:
            wide = images.resize(image, (2 * height, 2 * width))
            top, left = height // 2, width // 2
            image = np.ascontiguousarray(wide[top : top + height, left : left + width])
        else:
            image = images.resize(image, self.size)
        if self.memory.take(image.nbytes):
            self.kept[index] = image
        return image

    def batch(self, indices: Sequence[int], white: float) -> Tensor:
        """Give (B, 3, H, W) float32 images in [0, 1]."""
        return torch.from_numpy(np.stack([images.to_input(self.resized(i), white) for i in indices]))

    def batches(self, white: float, size: int = 4) -> Iterator[Tensor]:
        """Give all images in order, some at a time."""
        for start in range(0, len(self.paths), size):
            yield self.batch(range(start, min(start + size, len(self.paths))), white)


class EncodedStore:
    """What the frozen part makes of each image, in half precision, kept while it fits into memory.

    An entry that is not kept is computed again and rounded alike, so a budget changes no result.
    """

    def __init__(self, encode: Encode, store: ImageStore, white: float, memory: Memory, device: str) -> None:
        self.encode, self.store, self.white = encode, store, white
        self.memory, self.device = memory, device
        self.kept: dict[int, tuple[Tensor, ...]] = {}

    def entries(self) -> Iterator[tuple[Tensor, ...]]:
        """Give every image's entry in order, as a batch of one."""
        for index in range(len(self.store.paths)):
            yield self.batch([index])

    def compute(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Encode some images, rounded to half precision, one entry each."""
        with torch.no_grad():
            parts = self.encode(self.store.batch(indices, self.white).to(self.device))
        halves = [part.half().cpu() for part in parts]
        return [tuple(half[row].clone() for half in halves) for row in range(len(indices))]

    def entry(self, index: int) -> tuple[Tensor, ...]:
        """Give one image's entry, from memory where it is kept."""
        if index in self.kept:
            return self.kept[index]
        (entry,) = self.compute([index])
        if self.memory.take(sum(part.nbytes for part in entry)):
            self.kept[index] = entry
        return entry

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Give the entries of several images as (B, ...) float32 tensors on the device."""
        columns = zip(*(self.entry(index) for index in indices), strict=True)
        return tuple(torch.stack(column).to(self.device).float() for column in columns)


class Batches:
    """The batch of every step of a run, as a pure function of the seed and the step's number.

    Images and photographs of the next step are prepared on another thread while a step runs.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        store: ImageStore,
        encoded: EncodedStore,
        *,
        batch_size: int,
        seed: int,
        with_images: bool = True,
        natural: ImageStore | None = None,
    ) -> None:
        self.samples, self.store, self.encoded, self.natural = samples, store, encoded, natural
        self.with_images = with_images
        self.batch_size, self.seed = min(batch_size, len(samples)), seed
        self.per_epoch = -(-len(samples) // self.batch_size)
        self.pool = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future[tuple[Tensor, Tensor | None]]] | None = None

    def indices(self, step: int) -> list[int]:
        """Give the positions of the samples of a step; every image has one turn in an epoch."""
        epoch, place = divmod(step, self.per_epoch)
        order = torch.randperm(len(self.samples), generator=ops.generator(self.seed, "epoch", epoch))
        chosen: list[int] = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        return chosen

    def read(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Read a step's images and photographs."""
        chosen = self.indices(step)
        natural = None
        if self.natural is not None:
            draw = ops.generator(self.seed, "natural", step)
            picks = torch.randint(len(self.natural.paths), (len(chosen),), generator=draw).tolist()
            natural = self.natural.batch([readable(self.natural, pick) for pick in picks], images.FULL_SCALE)
        images_ = self.store.batch(chosen, self.encoded.white) if self.with_images else torch.empty(0)
        return images_, natural

    def at(self, step: int) -> Batch:
        """Give a step's batch on the device."""
        if self.ahead is not None and self.ahead[0] == step:
            images_, natural = self.ahead[1].result()
        else:
            images_, natural = self.read(step)
        self.ahead = (step + 1, self.pool.submit(self.read, step + 1))
        chosen, device = self.indices(step), self.encoded.device
        return Batch(
            images_.to(device),
            self.encoded.batch(chosen),
            torch.tensor([float(self.samples[index].label) for index in chosen], device=device),
            natural.to(device) if natural is not None else None,
        )


def readable(store: ImageStore, pick: int) -> int:
    """Give the first image from `pick` on that can be read, for a purpose that any image serves.

    Raises DataError if there is none.
    """
    for offset in range(len(store.paths)):
        index = (pick + offset) % len(store.paths)
        try:
            store.resized(index)
        except ImageError:
            continue
        return index
    raise DataError(f"none of the {len(store.paths)} photographs beside {store.paths[0]} can be read")
