"""Stores of images that are decoded once, and of the frozen part's outputs for them, computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blemish import images, seeding
from blemish.data.loading import altering
from blemish.data.loading.cache import FeatureCache, Memory
from blemish.data.loading.sampling import COPY, Entry, flipped
from blemish.files import digest
from blemish.images import Light, Preprocessing
from blemish.progress import Stop, never, silent, tracked
from blemish.types import AnyArray

Encode = Callable[[Tensor], tuple[Tensor, ...]]


class ImageStore:
    """Images at the network's input size, decoded once and kept in memory up to a budget.

    They are kept as returned by `Preprocessing.resized`: uint8 for 8-bit files, float32 for deeper ones. With
    `crop`, an image is resized to twice the input size and its centre cropped.
    """

    def __init__(
        self, paths: Sequence[Path], preprocessing: Preprocessing, memory: Memory, *, crop: bool = False
    ) -> None:
        self.paths, self.preprocessing, self.memory, self.crop = list(paths), preprocessing, memory, crop
        self.kept: dict[int, AnyArray] = {}
        self.maxima: dict[int, int] = {}
        """Largest value of each image with more than 8 bits read so far."""
        self.digests: dict[int, str] = {}
        """SHA-256 of the file of each image read so far, by index."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.preprocessing.image_size

    def fill(self, stop: Stop = never) -> ImageStore:
        """Read all images in parallel and return the store.

        Raises ImageError for the first unreadable one, StoppedError when asked to stop.
        """
        indices, pool = range(len(self.paths)), ThreadPoolExecutor()
        try:
            for _ in tracked(pool.map(self.resized, indices), len(indices), silent, "reading", stop=stop):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        return self

    def set_white(self, white: float) -> None:
        """Set the white level of 16-bit data for later reads."""
        self.preprocessing = dataclasses.replace(self.preprocessing, white=white)

    def set_light(self, light: Light) -> None:
        """Bring the images to this light in later reads."""
        self.preprocessing = dataclasses.replace(self.preprocessing, light=light)

    def without(self, left_out: frozenset[int]) -> ImageStore:
        """Return a store without these images that keeps what has been read of the others."""
        kept = [index for index in range(len(self.paths)) if index not in left_out]
        store = ImageStore(
            [self.paths[index] for index in kept], self.preprocessing, self.memory, crop=self.crop
        )
        store.kept = {new: self.kept[old] for new, old in enumerate(kept) if old in self.kept}
        store.maxima = {new: self.maxima[old] for new, old in enumerate(kept) if old in self.maxima}
        store.digests = {new: self.digests[old] for new, old in enumerate(kept) if old in self.digests}
        return store

    def digest(self, index: int) -> str:
        """Return the SHA-256 of an image's file, reading the file only if it has not been read before."""
        if index not in self.digests:
            self.digests[index] = digest(self.paths[index])
        return self.digests[index]

    def resized(self, index: int) -> AnyArray:
        """Return one image at the store's size: (h, w, 3), in the units of its file."""
        if index in self.kept:
            return self.kept[index]
        image, self.digests[index] = images.read_digested(self.paths[index])
        if image.dtype == np.uint16:
            self.maxima[index] = int(image.max())
        height, width = self.size
        if self.crop:
            wide = images.resize(image, (2 * height, 2 * width))
            top, left = height // 2, width // 2
            image = np.ascontiguousarray(wide[top : top + height, left : left + width])
        else:
            image = self.preprocessing.resized(image)
        if self.memory.take(image.nbytes):
            self.kept[index] = image
        return image

    def inputs(self, index: int) -> AnyArray:
        """Return the (N, 3, h, w) inputs of one image, float32 in [0, 1]."""
        return self.preprocessing.scaled(self.resized(index))

    def copy(self, index: int, number: int) -> AnyArray:
        """Return the (N, 3, h, w) inputs of an altered copy of one image, always the same for its number."""
        draw = np.random.default_rng(seeding.initial_seed(number, "copy", self.digest(index)))
        image = altering.altered(self.resized(index), self.preprocessing.white, draw)
        return self.preprocessing.scaled(image)

    def light_scores(self) -> list[float]:
        """Return the light score of each image; none if their light is left as it is."""
        found = (
            self.preprocessing.with_light_score(self.resized(index))[1] for index in range(len(self.paths))
        )
        return [score for score in found if score is not None]

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return the images as a (B, 3, h, w) float32 tensor in [0, 1]."""
        return torch.from_numpy(np.concatenate([self.inputs(index) for index in indices]))

    def batches(self, size: int = 4) -> Iterator[Tensor]:
        """Yield all images in order, in batches of `size`."""
        for start in range(0, len(self.paths), size):
            yield self.batch(range(start, min(start + size, len(self.paths))))


class EncodedStore:
    """Outputs of the frozen part for each image and its views, in half precision, cached while there is room.

    An entry that is not cached is computed again with the same rounding, so that the memory budget affects no
    result. For detectors without a frozen part, `encode` is None and entries are empty.

    Views below COPY are those that `view` makes of an image. From COPY on they are its altered copies.
    """

    def __init__(
        self,
        encode: Encode | None,
        store: ImageStore,
        cache: FeatureCache,
        device: str,
        *,
        view: Callable[[AnyArray, int], AnyArray] = flipped,
    ) -> None:
        self.encode, self.store, self.view = encode, store, view
        self.cache, self.device = cache, device

    def entries(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the entry of each image in order, as a batch of one."""
        for index in range(len(self.store.paths)):
            yield self.batch([(index, 0)])

    def compute(self, encode: Encode, index: int, view: int) -> tuple[Tensor, ...]:
        """Run the frozen part on one image and round its outputs to half precision."""
        if view >= COPY:
            image = self.store.copy(index, view - COPY)
        else:
            image = self.view(self.store.inputs(index), view)
        with torch.no_grad():
            parts = encode(torch.from_numpy(image).to(self.device))
        return tuple(part[0].half().cpu().contiguous() for part in parts)

    def entry(self, index: int, view: int) -> tuple[Tensor, ...]:
        """Return the entry of one image, from the cache if it is there."""
        if self.encode is None:
            return ()
        name = f"{self.store.digest(index)}.{view}"
        if view >= COPY:
            name += f".{altering.DIGEST}"
        entry = self.cache.get(name)
        if entry is None:
            entry = self.compute(self.encode, index, view)
            self.cache.put(name, entry)
        return entry

    def batch(self, entries: Sequence[Entry]) -> tuple[Tensor, ...]:
        """Return several entries as float32 tensors (B, ...) on the device."""
        columns = zip(*(self.entry(*entry) for entry in entries), strict=True)
        return tuple(torch.stack(column).to(self.device).float() for column in columns)
