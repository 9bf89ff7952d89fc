"""How a setting moves over a run: pure functions of how much of it has passed, from 0 to 1."""

from math import cos, pi

from maskllm.learn.config import Schedule


def passed(step: int, steps: int) -> float:
    """How much of the run lies behind `step` of 0 to steps - 1, at most 1; a run of one step has it all
    before it."""
    return min(step / max(steps - 1, 1), 1.0)


def anneal(schedule: Schedule, share: float, start: float, end: float) -> float:
    """Temperature and scale: along a straight line (the paper), or by the same factor every step."""
    return linear(share, start, end) if schedule == "linear" else start * (end / start) ** share


def linear(share: float, start: float, end: float) -> float:
    """A straight line, as the weight regularisation decays."""
    return start + (end - start) * share


def cosine(share: float, start: float, end: float) -> float:
    """Half a cosine: the learning rate, without warm-up."""
    return end + (start - end) * (1 + cos(pi * share)) / 2
