"""Blemish finds defects on manufactured parts."""

from blemish._version import __version__

__all__ = ["__version__"]
