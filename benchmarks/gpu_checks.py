"""What `gpu.py` checks: whether a device trains and scores as the processor does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_job import REFUSED, Job, arithmetic, in_a_line
from gpu_learning import Learned, learn

import blemish
from blemish.detectors import registry
from blemish.exporting.gate import LIMITS, RANKED, rank_correlation
from blemish.images import read
from blemish.types import FloatArray, Verdict

SAME_DIGITS = {"fp32": "fp32", "tf32": "fp16", "fp16": "fp16", "bf16": "bf16"}
"""The precision of `blemish export` whose limits apply: TF32 has as many binary digits as float16."""
LOSS_LIMIT = 2e-4
"""Largest difference of a loss term in a few steps, as a share of the step's loss. On one processor, two ways
to compute convolutions differ by up to 2e-5 after four steps, bfloat16 by 2e-4 to 1e-3."""
CHANGE_LIMITS = {"Muon": 0.25}
"""Largest difference between what training changed in the weights, as a share of the change, where it is not
CHANGE_LIMIT. Muon's products in bfloat16 magnify rounding errors: 0.08 there; 0.27 at 1.2 times the rate."""
CHANGE_LIMIT = 0.03
"""0.004 there, and 0.17 at 1.2 times the learning rate: Adam moves a weight whose gradient is all rounding
error as far as any other."""
LEARNED_LIMIT = 0.002
"""Largest root mean square difference of the maps after these steps; up to 2e-4 there."""
FIT_LIMIT = 0.01
"""Largest root mean square difference of the maps after a fit, which may choose others among near ties; up to
2e-5 there."""
TOGETHER = 8
"""Images in a run when they are judged together."""


@dataclass(frozen=True)
class Check:
    """One comparison of the device with the processor; without a limit it is for information."""

    name: str
    precision: str
    value: float
    limit: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the value is at most the limit; NaN is not."""
        return None if self.limit is None else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return the check with its result; "value" is null where it is not finite."""
        finite = self.value if math.isfinite(self.value) else None
        found = {"check": self.name, "precision": self.precision, "value": finite, "limit": self.limit}
        return found | {"passed": self.passed}


# --- training ---


def training(job: Job, method: str) -> list[Check]:
    """Train or fit a method on both devices, from the same weights and with the same random numbers.

    Methods that learn from labelled defects are checked with them as well.
    """
    found: list[Check] = []
    for supervision in ("none", "full"):
        if supervision not in registry.preset(method, "default").regimes:
            continue
        defects: dict[str, Any] = (
            {} if supervision == "none" else {"supervision": supervision, "train_defects": 4}
        )
        prefix = "" if supervision == "none" else "with labelled defects: "
        with arithmetic("fp32"):
            expected = learn(job, method, "cpu", same_draws=False, **defects)
            there = learn(job, method, job.device, **defects)
            again = learn(job, method, job.device, **defects)
        found += [
            Check(prefix + name, "fp32", value, limit)
            for name, value, limit in compared(job, there, expected)
        ]
        if expected.before:
            found.append(Check(f"{prefix}weights, trained twice", "fp32", change_gap(again, there)))
    return found


def compared(job: Job, there: Learned, expected: Learned) -> list[tuple[str, float, float]]:
    """Compare what was learned on a device and on the processor: names, differences and limits."""
    maps = map_gap(*(maps_of(each, job.files()[:4]) for each in (there, expected)))
    if not expected.before:
        return [("maps after the fit, rms difference", maps, FIT_LIMIT)]
    most = CHANGE_LIMITS.get(expected.optimizer, CHANGE_LIMIT)
    return [
        (f"losses of {len(expected.losses)} steps", loss_gap(there.losses, expected.losses), LOSS_LIMIT),
        ("weights after them, difference of the change", change_gap(there, expected), most),
        ("maps after them, rms difference", maps, LEARNED_LIMIT),
    ]


def loss_gap(there: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]]) -> float:
    """Return the largest difference of a loss term, as a share of the expected loss of its step."""
    return max(
        abs(one[name] - other[name]) / abs(other["loss"])
        for one, other in zip(there, expected, strict=True)
        for name in other
    )


def change_gap(there: Learned, expected: Learned) -> float:
    """Return the difference between the changes of the weights, as a share of the expected change."""
    wanted = expected.changes()
    return float((there.changes() - wanted).norm() / wanted.norm())


def maps_of(learned: Learned, files: Sequence[Path]) -> FloatArray:
    """Return the maps of images, computed on the processor."""
    preprocessing = learned.preprocessing
    with torch.no_grad():
        found = [learned.detector(torch.from_numpy(preprocessing.inputs(read(file))))[0] for file in files]
    return np.stack([preprocessing.merge(maps.numpy()) for maps in found])


def map_gap(there: FloatArray, expected: FloatArray) -> float:
    """Return the root mean square difference of maps, in standard deviations of the expected ones."""
    error = np.square(there.astype(np.float64) - expected).mean()
    return float(np.sqrt(error) / expected.astype(np.float64).std())


# --- scores and maps ---


def judging(job: Job, method: str) -> list[Check]:
    """Compare a model file's scores, labels and maps on the device with ONNX Runtime's on the processor."""
    files = job.files()
    if not job.model(method).is_file():
        raise RuntimeError("there is no model file: the training failed")
    with blemish.load(job.model(method)) as model:
        expected = [model.predict(file) for file in files]  # one by one, for the sake of memory
    found: list[Check] = []
    for precision in job.precisions:
        try:
            found += judged(job, method, precision, files, expected)
        except REFUSED as error:
            found.append(Check(f"runs: {in_a_line(error)}", precision, math.nan, 0.0))
    return found


def judged(
    job: Job, method: str, precision: str, files: Sequence[Path], expected: Sequence[Verdict]
) -> list[Check]:
    """Compare one precision's verdicts with the expected ones."""
    limits = LIMITS[SAME_DIGITS[precision]]
    with (
        arithmetic(precision),
        blemish.load(
            job.model(method),
            backend="torch",
            device=job.device,
            precision="fp32" if precision == "tf32" else precision,
        ) as model,
    ):
        alone = [model.predict(file) for file in files]
        together: list[Verdict] = []
        for start in range(0, len(files), TOGETHER):
            together += model.predict_batch(files[start : start + TOGETHER])
    maps, wanted = stacked(alone), stacked(expected)
    scores, right = ([each.score for each in verdicts] for verdicts in (alone, expected))
    least = limits.rank_correlation / (1 if len(files) >= RANKED else 2)
    changed = sum(one.label != other.label for one, other in zip(alone, expected, strict=True))
    spread = wanted.astype(np.float64).std()
    return [
        Check("maps, rms difference", precision, map_gap(maps, wanted), limits.map_error),
        Check("maps, largest difference", precision, float(np.abs(maps - wanted).max() / spread)),
        Check(
            "maps in a batch and alone, rms difference",
            precision,
            float(np.sqrt(np.square(stacked(together) - maps).mean()) / spread),
            limits.map_error,
        ),
        Check("scores, 1 - rank correlation", precision, 1 - rank_correlation(right, scores), 1 - least),
        Check(
            "scores, largest difference",
            precision,
            float(np.abs(np.array(scores) - right).max() / (np.std(right) or 1.0)),
        ),
        Check("labels that change", precision, float(changed), limits.flips * len(files)),
    ]


def stacked(verdicts: Sequence[Verdict]) -> FloatArray:
    """Return the maps of verdicts, (N, h, w)."""
    return np.stack([each.map for each in verdicts])
