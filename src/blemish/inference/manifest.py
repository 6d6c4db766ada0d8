"""The manifest of a model file as a record: everything that the file says about itself.

Field names and nesting are those of manifest.json (docs/model-file.md). Fields with a default are missing
from the first files of format 1, which are older than these fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from blemish.data.folds import FoldRecord
from blemish.errors import ConfigError, ModelFileError
from blemish.images import Preprocessing
from blemish.inference.choice import Choice
from blemish.types import Calibration, LightCalibration


@dataclass(frozen=True)
class UsedFiles:
    """Short digests of the images that a model has seen."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    before: tuple[str, ...] = ()
    """Images that an earlier model was trained on, or from which earlier thresholds were set."""
    names: dict[str, str] = field(default_factory=dict)
    """Paths, relative to the data set, of the images that a model remembers, by short digest."""

    @property
    def all(self) -> frozenset[str]:
        """All of these digests."""
        return frozenset((*self.train, *self.held_out, *self.before))


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, rename={"start": "from"}):
    """What determines a training run: two runs that agree in all of this end with the same weights."""

    model: str
    preset: str
    supervision: str = "none"
    light: str = "off"
    config: dict[str, Any]
    images: str
    """SHA-256 over the training images, their labels and masks."""
    held_out: str
    """SHA-256 over the held-out images."""
    natural_images: str | int = "none"
    start: str = ""
    """SHA-256 of the weights that a warm start began with; empty for a new model."""
    torch: str = ""
    blemish: str = ""
    seed: int
    precision: str
    white: float = 0.0
    device: str = ""
    pretrained: str
    """SHA-256 of the pretrained weights; empty if the method has none."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """How a model was trained."""

    pretrained: str
    """Name of the network whose pretrained weights the model uses; empty if there is none."""
    steps: int
    epochs: float
    seconds: float
    device: str
    threads: int
    notes: tuple[str, ...]
    history: tuple[dict[str, float], ...]
    run: RunRecord
    data: str
    good_images: int
    defective_images: int = 0
    masked_images: int = 0
    held_out_images: int
    fold: FoldRecord | None = None
    files: UsedFiles | None = None
    graph_difference: float


class ExportRecord(
    msgspec.Struct, frozen=True, kw_only=True, rename={"in_floating_point": "in floating point"}
):
    """How an export was made from its model, and how well the two agree."""

    limits: dict[str, float]
    agreement: dict[str, dict[str, Any]]
    flops: int
    reduced: tuple[dict[str, Any], ...]
    in_floating_point: tuple[str, ...]
    thresholds: str


@dataclass(frozen=True)
class Manifest:
    """What a model file says about itself."""

    method: str
    config: dict[str, Any]
    preprocessing: Preprocessing
    outputs: tuple[str, ...]
    calibration: Calibration
    training: TrainingRecord
    versions: dict[str, str]
    engine: Choice = field(default_factory=Choice)
    export: ExportRecord | None = None
    light_calibration: LightCalibration | None = None

    @property
    def requires(self) -> tuple[str, ...]:
        """What a reader has to know to judge as this model does, beyond the first format."""
        return () if self.preprocessing.light is None else ("light",)

    @property
    def used(self) -> frozenset[str]:
        """Short digests of all images that the model has seen; empty for an early file that lists none."""
        return self.training.files.all if self.training.files else frozenset()

    @classmethod
    def untrained(
        cls, method: str, config: dict[str, Any], preprocessing: Preprocessing, outputs: tuple[str, ...]
    ) -> Manifest:
        """Return the manifest of an untrained model, by whose infinite thresholds every part is good."""
        infinite = float("inf")
        calibration = Calibration((), (), (), (), (), *(0.0,) * 4, 0, *(infinite,) * 3)
        run = RunRecord(
            model=method,
            preset="",
            config=config,
            images="",
            held_out="",
            seed=0,
            precision="",
            pretrained="",
        )
        training = TrainingRecord(
            pretrained="",
            steps=0,
            epochs=0.0,
            seconds=0.0,
            device="",
            threads=0,
            notes=(),
            history=(),
            run=run,
            data="",
            good_images=0,
            held_out_images=0,
            graph_difference=0.0,
        )
        return cls(method, config, preprocessing, outputs, calibration, training, {})

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values. Only an export names its engine; what is off is left out."""
        record: dict[str, Any] = msgspec.to_builtins(self)
        if self.export is None:
            record = {name: value for name, value in record.items() if name not in ("engine", "export")}
        if self.preprocessing.light is None:
            record["preprocessing"].pop("light", None)  # msgspec sets no default on what it has read
            record.pop("light_calibration", None)
        return record

    @classmethod
    def from_json(cls, record: object, name: str) -> Manifest:
        """Return the manifest that `to_json` was called on; name: that of the file, for messages.

        Raises ModelFileError, which names the first field that is missing or does not fit.
        """
        try:
            made = msgspec.convert(record, cls)
        except msgspec.ValidationError as error:
            raise ModelFileError(f"{name} is damaged: {sentence(str(error))}") from error
        except ConfigError as error:
            raise ModelFileError(
                f"{name} needs an engine that this version does not know: {error}"
            ) from error
        if complaint := made.inconsistency():
            raise ModelFileError(f"{name} is damaged: {complaint}")
        return made

    def inconsistency(self) -> str:
        """Describe the first fields that fit by themselves but not together; "" where all do."""
        calibration, count = self.calibration, len(self.calibration.statistics)
        for field_name in ("centers", "scales"):
            found = len(getattr(calibration, field_name))
            if found != count:
                return f"calibration.{field_name} in its manifest has {found} numbers; expected {count}"
        if min(calibration.scales, default=1.0) <= 0:
            return f"calibration.scales in its manifest has {min(calibration.scales)}; expected more than 0"
        for field_name in ("scores", "pixel_maxima"):
            values = getattr(calibration, field_name)
            if not values or list(values) != sorted(values):
                return f"calibration.{field_name} in its manifest is empty or not ascending"
        size = self.preprocessing.image_size
        if min(size) < 1 or list(size) != list(self.config.get("image_size", size)):
            return f"preprocessing.image_size in its manifest is {size}; expected the config's"
        if self.preprocessing.white <= 0:
            return f"preprocessing.white in its manifest is {self.preprocessing.white}; expected more than 0"
        return self.inconsistent_light()

    def inconsistent_light(self) -> str:
        """Describe what does not fit in the light and its calibration; "" where all does."""
        light, known = self.preprocessing.light, self.light_calibration
        if light is None or known is None:
            one = (light is None) != (known is None)
            return "its manifest has one of light and light_calibration; expected both" if one else ""
        if complaint := light.inconsistency():
            return f"preprocessing.{complaint}"
        if not known.scores or list(known.scores) != sorted(known.scores) or not 0 <= known.limit < 1:
            return "light_calibration in its manifest has no ascending scores, or a limit outside [0, 1)"
        return ""


def sentence(complaint: str) -> str:
    """Rephrase a message of msgspec, such as "Expected `int`, got `str` - at `$.training.steps`"."""
    what, _, where = complaint.partition(" - at ")
    place = where.strip("`").removeprefix("$").lstrip(".") or "the top level"
    if what.startswith("Object missing required field"):
        missing = what.split("`")[1]
        return f"found no field {place + '.' if where else ''}{missing} in its manifest; expected one"
    return f"{place} in its manifest does not fit: {what[0].lower()}{what[1:]}"


def recalibrated(
    manifest: Manifest,
    calibration: Calibration,
    used: tuple[str, ...],
    light: LightCalibration | None = None,
) -> Manifest:
    """Return a manifest with other calibrations; used: short digests of the good images behind them.

    These become the held-out images. The earlier ones stay recorded, so that no evaluation counts them.
    """
    files = manifest.training.files
    if files is not None:
        before = tuple(sorted({*files.before, *files.held_out}))
        files = replace(files, held_out=used, before=before)
    training = replace(manifest.training, files=files)
    return replace(manifest, calibration=calibration, light_calibration=light, training=training)
