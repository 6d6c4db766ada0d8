"""What a run is asked for, as a record.

The command line, Python, a sweep on another machine and an app all build the same record, and it can be
written as JSON and read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec
from typing_extensions import override

from blemish.data.folds import Fold
from blemish.errors import ConfigError
from blemish.files import plain
from blemish.inference.calibration import check_shares
from blemish.training.length import Length, seconds


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What every run of the training loop is asked for."""

    out: Path
    """The file to write."""
    preset: str = "default"
    """A preset of the method: default, or paper for the method to the letter."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method's config, as text or as values."""
    weights: Path | None = None
    """Pretrained weights, where they should not be looked up."""
    steps: int | None = None
    epochs: int | None = None
    budget: float | str | None = None
    """Wall time for everything, in seconds or as text such as "10m". At most one of the three is given."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "auto"
    """auto, fp32 or bf16."""
    memory: int = 4 << 30
    """Bytes for decoded images, and as many again for encoded ones."""
    cache: str = "auto"
    """Where encoded images go that memory does not hold: auto, into files beside `out` until the end; a
    folder, which keeps all of them for later runs, too; off, nowhere."""
    resume: bool = False
    """Whether to go on from the checkpoint beside `out`."""

    def __post_init__(self) -> None:
        """Take paths as text, too; raise ConfigError for a length that cannot be."""
        for name in self.paths():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        object.__setattr__(self, "cache", str(self.cache))
        if isinstance(self.budget, str):
            object.__setattr__(self, "budget", seconds(self.budget))
        self.length.check()

    @classmethod
    def paths(cls) -> tuple[str, ...]:
        """Names of the fields that are paths."""
        return ("out", "weights")

    @property
    def length(self) -> Length:
        """How long to train."""
        return Length(self.steps, self.epochs, self.budget if not isinstance(self.budget, str) else None)

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON has it."""
        record: dict[str, Any] = plain(self)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; raise ConfigError that names the field that does not fit."""
        try:
            return msgspec.convert(record, cls, dec_hook=lambda kind, value: kind(value))
        except msgspec.ValidationError as error:
            raise ConfigError(f"this is no request for a run: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TrainingRequest(RunRequest):
    """What `blemish.train` is asked for."""

    data: Path
    """Folder or manifest of a data set."""
    model: str | None = None
    """The method; None: that of `start`."""
    start: Path | None = None
    """A model file to go on from, with its method and settings, in a shorter run."""
    layout: str = "auto"
    supervision: str = "auto"
    """What is learned of defects: none, weak, mixed or full; auto: what the training images allow."""
    train_defects: str | float | None = None
    """How many defective images train, a number or a share, chosen at random by the seed; None: as the data
    set's own split says."""
    train_masks: str | float | None = None
    """How many of those keep their masks; None: all."""
    fold: Fold | None = None
    """The part of a cross-validation that does not train; None: as the data set's own split says."""
    natural_images: str = "drawn"
    """For a method with a pretraining penalty: "drawn" for rendered images, a folder of photographs, or
    "none" to switch the penalty off."""
    schedule: str = "default"
    """paper: the paper's own length, rates and batches, under any preset."""
    false_reject_rate: float = 0.01
    """Share of good parts that may be called defective."""

    @override
    def __post_init__(self) -> None:
        """Take paths as text, too; raise ConfigError for a length or a rate that cannot be."""
        super().__post_init__()
        object.__setattr__(self, "natural_images", str(self.natural_images))
        check_shares(false_reject_rate=self.false_reject_rate)

    @classmethod
    @override
    def paths(cls) -> tuple[str, ...]:
        return (*super().paths(), "data", "start")


@dataclass(frozen=True, kw_only=True)
class DistillationRequest(RunRequest):
    """What `distill` is asked for."""

    images: Path
    """Folder of natural images of anything."""
    size: str = "small"
    """Of the teacher: small or medium, for EfficientAD-S or -M."""
    source: str | None = None
    """The backbone whose features are learned; None: the paper's. `weights` are its own."""

    @classmethod
    @override
    def paths(cls) -> tuple[str, ...]:
        return (*super().paths(), "images")
