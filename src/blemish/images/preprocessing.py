"""What becomes of an image before the network, and of its maps behind it.

A model file records a `Preprocessing`, and training, calibration, export, the gate and prediction all go
through it, so an image is treated alike everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blemish.images.resizing import FULL_SCALE, resize, resize_map, to_input
from blemish.types import AnyArray, FloatArray

Box = tuple[int, int, int, int]
Size = tuple[int, int]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input. Sizes are height and width."""

    image_size: Size
    """Height h and width w of the network's input."""
    white: float = FULL_SCALE
    """The value of 16-bit data that becomes 1; 8-bit images are divided by 255."""
    color: str = "RGB"
    """The order of the channels."""

    def resized(self, image: AnyArray) -> AnyArray:
        """Resize an image (H, W, 3) to (h, w, 3), in the units of its file."""
        return resize(image, self.image_size)

    def scaled(self, resized: AnyArray) -> FloatArray:
        """Turn a resized image (h, w, 3) into the network's inputs (N, 3, h, w), in [0, 1]; N is 1."""
        return to_input(resized, self.white)[None]

    def inputs(self, image: AnyArray) -> FloatArray:
        """Turn an image (H, W, 3) into the network's inputs (N, 3, h, w), float32 in [0, 1]; N is 1."""
        return self.scaled(self.resized(image))

    def merge(self, maps: FloatArray) -> FloatArray:
        """Merge the maps (N, h, w) of one image's inputs into its anomaly map."""
        merged: FloatArray = maps[0]
        return merged

    def merge_statistics(self, statistics: FloatArray) -> FloatArray:
        """Merge the statistics (N, K) of one image's inputs into its own (K,): of each, the largest."""
        merged: FloatArray = statistics.max(axis=0)
        return merged

    def to_image(self, box: Box, map_size: Size, size: Size) -> Box:
        """Turn a box in pixels of a map into one in pixels of its image, of every pixel that it touches.

        Boxes are x0, y0, x1, y1, the last two exclusive.
        """
        (h, w), (height, width) = map_size, size
        x0, y0, x1, y1 = box
        return x0 * width // w, y0 * height // h, -(-x1 * width // w), -(-y1 * height // h)

    def map_to_image(self, anomaly_map: FloatArray, size: Size) -> FloatArray:
        """Resize a map to its image's height and width, bilinearly."""
        return resize_map(anomaly_map, size)


def stacked(inputs: list[FloatArray]) -> FloatArray:
    """Join the inputs of several images, each (N, 3, h, w), along the first axis."""
    return inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
