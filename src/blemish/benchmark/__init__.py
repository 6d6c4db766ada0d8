"""How long models take, side by side: `run` is the entrance."""
