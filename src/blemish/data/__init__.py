"""Data sets: the layouts on disk, splits, folds, labels and checks.

Exports `scan`, which lists the samples of a data set; the package `loading` turns samples into batches.
"""

from blemish.data.layouts import LAYOUTS, Layout, recognise, scan

__all__ = ["LAYOUTS", "Layout", "recognise", "scan"]
