"""The `maskllm_*` metric families, by mask or API key; vLLM's own `vllm:*` stay as they are beside them."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import psutil
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.names import DENSE

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
    """Counts what requests report, and shows what the engine last said of its slots.

    Prometheus sees no increase in a series that begins with it, so what alerts count begins at 0.
    """

    def __init__(
        self, registry: CollectorRegistry = REGISTRY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.registry = registry

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
        self.load_failures = counter(
            "mask_load_failures", "Times that a mask could not be brought into the engine's host memory."
        )
        self._by_mask = [
            *(self.requests, self.errors, self.prompt_tokens, self.generation_tokens, self.load_failures),
            *(self.ttft, self.inter_token, self.e2e, self.queue),
        ]
        self.refused = Counter(
            "maskllm_masks_refused", "PUTs of a file that is no mask here.", registry=registry
        )
        self.refused_files = Gauge(
            "maskllm_refused_files", "Files refused at start and not replaced since.", registry=registry
        )
        self.responses = Counter(
            "maskllm_http_responses",
            "Answers of the routes that compute; 499 is a client that did not wait.",
            ["path", "status"],
            registry=registry,
        )
        self.engine_up = Gauge(
            "maskllm_engine_up", "Whether the engine can answer requests.", registry=registry
        )
        self.engine_restarts = Counter(
            "maskllm_engine_restarts", "Times that the engine died, and another began.", registry=registry
        )
        self.key_requests = Counter(
            "maskllm_key_requests", "Answered requests by API key.", ["key", "status"], registry=registry
        )
        self.key_tokens = Counter(
            "maskllm_key_tokens", "Prompt and generated tokens by API key.", ["key"], registry=registry
        )
        self.engine: dict[str, Any] = {}
        self.known: Collection[str] = ()
        """The names of all masks."""
        # prometheus_client takes 2 us longer to find a series than a cache.
        self._label = cache(lambda family, *labels: family.labels(*labels))
        self._clock = clock
        self._recent: deque[tuple[float, Finished]] = deque()
        registry.register(self)

    def finish(self, request: Finished) -> None:
        """Count one request."""
        self._label(self.requests, request.mask, request.reason).inc()
        self._label(self.prompt_tokens, request.mask).inc(request.prompt_tokens)
        self._label(self.generation_tokens, request.mask).inc(request.generation_tokens)
        self._label(self.e2e, request.mask).observe(request.e2e_s)
        for histogram, seconds in (
            (self.ttft, request.ttft_s),
            (self.inter_token, request.inter_token_s),
            (self.queue, request.queue_s),
        ):
            if seconds is not None:
                self._label(histogram, request.mask).observe(seconds)
        self._recent.append((self._clock(), request))
        self.recent()

    def answer(self, path: str | None, key: str, status: int, tokens: int) -> None:
        """Count one answer, by path where that computes."""
        if path is not None:
            self._label(self.responses, path, status).inc()
        self._label(self.key_requests, key, status).inc()
        self._label(self.key_tokens, key).inc(tokens)

    def recent(self) -> Iterator[Finished]:
        """Requests that ended in the last WINDOW_S seconds; older ones are forgotten."""
        while self._recent and self._recent[0][0] < self._clock() - WINDOW_S:
            self._recent.popleft()
        return (request for _, request in self._recent)

    def forget(self, mask: str) -> None:
        """Drop the series of a mask that is no more: names come and go for as long as the server runs."""
        for family in self._by_mask:
            family.remove_by_labels({"mask": mask})
        self._label.cache_clear()

    def collect(self) -> Iterator[Metric]:
        """The machine, and the engine from `self.engine`, which the endpoint refreshes before a scrape."""
        yield from _machine()
        if self.engine:
            yield from self._memory()
            yield from self._waits()
            yield from self._swaps()

    def _memory(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("maskllm_slots_total", "Slots.", value=self.engine["slots_total"])
        yield GaugeMetricFamily("maskllm_slots_used", "Slots with a mask.", value=self.engine["slots_used"])
        for name in ("resident_bytes", "packed_bytes"):
            where = "on the device" if name == "resident_bytes" else "in the engine's host memory"
            gauge = GaugeMetricFamily(f"maskllm_{name}", f"Bytes of a mask {where}.", labels=["mask"])
            for mask, size in self.engine[name].items():
                gauge.add_metric([mask], size)
            yield gauge
        parts = {
            "base": self.engine["base_bytes"],
            "slots": self.engine["slot_bytes"] * self.engine["slots_total"],
            "packed": sum(self.engine["packed_bytes"].values()),
            "kv": self.engine["kv_bytes"],
        }
        memory = GaugeMetricFamily("maskllm_engine_memory_bytes", "What the engine holds.", labels=["part"])
        for part, size in parts.items():
            memory.add_metric([part], size)
        yield memory

    def _waits(self) -> Iterator[Metric]:
        in_flight = GaugeMetricFamily(
            "maskllm_requests_in_flight", "Requests that the engine has now.", labels=["mask"]
        )
        longest = GaugeMetricFamily(
            "maskllm_longest_wait_seconds",
            "Longest that one of them has been without a new token.",
            labels=["mask"],
        )
        waits = self.engine["waits"]
        for mask in dict.fromkeys([DENSE, *self.known, *waits]):
            in_flight.add_metric([mask], len(waits.get(mask, [])))
            longest.add_metric([mask], max(waits.get(mask, [0.0])))
        yield in_flight
        yield longest

    def _swaps(self) -> Iterator[Metric]:
        swapped = CounterMetricFamily(
            "maskllm_swaps", "Swaps of a mask, as in maskllm_swap_seconds.", labels=["mask", "source"]
        )
        for source, masks in self.engine["swapped"].items():
            for mask in dict.fromkeys([*self.known, *masks]):
                swapped.add_metric([mask, source], masks.get(mask, 0))
        yield swapped
        swaps = HistogramMetricFamily(
            "maskllm_swap_seconds",
            "From disk to host memory, beside the steps, and from host memory to a slot, between them.",
            labels=["source"],
        )
        for source, (counts, seconds) in self.engine["swaps"].items():
            bounds = [*map(str, SWAP_SECONDS), "+Inf"]
            swaps.add_metric([source], list(zip(bounds, accumulate(counts), strict=True)), seconds)
        yield swaps


def _machine() -> Iterator[Metric]:
    """The host, and this process's children, which are the engine; of itself prometheus_client tells."""
    resident = cpu_s = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            resident += process.memory_info().rss
            cpu_s += sum(process.cpu_times()[:4])  # user and system, and of children that have ended
    memory = psutil.virtual_memory()
    yield CounterMetricFamily(
        "maskllm_engine_cpu_seconds", "CPU time of the engine's processes.", value=cpu_s
    )
    for name, text, value in (
        ("engine_resident_memory_bytes", "Memory of the engine's processes.", resident),
        ("host_memory_total_bytes", "Memory of the machine.", memory.total),
        ("host_memory_available_bytes", "Memory that can be had without swapping.", memory.available),
        ("host_cpus", "Cores of the machine.", psutil.cpu_count() or 1),
        ("host_load1", "Processes that run or want to, mean of a minute.", psutil.getloadavg()[0]),
    ):
        yield GaugeMetricFamily(f"maskllm_{name}", text, value=value)
