"""From samples to batches: images decoded once, the frozen part run once, every draw from the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from blemish import images, ops
from blemish.data.cache import FeatureCache, Memory
from blemish.data.masks import Mask
from blemish.data.sampling import FLIPS, Entry, epoch_entries, epoch_length, flipped
from blemish.errors import DataError, ImageError
from blemish.files import digest
from blemish.types import AnyArray, Batch, Sample

Encode = Callable[[Tensor], tuple[Tensor, ...]]


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
    """What the frozen part makes of each image and its flips, in half precision, kept where there is room.

    An entry that is not kept is computed again and rounded alike, so a budget changes no result.
    """

    def __init__(
        self,
        encode: Encode,
        store: ImageStore,
        white: float,
        cache: FeatureCache,
        device: str,
        *,
        view: Callable[[AnyArray, int], AnyArray] = flipped,
    ) -> None:
        self.encode, self.store, self.white, self.view = encode, store, white, view
        self.cache, self.device = cache, device
        self.digests: dict[int, str] = {}

    def entries(self) -> Iterator[tuple[Tensor, ...]]:
        """Give every image's entry in order, as a batch of one."""
        for index in range(len(self.store.paths)):
            yield self.batch([(index, 0)])

    def name(self, index: int, flip: int) -> str:
        """Name an entry by its file's content and the flip."""
        if index not in self.digests:
            self.digests[index] = digest(self.store.paths[index])
        return f"{self.digests[index]}.{flip}"

    def compute(self, index: int, flip: int) -> tuple[Tensor, ...]:
        """Encode an image, rounded to half precision."""
        image = self.view(self.store.batch([index], self.white).numpy(), flip)
        with torch.no_grad():
            parts = self.encode(torch.from_numpy(image).to(self.device))
        return tuple(part[0].half().cpu().contiguous() for part in parts)

    def entry(self, index: int, flip: int) -> tuple[Tensor, ...]:
        """Give one image's entry, from the cache where it is kept."""
        name = self.name(index, flip)
        entry = self.cache.get(name)
        if entry is None:
            entry = self.compute(index, flip)
            self.cache.put(name, entry)
        return entry

    def batch(self, entries: Sequence[Entry]) -> tuple[Tensor, ...]:
        """Give several entries as (B, ...) float32 tensors on the device."""
        columns = zip(*(self.entry(*entry) for entry in entries), strict=True)
        return tuple(torch.stack(column).to(self.device).float() for column in columns)


class NaturalImages(Protocol):
    """Images of all the world but the product, for EfficientAD's pretraining penalty."""

    @property
    def digest(self) -> str:
        """Tell a run with these from one with others."""

    def batch(self, step: int, count: int) -> Tensor:
        """Give a step's (count, 3, H, W) float32 images in [0, 1]."""


@dataclass(frozen=True)
class Photographs:
    """Natural images drawn from a store, those that cannot be read left out."""

    store: ImageStore
    seed: int
    digest: str
    """Of the files."""

    def batch(self, step: int, count: int) -> Tensor:
        """Give a step's (count, 3, H, W) float32 images in [0, 1]; raise DataError if none can be read."""
        draw = ops.generator(self.seed, "natural", step)
        picks = torch.randint(len(self.store.paths), (count,), generator=draw).tolist()
        return self.store.batch([readable(self.store, pick) for pick in picks], images.FULL_SCALE)


class Batches:
    """The batch of every step of a run, as a pure function of the seed and the step's number.

    Images of the next step, natural ones too, are prepared on another thread while a step runs.
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
        natural: NaturalImages | None = None,
        masks: Mapping[int, Mask] | None = None,
        flips: int = FLIPS,
    ) -> None:
        self.samples, self.store, self.encoded, self.natural = samples, store, encoded, natural
        self.with_images, self.masks, self.flips = with_images, masks or {}, flips
        self.labels = [sample.label for sample in samples]
        length = epoch_length(self.labels, flips)
        self.batch_size, self.seed = min(batch_size, length), seed
        self.per_epoch = -(-length // self.batch_size)
        self.pool = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future[tuple[Tensor, Tensor | None]]] | None = None

    def entries(self, step: int) -> list[Entry]:
        """Give the samples and flips of a step."""
        epoch, place = divmod(step, self.per_epoch)
        order = epoch_entries(self.labels, self.seed, epoch, self.flips)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def read(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Read a step's images, and natural ones where the run has them."""
        chosen = [index for index, _ in self.entries(step)]
        natural = self.natural.batch(step, len(chosen)) if self.natural is not None else None
        images_ = self.store.batch(chosen, self.encoded.white) if self.with_images else torch.empty(0)
        return images_, natural

    def at(self, step: int) -> Batch:
        """Give a step's batch on the device."""
        if self.ahead is not None and self.ahead[0] == step:
            images_, natural = self.ahead[1].result()
        else:
            images_, natural = self.read(step)
        self.ahead = (step + 1, self.pool.submit(self.read, step + 1))
        entries, device = self.entries(step), self.encoded.device
        masks, weights = self.labelled_pixels(entries)
        known = [self.labels[index] == 0 or index in self.masks for index, _ in entries]
        return Batch(
            images_.to(device),
            self.encoded.batch(entries),
            torch.tensor([float(self.labels[index]) for index, _ in entries], device=device),
            torch.tensor(known, device=device),
            masks.to(device) if masks is not None else None,
            weights.to(device) if weights is not None else None,
            natural.to(device) if natural is not None else None,
        )

    def labelled_pixels(self, entries: Sequence[Entry]) -> tuple[Tensor | None, Tensor | None]:
        """Give the (B, H, W) masks and weights of a step, None where the run has none."""
        if not self.masks:
            return None, None
        masks = torch.zeros(len(entries), *self.store.size)
        weights = torch.ones(len(entries), *self.store.size)
        weighted = False
        for row, (index, flip) in enumerate(entries):
            if index in self.masks:
                mask = self.masks[index]
                masks[row] = torch.from_numpy(flipped(mask.defective, flip))
                if mask.weights is not None:
                    weights[row], weighted = torch.from_numpy(flipped(mask.weights, flip)), True
        return masks, weights if weighted else None


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
