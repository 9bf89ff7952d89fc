"""Build and start what docker-compose.yml names, send traffic, check who watches it, take it down.

    python deploy/test_compose.py                 # make test-compose
    python deploy/test_compose.py --stand-ins     # where no registry of images can be reached

Needs Docker with compose 2.24, and minutes: no part of `make test`. It uses free ports and a project of its
own, so that it disturbs nothing that runs, and ends with 1 at the first thing that is not as promised.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
PROJECT = ["docker", "compose", "--env-file", "/dev/null", "--project-name", "maskllm-test"]
PROJECT += ["--profile", "load", "--profile", "scale"]
PORTS = [
    "PORT",
    "REPLICA_PORT",
    "BALANCER_PORT",
    "PROMETHEUS_PORT",
    "ALERTMANAGER_PORT",
    "GRAFANA_PORT",
    "LOAD_PORT",
]
STAND_INS = {"prom/alertmanager:v0.28.1": "alertmanager", "grafana/grafana:12.1.1": "grafana"}
MASKS = sorted(file.stem for file in (ROOT / "examples/demo/masks").glob("*.safetensors"))
LOAD_S = 75
"""Traffic that the dashboards need: a minute of it, with Prometheus' interval of 15 s."""


class Compose:
    """The services, at ports of their own."""

    def __init__(self) -> None:
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
        self.ports = {name: probe.getsockname()[1] for name, probe in zip(PORTS, probes, strict=True)}
        for probe in probes:
            probe.close()
        published = {name: str(port) for name, port in self.ports.items()}
        # Fewer slots than masks, so that there are swaps to watch.
        chosen = {"LOAD_TARGET": "http://haproxy:8000", "SERVE_ARGS": "--slots 4"}
        self.environment = os.environ | published | chosen

    def __call__(self, *command: str) -> str:
        """What a command of compose prints; raises CalledProcessError where it fails."""
        done = subprocess.run(
            [*PROJECT, *command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout

    def container(self, service: str) -> dict[str, Any]:
        """What Docker knows of a service's container."""
        identity = self("ps", "--quiet", service).strip()
        found: list[dict[str, Any]] = json.loads(
            subprocess.run(["docker", "inspect", identity], stdout=subprocess.PIPE, check=True).stdout
        )
        return found[0]

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}"

    def answer(self, port: str, path: str, body: dict[str, Any] | None = None) -> tuple[Any, dict[str, str]]:
        """JSON from a service, and the headers; raises HTTPError or URLError."""
        data = json.dumps(body).encode() if body else None
        request = Request(self.url(port) + path, data, {"content-type": "application/json"})
        with urlopen(request, timeout=60) as response:
            return json.load(response), {name.lower(): value for name, value in response.headers.items()}

    def ask(self, port: str, mask: str) -> dict[str, str]:
        """The headers of a completion under a mask."""
        body = {"prompt": "Once upon a time", "max_tokens": 8}
        completion, headers = self.answer(port, f"/v1/completions?mask={mask}", body)
        assert completion["usage"]["completion_tokens"] == 8, completion
        return headers

    def refusal(self, port: str, mask: str) -> int:
        """The status of a completion that must not be answered."""
        try:
            headers = self.ask(port, mask)
        except HTTPError as error:
            return error.code
        raise AssertionError(f"{mask} was answered by {headers['x-mask']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stand-ins", action="store_true", help="stand-ins for images that are not here")
    parser.add_argument("--no-cache", action="store_true", help="build the server's image from nothing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is taken down
    compose, stubs = Compose(), stand_in() if options.stand_ins else []
    try:
        check(compose, options.no_cache, stubs)
    except Exception:
        print(compose("logs", "--no-color", "--tail", "40"))
        raise
    finally:
        compose("down", "--volumes", "--timeout", "30")
    print(f"passed, with stand-ins for {', '.join(stubs)}" if stubs else "passed")


def check(compose: Compose, no_cache: bool, stubs: list[str]) -> None:
    """Everything, from nothing to stopped. Raises at the first thing that is wrong."""
    check_gpu(compose)
    begin = time.monotonic()
    compose("build", *(["--no-cache"] if no_cache else []), "server")
    say(begin, "the server's image is built")
    started = time.monotonic()
    compose("up", "--detach", "--no-build", "server")
    until(lambda: compose.ask("PORT", "legal"), 600)
    say(started, "from its image to a first answer")
    say(begin, "from the beginning to a first answer")

    begin = time.monotonic()
    compose("up", "--detach", "--build", "--wait", "--wait-timeout", "900")
    say(begin, "everything is healthy")
    check_container(compose)
    check_masks(compose)
    check_balance(compose)
    check_load(compose)
    check_watching(compose, stubs)

    begin = time.monotonic()
    check_restart(compose)
    say(begin, "the server, killed, is back")

    begin = time.monotonic()
    compose("stop")
    codes = {row["Service"]: row["ExitCode"] for row in rows(compose("ps", "--all", "--format", "json"))}
    expected = ("server", "replica", "haproxy", "prometheus", "alertmanager")
    assert all(codes[service] == 0 for service in expected), codes
    say(begin, f"stopped with {codes}")


def check_gpu(compose: Compose) -> None:
    """The file for GPUs, merged by compose itself: CUDA's image, and for each replica a GPU."""
    files = ("-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml")
    services = json.loads(compose(*files, "config", "--format", "json"))["services"]
    for name, gpu in (("server", "0"), ("replica", "1")):
        service = services[name]
        assert (service["image"], service["build"]["args"]["DEVICE"]) == ("maskllm:cuda", "cuda"), service
        reserved = service["deploy"]["resources"]["reservations"]["devices"]
        assert [device["device_ids"] for device in reserved] == [[gpu]], service
        assert service["read_only"], service


def check_container(compose: Compose) -> None:
    """The server's is as small and shut as promised: user 1000, nothing to write on, no build tools."""
    look = (
        "id -u; for tool in gcc g++ cc c++ ld make git; do command -v $tool; done; touch /app/new && echo new"
    )
    assert compose("exec", "-T", "server", "sh", "-c", f"{look}; :") == "1000\n"
    container = compose.container("server")
    assert container["HostConfig"]["ReadonlyRootfs"], container["HostConfig"]
    labels = container["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "maskllm", labels
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0", labels


def check_restart(compose: Compose) -> None:
    """A server that dies is started again."""

    def back() -> None:
        assert compose.container("server")["RestartCount"] == 1
        compose.ask("PORT", "legal")

    # Not `docker kill`, after which Docker itself starts nothing again.
    compose("exec", "-T", "server", "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)")
    until(back, 600)


def check_masks(compose: Compose) -> None:
    """Each mask answers as itself, none as the dense base, and there is no other."""
    for mask in MASKS:
        assert compose.ask("PORT", mask)["x-mask"].startswith(f"{mask}@")
    assert compose.ask("PORT", "none")["x-mask"] == "none"
    assert compose.refusal("PORT", "nope") == 404


def check_balance(compose: Compose) -> None:
    """Each mask has one home, and the base none."""
    homes = {mask: {compose.ask("BALANCER_PORT", mask)["x-replica"] for _ in range(3)} for mask in MASKS}
    assert all(len(home) == 1 for home in homes.values()), homes
    assert {compose.ask("BALANCER_PORT", "none")["x-replica"] for _ in range(16)} == {"one", "two"}
    print(f"homes: {homes}")


def check_load(compose: Compose) -> None:
    """Locust's page starts users, who meet no error beside other traffic."""
    form = urlencode({"user_count": 2, "spawn_rate": 2, "user_classes": "Zipf"}).encode()
    with urlopen(compose.url("LOAD_PORT") + "/swarm", form, timeout=20) as response:
        assert json.load(response)["success"]
    end = time.monotonic() + LOAD_S
    while time.monotonic() < end:
        compose.ask("PORT", MASKS[0])
        check_masks(compose)
        time.sleep(1)
    stats, _ = compose.answer("LOAD_PORT", "/stats/requests")
    urlopen(compose.url("LOAD_PORT") + "/stop", b"", timeout=150).close()
    assert stats["total_rps"] > 0, stats
    assert not stats["errors"], stats
    print(f"locust: {stats['total_rps']:.1f} events/s, no error")


def check_watching(compose: Compose, stubs: list[str]) -> None:
    """Prometheus reaches everyone, its rules work, every query of the dashboards has data."""

    def watched() -> list[str]:
        targets, _ = compose.answer("PROMETHEUS_PORT", "/api/v1/targets")
        active = targets["data"]["activeTargets"]
        down = {each["scrapeUrl"]: each["lastError"] for each in active if each["health"] != "up"}
        urls = sorted(each["scrapeUrl"] for each in active)
        replicas = [each for each in active if each["labels"]["job"] == "maskllm"]
        assert not down, down
        assert len(replicas) == 2, urls
        return urls

    print(f"Prometheus reaches {until(watched, 60)}")
    groups = compose.answer("PROMETHEUS_PORT", "/api/v1/rules")[0]["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    assert all(rule["health"] != "err" for rule in rules), rules
    managers = compose.answer("PROMETHEUS_PORT", "/api/v1/alertmanagers")[0]["data"]["activeAlertmanagers"]
    assert len(managers) == 1, managers
    firing = [rule["name"] for rule in rules if rule["type"] == "alerting" and rule["state"] == "firing"]
    print(f"{len(rules)} rules, firing: {firing or 'none'}")
    # What the alert of a replica that is down reads.
    series = urlencode({"query": 'haproxy_server_status{proxy="replicas", state="UP"} == 1'})
    up = until(lambda: compose.answer("PROMETHEUS_PORT", f"/api/v1/query?{series}")[0]["data"]["result"], 60)
    assert {each["metric"]["server"] for each in up} == {"one", "two"}, up
    check = [
        sys.executable,
        str(ROOT / "deploy/check_dashboards.py"),
        "--prometheus",
        compose.url("PROMETHEUS_PORT"),
    ]
    subprocess.run(check, check=True)
    compose.answer("GRAFANA_PORT", "/api/health")
    if "grafana" not in stubs:
        found, _ = compose.answer("GRAFANA_PORT", "/api/search?type=dash-db")
        files = (ROOT / "deploy/grafana/dashboards").glob("*.json")
        assert {each["uid"] for each in found} == {json.loads(file.read_text())["uid"] for file in files}, (
            found
        )


def stand_in() -> list[str]:
    """Tag stand-ins for the images that are not here; which they are."""
    made = []
    for tag, target in STAND_INS.items():
        if subprocess.run(["docker", "image", "inspect", tag], capture_output=True, check=False).returncode:
            file = str(ROOT / "deploy/stand-ins.Dockerfile")
            build = ["docker", "build", "-q", "-f", file, "--target", target, "-t", tag, str(ROOT / "deploy")]
            subprocess.run(build, check=True)
        label = ["docker", "image", "inspect", "--format", '{{index .Config.Labels "maskllm.stand-in"}}', tag]
        if subprocess.run(label, capture_output=True, text=True, check=True).stdout.strip() == "true":
            made.append(target)
    return made


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def until(promise: Callable[[], Any], patience_s: float) -> Any:
    """What a call gives once it raises nothing; raises what it last raised when patience is over."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return promise()
        except (AssertionError, OSError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def say(begin: float, what: str) -> None:
    print(f"{time.monotonic() - begin:6.1f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
