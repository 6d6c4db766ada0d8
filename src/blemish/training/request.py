"""A request for a run, as a record.

The command line, Python, a sweep on another machine and an app all build the same record, which can be
written as JSON and read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_type_hints

import msgspec
from typing_extensions import override

from blemish.data.folds import Fold
from blemish.detectors.settings import nearest
from blemish.detectors.sizing import read_defect_size, read_scale
from blemish.errors import ConfigError
from blemish.files import to_json_types
from blemish.inference.calibration import check_shares
from blemish.training.length import Length, seconds

LIGHTS = ("off", "standardise")
"""What can be done about the light of images."""


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The options that every run of the training loop has."""

    out: Path
    """The file to write."""
    preset: str = "default"
    """A preset of the method: default, or paper for exactly the paper's settings."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method by name, as text or as values."""
    weights: Path | None = None
    """File of pretrained weights, in place of the usual lookup."""
    steps: int | None = None
    epochs: int | None = None
    budget: float | str | None = None
    """Wall time for the whole run, in seconds or as text such as "10m". At most one of the three may be
    given."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "auto"
    """auto, fp32 or bf16."""
    memory: int = 4 << 30
    """Bytes for decoded images, and the same again for encoded ones."""
    cache: str = "auto"
    """Where encoded images that exceed the memory are stored: auto, in files beside `out` until the run ends;
    a folder, which keeps all of them, also for later runs; off, nowhere."""
    resume: bool = False
    """Whether to resume from the checkpoint beside `out`."""

    def __post_init__(self) -> None:
        """Convert paths and durations given as text; raise ConfigError for a value of another type."""
        self.check_types()
        for name in self.paths():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        object.__setattr__(self, "cache", as_text(self.cache))
        if isinstance(self.budget, str):
            object.__setattr__(self, "budget", seconds(self.budget))
        self.length.check()

    def check_types(self) -> None:
        """Raise ConfigError for the first field whose value has another type, and for negative memory."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, Path):
                value = str(value)
            try:
                msgspec.convert(to_json_types(value), kind, dec_hook=lambda kind, value: kind(value))
            except msgspec.ValidationError as error:
                raise ConfigError(f"{name} {value!r} does not fit: {error}") from error
        if self.memory < 0:
            raise ConfigError(f"memory {self.memory}: expected 0 bytes or more")

    @classmethod
    def paths(cls) -> tuple[str, ...]:
        """Return the names of the fields that are paths."""
        return ("out", "weights")

    @property
    def length(self) -> Length:
        """The length of training."""
        return Length(self.steps, self.epochs, self.budget if not isinstance(self.budget, str) else None)

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON values."""
        record: dict[str, Any] = to_json_types(self)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Return the request from JSON values; raise ConfigError, which names the field that does not fit."""
        try:
            request = msgspec.convert(record, cls, dec_hook=lambda kind, value: kind(value))
        except msgspec.ValidationError as error:
            raise ConfigError(f"this is not a valid request: {error}") from error
        refuse_unknown(record, request.to_json())
        return request


@dataclass(frozen=True, kw_only=True)
class TrainingRequest(RunRequest):
    """The options of `blemish.train`."""

    data: Path
    """Folder or manifest of a data set."""
    model: str | None = None
    """The method; None: that of `start` or, without one, the best for what the data offer."""
    start: Path | None = None
    """A model file for a warm start, with its method and settings, in a shorter run."""
    layout: str = "auto"
    supervision: str = "auto"
    """What to learn from defects: none, weak, mixed or full; auto: what the training images allow."""
    train_defects: str | int | float | None = None  # 1 is one image, 1.0 is all of them
    """Number or share of the defective images to train on, chosen at random by the seed; None: those of the
    data set's own split."""
    train_masks: str | int | float | None = None
    """Number or share of those that keep their masks; None: all."""
    fold: Fold | None = None
    """The fold of a cross-validation that is tested and not trained on; None: the data set's own split."""
    natural_images: str = "drawn"
    """For a method with a pretraining penalty: "drawn" for rendered images, a folder of photographs, or
    "none" to switch the penalty off."""
    schedule: str = "default"
    """default, or paper for the paper's own length, learning rates and batch size, under any preset."""
    scale: str | float | tuple[float, float] | None = None
    """Pixels of the network's input for one pixel of the image, also vertical and horizontal, or as text such
    as "0.5" or "0.5x0.25". At most one of image_size (a setting), scale and defect_size may be given."""
    defect_size: str | float | None = None
    """Shorter side of the smallest defect that must be found, in pixels of the image, or as text such as
    "12px"; the size of the network's input follows from it."""
    false_reject_rate: float = 0.01
    """Share of good parts that may be called defective."""
    light: str | None = None
    """off, or standardise: bring the brightness and contrast of each image to those of the training images.
    None: as in `start`, or off."""
    light_limit: float = 0.0
    """Light p-value up to which a part is labelled at least review; 0: never."""

    @override
    def __post_init__(self) -> None:
        """Convert what is given as text; raise ConfigError for an invalid length, size or rate."""
        super().__post_init__()
        object.__setattr__(self, "natural_images", as_text(self.natural_images))
        if self.scale is not None:
            object.__setattr__(self, "scale", read_scale(self.scale))
        if self.defect_size is not None:
            object.__setattr__(self, "defect_size", read_defect_size(self.defect_size))
        sizes = {"image_size": self.settings.get("image_size")}
        sizes |= {"scale": self.scale, "defect_size": self.defect_size}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} were given; expected at most one of {', '.join(sizes)}")
        check_shares(false_reject_rate=self.false_reject_rate)
        if self.light not in (None, *LIGHTS):
            raise ConfigError(f"light {self.light!r}: expected {' or '.join(LIGHTS)}")

    @classmethod
    @override
    def paths(cls) -> tuple[str, ...]:
        return (*super().paths(), "data", "start")


@dataclass(frozen=True, kw_only=True)
class DistillationRequest(RunRequest):
    """The options of `distill`."""

    images: Path
    """Folder of natural images, of anything."""
    size: str = "small"
    """Size of the teacher: small or medium, for EfficientAD-S or -M."""
    source: str | None = None
    """The backbone whose features are distilled; None: the paper's. `weights` are this backbone's."""

    @classmethod
    @override
    def paths(cls) -> tuple[str, ...]:
        return (*super().paths(), "images")


def as_text(choice: str | Path) -> str:
    """Return a choice as text; a path stays one where its name is also that of a choice, such as "none"."""
    bare = isinstance(choice, Path) and len(choice.parts) == 1 and not choice.is_absolute()
    return f"./{choice}" if bare else str(choice)


def refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any], place: str = "") -> None:
    """Raise ConfigError for a field that a record does not have: msgspec ignores it."""
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"a request has no field {place + name!r}; {nearest(name, known)}")
        if isinstance(value, Mapping):
            refuse_unknown(value, known[name], f"{place}{name}.")
