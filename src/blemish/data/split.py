"""Which image is for what: the same images in the same folders are split the same way, on every machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blemish.errors import ConfigError, DataError
from blemish.types import Sample

TEST_SHARE = 0.2
"""Share of the good images that are for testing, where the data set does not say."""


@dataclass(frozen=True)
class Split:
    """The parts of a data set, each sorted by path; no image is in two of them."""

    train: tuple[Sample, ...]
    """Good images that the model learns from."""
    held_out: tuple[Sample, ...]
    """Good images that give the thresholds."""
    test: tuple[Sample, ...]
    """Good and defective images that `evaluate` alone opens."""
    train_defects: tuple[Sample, ...] = ()
    """Defective images that the data set gives for training."""


def split(
    samples: Sequence[Sample],
    root: Path,
    held_out_share: float = 0.1,
    held_out_minimum: int = 5,
    trained: Collection[Path] = (),
) -> Split:
    """Split the samples of the data set at `root`.

    Held out are the good images of the data set's own validation part; where there are none, a share of the
    good training images, at least `held_out_minimum` of them but never more than half, and none that an
    earlier model `trained` on. Defective validation images are in no part. Choices go by the SHA-256 of the
    path relative to `root`: no seed, no order counts.
    Raises DataError where fewer than two good images are for training, one file is listed twice, or only some
    samples say what they are for; ConfigError for a share or minimum that cannot be.
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
    if len(pool) < 2:
        raise DataError(f"found {len(pool)} good images for training in {root}; expected at least 2")
    validation = (sample for sample in rest if sample.label == 0 and sample.split == "validation")
    held_out = {sample for sample in validation if sample.path not in trained}
    if not held_out:
        count = max(held_out_minimum, round(held_out_share * len(pool)))
        unseen = [sample for sample in _by_hash(pool, root) if sample.path not in trained]
        held_out = set(unseen[: min(count, len(pool) // 2)])
    defects = {sample for sample in rest if sample.label == 1 and sample.split == "train"}
    return Split(_by_path(pool - held_out, root), _by_path(held_out, root), test, _by_path(defects, root))


def choose_test(samples: Sequence[Sample], root: Path) -> tuple[Sample, ...]:
    """Choose the samples for testing, sorted by path: what the data set says, else all defects and some good.

    Without defects, and with nothing said, there are none. Unlike `split`, this asks for no training images.
    Raises DataError where only some samples say what they are for.
    """
    given = sum(bool(sample.split) for sample in samples)
    if given not in (0, len(samples)):
        raise DataError(f"{given} of {len(samples)} images in {root} name their split; expected all or none")
    if given:
        return _by_path((sample for sample in samples if sample.split == "test"), root)
    defects = [sample for sample in samples if sample.label == 1]
    good = [sample for sample in samples if sample.label == 0]
    chosen = _by_hash(good, root)[: round(TEST_SHARE * len(good))] if defects else []
    return _by_path([*defects, *chosen], root)


def relative_path(path: Path, root: Path) -> str:
    """Give the path of an image as seen from its data set, with forward slashes; `root` may be a manifest."""
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
