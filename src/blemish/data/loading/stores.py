"""Images decoded once, and the frozen part run once on each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blemish import images
from blemish.data.loading.cache import FeatureCache, Memory
from blemish.data.loading.sampling import Entry, flipped
from blemish.files import digest
from blemish.images import Preprocessing
from blemish.types import AnyArray

Encode = Callable[[Tensor], tuple[Tensor, ...]]


class ImageStore:
    """Images at the network's size, decoded once and kept while they fit into memory.

    They are kept as `Preprocessing.resized` returns them: bytes for 8-bit files, float32 for deeper ones.
    With crop, an image is resized to twice the size and its centre is taken.
    """

    def __init__(
        self, paths: Sequence[Path], preprocessing: Preprocessing, memory: Memory, *, crop: bool = False
    ) -> None:
        self.paths, self.preprocessing, self.memory, self.crop = list(paths), preprocessing, memory, crop
        self.kept: dict[int, AnyArray] = {}
        self.maxima: dict[int, int] = {}
        """Largest value of each image read so far from a file of more than 8 bits."""
        self.digests: dict[int, str] = {}
        """SHA-256 of the file of each image read so far."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.preprocessing.image_size

    def fill(self) -> ImageStore:
        """Read every image once, in parallel; raise ImageError for the first that cannot be read."""
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(self.resized, range(len(self.paths))):
                pass
        return self

    def set_white(self, white: float) -> None:
        """Set the value of 16-bit data that is white from now on."""
        self.preprocessing = dataclasses.replace(self.preprocessing, white=white)

    def without(self, left_out: frozenset[int]) -> ImageStore:
        """Return the store of the other images, with what has been read of them."""
        kept = [index for index in range(len(self.paths)) if index not in left_out]
        store = ImageStore(
            [self.paths[index] for index in kept], self.preprocessing, self.memory, crop=self.crop
        )
        store.kept = {new: self.kept[old] for new, old in enumerate(kept) if old in self.kept}
        store.maxima = {new: self.maxima[old] for new, old in enumerate(kept) if old in self.maxima}
        store.digests = {new: self.digests[old] for new, old in enumerate(kept) if old in self.digests}
        return store

    def digest(self, index: int) -> str:
        """Return the SHA-256 of an image's file, which is read for it only if it has not been read before."""
        if index not in self.digests:
            self.digests[index] = digest(self.paths[index])
        return self.digests[index]

    def resized(self, index: int) -> AnyArray:
        """Return one image at the store's size, (h, w, 3) in the file's units."""
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
        """Return one image's inputs (N, 3, h, w), float32 in [0, 1]."""
        return self.preprocessing.scaled(self.resized(index))

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return (B, 3, h, w) float32 images in [0, 1]."""
        return torch.from_numpy(np.concatenate([self.inputs(index) for index in indices]))

    def batches(self, size: int = 4) -> Iterator[Tensor]:
        """Yield all images in order, `size` at a time."""
        for start in range(0, len(self.paths), size):
            yield self.batch(range(start, min(start + size, len(self.paths))))


class EncodedStore:
    """What the frozen part makes of each image and its flips, in half precision, kept where there is room.

    An entry that is not kept is computed again and rounded alike, so a memory budget changes no result.
    Without a frozen part, `encode` is None and entries are empty.
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
        """Yield every image's entry in order, as a batch of one."""
        for index in range(len(self.store.paths)):
            yield self.batch([(index, 0)])

    def compute(self, encode: Encode, index: int, flip: int) -> tuple[Tensor, ...]:
        """Encode an image, rounded to half precision."""
        image = self.view(self.store.inputs(index), flip)
        with torch.no_grad():
            parts = encode(torch.from_numpy(image).to(self.device))
        return tuple(part[0].half().cpu().contiguous() for part in parts)

    def entry(self, index: int, flip: int) -> tuple[Tensor, ...]:
        """Return one image's entry, from the cache where it is kept."""
        if self.encode is None:
            return ()
        name = f"{self.store.digest(index)}.{flip}"
        entry = self.cache.get(name)
        if entry is None:
            entry = self.compute(self.encode, index, flip)
            self.cache.put(name, entry)
        return entry

    def batch(self, entries: Sequence[Entry]) -> tuple[Tensor, ...]:
        """Return several entries as (B, ...) float32 tensors on the device."""
        columns = zip(*(self.entry(*entry) for entry in entries), strict=True)
        return tuple(torch.stack(column).to(self.device).float() for column in columns)
