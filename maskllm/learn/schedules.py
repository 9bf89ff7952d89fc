"""How a setting moves over a run: pure functions of the step, `start` at the first, `end` at the last."""

from math import cos, pi


def linear(step: int, steps: int, start: float, end: float) -> float:
    """A straight line: temperature, scale, and the decay of the weight regularisation."""
    return start + (end - start) * _passed(step, steps)


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Half a cosine: the learning rate, without warm-up."""
    return end + (start - end) * (1 + cos(pi * _passed(step, steps))) / 2


def _passed(step: int, steps: int) -> float:
    """How much of the run lies behind `step` of 0 to steps - 1; a run of one step stays at its start."""
    return step / max(steps - 1, 1)
