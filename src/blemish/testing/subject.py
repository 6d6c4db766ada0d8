"""What is checked: a method, its settings, and a model of it, trained on rendered parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from blemish.detectors import registry, sizing
from blemish.detectors.base import Detector
from blemish.detectors.settings import FROM_IMAGES, Config, as_json
from blemish.images import to_input
from blemish.inference import bundle
from blemish.inference.engines.pytorch import restored
from blemish.inference.predictor import Predictor
from blemish.testing import parts
from blemish.training import run
from blemish.training.request import TrainingRequest
from blemish.types import Batch, Supervision

MASKED: Mapping[Supervision, int | None] = {"none": None, "weak": 0, "mixed": 2, "full": None}
"""How many of the four training defects keep their masks."""
SIZE = (80, 100)
"""Height and width of the rendered parts."""


@dataclass(frozen=True)
class Subject:
    """A method with its settings, and a model of it, trained on rendered parts."""

    request: TrainingRequest
    model: Predictor = field(repr=False)

    @property
    def name(self) -> str:
        """The method's name."""
        return str(self.request.model)

    @property
    def supervision(self) -> Supervision:
        """What was learned of defects."""
        return cast(Supervision, self.request.supervision)

    @property
    def config(self) -> Config:
        """The method's config, with the image size that training derives if the settings leave it open."""
        made = registry.configure(self.name, settings=self.request.settings, supervision=self.supervision)
        open_size = made.image_size == FROM_IMAGES
        return dataclasses.replace(made, image_size=sizing.for_shape(made, SIZE)) if open_size else made

    @property
    def has_steps(self) -> bool:
        """Whether the method is trained by steps."""
        return registry.method(self.name).has_steps

    @property
    def leaves_one_out(self) -> bool:
        """Whether thresholds are set from the training images, each scored without itself."""
        return registry.method(self.name).leaves_one_out

    def detector(self, seed: int = 0) -> Detector:
        """Return the detector untrained, with its pretrained part."""
        built = registry.build(self.name, self.config, seed)
        run.load_weights(built, None, self.request.weights)
        return built

    def trained(self) -> Detector:
        """Return the detector of the model file."""
        return restored(bundle.read(self.request.out))

    def train(self, out: Path, **changes: Any) -> Predictor:
        """Train again into another file."""
        return run.run(dataclasses.replace(self.request, out=out, **changes))

    def images(self, count: int = 3) -> Tensor:
        """Return (count, 3, h, w) good parts as the network takes them."""
        size = self.config.image_size
        return torch.from_numpy(np.stack([to_input(parts.part(50 + n, size)) for n in range(count)]))


def train(
    folder: Path,
    method: str,
    *,
    supervision: Supervision = "none",
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    weights: Path | None = None,
    natural_images: str = "drawn",
) -> Subject:
    """Train a method on a small data set of rendered parts, written into `folder`; return what to check.

    steps: as few as let the method find a checkered spot; None for a method that is fitted without steps.
    """
    data = parts.data_set(folder / "parts", train=10, good=2, bad=2, train_bad=4, size=SIZE)
    request = TrainingRequest(
        data=data,
        out=folder / "model.blemish",
        model=method,
        supervision=supervision,
        train_masks=MASKED[supervision],
        settings=as_json(registry.configure(method, settings=settings, supervision=supervision)),
        steps=steps,
        weights=weights,
        natural_images=natural_images,
        precision="fp32",
        device="cpu",
    )
    return Subject(request, run.run(request))


def labelled_batch(subject: Subject, detector: Detector, count: int) -> Batch:
    """Return a batch such as the subject learns from: with supervision two of three parts are defective."""
    images, size, supervision = subject.images(count), subject.config.image_size, subject.supervision
    labels, masked = torch.zeros(count), torch.ones(count) > 0
    masks = torch.zeros(count, *size)
    for row in range(count if supervision != "none" else 0):
        if row % 3:
            image, mask = parts.spotted(50 + row, size)
            images[row], labels[row] = torch.from_numpy(to_input(image)), 1
            masked[row] = supervision == "full" or (supervision == "mixed" and row % 3 == 1)
            masks[row] = torch.from_numpy(mask) * masked[row]
    known = masks if supervision in ("mixed", "full") else None
    return dataclasses.replace(good_batch(detector, images), labels=labels, masked=masked, masks=known)


def good_batch(detector: Detector, images: Tensor) -> Batch:
    """Return a batch of good parts (B, 3, h, w)."""
    with torch.no_grad():
        encoded = tuple(part.float() for part in detector.encode(images))
    natural = images.flip(3) if detector.config.reads_natural_images else None
    return Batch(images, encoded, torch.zeros(len(images)), torch.ones(len(images)) > 0, natural=natural)
