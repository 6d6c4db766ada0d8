"""Distil a teacher for EfficientAD. Empty, so that nothing pulls in torch."""
