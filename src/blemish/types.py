"""The records that cross the seams between rooms: frozen, and none of them computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[Any]

SplitName = Literal["train", "validation", "test", ""]
Supervision = Literal["none", "weak", "mixed", "full"]
"""What is labelled among the training images: good ones only; defects without masks; some masked; all."""
Label = Literal["ok", "review", "defect"]


@dataclass(frozen=True)
class Saturation:
    """From how many pixels on a region counts as found whole, for one kind of defect."""

    pixel_value: int
    """Of this kind in mask files, 1 to 255."""
    threshold: float
    """A number of pixels, or a share of the region's area."""
    relative: bool


@dataclass(frozen=True)
class Sample:
    """One image of a data set."""

    path: Path
    label: int
    """0 good, 1 defective."""
    kind: str
    """The kind of defect, the folder's name as a rule; "good" for a good part."""
    split: SplitName = ""
    """What the layout says the image is for; empty where the layout does not say."""
    masks: tuple[Path, ...] = ()
    """Mask files whose union is the defect. None: not masked (or good)."""
    saturations: tuple[Saturation, ...] = ()
    """Of the kinds of defect in the data set, where it says; then each mask file is one region."""


@dataclass(frozen=True)
class Batch:
    """What one training step reads."""

    images: Tensor
    """(B, 3, H, W) float32 RGB, 1.0 at the white level; empty where a detector trains on `encoded` alone."""
    encoded: tuple[Tensor, ...]
    """What the detector's frozen part makes of the images, float32."""
    labels: Tensor
    """(B,) float32: 0 good, 1 defective."""
    masked: Tensor
    """(B,) booleans: whether it is known which pixels are defective; false for a defect without a mask."""
    masks: Tensor | None = None
    """(B, H, W) float32, 1 where a pixel is defective; None: there are no masks in this run."""
    weights: Tensor | None = None
    """(B, H, W) float32, of each defective pixel in the loss; None: all count alike."""
    natural: Tensor | None = None
    """(B, 3, H, W) float32 natural images in [0, 1] for the pretraining penalty; None: it is off."""
    progress: float = 0.0
    """Share of the run's steps that are done, 0 at the first."""


@dataclass(frozen=True)
class LabelRules:
    """How training reads labelled defects."""

    flips: bool = True
    """Whether each is also shown flipped, in both directions and turned."""
    dilation: int = 0
    """Side of the square that widens their masks, in pixels of the image; odd, or 0."""
    weighted: bool = False
    """Whether a pixel of a mask is weighted by its distance to the border of its region."""


@dataclass(frozen=True)
class Calibration:
    """What held-out good images say about scores, and the thresholds that follow."""

    statistics: tuple[str, ...]
    """Names of the K numbers that the graph returns for an image."""
    centers: tuple[float, ...]
    scales: tuple[float, ...]
    """The image score is max over k of (statistic_k - centers_k) / scales_k."""
    scores: tuple[float, ...]
    """Image scores of the held-out good images, ascending."""
    pixel_maxima: tuple[float, ...]
    """Largest map value of each held-out good image, ascending."""
    false_reject_rate: float
    """Share of good parts that may be called defect."""
    review_rate: float
    """Share of good parts that may be called review or defect."""
    confidence: float
    """Probability with which the promise on the false-reject rate holds."""
    promised_rate: float
    """The false-reject rate that the defect threshold does promise at that confidence."""
    images_needed: int
    """Held-out good images that the asked-for rate needs, at the least."""
    defect_threshold: float
    review_threshold: float
    pixel_threshold: float


@dataclass(frozen=True)
class Region:
    """One connected region of a map above the pixel threshold, in pixels of the image.

    It is found on the map as the network gives it, whatever the size at which the map is asked for.
    """

    box: tuple[int, int, int, int]
    """x0, y0, x1, y1; the last two exclusive. It covers every pixel that the region touches."""
    area: int
    """In pixels of the image, rounded."""
    peak: float
    """Largest map value in the region."""
    peak_xy: tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """What a model says of one image."""

    path: str
    """Empty for an image that came as an array."""
    label: Label
    score: float
    """Raw; higher is worse."""
    p_value: float
    """Share of good parts at least this odd, from the held-out good images."""
    regions: tuple[Region, ...]
    map: FloatArray = field(repr=False, compare=False)
    """Raw. (h, w), the network's input size; where the full size was asked for, the image's own (H, W)."""
    parts: dict[str, FloatArray] = field(default_factory=dict, repr=False, compare=False)
    """The maps that `map` was joined from, where the method has several and they were asked for. As the
    network gives them, or at the image's own size."""


@dataclass(frozen=True)
class ImageResult:
    """One test image of an evaluation."""

    path: str
    """Relative to the data set."""
    kind: str
    truth: int
    """0 good, 1 defective."""
    label: Label
    score: float
    p_value: float


@dataclass(frozen=True)
class MetricRow:
    """The metrics of one kind of defect against all good test images. None: not defined here."""

    kind: str
    """"all" for the whole test set."""
    good: int
    defective: int
    masked: int
    """Defective images with a mask, on which the pixel metrics stand."""
    image_auroc: float | None
    image_ap: float | None
    image_f1_max: float | None
    pixel_auroc: float | None
    pixel_ap: float | None
    pixel_f1_max: float | None
    aupro: float | None
    saturated_pro: float | None = None
    """Up to a false-positive rate of 0.05; None in every row where the data set names no saturation."""


@dataclass(frozen=True)
class Exhibit:
    """One image that the report shows in full."""

    title: str
    result: ImageResult
    image: npt.NDArray[np.uint8] = field(repr=False)
    """(H, W, 3)."""
    map: FloatArray = field(repr=False)
    """(H, W)."""
    mask: BoolArray | None = field(repr=False)
    """(H, W); None where the image has no mask."""


@dataclass(frozen=True)
class Evaluation:
    """A model on a labelled data set."""

    data: str
    """Name of the data set's folder."""
    rows: tuple[MetricRow, ...]
    """The whole test set first, then one row for each kind of defect."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap interval of each image-level metric over the whole set, by field name of MetricRow."""
    images: tuple[ImageResult, ...]
    skipped: tuple[str, ...]
    """One sentence for each image that could not be read."""
    calibration: Calibration
    provenance: dict[str, Any]
    """What the model file says of itself, flat: method, backbone, image size, seed, versions, digest, ..."""
    exhibits: tuple[Exhibit, ...]
    """Worst mistakes first, then best finds."""
