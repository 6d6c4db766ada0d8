"""From a trained model to one that runs faster elsewhere, with `pipeline`."""
