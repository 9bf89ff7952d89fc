"""A real server to put under load: how to start it and its masks, and what its processes and metrics say."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from maskllm.core import maskset
from maskllm.core.maskset import MaskSet

ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples/demo/base"
MASKS = ROOT / "examples/demo/masks"
ADMIN = {"Authorization": "Bearer boss"}
BINARY = {"content-type": "application/octet-stream"}
START_S = 300
NOISE = 0.2
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench serve`, whose console script does not start in vLLM's CPU package ("No package metadata")."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def engine(self) -> psutil.Process:
        """The process that holds the weights."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if "EngineCore" in child.name())

    def client(self, timeout_s: float = 120) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s, headers=ADMIN)

    def session(self, timeout_s: float = 120) -> aiohttp.ClientSession:
        """For load: as many connections as it takes."""
        limits = aiohttp.ClientTimeout(total=timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(self.url, headers=ADMIN, timeout=limits, connector=connector)

    def rss(self) -> dict[str, int]:
        """Bytes of memory of each of its processes."""
        api = psutil.Process(self.process.pid)
        return {"API": api.memory_info().rss, "engine": self.engine.memory_info().rss}

    def in_flight(self) -> int:
        """Requests that the engine has or the API holds; also of the dense base and of replaced versions."""
        with self.client() as client:
            held = sum(mask["in_flight"] for mask in client.get("/v1/masks").json()["data"])
        return max(held, round(sum(sample.value for sample in self._samples("maskllm_requests_in_flight"))))

    def swaps(self) -> dict[str, "Swaps"]:
        """All swaps since its start, by source."""
        found: dict[str, Swaps] = {}
        for sample in self._samples("maskllm_swap_seconds"):
            swaps = found.setdefault(sample.labels["source"], Swaps({}, 0.0))
            if sample.name.endswith("_bucket"):
                swaps.upto[float(sample.labels["le"])] = sample.value
            elif sample.name.endswith("_sum"):
                found[sample.labels["source"]] = Swaps(swaps.upto, sample.value)
        return found

    def steps(self) -> float:
        """Steps that the engine has made."""
        return sum(s.value for s in self._samples("vllm:iteration_tokens_total") if s.name.endswith("_count"))

    def _samples(self, name: str) -> list[Sample]:
        """Of one family of its metrics."""
        with self.client() as client:
            text = client.get("/metrics").text
        families = [family for family in text_string_to_metric_families(text) if family.name == name]
        return [sample for family in families for sample in family.samples]


@dataclass(frozen=True)
class Swaps:
    """A histogram of swaps: how many took up to so many seconds, and the seconds of them all."""

    upto: dict[float, float]
    seconds: float

    @property
    def count(self) -> float:
        return max(self.upto.values(), default=0)

    def since(self, before: "Swaps | None") -> "Swaps":
        if before is None:
            return self
        return Swaps({at: n - before.upto[at] for at, n in self.upto.items()}, self.seconds - before.seconds)

    def quantile(self, q: float) -> float:
        """Seconds, as Prometheus' histogram_quantile has it: evenly spread within a bucket."""
        wanted, low, below = q * self.count, 0.0, 0.0
        for high, count in sorted(self.upto.items()):
            if count >= wanted and count > below:
                share = (wanted - below) / (count - below)
                return low if high == float("inf") else low + (high - low) * share
            low, below = high, count
        return low


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(masks: Path, folder: Path, *options: object, before: tuple[str, ...] = ()) -> Iterator[Server]:
    """`maskllm serve` of the demo base until the block ends; its log and request log go into `folder`.

    `before` is what runs the command, if not nothing.
    """
    keys = json.dumps([{"id": "boss", "sha256": sha256(b"boss").hexdigest(), "role": "admin"}])
    command = [*before, sys.executable, "-m", "server", "--model", BASE, "--masks", masks, "--keys", keys]
    command += ["--log-requests", folder / "requests.log", *options]
    with running(command, folder / "server.log") as server:
        yield server


@contextmanager
def running(command: list[Any], log: Path, **environment: str) -> Iterator[Server]:
    """A server's command on a port of its own until the block ends, once it is healthy."""
    port = free_port()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in [*command, "--port", port]],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            process.wait()


def mixed_mask(path: Path, seed: int) -> bytes:
    """Write a mask: each layer from one of the demo's, with a fifth at random. Returns the file."""
    dice, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    learned, packed = _learned(), {}
    for layer in learned[0].shapes:
        packed[layer] = codes = dice.choice(learned).packed[layer].clone()
        other = torch.rand(codes.shape, generator=noise) < NOISE
        other[:, -1] = False  # a byte that may hold less than three groups
        codes[other] = torch.randint(6**3, codes.shape, generator=noise, dtype=torch.uint8)[other]
    maskset.save(replace(learned[0], packed=packed, provenance={"seed": seed}, scores={}), path)
    return path.read_bytes()


@cache
def _learned() -> list[MaskSet]:
    return [maskset.load(file) for file in sorted(MASKS.glob("*.safetensors"))]


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text()[-4000:]}")
