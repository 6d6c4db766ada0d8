"""Set a model's thresholds again from good images, without training."""

from __future__ import annotations

from pathlib import Path

from blemish import images as files
from blemish.errors import ConfigError
from blemish.files import SHORT_DIGEST, check_writable
from blemish.inference import bundle, calibration, manifest
from blemish.inference.bundle import Bundle
from blemish.inference.measure import measure
from blemish.inference.predictor import Predictor
from blemish.progress import Report, silent, tracked
from blemish.types import Calibration, FloatArray


def calibrate(
    model: str | Path,
    images: str | Path,
    *,
    out: str | Path,
    false_reject_rate: float = 0.01,
    light_limit: float | None = None,
    report: Report = silent,
) -> Calibration:
    """Set the thresholds of a model file from a folder of good images, and write the result to `out`.

    The model must not have been trained on these images. light_limit: the light p-value up to which a part is
    labelled at least review, for a model that standardises light; None: as before. Raises ImageError for the
    first image that cannot be read, since thresholds must not be set from the rest; ConfigError for a missing
    or empty folder, a rate that is not between 0 and 1, or a light limit that does not fit; DataError for a
    single image; OutputError for an `out` that cannot be written.
    """
    calibration.check_shares(false_reject_rate=false_reject_rate)
    check_writable(Path(out))
    opened = bundle.read(Path(model))
    if not Path(images).is_dir():
        raise ConfigError(f"found no folder at {images}; expected a folder of good images")
    paths = files.list_images(Path(images), recursive=True)
    if not paths:
        raise ConfigError(f"no images in {images}; expected good ones")
    preprocessing = opened.manifest.preprocessing
    limit = settle_light_limit(opened, light_limit, len(paths))
    used: list[str] = []
    lights: list[float] = []

    def inputs(path: Path) -> FloatArray:
        image, digest = files.read_digested(path)
        used.append(digest[:SHORT_DIGEST])
        found, light = preprocessing.with_light_score(preprocessing.resized(image))
        if light is not None:
            lights.append(light)
        return found

    with Predictor(opened) as predictor:
        measured = measure(
            predictor.engine, preprocessing, map(inputs, tracked(paths, len(paths), report, "calibrating"))
        )
    names = opened.manifest.calibration.statistics
    found = calibration.fit(*measured, names, false_reject_rate=false_reject_rate)
    light = calibration.fit_light(lights, limit) if lights else None
    made = manifest.recalibrated(opened.manifest, found, tuple(used), light)
    bundle.write(Path(out), made, opened.weights, opened.graph)
    return found


def settle_light_limit(opened: Bundle, given: float | None, count: int) -> float:
    """Return the light limit of a model that is calibrated on `count` images; None: that which it has.

    Raises ConfigError for a limit that is out of reach, and for any with a model that leaves light as it is.
    """
    known = opened.manifest.light_calibration
    if known is None:
        if given:
            raise ConfigError(f"found a light limit of {given:g}, but {opened.path} leaves light as it is")
        return 0.0
    limit = known.limit if given is None else given
    calibration.check_light_limit(limit, count)
    return limit
