"""Select the labelled defects used for training, and determine the supervision."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from blemish import seeding
from blemish.data.split import Split, relative_path
from blemish.errors import ConfigError, DataError
from blemish.types import Sample, Supervision

SUPERVISIONS: tuple[Supervision, ...] = ("none", "weak", "mixed", "full")


def amount(text: str | float, of: int, name: str) -> int:
    """Convert a number of images, or a share of `of` such as 0.5 or 50%, to a count; raise ConfigError.

    A share above 0 is rounded to at least one image.
    """
    match = re.fullmatch(r"(\d+)|(\d*\.\d+)|(\d+(?:\.\d*)?)%", str(text).strip())
    if not match:
        raise ConfigError(f"{name} {text}: expected a number of images, or a share such as 0.5 or 50%")
    if match[1]:
        count = int(match[1])
    else:
        share = float(match[2]) if match[2] else float(match[3]) / 100
        if share > 1:
            raise ConfigError(f"{name} {text}: expected a share of at most 1")
        count = max(round(share * of), int(share > 0))
    if count > of:
        raise ConfigError(f"{name} {text}: only {of} are available")
    return count


def sample_at_random(
    samples: Sequence[Sample], root: Path, count: int, seed: int, purpose: str
) -> tuple[Sample, ...]:
    """Sample `count` items at random from the seed; a larger count includes those of a smaller one."""
    by_path = sorted(samples, key=lambda sample: relative_path(sample.path, root))
    order = torch.randperm(len(by_path), generator=seeding.generator(seed, purpose))[:count]
    return tuple(by_path[place] for place in sorted(order.tolist()))


def choose_defects(parts: Split, root: Path, wanted: str | float | None, seed: int) -> Split:
    """Sample `wanted` training defects from the training split or, if it has none, from the test split.

    Defects taken from the test split are removed from it. If `wanted` is None, the data set's own split is
    kept. Raises ConfigError for an invalid amount, or one larger than the number of available defects.
    """
    if wanted is None:
        return parts
    given = parts.train_defects or tuple(sample for sample in parts.test if sample.label == 1)
    drawn = sample_at_random(given, root, amount(wanted, len(given), "train defects"), seed, "defects")
    test = tuple(sample for sample in parts.test if sample not in drawn)
    return dataclasses.replace(parts, train_defects=drawn, test=test)


def keep_masks(parts: Split, root: Path, wanted: str | float | None, seed: int) -> Split:
    """Keep the masks of `wanted` randomly sampled training defects; raise ConfigError as `amount` does."""
    if wanted is None:
        return parts
    masked = [sample for sample in parts.train_defects if sample.masks]
    kept = set(sample_at_random(masked, root, amount(wanted, len(masked), "train masks"), seed, "masks"))
    defects = (
        sample if sample in kept else dataclasses.replace(sample, masks=()) for sample in parts.train_defects
    )
    return dataclasses.replace(parts, train_defects=tuple(defects))


def recognise(defects: Sequence[Sample]) -> Supervision:
    """Return the supervision that the training defects provide, by how many of them have masks."""
    masked = sum(bool(sample.masks) for sample in defects)
    if not defects:
        return "none"
    if not masked:
        return "weak"
    return "full" if masked == len(defects) else "mixed"


def supervise(
    parts: Split, asked: str, able: Sequence[Supervision], model: str
) -> tuple[Split, Supervision, str]:
    """Determine the supervision: as requested or, for auto, as the data provide it and the model can use it.

    Returns the split with the defects used for training, the supervision, and a note for the user on defects
    that the model cannot use, or "". Raises ConfigError for a supervision that is unknown or that the model
    cannot learn from, DataError if the data do not provide it.
    """
    known: dict[str, Supervision] = {name: name for name in SUPERVISIONS}
    chosen = known.get(asked, recognise(parts.train_defects))
    if asked not in ("auto", *known):
        raise ConfigError(f"unknown supervision {asked!r}; expected auto, {', '.join(SUPERVISIONS)}")
    if chosen not in able and asked != "auto":
        raise ConfigError(f"{model} supports supervision {' or '.join(able)}, not {asked}")
    unused = ""
    if chosen not in able:
        chosen, unused = "none", f"; {model} cannot use the {len(parts.train_defects)} defective images"
    if chosen == "none":
        parts = dataclasses.replace(parts, train_defects=())
    elif chosen == "weak":
        parts = keep_masks(parts, Path(), 0, 0)
    if recognise(parts.train_defects) != chosen:
        masked = sum(bool(sample.masks) for sample in parts.train_defects)
        raise DataError(
            f"found {len(parts.train_defects)} defective training images, {masked} of them with masks; "
            f"supervision {chosen} expects {NEEDS[chosen]}"
        )
    return parts, chosen, unused


NEEDS = {
    "weak": "at least one, from the data set's split or --train-defects",
    "mixed": "some with masks and some without (--train-masks leaves some out)",
    "full": "at least one, and masks for all",
}


def describe(parts: Split, supervision: Supervision) -> str:
    """Return a summary of the training images and the supervision."""
    defects = parts.train_defects
    masked = sum(bool(sample.masks) for sample in defects)
    sentence = f"supervision {supervision}: {len(parts.train)} good"
    if defects:
        sentence += f" and {len(defects)} defective training images, {masked} with masks"
    else:
        sentence += " training images"
        waiting = sum(sample.label for sample in parts.test)
        if waiting:
            sentence += (
                f" ({waiting} defective images are used for testing; --train-defects moves some to training)"
            )
    return sentence
