"""What the metrics say of masks, requests and the machine, beside what test_api.py asks."""

import httpx
import psutil
import pytest
from prometheus_client import CollectorRegistry
from running import Server
from test_api import ASK, metric

from server.engine.openai import EngineDeadError, status_of
from server.metrics import Finished, Metrics


@pytest.fixture
def http(server: Server):
    with server.client() as client:
        yield client


def engine(**stats) -> dict:
    """What an engine with one slot says that has no mask."""
    nothing = {"base_bytes": 0, "slot_bytes": 0, "slots_total": 1, "slots_used": 0, "kv_bytes": 0}
    nothing |= {"resident_bytes": {}, "packed_bytes": {}, "swaps": {}, "swapped": {}, "waits": {}}
    return nothing | stats


def test_the_longest_wait_of_each_mask_is_shown_and_0_where_nobody_waits():
    metrics = Metrics(CollectorRegistry())
    metrics.known = {"legal", "medical"}
    metrics.engine = engine(waits={"legal": [0.5, 7.5], "none": [2.0]})

    def shown(name: str) -> list[float | None]:
        value = metrics.registry.get_sample_value
        return [value(f"maskllm_{name}", {"mask": mask}) for mask in ("legal", "medical", "none")]

    assert shown("requests_in_flight") == [2, 0, 1]
    assert shown("longest_wait_seconds") == [7.5, 0, 2]


def test_what_the_engine_holds_adds_up_by_part():
    metrics = Metrics(CollectorRegistry())
    metrics.engine = engine(
        base_bytes=1000, slot_bytes=30, slots_total=4, kv_bytes=7, packed_bytes={"a": 2, "b": 3}
    )
    parts = {"base": 1000, "slots": 120, "packed": 5, "kv": 7}
    for part, size in parts.items():
        assert metrics.registry.get_sample_value("maskllm_engine_memory_bytes", {"part": part}) == size


def test_a_mask_that_was_forgotten_and_comes_again_is_counted_from_0():
    metrics = Metrics(CollectorRegistry())
    for _ in range(2):
        metrics.finish(Finished("legal", "stop", prompt_tokens=3, generation_tokens=4, e2e_s=1.0))
        labels = {"mask": "legal", "reason": "stop"}
        assert metrics.registry.get_sample_value("maskllm_requests_total", labels) == 1
        assert metrics.registry.get_sample_value("maskllm_generation_tokens_total", {"mask": "legal"}) == 4
        metrics.forget("legal")
        assert metrics.registry.get_sample_value("maskllm_requests_total", labels) is None


def test_swaps_are_counted_by_mask_from_0_on_and_forgotten_with_it(http: httpx.Client):
    def swaps(source: str) -> float:
        return metric(http, "maskllm_swaps_total", mask="counted", source=source)

    assert http.put("/v1/masks/counted", json={"file": "legal.safetensors"}).status_code == 201
    assert 'maskllm_swaps_total{mask="counted",source="host"} 0.0' in http.get("/metrics").text
    assert http.post("/v1/completions", params={"mask": "counted"}, json=ASK).status_code == 200
    assert (swaps("disk"), swaps("host")) == (1, 1)
    assert http.delete("/v1/masks/counted").status_code == 204
    assert 'mask="counted"' not in http.get("/metrics").text

    assert http.put("/v1/masks/counted", json={"file": "legal.safetensors"}).status_code == 201
    assert (swaps("disk"), swaps("host")) == (1, 0)  # the worker forgot, too
    assert http.delete("/v1/masks/counted").status_code == 204


def test_refused_puts_are_counted_and_puts_that_name_no_file_are_not(http: httpx.Client):
    before = metric(http, "maskllm_masks_refused_total")
    assert http.put("/v1/masks/broken").status_code == 400
    binary = {"content-type": "application/octet-stream"}
    assert http.put("/v1/masks/up", content=b"no mask", headers=binary).status_code == 400
    assert http.put("/v1/masks/ghost").status_code == 400
    assert metric(http, "maskllm_masks_refused_total") == before + 2
    assert metric(http, "maskllm_refused_files") >= 3  # broken, foreign, and a name that is markup


def test_answers_are_counted_by_route_and_status_from_0_on(http: httpx.Client):
    def answers(path: str, status: int) -> float:
        return metric(http, "maskllm_http_responses_total", path=path, status=str(status))

    text = http.get("/metrics").text
    assert 'maskllm_http_responses_total{path="/v1/completions",status="500"} 0.0' in text
    before = answers("/v1/completions", 200), answers("/v1/completions", 404)
    http.post("/v1/completions", json=ASK)
    http.post("/v1/completions", params={"mask": "nope"}, json=ASK)
    http.get("/v1/no/such/route")
    assert (answers("/v1/completions", 200), answers("/v1/completions", 404)) == (
        before[0] + 1,
        before[1] + 1,
    )
    assert "no/such/route" not in http.get("/metrics").text


def test_errors_are_counted_by_the_status_that_the_client_gets(http: httpx.Client):
    def errors(status: int) -> float:
        return sum(
            metric(http, "maskllm_errors_total", mask=mask, status=str(status))
            for mask in ("unknown", "legal")
        )

    before = errors(400), errors(500)
    for refused in ({"n": "1"}, {"zzz": 1}, {"logprobs": 25}, {"logprobs": 25, "stream": True}):
        assert http.post("/v1/completions", json={**ASK, "mask": "legal", **refused}).status_code == 400
    assert (errors(400), errors(500)) == (before[0] + 4, before[1])
    assert status_of(EngineDeadError()) == 503


def test_a_request_is_in_flight_under_its_mask_until_its_last_token(http: httpx.Client):
    long = {**ASK, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", params={"mask": "novels"}, json=long) as answer:
        chunks = answer.iter_lines()
        next(chunks)
        assert metric(http, "maskllm_requests_in_flight", mask="novels") == 1
        assert 0 < metric(http, "maskllm_longest_wait_seconds", mask="novels") < 10
        for _ in chunks:
            pass
    assert metric(http, "maskllm_requests_in_flight", mask="novels") == 0
    assert metric(http, "maskllm_longest_wait_seconds", mask="novels") == 0


def test_the_machine_and_the_engines_process_are_shown(http: httpx.Client, server: Server):
    running = next(p for p in psutil.Process(server.process.pid).children() if "EngineCore" in p.name())
    memory = metric(http, "maskllm_engine_resident_memory_bytes")
    assert running.memory_info().rss / 2 < memory < 3 * running.memory_info().rss
    assert metric(http, "maskllm_engine_cpu_seconds_total") > 1
    assert metric(http, "maskllm_host_memory_total_bytes") == psutil.virtual_memory().total
    assert metric(http, "maskllm_host_cpus") == psutil.cpu_count()
    assert metric(http, "maskllm_engine_up") == 1
    assert metric(http, "maskllm_engine_restarts_total") == 0
