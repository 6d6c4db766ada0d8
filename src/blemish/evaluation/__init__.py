"""Evaluation of a model on a labelled data set: metrics and reports."""
