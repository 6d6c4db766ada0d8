"""Standardise the light of images: the brightness and contrast of each channel, towards those in training.

An image's light is the mean and the deviation of each channel over a thumbnail, without the darkest and the
brightest hundredth. A gain and an offset bring them to the values that training images usually have. What
that takes away from an image would be lost to the anomaly map, so it is a statistic of its own, the light
score: a part of the wrong colour has a high one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from blemish.types import FloatArray

Doubles = npt.NDArray[np.float64]

SIDE = 64
"""Number of blocks along the shorter side of a thumbnail; an image may be slightly larger or smaller."""
CONSTANT = 1e-4
"""Deviation up to which a channel counts as constant, in shares of white."""
FLOOR = 0.005
"""Deviation of log gains and offsets below which differences between images mean nothing."""


@dataclass(frozen=True)
class Light:
    """The light of training images: what each image is brought to, and how much that usually takes.

    C is the number of channels, 3. Levels are in shares of white: black is 0, white is 1.
    """

    mean: tuple[float, ...]
    """(C,), the mean of each channel to which images are brought."""
    deviation: tuple[float, ...]
    """(C,), the standard deviation of each channel to which images are brought."""
    center: tuple[float, ...]
    """(2C,), mean over the training images of the log gains, then the offsets, that bring them there."""
    covariance: tuple[tuple[float, ...], ...]
    """(2C, 2C), their covariance, shrunk."""
    gain_limits: tuple[float, float] = (0.6, 1.6)
    """Smallest and largest gain of a channel."""
    offset_limit: float = 0.25
    """Largest offset of a channel in either direction."""

    def correction(self, mean: Doubles, deviation: Doubles) -> tuple[Doubles, Doubles]:
        """Return the (C,) gains and offsets for an image of these levels, within the limits."""
        wanted = np.maximum(self.deviation, CONSTANT)
        gain = np.clip(wanted / np.maximum(deviation, CONSTANT), *self.gain_limits)
        offset = np.clip(np.array(self.mean) - gain * mean, -self.offset_limit, self.offset_limit)
        return gain, offset

    def standardise(self, inputs: FloatArray) -> float:
        """Bring a (C, H, W) image to the light of training, in place; return its light score.

        Values beyond black or white are clipped, as a camera would have done in that light. What an image has
        lost by saturation does not come back.
        """
        gain, offset = self.correction(*levels(inputs))
        np.multiply(inputs, gain.astype(np.float32)[:, None, None], out=inputs)
        np.add(inputs, offset.astype(np.float32)[:, None, None], out=inputs)
        np.clip(inputs, 0, 1, out=inputs)
        return self.score(gain, offset)

    def score(self, gain: Doubles, offset: Doubles) -> float:
        """Return the Mahalanobis distance of a correction from those of the training images."""
        away = np.concatenate([np.log(gain), offset]) - self.center
        return float(np.sqrt(away @ np.linalg.solve(np.array(self.covariance), away)))

    def inconsistency(self) -> str:
        """Describe the first field that does not fit; "" where all do."""
        channels = len(self.mean)
        if channels != 3 or len(self.deviation) != 3 or len(self.center) != 6:
            return "light has levels of another number of channels; expected 3"
        if [len(row) for row in self.covariance] != 6 * [6] or np.linalg.eigvalsh(self.covariance)[0] <= 0:
            return "light.covariance is no positive definite matrix of 6 x 6"
        if not 0 < self.gain_limits[0] <= 1 <= self.gain_limits[1] or self.offset_limit < 0:
            return "light has limits of gain and offset that leave no image as it is"
        return ""


def measure(images: Iterable[FloatArray]) -> Light:
    """Return the light of training images (C, H, W), float32 with black at 0 and white at 1.

    They are brought to the median of their levels. The covariance is shrunk towards its diagonal as if 2C
    more images without correlation had been seen, and FLOOR is added to the deviations.
    """
    means, deviations = (np.array(each) for each in zip(*map(levels, images), strict=True))
    mean, deviation = np.median(means, axis=0).tolist(), np.median(deviations, axis=0).tolist()
    light = Light(tuple(mean), tuple(deviation), center=(), covariance=())
    pairs = (light.correction(*each) for each in zip(means, deviations, strict=True))
    taken = np.array([np.concatenate([np.log(gain), offset]) for gain, offset in pairs])
    count, size = taken.shape
    covariance = np.cov(taken, rowvar=False, bias=True)
    shrunk = (count * covariance + size * np.diag(np.diag(covariance))) / (count + size)
    shrunk += FLOOR**2 * np.eye(size)
    return replace(light, center=tuple(taken.mean(0).tolist()), covariance=tuple(map(tuple, shrunk.tolist())))


def levels(inputs: FloatArray) -> tuple[Doubles, Doubles]:
    """Return the (C,) means and deviations of a (C, H, W) image's thumbnail, without its extreme hundredths.

    The thumbnail is the mean of square blocks, SIDE of them along the shorter side. What is left over at the
    right and lower edge, less than a block, is not counted.
    """
    channels, height, width = inputs.shape
    step = max(1, min(height, width) // SIDE)
    down, across = height // step, width // step
    # rows first: sums over the last axis are slow
    rows = inputs[:, : down * step].reshape(channels, down, step, width).sum(2)
    sums = rows[..., : across * step].reshape(channels, down * across, step).sum(2)
    blocks = np.sort(sums / np.float32(step * step), axis=1)
    cut = blocks.shape[1] // 100
    middle = blocks[:, cut : blocks.shape[1] - cut].astype(np.float64)
    return middle.mean(1), middle.std(1)
