"""What a user can fix.

    BlemishError            any of these: one sentence that says what was found, where, what was expected
    ├── ImageError          a file that is no readable image
    ├── DataError           a folder, manifest, mask or split that cannot be used
    ├── ConfigError         an option or value that does not exist or does not fit
    ├── WeightsError        pretrained weights that are missing or do not fit their network
    ├── ModelFileError      a model file or checkpoint that is damaged, foreign or missing
    ├── OutputError         a place or disk that does not take a file
    ├── ExportError         a graph that differs from the model it was written from
    ├── MetricError         a metric that is not defined on what it was given
    └── StoppedError        a training run that was asked to stop, and can go on

The command line prints the sentence and exits with status 2. Everything else is a bug, with its traceback.
"""


class BlemishError(Exception):
    """Something a user can fix; the message is one sentence."""


class ImageError(BlemishError):
    """A file that is no readable image."""


class DataError(BlemishError):
    """A folder, manifest, mask or split that cannot be used."""


class ConfigError(BlemishError):
    """An option or value that does not exist or does not fit."""


class WeightsError(BlemishError):
    """Pretrained weights that are missing or do not fit their network."""


class ModelFileError(BlemishError):
    """A model file or checkpoint that is damaged, foreign or missing."""


class MetricError(BlemishError):
    """A metric that is not defined on what it was given."""


class OutputError(BlemishError):
    """A place or disk that does not take a file."""


class ExportError(BlemishError):
    """A graph that differs from the model it was written from."""


class StoppedError(BlemishError):
    """A training run that was asked to stop, and can go on."""
