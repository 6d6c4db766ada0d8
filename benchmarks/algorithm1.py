"""EfficientAD's algorithm 1 as the paper writes it, to measure and to check the product against.

Batzner, Heckler, König, WACV 2024, supplement. Float32, channels-first, the teacher run at every step, three
passes of the student, torch.quantile, torch's default Adam, photographs read before the step; each gain that
the product has can be switched on. Only the networks are the product's.
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
from blemish.data.loading.batches import Batches
from blemish.detectors.efficientad.detector import EfficientAD
from blemish.training.loop import Run

CHANNELS = 384
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
"""What `Transcription` can be told to do otherwise; "kept memory" is the process's affair."""


class Transcription:
    """Algorithm 1's step with the gains that are switched on.

    It starts from copies of a detector's networks and statistics, and reads its draws in that detector's
    order: photograph to grey or not, what the image is changed in, by how much, dropout.
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
        """Take one optimiser step on the run's images; give its losses."""
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
        """Read a step's image and photograph, here or, with prefetch, while the step before it ran."""
        if "prefetch" not in self.gains:
            return batches.read(step)
        found = self.ahead.result() if self.ahead else batches.read(step)
        self.ahead = self.pool.submit(batches.read, step + 1)
        return found

    def losses(
        self, image: Tensor, photograph: Tensor, draw: torch.Generator, known: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Algorithm 1, lines 12 to 24, for one (1, 3, H, W) image and one photograph, both in [0, 1].

        known: what the teacher makes of the image; None: it is run.
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
        return (raw.float() - self.mean) / self.std

    def student_outputs(self, x: Tensor, p: Tensor, changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the student's first half on image and photograph, and its second on the changed image."""
        if "one pass" not in self.gains:
            first, penalised = (self.student(each)[:, :CHANNELS].float() for each in (x, p))
            return first, penalised, self.student(changed)[:, CHANNELS:].float()
        features, last = self.student[:-1](torch.cat([x, p, changed])), cast(nn.Conv2d, self.student[-1])
        bias = cast(Tensor, last.bias)
        first = conv2d(features[:2], last.weight[:CHANNELS], bias[:CHANNELS]).float()
        second = conv2d(features[2:], last.weight[CHANNELS:], bias[CHANNELS:]).float()
        return first[:1], first[1:], second

    def hard_loss(self, error: Tensor) -> Tensor:
        """Average the elements that are at least the 0.999 quantile of all."""
        if "topk" in self.gains:
            hard = error.numel() - math.ceil((error.numel() - 1) * 0.999)
            return error.flatten().topk(hard, sorted=False).values.mean()
        return error[error >= torch.quantile(error, 0.999)].mean()


def normalised(image: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image - mean[:, None, None]) / std[:, None, None]


def grey(image: Tensor) -> Tensor:
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
