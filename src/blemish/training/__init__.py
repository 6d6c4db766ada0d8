"""From a data set to a model file. Empty, so that nothing pulls in torch: `run` is the entrance."""
