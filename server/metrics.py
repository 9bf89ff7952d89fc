"""The `maskllm_*` metric families, by mask or API key; vLLM's own `vllm:*` stay as they are beside them."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

WINDOW_S = 60
"""How long a request that ended counts as recent."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SWAP_SECONDS = tuple(0.0001 * 2 ** (step / 2) for step in range(34))
"""Up to 9 s, and so fine that a percentile is off by a fifth at most."""


@dataclass(frozen=True)
class Finished:
    """One request as the engine saw it end. Seconds are None where the engine keeps no clocks."""

    mask: str
    reason: str
    prompt_tokens: int
    generation_tokens: int
    e2e_s: float
    ttft_s: float | None = None
    inter_token_s: float | None = None
    queue_s: float | None = None


class Metrics(Collector):
    """Counts what requests report, and shows what the engine last said of its slots."""

    def __init__(
        self, registry: CollectorRegistry = REGISTRY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"maskllm_{name}", text, ["mask", *labels], registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"maskllm_{name}", text, ["mask"], buckets=SECONDS, registry=registry)

        self.requests = counter("requests", "Finished requests.", "reason")
        self.errors = counter("errors", "Requests refused or failed, by HTTP status.", "status")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.")
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Mean time between a request's tokens, once a request."
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.")
        self.queue = histogram("queue_time_seconds", "Waiting to be scheduled.")
        self.key_requests = Counter(
            "maskllm_key_requests", "Answered requests by API key.", ["key", "status"], registry=registry
        )
        self.key_tokens = Counter(
            "maskllm_key_tokens", "Prompt and generated tokens by API key.", ["key"], registry=registry
        )
        self.engine: dict[str, Any] = {}
        self._clock = clock
        self._recent: deque[tuple[float, Finished]] = deque()
        registry.register(self)

    def finish(self, request: Finished) -> None:
        """Count one request."""
        self.requests.labels(request.mask, request.reason).inc()
        self.prompt_tokens.labels(request.mask).inc(request.prompt_tokens)
        self.generation_tokens.labels(request.mask).inc(request.generation_tokens)
        self.e2e.labels(request.mask).observe(request.e2e_s)
        for histogram, seconds in (
            (self.ttft, request.ttft_s),
            (self.inter_token, request.inter_token_s),
            (self.queue, request.queue_s),
        ):
            if seconds is not None:
                histogram.labels(request.mask).observe(seconds)
        self._recent.append((self._clock(), request))
        self.recent()

    def recent(self) -> Iterator[Finished]:
        """Requests that ended in the last WINDOW_S seconds; older ones are forgotten."""
        while self._recent and self._recent[0][0] < self._clock() - WINDOW_S:
            self._recent.popleft()
        return (request for _, request in self._recent)

    def collect(self) -> Iterator[Metric]:
        """The engine's slots, from `self.engine`, which the endpoint refreshes before a scrape."""
        if not self.engine:
            return
        yield GaugeMetricFamily("maskllm_slots_total", "Slots.", value=self.engine["slots_total"])
        yield GaugeMetricFamily("maskllm_slots_used", "Slots with a mask.", value=self.engine["slots_used"])
        for name in ("resident_bytes", "packed_bytes"):
            where = "on the device" if name == "resident_bytes" else "in the engine's host memory"
            gauge = GaugeMetricFamily(f"maskllm_{name}", f"Bytes of a mask {where}.", labels=["mask"])
            for mask, size in self.engine[name].items():
                gauge.add_metric([mask], size)
            yield gauge
        swaps = HistogramMetricFamily(
            "maskllm_swap_seconds",
            "From disk to host memory, beside the steps, and from host memory to a slot, between them.",
            labels=["source"],
        )
        for source, (counts, seconds) in self.engine["swaps"].items():
            bounds = [*map(str, SWAP_SECONDS), "+Inf"]
            swaps.add_metric([source], list(zip(bounds, accumulate(counts), strict=True)), seconds)
        yield swaps
