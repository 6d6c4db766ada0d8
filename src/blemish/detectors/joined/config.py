"""The settings of joined methods. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from blemish.detectors.settings import STATISTICS, Config


@dataclass(frozen=True, kw_only=True)
class JoinedConfig(Config):
    """The settings of joined methods: those of each part. `image_size` is that of the largest part."""

    parts: tuple[dict[str, Any], ...] = ()
    """For each part its `method` and its `config`."""
    batch_size: int = 1
    statistics: tuple[str, ...] = ("top_mean",)
    """Of the joined map, or "sum": the sum of the parts' z-scores."""

    @property
    @override
    def known_statistics(self) -> tuple[str, ...]:
        return (*STATISTICS, "sum")
