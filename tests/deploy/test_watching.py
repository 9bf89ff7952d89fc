"""A real server, Prometheus and Alertmanager: traffic is seen on every panel, and a death is told of.

These tests run in order, and the last one ends the server.
"""

import http.server
import json
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

sys.path += [str(Path(__file__).parents[2] / "deploy"), str(Path(__file__).parents[2] / "benchmarks")]
from check_dashboards import Prometheus, check
from picture import Picture
from serving import MASKS, Server, free_port, serving

DEPLOY = Path(__file__).parents[2] / "deploy"
INTERVAL = "1s"
WINDOW = "4s"
ASK = {"prompt": "The Secretary shall", "max_tokens": 8, "temperature": 0, "ignore_eos": True}

needed = ["prometheus", "prometheus-alertmanager"]
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, needed)),
    reason=f"needs Debian's {' and '.join(needed)}, which are not both here",
)


@dataclass(frozen=True)
class Watched:
    """A server, who watches it, and what they told."""

    server: Server
    prometheus: Prometheus
    told: "queue.Queue[dict[str, Any]]"
    """Alerts as Alertmanager sent them."""


def until(holds: Callable[[], Any], seconds: float = 60) -> Any:
    """What `holds` returns, once it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := holds():
                return value
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail("it never came to hold")


@contextmanager
def process(log: Path, *command: object) -> Iterator[None]:
    with log.open("wb") as out:
        started = subprocess.Popen([str(word) for word in command], stdout=out, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        started.terminate()
        started.wait(30)


@contextmanager
def webhook(told: "queue.Queue[dict[str, Any]]") -> Iterator[int]:
    """Listens as whoever is told of alerts; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            for alert in json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]:
                told.put(alert)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever).start()
        try:
            yield listening.server_address[1]
        finally:
            listening.shutdown()


def rewritten(source: Path, target: Path, change: Callable[[Any], None]) -> Path:
    settings = yaml.safe_load(source.read_text())
    change(settings)
    target.write_text(yaml.safe_dump(settings))
    return target


