"""The settings of joined methods. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blemish.detectors.settings import Config


@dataclass(frozen=True, kw_only=True)
class JoinedConfig(Config):
    """The settings of joined methods: those of each part. `image_size` is that of the largest part."""

    parts: tuple[dict[str, Any], ...] = ()
    """For each part its `method` and its `config`."""
    batch_size: int = 1
    statistics: tuple[str, ...] = ("top_mean",)
