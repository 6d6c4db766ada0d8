"""The input of training steps. Imports nothing, so that other modules can be used without torch."""
