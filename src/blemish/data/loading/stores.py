"""Images decoded once, and the frozen part run once on each of them."""

from __future__ import annotations

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
from blemish.types import AnyArray

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
