"""Set a model's thresholds again from good images, without training."""

from __future__ import annotations

from pathlib import Path

from blemish import images as files
from blemish.errors import ConfigError
from blemish.files import SHORT_DIGEST, check_writable
from blemish.inference import bundle, calibration, manifest
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
    report: Report = silent,
) -> Calibration:
    """Set the thresholds of a model file from a folder of good images, and write the result to `out`.

    The model must not have been trained on these images. Raises ImageError for the first image that cannot be
    read, since thresholds must not be set from the rest; ConfigError for a missing or empty folder, or a rate
    that is not between 0 and 1; DataError for a single image; OutputError for an `out` that cannot be
    written.
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
    used: list[str] = []

    def inputs(path: Path) -> FloatArray:
        image, digest = files.read_digested(path)
        used.append(digest[:SHORT_DIGEST])
        return preprocessing.inputs(image)

    with Predictor(opened) as predictor:
        measured = measure(
            predictor.engine, preprocessing, map(inputs, tracked(paths, len(paths), report, "calibrating"))
        )
    names = opened.manifest.calibration.statistics
    found = calibration.fit(*measured, names, false_reject_rate=false_reject_rate)
    made = manifest.recalibrated(opened.manifest, found, tuple(used))
    bundle.write(Path(out), made, opened.weights, opened.graph)
    return found
