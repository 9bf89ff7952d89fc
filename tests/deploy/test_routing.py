"""HAProxy, as deploy/haproxy/haproxy.cfg has it, before two real servers: where the requests of a mask go."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from serving import BASE, MASKS, Server, free_port, running  # noqa: E402

pytestmark = pytest.mark.skipif(
    not shutil.which("haproxy"), reason="needs haproxy, which is not here (apt-get install haproxy)"
)

NAMES = sorted(file.stem for file in MASKS.glob("*.safetensors"))
HOT = 16
"""Requests under way at a time. The home of their mask may have 1.25 of its half of them."""
MOST = 10
OPTIONS = ["--slots", 4, "--kv-cache-memory-bytes", 128 << 20, "--max-num-seqs", 8, "--enforce-eager"]
OPTIONS += ["--max-waiting", MOST]


@dataclass(frozen=True)
class Balanced:
    """The balancer and its replicas, as haproxy.cfg names them."""

    client: httpx.Client
    replicas: dict[str, Server]

    def ask(self, body: dict[str, object] | None = None, **how: object) -> httpx.Response:
        return self.client.post(
            "/v1/completions", json={"prompt": "The", "max_tokens": 1} | (body or {}), **how
        )

    def replica(self, **how: object) -> str:
        """Which replica answers a request."""
        answer = self.ask(**how)
        assert answer.status_code == 200, answer.text
        return answer.headers["X-Replica"]

    def served(self) -> dict[str, Counter[str]]:
        """How many requests each replica says that it served, by mask."""
        return {name: _served(server) for name, server in self.replicas.items()}


def _served(server: Server) -> Counter[str]:
    served: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            if sample.name == "maskllm_requests_total":
                served[sample.labels["mask"]] += int(sample.value)
    return served


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balanced]:
    folder = tmp_path_factory.mktemp("replicas")
    command = [sys.executable, "-m", "server", "--model", BASE, "--masks", MASKS, *OPTIONS]
    with (
        running(command, folder / "one.log", CXX="none") as one,
        running(command, folder / "two.log", CXX="none") as two,
        _balancing(one, two) as client,
    ):
        yield Balanced(client, {"one": one, "two": two})


@contextmanager
def _balancing(one: Server, two: Server) -> Iterator[httpx.Client]:
    balancer, metrics = (f"127.0.0.1:{free_port()}" for _ in range(2))
    addresses = {
        "BALANCER": balancer,
        "BALANCER_METRICS": metrics,
        "REPLICA_1": one.url.removeprefix("http://"),
        "REPLICA_2": two.url.removeprefix("http://"),
    }
    command = ["haproxy", "-db", "-f", ROOT / "deploy/haproxy/haproxy.cfg"]
    with subprocess.Popen(command, env=os.environ | addresses) as process:
        try:
            while not _answers(f"http://{metrics}/health"):
                assert process.poll() is None, "haproxy did not start"
                time.sleep(0.05)
            with httpx.Client(base_url=f"http://{balancer}", timeout=120) as client:
                yield client
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_each_mask_stays_on_one_replica_and_both_have_some(balanced: Balanced):
    for _ in range(3):
        for mask in NAMES:
            balanced.replica(params={"mask": mask})
    one, two = balanced.served().values()
    assert one + two == dict.fromkeys(NAMES, 3)
    assert one
    assert two
    assert not set(one) & set(two)


def test_a_mask_has_one_home_however_it_is_named(balanced: Balanced):
    for mask in NAMES:
        answer = balanced.ask(params={"mask": mask})
        label, home = answer.headers["X-Mask"], answer.headers["X-Replica"]
        homes = [
            balanced.replica(params={"mask": label}),
            balanced.replica(headers={"X-Mask": mask}),
            balanced.replica(body={"mask": mask}),
            balanced.replica(body={"model": mask}),
            balanced.replica(body={"model": f"base:{mask}"}),
            balanced.replica(body={"model": "base", "mask": mask}),
        ]
        assert homes == [home] * 6


def test_a_mask_is_found_in_a_long_body(balanced: Balanced):
    long = {"prompt": "word " * 40_000}  # 200 kB, and more than the model reads: refused by the replica
    home = {mask: balanced.replica(params={"mask": mask}) for mask in NAMES}
    assert {mask: balanced.ask(long | {"mask": mask}).headers["X-Replica"] for mask in NAMES} == home


def test_requests_that_name_no_mask_are_spread_over_both(balanced: Balanced):
    for how in ({}, {"params": {"mask": "none"}}):
        assert {balanced.replica(**how) for _ in range(16)} == {"one", "two"}


def test_a_hot_mask_spills_over_to_the_other_replica(balanced: Balanced):
    home = balanced.replica(params={"mask": "legal"})
    before = balanced.served()
    long = {"max_tokens": 100, "min_tokens": 100}
    with ThreadPoolExecutor(HOT) as pool:
        asked = [pool.submit(balanced.replica, body=long, params={"mask": "legal"}) for _ in range(HOT)]
    there = Counter(each.result() for each in asked)
    assert {
        name: count["legal"] - before[name]["legal"] for name, count in balanced.served().items()
    } == there
    assert HOT / 2 <= there[home] <= MOST


def test_what_a_full_replica_refuses_is_tried_on_the_other(balanced: Balanced):
    home = balanced.replica(params={"mask": "legal"})
    long = {"prompt": "The", "max_tokens": 200, "min_tokens": 200}
    with ThreadPoolExecutor(2 * MOST) as pool, balanced.replicas[home].client() as direct:
        filling = [pool.submit(direct.post, "/v1/completions", json=long) for _ in range(2 * MOST)]
        while direct.post("/v1/completions", json={"prompt": "The", "max_tokens": 1}).status_code != 503:
            assert not all(each.done() for each in filling), "it was never full"
        assert balanced.replica(params={"mask": "legal"}) != home


def test_a_replica_says_what_llm_ds_router_reads(balanced: Balanced):
    """Its model server protocol: masks as adapters in the gauge, and as models with a parent."""
    body = {"prompt": "The", "max_tokens": 200, "min_tokens": 200, "stream": True, "model": "legal"}
    with balanced.replicas["one"].client() as replica:
        with replica.stream("POST", "/v1/completions", json=body) as answer:
            for _ in answer.iter_lines():  # each a token, until a step with it has been counted
                families = text_string_to_metric_families(replica.get("/metrics").text)
                samples = {each.name: each for family in families for each in family.samples}
                labels = samples["vllm:lora_requests_info"].labels
                if labels["running_lora_adapters"]:
                    break
        models = replica.get("/v1/models").json()["data"]
    assert labels == {"max_lora": "4", "running_lora_adapters": "legal", "waiting_lora_adapters": ""}
    assert {"vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= set(samples)
    assert {each["id"]: each["parent"] for each in models} == {"base": None} | dict.fromkeys(NAMES, "base")


def test_a_change_is_refused_for_it_would_reach_one_replica(balanced: Balanced):
    for method, path in (("PUT", "masks/tax"), ("DELETE", "masks/legal"), ("POST", "masks/legal/load")):
        answer = balanced.client.request(method, f"/v1/{path}")
        assert answer.status_code == 405
        assert "on each of them" in json.loads(answer.text)["error"]["message"]


def test_a_dead_replicas_masks_move_and_the_others_stay(balanced: Balanced):
    home = {mask: balanced.replica(params={"mask": mask}) for mask in NAMES}
    dead, alive = home["legal"], ({"one", "two"} - {home["legal"]}).pop()
    process = psutil.Process(balanced.replicas[dead].process.pid)
    for each in [process, *process.children(recursive=True)]:
        each.kill()
    balanced.replicas[dead].process.wait()
    # No request is lost, even before HAProxy's next check: a refused connection is tried on the other.
    assert {mask: balanced.replica(params={"mask": mask}) for mask in NAMES} == dict.fromkeys(NAMES, alive)
