"""A real server to test: how to start it, and masks it must take or refuse."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import httpx
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from serving import running

from maskllm.core import maskset
from maskllm.core.base import Base
from maskllm.core.patterns import best

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples/demo/base"
MASKS = ROOT / "examples/demo/masks"
SLOTS = 4
MAX_COMPLETION_TOKENS = 500
KEYS = {
    "boss": {"role": "admin"},
    "acme": {"role": "use", "masks": ["legal"]},
    "hasty": {"role": "use", "requests_per_minute": 2},
    "wordy": {"role": "use", "tokens_per_minute": 30},
    "hurried": {"role": "use", "tokens_per_minute": 10},
    "single": {"role": "use", "concurrency": 1},
}
HOSTILE = "<img src=x onerror=alert(1)>"
"""A name that must never become markup."""


@dataclass(frozen=True)
class Server:
    """A running `maskllm serve` and the folder of its masks."""

    url: str
    masks: Path
    log: Path
    process: subprocess.Popen[bytes]
    slots: int = SLOTS

    def client(self, key: str = "boss") -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, headers=bearer(key))


def bearer(key: str = "boss") -> dict[str, str]:
    """The header of one of KEYS; a key here is its id."""
    return {"Authorization": f"Bearer {key}"}


@contextmanager
def serving(masks: Path, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    """The demo base under the masks of a folder, in fp32, until the block ends."""
    keys = log.with_name("keys.json")
    entries = [{"id": id, "sha256": sha256(id.encode()).hexdigest(), **key} for id, key in KEYS.items()]
    keys.write_text(json.dumps(entries))
    command = [sys.executable, "-m", "server", "--keys", keys, "--model", BASE, "--masks", masks]
    command += ["--slots", SLOTS, "--dtype", "float32", "--max-completion-tokens", MAX_COMPLETION_TOKENS]
    with running([*command, *options], log, **environment) as started:
        yield Server(started.url, masks, log, started.process)


def sent(
    server: Server, method: str, path: str, id: str, body: bytes, size: int | None = None, key: str = "boss"
) -> socket.socket:
    """A connection to which a request, or the beginning of one of `size` bytes, was sent."""
    host, port = server.url.removeprefix("http://").split(":")
    kind = "octet-stream" if method == "PUT" else "json"
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nX-Request-Id: {id}\r\n"
    head += f"Content-Type: application/{kind}\r\nContent-Length: {size or len(body)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(head.encode() + body)
    return connection


def random_mask(base: Base, path: Path, seed: int, fingerprint: str | None = None) -> Path:
    """A valid 2:4 mask of the demo base (or of a base with another fingerprint) at random."""
    noise = torch.Generator().manual_seed(seed)
    layers = maskset.load(MASKS / "legal.safetensors").shapes
    masks = {name: best(torch.rand(shape, generator=noise)) for name, shape in layers.items()}
    maskset.save(maskset.from_masks(masks, Base(fingerprint or base.fingerprint, base.shapes)), path)
    return path
