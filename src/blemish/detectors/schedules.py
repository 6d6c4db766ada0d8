"""Learning-rate schedules: functions from the share of steps done to a factor on the learning rates."""

from __future__ import annotations

import math


def constant(progress: float) -> float:
    """Keep the rate constant (SimpleNet)."""
    return 1.0


def step_95(progress: float) -> float:
    """Keep the rate constant, then a tenth of it for the last 5 % of the steps (EfficientAD, algorithm 1)."""
    return 1.0 if progress < 0.95 else 0.1


def step_80_90(progress: float) -> float:
    """Multiply the rate by 0.4 at 80 % of the steps and again at 90 % (SuperSimpleNet, section 4)."""
    return 0.4 ** ((progress >= 0.8) + (progress >= 0.9))


def one_cycle(progress: float, rise: float = 0.05, hold: float = 0.5) -> float:
    """Rise linearly until `rise`, hold until `hold`, fall as a cosine to 1 %; for runs of known length."""
    if progress < rise:
        return 0.05 + 0.95 * progress / rise
    if progress < hold:
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - hold) / (1 - hold)))


SCHEDULES = {"constant": constant, "step-95": step_95, "step-80-90": step_80_90, "one-cycle": one_cycle}
"""The schedules by name."""
