"""From a trained model to one that runs faster elsewhere: `pipeline` is the entrance."""
