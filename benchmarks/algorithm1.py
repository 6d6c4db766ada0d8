"""EfficientAD's algorithm 1 as the paper writes it, to time and check our training step against.

Batzner, Heckler, König, WACV 2024, supplement. The step computes in float32 with channels first, runs the
teacher every time and the student in three passes, finds the quantile with torch.quantile, optimises with
torch's default Adam, and reads its photograph before it starts. Each of our gains can be switched on. Only
the networks are ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from blemish import seeding
from blemish.backbones.pdn import CHANNELS
from blemish.data.loading.batches import Batches
from blemish.detectors.efficientad.detector import EfficientAD
from blemish.training.loop import Run

GAINS = (
    "cached teacher",
    "channels-last",
    "bfloat16",
    "topk",
    "fused Adam",
    "kept memory",
    "prefetch",
    "one pass",
)
"""What can be switched on in a `Transcription`; "kept memory" is a setting of the whole process."""


class Transcription:
    """Algorithm 1's step with the gains that are switched on.

    It starts from copies of a detector's networks and statistics, and draws random numbers in the same order
    as that detector: whether the photograph turns grey, what is changed in the image, by how much, dropout.
    """

    def __init__(self, detector: EfficientAD, gains: Collection[str] = ()) -> None:
        self.gains = gains
        form = torch.channels_last if "channels-last" in gains else torch.contiguous_format
        parts = copy.deepcopy((detector.teacher, detector.student, detector.autoencoder))
        for part in parts:
            cast(nn.Module, part).to(memory_format=form)  # type: ignore[call-overload]
        self.teacher, self.student, self.autoencoder = parts[0], parts[1], cast(nn.Module, parts[2])
        self.mean, self.std = detector.teacher_mean.clone(), detector.teacher_std.clone()
        self.optimizer = torch.optim.Adam(
            [*self.student.parameters(), *self.autoencoder.parameters()],
            lr=1e-4,
            weight_decay=1e-5,
            fused=True if "fused Adam" in gains else None,
        )
        self.pool = ThreadPoolExecutor(1)
        self.ahead: Future[tuple[Tensor, Tensor | None]] | None = None

    def step(self, run: Run, step: int) -> dict[str, float]:
        """Take one optimiser step on the run's images; return its losses."""
        batches = cast(Batches, run.batches)
        image, photograph = self.read(batches, step)
        known = None
        if "cached teacher" in self.gains:
            (known,) = batches.encoded.batch(batches.entries(step))
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4 if step < 0.95 * run.steps else 1e-5
        draw = seeding.generator(run.seed, "step", step)
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in self.gains):
            terms = self.losses(image, cast(Tensor, photograph), draw, known)
        total = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {name: float(term.detach()) for name, term in (terms | {"loss": total}).items()}

    def read(self, batches: Batches, step: int) -> tuple[Tensor, Tensor | None]:
        """Return a step's image and photograph; with prefetch they were read during the step before."""
        if "prefetch" not in self.gains:
            return batches.read(step)
        found = self.ahead.result() if self.ahead else batches.read(step)
        self.ahead = self.pool.submit(batches.read, step + 1)
        return found

    def losses(
        self, image: Tensor, photograph: Tensor, draw: torch.Generator, known: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the loss terms of algorithm 1, lines 12 to 24.

        image, photograph: (1, 3, H, W) in [0, 1]. known: the teacher's output on the image; None: it is run.
        """
        p = normalised(sometimes_grey(photograph, draw))
        x, changed = normalised(image), normalised(change(image, draw))
        with torch.no_grad():
            target = self.describe(self.teacher(x) if known is None else known)
            changed_target = self.describe(self.teacher(changed))
        imitated, penalised, second = self.student_outputs(x, p, changed)
        rebuilt = self.autoencoder(changed, draw).float()
        return {
            "hard": self.hard_loss((target - imitated) ** 2),
            "penalty": (penalised**2).mean(),
            "autoencoder": ((changed_target - rebuilt) ** 2).mean(),
            "student_autoencoder": ((rebuilt - second) ** 2).mean(),
        }

    def describe(self, raw: Tensor) -> Tensor:
        """Normalise the teacher's output by its statistics over the training images."""
        return (raw.float() - self.mean) / self.std

    def student_outputs(self, x: Tensor, p: Tensor, changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the student's first half on image and photograph, and its second on the changed image."""
        if "one pass" not in self.gains:
            first, penalised = (self.student(each)[:, :CHANNELS].float() for each in (x, p))
            return first, penalised, self.student(changed)[:, CHANNELS:].float()
        features, last = self.student.features(torch.cat([x, p, changed])), self.student.last
        bias = cast(Tensor, last.bias)
        first = conv2d(features[:2], last.weight[:CHANNELS], bias[:CHANNELS]).float()
        second = conv2d(features[2:], last.weight[CHANNELS:], bias[CHANNELS:]).float()
        return first[:1], first[1:], second

    def hard_loss(self, error: Tensor) -> Tensor:
        """Return the mean of the elements that are at least the 0.999 quantile of all of them."""
        if "topk" in self.gains:
            hard = error.numel() - math.ceil((error.numel() - 1) * 0.999)
            return error.flatten().topk(hard, sorted=False).values.mean()
        return error[error >= torch.quantile(error, 0.999)].mean()


def normalised(image: Tensor) -> Tensor:
    """Normalise an image as ImageNet's."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean[:, None, None]) / std[:, None, None]


def grey(image: Tensor) -> Tensor:
    """Return the luma of an image (ITU-R 601)."""
    red, green, blue = image.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def sometimes_grey(photograph: Tensor, draw: torch.Generator) -> Tensor:
    """Turn the photograph grey with probability 0.3."""
    return grey(photograph).repeat(1, 3, 1, 1) if torch.rand(1, generator=draw) < 0.3 else photograph


def change(image: Tensor, draw: torch.Generator) -> Tensor:
    """Change brightness, contrast or saturation by a factor from U(0.8, 1.2)."""
    which = int(torch.randint(3, (1,), generator=draw))
    factor = 0.8 + 0.4 * float(torch.rand(1, generator=draw))
    if which == 0:
        blended = factor * image
    elif which == 1:
        blended = factor * image + (1 - factor) * grey(image).mean()
    else:
        blended = factor * image + (1 - factor) * grey(image)
    return blended.clamp(0, 1)
