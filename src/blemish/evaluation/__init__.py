"""A model and a labelled data set to metrics and a report."""
