"""The frozen dataclasses that packages exchange; they hold data and compute nothing."""

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
"""Labels of the training images: good images only, or also defective ones with no, some or all masks."""
Label = Literal["ok", "review", "defect"]
Reason = Literal["", "light"]
"""Why a part is labelled otherwise than by its score: "light", its light p-value is at the limit or below."""


@dataclass(frozen=True)
class Saturation:
    """The saturation threshold of one kind of defect: the overlap at which a region counts as fully found."""

    pixel_value: int
    """Value that marks this kind of defect in mask files, 1 to 255."""
    threshold: float
    """A number of pixels or, if `relative`, a share of the region's area."""
    relative: bool


@dataclass(frozen=True)
class Sample:
    """One image of a data set."""

    path: Path
    label: int
    """0 good, 1 defective."""
    kind: str
    """Kind of defect, usually the name of the folder; "good" for a good part."""
    split: SplitName = ""
    """The part of the data set to which the layout assigns the image; empty if it assigns none."""
    masks: tuple[Path, ...] = ()
    """Mask files whose union marks the defect; empty for a good image or a defect without a mask."""
    saturations: tuple[Saturation, ...] = ()
    """Saturation of each kind of defect, if the data set defines it; each mask file is then one region."""


@dataclass(frozen=True)
class Batch:
    """The input of one training step."""

    images: Tensor
    """(B, 3, H, W) float32 RGB, 1.0 at the white level; empty if the detector trains on `encoded` alone."""
    encoded: tuple[Tensor, ...]
    """Outputs of the detector's frozen part for the images, float32."""
    labels: Tensor
    """(B,) float32: 0 good, 1 defective."""
    masked: Tensor
    """(B,) bool: whether the defective pixels are known; false for a defect without a mask."""
    masks: Tensor | None = None
    """(B, H, W) float32, 1 for defective pixels; None if the run has no masks."""
    weights: Tensor | None = None
    """(B, H, W) float32 weights of the defective pixels in the loss; None for equal weights."""
    natural: Tensor | None = None
    """(B, 3, H, W) float32 natural images in [0, 1] for the pretraining penalty; None if it is off."""
    names: tuple[str, ...] = ()
    """SHA-256 of the image files."""
    progress: float = 0.0
    """Share of the run's steps already completed, 0 at the first step."""


@dataclass(frozen=True)
class LabelRules:
    """How training uses labelled defects."""

    flips: bool = True
    """Whether each defective image is also used flipped: horizontally, vertically and both."""
    dilation: int = 0
    """Side in image pixels of the square by which masks are dilated; odd, or 0 for no dilation."""
    weighted: bool = False
    """Whether the pixels of a mask are weighted by their distance from the border of their region."""


@dataclass(frozen=True)
class Calibration:
    """The scores of good images that were not learned from, and the thresholds derived from them."""

    statistics: tuple[str, ...]
    """Names of the K statistics that the graph computes for an image."""
    centers: tuple[float, ...]
    scales: tuple[float, ...]
    """The image score is max over k of (statistic_k - centers_k) / scales_k."""
    scores: tuple[float, ...]
    """Image scores of the held-out good images, ascending."""
    pixel_maxima: tuple[float, ...]
    """Maximum of the map of each held-out good image, ascending."""
    false_reject_rate: float
    """Requested share of good parts that may be labelled defect."""
    review_rate: float
    """Requested share of good parts that may be labelled review or defect."""
    confidence: float
    """Confidence level of `promised_rate`."""
    promised_rate: float
    """False-reject rate that the defect threshold guarantees at that confidence level."""
    images_needed: int
    """Minimum number of held-out good images for which the requested rate can be guaranteed."""
    defect_threshold: float
    review_threshold: float
    pixel_threshold: float
    left_out: bool = False
    """Whether the images were not held out, but learned from and each scored without itself."""


