"""From a data set to a model file, with `run`. Nothing is imported here, so that torch is not loaded."""
