"""The errors that a user can fix.

    BlemishError            base class; the message says what was found, where, and what was expected
    ├── ImageError          a file cannot be read as an image
    ├── DataError           a folder, manifest, mask or split cannot be used
    ├── ConfigError         an option or value is unknown, out of range or in conflict with another
    ├── WeightsError        pretrained weights are missing or do not fit their network
    ├── ModelFileError      a model file or checkpoint is missing, damaged or not from Blemish
    ├── OutputError         a file cannot be written
    ├── ExportError         an exported graph disagrees with its source model
    ├── MetricError         a metric is undefined for its input
    └── StoppedError        a run stopped on request

The command line prints the message and exits with status 2. Any other exception is a bug and keeps its
traceback.
"""


class BlemishError(Exception):
    """An error that a user can fix; the message is one sentence."""


class ImageError(BlemishError):
    """A file cannot be read as an image."""


class DataError(BlemishError):
    """A folder, manifest, mask or split cannot be used."""


class ConfigError(BlemishError):
    """An option or value is unknown, out of range or in conflict with another."""


class WeightsError(BlemishError):
    """Pretrained weights are missing or do not fit their network."""


class ModelFileError(BlemishError):
    """A model file or checkpoint is missing, damaged or not from Blemish."""


class MetricError(BlemishError):
    """A metric is undefined for its input."""


class OutputError(BlemishError):
    """A file cannot be written."""


class ExportError(BlemishError):
    """An exported graph disagrees with its source model."""


class StoppedError(BlemishError):
    """A run stopped on request."""