@dataclass(frozen=True)
class LightCalibration:
    """The light scores of held-out good images, of a model that standardises light."""

    scores: tuple[float, ...]
    """Ascending."""
    limit: float = 0.0
    """Light p-value up to which a part is labelled at least review; 0: never, as p-values are above 0."""


@dataclass(frozen=True)
class Region:
    """A connected region of the map above the pixel threshold, in pixels of the image.

    Regions are found in the map at the network's input size, whatever size of map is requested.
    """

    box: tuple[int, int, int, int]
    """x0, y0, x1, y1, the last two exclusive; covers every image pixel that the region touches."""
    area: int
    """In image pixels, rounded."""
    peak: float
    """Largest map value in the region."""
    peak_xy: tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """The result for one image."""

    path: str
    """Empty if the image was passed as an array."""
    label: Label
    score: float
    """Raw; higher is worse."""
    p_value: float
    """Estimated share of good parts that are at least as anomalous as the image."""
    regions: tuple[Region, ...]
    map: FloatArray = field(repr=False, compare=False)
    """Raw values at the network's input size (h, w), or at the image's own size (H, W) on request."""
    parts: dict[str, FloatArray] = field(default_factory=dict, repr=False, compare=False)
    """The maps of which `map` is composed, on request and if the method has several; same size as `map`."""
    light_p: float | None = None
    """Estimated share of good parts whose light is at least as unusual; None if light is left as it is."""
    reason: Reason = ""
    """Why the label is not that of the score."""


@dataclass(frozen=True)
class Nearest:
    """The most similar place in a good image to the most anomalous place of the image that was judged."""

    image: str
    """Path of the good image relative to its data set."""
    xy: tuple[int, int]
    """The place in the good image, in pixels of an image of the size of the one that was judged."""
    worst_xy: tuple[int, int]
    """The most anomalous place, in pixels of the image that was judged."""
    distance: float
    """Between the features of both places; on average, good features are 1 away from their mean."""


@dataclass(frozen=True)
class ImageResult:
    """The result for one test image of an evaluation."""

    path: str
    """Relative to the root of the data set."""
    kind: str
    truth: int
    """0 good, 1 defective."""
    label: Label
    score: float
    p_value: float
    light_p: float | None = None
    reason: Reason = ""


@dataclass(frozen=True)
class MetricRow:
    """The metrics of one kind of defect against all good test images; None if undefined."""

    kind: str
    """"all" for the whole test set."""
    good: int
    defective: int
    masked: int
    """Number of defective images with a mask, from which the pixel-level metrics are computed."""
    image_auroc: float | None
    image_ap: float | None
    image_f1_max: float | None
    pixel_auroc: float | None
    pixel_ap: float | None
    pixel_f1_max: float | None
    aupro: float | None
    saturated_pro: float | None = None
    """Up to a false-positive rate of 0.05; None if the data set defines no saturation."""


@dataclass(frozen=True)
class Exhibit:
    """One image shown in the report."""

    title: str
    result: ImageResult
    image: npt.NDArray[np.uint8] = field(repr=False)
    """(H, W, 3)."""
    map: FloatArray = field(repr=False)
    """(H, W)."""
    mask: BoolArray | None = field(repr=False)
    """(H, W); None if the image has no mask."""


@dataclass(frozen=True)
class Evaluation:
    """The results of a model on a labelled data set."""

    data: str
    """Folder name of the data set."""
    rows: tuple[MetricRow, ...]
    """The whole test set first, then one row per kind of defect."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap intervals of the image-level metrics on the whole test set, by field of MetricRow."""
    images: tuple[ImageResult, ...]
    skipped: tuple[str, ...]
    """One sentence for each image that could not be read."""
    calibration: Calibration
    provenance: dict[str, Any]
    """Origin of the model from its manifest, flattened: method, network, image size, seed, versions, ..."""
    exhibits: tuple[Exhibit, ...]
    """The worst mistakes first, then the clearest detections."""
