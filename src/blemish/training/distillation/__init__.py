"""Distil a teacher for EfficientAD. Nothing is imported here, so that torch is not loaded."""
