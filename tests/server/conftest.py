"""One real server for the whole session: the demo base, its masks, and files that must be refused."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from maskllm.core import maskset
from maskllm.core.base import Base, read_base
from maskllm.core.patterns import best

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples/demo/base"
MASKS = ROOT / "examples/demo/masks"
SLOTS = 4
START_S = 240


@dataclass(frozen=True)
class Server:
    """A running `maskllm serve` and the folder of its masks."""

    url: str
    masks: Path
    log: Path
    process: subprocess.Popen[bytes]

    def client(self, **kwargs: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **kwargs)


@pytest.fixture(scope="session")
def base() -> Base:
    return read_base(BASE)


def random_mask(base: Base, path: Path, seed: int, fingerprint: str | None = None) -> Path:
    """A valid 2:4 mask of the demo base (or of a base with another fingerprint) at random."""
    noise = torch.Generator().manual_seed(seed)
    layers = maskset.load(MASKS / "legal.safetensors").shapes
    masks = {name: best(torch.rand(shape, generator=noise)) for name, shape in layers.items()}
    maskset.save(maskset.from_masks(masks, Base(fingerprint or base.fingerprint, base.shapes)), path)
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("masks")
    for file in MASKS.glob("*.safetensors"):
        shutil.copy(file, folder)
    (folder / "broken.safetensors").write_bytes((MASKS / "legal.safetensors").read_bytes()[:100_000])
    random_mask(base, folder / "foreign.safetensors", seed=1, fingerprint="0" * 64)
    random_mask(base, folder / "victim.safetensors", seed=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [sys.executable, "-m", "maskllm.cli", "serve", "--model", BASE, "--masks", folder]
    command += ["--host", "127.0.0.1", "--port", port, "--slots", SLOTS]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    server = Server(f"http://127.0.0.1:{port}", folder, log, process)
    try:
        wait_until_healthy(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{server.log.read_text()[-4000:]}")
