"""Split a data set into training, held-out and test images, in the same way on every machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blemish.errors import ConfigError, DataError
from blemish.types import Sample

TEST_SHARE = 0.2
"""Share of the good images used for testing if the data set defines no split."""


@dataclass(frozen=True)
class Split:
    """The disjoint parts of a data set, each sorted by path."""

    train: tuple[Sample, ...]
    """Good images to train on."""
    held_out: tuple[Sample, ...]
    """Good images from which the thresholds are set."""
    test: tuple[Sample, ...]
    """Good and defective images, which only `evaluate` opens."""
    train_defects: tuple[Sample, ...] = ()
    """Defective images of the training split."""


def split(
    samples: Sequence[Sample],
    root: Path,
    held_out_share: float = 0.1,
    held_out_minimum: int = 5,
    trained: Collection[Path] = (),
    *,
    hold_out: bool = True,
) -> Split:
    """Split the samples of the data set at `root`.

    The held-out images are the good images of the data set's own validation split or, if it has none, a share
    of the good training images: at least `held_out_minimum` of them, but at most half. Images in `trained`,
    on which an earlier model was trained, are never held out. Without `hold_out`, only the data set's own
    validation images are. Defective validation images are not used.
    Images are chosen by the SHA-256 of their path relative to `root`, independently of any seed or order.
    Raises DataError if there are fewer than two good training images (or none, without `hold_out`), a file is
    listed twice, or only some samples have a split; ConfigError for a share or minimum out of range.
    """
    if not 0 < held_out_share < 1 or held_out_minimum < 1:
        raise ConfigError(
            f"found a held-out share of {held_out_share} and a minimum of {held_out_minimum}; "
            "expected a share between 0 and 1 and a minimum of 1 or more"
        )
    _refuse_repeated(samples)
    test = choose_test(samples, root)
    rest = set(samples) - set(test)
    pool = {sample for sample in rest if sample.label == 0 and sample.split != "validation"}
    least = 2 if hold_out else 1
    if len(pool) < least:
        raise DataError(f"found {len(pool)} good images for training in {root}; expected at least {least}")
    validation = (sample for sample in rest if sample.label == 0 and sample.split == "validation")
    held_out = {sample for sample in validation if sample.path not in trained}
    if not held_out and hold_out:
        count = max(held_out_minimum, round(held_out_share * len(pool)))
        unseen = [sample for sample in _by_hash(pool, root) if sample.path not in trained]
        held_out = set(unseen[: min(count, len(pool) // 2)])
    defects = {sample for sample in rest if sample.label == 1 and sample.split == "train"}
    return Split(_by_path(pool - held_out, root), _by_path(held_out, root), test, _by_path(defects, root))


def choose_test(samples: Sequence[Sample], root: Path) -> tuple[Sample, ...]:
    """Return the test samples, sorted by path: the data set's own or else all defective and some good ones.

    A data set with neither a split nor defects has none. Unlike `split`, this requires no training images.
    Raises DataError if only some samples have a split.
    """
    given = sum(bool(sample.split) for sample in samples)
    if given not in (0, len(samples)):
        raise DataError(f"{given} of {len(samples)} images in {root} have a split; expected all or none")
    if given:
        return _by_path((sample for sample in samples if sample.split == "test"), root)
    defects = [sample for sample in samples if sample.label == 1]
    good = [sample for sample in samples if sample.label == 0]
    chosen = _by_hash(good, root)[: round(TEST_SHARE * len(good))] if defects else []
    return _by_path([*defects, *chosen], root)


def relative_path(path: Path, root: Path) -> str:
    """Return an image's path relative to its data set, with forward slashes; `root` may be a manifest."""
    return Path(os.path.relpath(path, root.parent if root.is_file() else root)).as_posix()


def _by_path(samples: Iterable[Sample], root: Path) -> tuple[Sample, ...]:
    return tuple(sorted(samples, key=lambda sample: relative_path(sample.path, root)))


def _by_hash(samples: Iterable[Sample], root: Path) -> list[Sample]:
    def digest(sample: Sample) -> bytes:
        return hashlib.sha256(relative_path(sample.path, root).encode(errors="surrogateescape")).digest()

    return sorted(samples, key=digest)


def _refuse_repeated(samples: Sequence[Sample]) -> None:
    seen: dict[Path, Path] = {}
    for sample in samples:
        file = sample.path.resolve()
        if file in seen:
            raise DataError(f"{seen[file]} and {sample.path} are the same file; expected every image once")
        seen[file] = sample.path
