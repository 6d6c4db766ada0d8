"""The conversion of images to a network's inputs, and of its maps back to the image.

A model file records its `Preprocessing`. Training, calibration, export, the gate and prediction all use it,
so that an image is treated the same way everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from blemish.images.light import Light
from blemish.images.resizing import resize, resize_map, to_input
from blemish.types import AnyArray, FloatArray

Box = tuple[int, int, int, int]
Size = tuple[int, int]


@dataclass(frozen=True)
class Preprocessing:
    """How images are converted to the network's input. Sizes are (height, width)."""

    image_size: Size
    """Height h and width w of the network's input."""
    white: float
    """White level of 16-bit data, which becomes 1; 8-bit images are divided by 255."""
    color: Literal["RGB"] = "RGB"
    """Channel order."""
    light: Light | None = None
    """The light that each image is brought to; None: images are left as they are."""

    def resized(self, image: AnyArray) -> AnyArray:
        """Resize an (H, W, 3) image to (h, w, 3); the pixel values keep the units of the file."""
        return resize(image, self.image_size)

    def scaled(self, resized: AnyArray) -> FloatArray:
        """Return a resized (h, w, 3) image as the network's (N, 3, h, w) inputs, float32 in [0, 1]; N = 1."""
        return self.with_light_score(resized)[0]

    def inputs(self, image: AnyArray) -> FloatArray:
        """Return an (H, W, 3) image as the network's (N, 3, h, w) inputs, float32 in [0, 1]; N = 1."""
        return self.scaled(self.resized(image))

    def with_light_score(self, resized: AnyArray) -> tuple[FloatArray, float | None]:
        """Return the inputs for a resized (h, w, 3) image, and its light score; None without `light`."""
        inputs = to_input(resized, self.white)
        score = None if self.light is None else self.light.standardise(inputs)
        return inputs[None], score

    def merge(self, maps: FloatArray) -> FloatArray:
        """Merge the (N, h, w) maps of one image's inputs into its anomaly map."""
        merged: FloatArray = maps[0]
        return merged

    def merge_statistics(self, statistics: FloatArray) -> FloatArray:
        """Return the (K,) maximum over the (N, K) statistics of one image's inputs."""
        merged: FloatArray = statistics.max(axis=0)
        return merged

    def to_image(self, box: Box, map_size: Size, size: Size) -> Box:
        """Convert a box from map pixels to image pixels, covering every image pixel that it touches.

        Boxes are (x0, y0, x1, y1), the last two exclusive.
        """
        (h, w), (height, width) = map_size, size
        x0, y0, x1, y1 = box
        return x0 * width // w, y0 * height // h, -(-x1 * width // w), -(-y1 * height // h)

    def point_to_image(self, point: tuple[int, int], map_size: Size, size: Size) -> tuple[int, int]:
        """Return the pixel x, y of the image under the centre of the map's pixel."""
        (h, w), (height, width), (x, y) = map_size, size, point
        return (2 * x + 1) * width // (2 * w), (2 * y + 1) * height // (2 * h)

    def area_to_image(self, area: int, map_size: Size, size: Size) -> int:
        """Return an area in pixels of the image, rounded, but at least 1."""
        (h, w), (height, width) = map_size, size
        return max(1, round(area * width * height / (w * h)))

    def map_to_image(self, anomaly_map: FloatArray, size: Size) -> FloatArray:
        """Resize a map bilinearly to the height and width of its image."""
        return resize_map(anomaly_map, size)


def stacked(inputs: list[FloatArray]) -> FloatArray:
    """Concatenate the (N, 3, h, w) inputs of several images along the first axis."""
    return inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
