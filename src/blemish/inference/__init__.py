"""From a model file and an image to a verdict. Imports no torch unless that is the chosen engine."""
