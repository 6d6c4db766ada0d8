"""The batches of a training run, with all randomness derived from the seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from blemish import seeding
from blemish.data.loading.masks import Mask
from blemish.data.loading.sampling import COPY, FLIPS, Entry, epoch_entries, epoch_length, flipped
from blemish.data.loading.stores import EncodedStore, ImageStore
from blemish.errors import DataError, ImageError
from blemish.progress import Report, Stop, never, silent, tracked
from blemish.types import Batch, Sample


class NaturalImages(Protocol):
    """Images of anything but the product, for EfficientAD's pretraining penalty."""

    @property
    def digest(self) -> str:
        """Identifies the set of images, so that a resumed run can detect another one."""

    def batch(self, step: int, count: int) -> Tensor:
        """Return a step's (count, 3, H, W) float32 images in [0, 1]."""


@dataclass(frozen=True)
class Photographs:
    """Natural images sampled at random from a store; unreadable ones are skipped."""

    store: ImageStore
    seed: int
    digest: str
    """SHA-256 of the names and sizes of the files."""

    def batch(self, step: int, count: int) -> Tensor:
        """Return a step's (count, 3, H, W) float32 images in [0, 1]; raise DataError if none can be read."""
        draw = seeding.generator(self.seed, "natural", step)
        picks = torch.randint(len(self.store.paths), (count,), generator=draw).tolist()
        return self.store.batch([readable(self.store, pick) for pick in picks])


class Pass:
    """Batches with every image once, or a number of them, in the order of their digests.

    Then come `copies` altered copies of each, in the same order. Can be iterated more than once.

    Reports progress after each batch, and raises StoppedError once `stop` returns true.
    """

    def __init__(
        self,
        batches: Batches,
        report: Report = silent,
        stop: Stop = never,
        phase: str = "fitting",
        limit: int | None = None,
        copies: int = 0,
    ) -> None:
        self.batches, self.report, self.stop, self.phase = batches, report, stop, phase
        order = sorted(range(len(batches.samples)), key=batches.store.digest)[:limit]
        views = (0, *range(COPY, COPY + copies))
        entries, size = [(index, view) for view in views for index in order], batches.batch_size
        self.count = len(entries)
        self.parts = [entries[first : first + size] for first in range(0, len(entries), size)]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order."""
        for entries in tracked(self.parts, len(self), self.report, self.phase, unit="batch", stop=self.stop):
            yield self.batches.of(entries, self.batches.images(entries))


class Batches:
    """The batch of each step of a run, as a pure function of the seed and the step's number.

    While a step runs, the images of the next one, including natural images, are prepared on another thread.
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
        """Return the sample indices and flips of a step."""
        epoch, place = divmod(step, self.per_epoch)
        order = epoch_entries(self.labels, self.seed, epoch, self.flips)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def read(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Read the images of a step, and its natural images if the run uses them."""
        entries = self.entries(step)
        natural = self.natural.batch(step, len(entries)) if self.natural is not None else None
        return self.images(entries), natural

    def images(self, entries: Sequence[Entry]) -> Tensor:
        """Read the images of entries; none if the detector trains on encodings alone."""
        return self.store.batch([index for index, _ in entries]) if self.with_images else torch.empty(0)

    def at(self, step: int) -> Batch:
        """Return a step's batch on the device."""
        if self.ahead is not None and self.ahead[0] == step:
            images_, natural = self.ahead[1].result()
        else:
            images_, natural = self.read(step)
        self.ahead = (step + 1, self.pool.submit(self.read, step + 1))
        return self.of(self.entries(step), images_, natural)

    def of(self, entries: Sequence[Entry], images_: Tensor, natural: Tensor | None = None) -> Batch:
        """Return the batch of entries and their images, on the device."""
        device = self.encoded.device
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
            tuple(self.store.digest(index) for index, _ in entries),
        )

    def labelled_pixels(self, entries: Sequence[Entry]) -> tuple[Tensor | None, Tensor | None]:
        """Return the (B, H, W) masks and weights of a step, each None if there are none."""
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
    """Return the index of the first readable image from `pick` on, where any image will do.

    Raises DataError if no image can be read.
    """
    for offset in range(len(store.paths)):
        index = (pick + offset) % len(store.paths)
        try:
            store.resized(index)
        except ImageError:
            continue
        return index
    raise DataError(f"none of the {len(store.paths)} photographs, such as {store.paths[0]}, can be read")
