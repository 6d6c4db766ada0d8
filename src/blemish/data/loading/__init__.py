"""What a training step reads. Empty, so that nothing pulls in torch."""