@contextmanager
def watching(server: Server, folder: Path) -> Iterator[Watched]:
    """Our configuration, with other addresses and shorter times."""
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    address, at = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"

    def prometheus(settings: Any) -> None:
        settings["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
        settings["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [at]
        targets = {
            "maskllm": server.url.removeprefix("http://"),
            "prometheus": address,
            "alertmanager": at,
        }
        settings["scrape_configs"] = [job for job in settings["scrape_configs"] if job["job_name"] in targets]
        for job in settings["scrape_configs"]:
            job.pop("dns_sd_configs", None)
            job["static_configs"][0]["targets"] = [targets[job["job_name"]]]

    def sooner(rules: Any) -> None:
        for rule in (rule for group in rules["groups"] for rule in group["rules"] if "for" in rule):
            rule["for"] = "2s"

    def alertmanager(settings: Any) -> None:
        settings["route"] |= {"group_wait": "1s", "group_interval": "1s"}
        settings["receivers"][0]["webhook_configs"][0]["url"] = f"http://127.0.0.1:{port}/alerts"

    with ExitStack() as stack:
        port = stack.enter_context(webhook(told))
        file = rewritten(DEPLOY / "alertmanager/alertmanager.yml", folder / "alertmanager.yml", alertmanager)
        stack.enter_context(
            process(
                folder / "alertmanager.log",
                "prometheus-alertmanager",
                f"--config.file={file}",
                f"--storage.path={folder / 'alertmanager'}",
                f"--web.listen-address={at}",
                "--cluster.listen-address=",
            )
        )
        rewritten(DEPLOY / "prometheus/rules.yml", folder / "rules.yml", sooner)
        file = rewritten(DEPLOY / "prometheus/prometheus.yml", folder / "prometheus.yml", prometheus)
        stack.enter_context(
            process(
                folder / "prometheus.log",
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address={address}",
            )
        )
        asked = Prometheus(f"http://{address}")
        until(lambda: httpx.get(f"http://{address}/-/ready").status_code == 200)
        yield Watched(server, asked, told)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    masks, logs = tmp_path_factory.mktemp("masks"), tmp_path_factory.mktemp("logs")
    for file in MASKS.glob("*.safetensors"):
        shutil.copy(file, masks)
    options = [
        "--slots",
        1,
        "--turn-steps",
        100_000,
        "--dtype",
        "float32",
        "--enforce-eager",
        "--open-metrics",
    ]
    options += ["--kv-cache-memory-bytes", 128 << 20]
    with serving(masks, logs, *options) as server, watching(server, logs) as each:
        yield each


def value(watched: Watched, expr: str) -> float | None:
    """What an expression is now, if it is one number."""
    result = watched.prometheus.ask("/api/v1/query", query=expr)["result"]
    return float(result[0]["value"][1]) if result else None


def test_every_query_of_every_dashboard_finds_something_after_traffic(watched: Watched):
    """Ten seconds of it: several masks, the dense base, a chat, and names that do not exist."""
    until(lambda: value(watched, "maskllm_engine_up") == 1)
    end = time.monotonic() + 10
    with watched.server.client() as client:
        while time.monotonic() < end:
            for mask in ("legal", "code", "none", "medical"):
                assert client.post("/v1/completions", params={"mask": mask}, json=ASK).status_code == 200
            chat = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4, "mask": "legal"}
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
            assert client.post("/v1/completions", params={"mask": "nope"}, json=ASK).status_code == 404
    sum_of_swaps = 'sum(maskllm_swaps_total{source="host"})'
    until(lambda: (value(watched, sum_of_swaps) or 0) > 3)
    assert check(watched.prometheus, minutes=10, window=WINDOW, step_s=1) == []


def test_the_same_panels_can_be_drawn(watched: Watched, tmp_path: Path):
    Picture(watched.prometheus, minutes=10, window=WINDOW, step_s=1).draw(tmp_path / "dashboards.png")
    assert (tmp_path / "dashboards.png").read_bytes().startswith(b"\x89PNG")


def test_a_query_that_is_wrong_and_one_that_finds_nothing_are_noticed(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    board = json.loads((DEPLOY / "grafana/dashboards/masks.json").read_text())
    first, second, *_ = (panel for panel in board["panels"] if panel["type"] == "timeseries")
    first["targets"][0]["expr"] = "sum(rate(maskllm_requests_total[1m])"
    second["targets"][0]["expr"] = "maskllm_no_such_metric"
    board["templating"]["list"][2]["query"]["query"] = "label_values(maskllm_no_such_metric, mask)"
    (tmp_path / "broken.json").write_text(json.dumps(board))
    monkeypatch.setattr("check_dashboards.DASHBOARDS", tmp_path)
    wrong = check(watched.prometheus, minutes=10, window=WINDOW, step_s=1)
    assert len(wrong) == 3
    assert "no value" in wrong[0]
    assert "parse error" in wrong[1]
    assert "no data" in wrong[2]


def test_a_mask_that_waits_for_another_is_seen_to_wait(watched: Watched):
    """One slot, and turns that do not end: a mask waits for as long as another has requests."""
    enough = threading.Event()

    def ask(mask: str, tokens: int) -> None:
        with watched.server.client() as client:
            client.post("/v1/completions", params={"mask": mask}, json={**ASK, "max_tokens": tokens})

    def keep_asking(tokens: int) -> None:
        while not enough.is_set():
            ask("stories", tokens)

    waits = 'maskllm_longest_wait_seconds{mask="novels"}'
    threads = [threading.Thread(target=keep_asking, args=[tokens]) for tokens in (400, 290, 170)]
    for thread in threads:
        thread.start()
    until(lambda: value(watched, 'maskllm_requests_in_flight{mask="stories"}') == 3)
    threads.append(threading.Thread(target=ask, args=["novels", 8]))
    threads[-1].start()
    try:
        until(lambda: (value(watched, waits) or 0) > 2)
        assert value(watched, 'maskllm_requests_in_flight{mask="novels"}') == 1
        assert value(watched, 'maskllm_longest_wait_seconds{mask="stories"}') < 1
    finally:
        enough.set()
        for thread in threads:
            thread.join(60)
    until(lambda: value(watched, waits) == 0)


def test_a_server_that_is_killed_is_told_of_through_alertmanager(watched: Watched):
    engine = watched.server.engine
    watched.server.process.kill()
    engine.kill()
    begin = time.monotonic()
    while (alert := watched.told.get(timeout=30))["labels"]["alertname"] != "ServerDown":
        pass
    assert time.monotonic() - begin < 30
    assert alert["status"] == "firing"
    assert alert["labels"]["severity"] == "critical"
    assert alert["labels"]["instance"] == watched.server.url.removeprefix("http://")
    assert alert["annotations"]["summary"].endswith("does not answer")
    assert alert["annotations"]["runbook_url"] == "docs/operations.md#serverdown"
