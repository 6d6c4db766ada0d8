"""Data sets: which images there are, what each is for, and what is known of it.

Hands out `scan`, which lists the samples of a data set; `loading` turns samples into batches.
"""

from blemish.data.layouts import LAYOUTS, Layout, recognise, scan

__all__ = ["LAYOUTS", "Layout", "recognise", "scan"]
