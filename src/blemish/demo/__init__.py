"""Rendered parts with planted defects, so that everything can be tried without a download."""

from blemish.demo.dataset import draw, draw_part
from blemish.demo.defects import DEFECTS

__all__ = ["DEFECTS", "draw", "draw_part"]
