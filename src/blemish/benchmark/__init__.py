"""Time models side by side, with `run`."""
