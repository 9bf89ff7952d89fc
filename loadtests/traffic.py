"""Which requests come when, how long and under which masks; and the record of what became of each.

Only the standard library and numpy: locustfile.py runs where nothing else is installed.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import count, cycle, islice
from pathlib import Path
from typing import Literal

import numpy as np

FITS = 0.99
"""Share of a trace's requests that are scaled alike; the rest, which are longer, are scaled to just fit."""


@dataclass(frozen=True)
class Arrival:
    """A request that is to come."""

    at_s: float
    """Since its source began."""
    prompt_tokens: int
    output_tokens: int


@dataclass
class Request:
    """What became of a request; all times are seconds since the run began."""

    kind: Literal["completion", "chat", "publish"]
    mask: str
    due_s: float
    """When it was to be sent. Latencies count from here, so that a late request is a slow one."""
    sent_s: float
    first_s: float | None = None
    last_s: float | None = None
    """Its first and last token; a publish has only an end."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token. Only for what was answered, as all that follow."""
        assert self.first_s is not None
        return self.first_s - self.due_s

    @property
    def e2e_s(self) -> float:
        assert self.last_s is not None
        return self.last_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token as vLLM defines it; None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


def poisson(rate: float, length: tuple[int, int], rng: np.random.Generator) -> Iterator[Arrival]:
    """Arrivals at random, so many a second on average; `length` is (prompt, output) tokens.

    The arrivals of several such sources together are again Poisson, with the sum of their rates.
    """
    at_s = 0.0
    while True:
        at_s += rng.exponential(1 / rate)
        yield Arrival(at_s, *length)


def regular(every_s: float, length: tuple[int, int]) -> Iterator[Arrival]:
    """One arrival at the end of each interval."""
    return (Arrival(every_s * number, *length) for number in count(1))


def trace(path: Path, context: int, speed: float) -> list[Arrival]:
    """A trace of Azure's LLM inference (TIMESTAMP, ContextTokens, GeneratedTokens), for a model's context.

    `speed` 2 plays it in half its time. Both lengths of a request are multiplied by the factor that lets FITS
    of the requests fit into the context, or by the smaller one with which a longer request does, but never by
    more than 1; at least one token is left of each.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Seven digits of a second, of which Python reads six.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    lengths = np.array([(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows])
    totals = lengths.sum(1)
    usual = int(np.quantile(totals, FITS, method="lower"))
    scaled = np.maximum(1, lengths * context // np.maximum(totals, max(usual, context))[:, None])
    return [
        Arrival((time - times[0]).total_seconds() / speed, int(prompt), int(output))
        for time, (prompt, output) in zip(times, scaled, strict=True)
    ]


def one(masks: Sequence[str]) -> Iterator[str]:
    """The first mask, always."""
    return cycle(masks[:1])


def uniform(masks: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
    """Each mask as often as any other, at random."""
    while True:
        yield masks[int(rng.integers(len(masks)))]


def zipf(masks: Sequence[str], exponent: float, rng: np.random.Generator) -> Iterator[str]:
    """The k-th mask with a probability proportional to 1 / k^exponent."""
    weights = 1 / np.arange(1, len(masks) + 1) ** exponent
    while True:
        yield masks[int(rng.choice(len(masks), p=weights / weights.sum()))]


def distinct(masks: Sequence[str], first: int = 0) -> Iterator[str]:
    """One mask after another, so that as many masks as can be meet in a batch."""
    return islice(cycle(masks), first % len(masks), None)
