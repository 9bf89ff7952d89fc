"""Whether the server holds under each fault: make chaos

    python benchmarks/chaos.py                       # every fault; fails (exit 1) if one does not hold
    python benchmarks/chaos.py overload clients      # only these
    python benchmarks/chaos.py --quick               # fewer cases and shorter load

Each fault gets a real server of its own with the demo's masks, and prints what was seen. Where *others* must
not notice, the median latency of clients that behave may grow by the factor 2 at most, by 1.25 where others
are refused: given two processors, of which the engine leaves one to the API. A full disk needs root, who can
mount a small one.
"""

import argparse
import asyncio
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import ADMIN, BINARY, MASKS, ROOT, Server, mixed_mask, serving
from soak import percentiles

from maskllm.core import maskset
from maskllm.core.base import Base
from maskllm.core.maskset import MaskError
from maskllm.core.patterns import best
from server.bounds import PATIENCE_S

OPTIONS = ["--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", 128 << 20]
LONG = {"prompt": "The Secretary shall", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "The Secretary shall", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
JSON = {"content-type": "application/json"}
FACTOR = 2.0
"""By which others' median latency may grow."""
OVERLOAD = {"p50": 1.25, "p99": 2.0}
"""By which that of accepted requests may, while ten times as many are refused."""
GROWTH = 60e6
"""Bytes by which the API process may grow under a flood."""
WAITING, ANSWER_S = 32, 120
SCHEMATHESIS = Path(sysconfig.get_path("scripts")) / "schemathesis"
PASSING = {"state", "slot", "resident_bytes", "requests", "in_flight", "last_used"}
"""What of a mask's card changes as it is used."""


class Broken(Exception):
    """What did not hold."""


class Skipped(Exception):
    """Why a fault cannot be had here."""


def must(held: bool, what: str) -> None:
    if not held:
        raise Broken(what)


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    load_s: float
    files: int
    puts: int
    sockets: int
    examples: int
    cases: int


FULL = Scale(load_s=20, files=10_000, puts=300, sockets=300, examples=600, cases=10_000)
QUICK = Scale(load_s=5, files=1_000, puts=60, sockets=100, examples=60, cases=4_000)


@contextmanager
def demo(folder: Path, *options: object, before: tuple[str, ...] = ()) -> Iterator[Server]:
    """A server whose masks are copies in `folder`/masks."""
    masks = folder / "masks"
    masks.mkdir(exist_ok=True)
    for file in MASKS.glob("*.safetensors"):
        shutil.copy(file, masks)
    with serving(masks, folder, *OPTIONS, *options, before=before) as server:
        yield server


def ask(api: httpx.Client, mask: str = "legal", **fields: Any) -> httpx.Response:
    return api.post("/v1/completions", params={"mask": mask}, json={**SHORT, **fields})


def choices(api: httpx.Client, mask: str = "legal") -> Any:
    """The tokens of an answer that must come."""
    answer = ask(api, mask)
    must(answer.status_code == 200, f"{mask} is answered with {answer.status_code}: {answer.text[:200]}")
    return answer.json()["choices"][0]["text"]


def states(api: httpx.Client) -> dict[str, str]:
    return {mask["id"]: mask["state"] for mask in api.get("/v1/masks").json()["data"]}


def cards(api: httpx.Client) -> dict[str, dict[str, Any]]:
    """Of each mask what stays as it is while nobody publishes."""
    listed = api.get("/v1/masks").json()["data"]
    return {mask["id"]: {name: mask[name] for name in mask if name not in PASSING} for mask in listed}


def flights(
    server: Server, pool: ThreadPoolExecutor, count: int, **fields: Any
) -> list[Future[httpx.Response]]:
    """So many long requests, returned once all are being answered."""

    def fly() -> httpx.Response:
        with server.client() as api:
            return ask(api, **LONG | fields)

    here = server.in_flight()
    flying = [pool.submit(fly) for _ in range(count)]
    while server.in_flight() < here + count:
        must(not any(flight.done() for flight in flying), "requests ended before all had begun")
        time.sleep(0.01)
    return flying


def wait_for_an_engine(api: httpx.Client, killed: float) -> float:
    """Seconds from then until there is one again."""
    while api.get("/health").status_code != 200:
        must(time.monotonic() < killed + 300, "no engine after 300 s")
        time.sleep(0.2)
    return time.monotonic() - killed


def engine_dies(folder: Path, scale: Scale) -> str:  # noqa: ARG001
    """The engine's process is killed with -9 under requests."""
    with demo(folder) as server, server.client() as api, ThreadPoolExecutor(32) as pool:
        done = [
            api.put("/v1/masks/code", content=mixed_mask(folder / "new.safetensors", seed=3), headers=BINARY),
            api.put("/v1/masks/general/pin"),
            api.put("/v1/aliases/law", json={"masks": {"code": 1}}),
        ]
        must(all(each.is_success for each in done), f"{[each.text[:200] for each in done]}")
        asked = ("legal", "law", "general")
        expected, before = {name: choices(api, name) for name in asked}, (states(api), cards(api))
        whole = flights(server, pool, 4)
        streams = flights(server, pool, 4, stream=True)
        server.engine.kill()
        killed = time.monotonic()
        answers = [flight.result(30) for flight in whole]
        failed_s = time.monotonic() - killed
        chunks = [flight.result(30) for flight in streams]
        must(failed_s < 2, f"requests in flight hung for {failed_s:.1f} s")
        must({a.status_code for a in answers} == {503}, f"answers: {[a.status_code for a in answers]}")
        must(all("Retry-After" in a.headers for a in answers), "503 without Retry-After")
        told = [chunk.status_code == 503 or '"code": 503' in chunk.text for chunk in chunks]
        must(all(told), f"a stream ended without an error: {[chunk.text[-200:] for chunk in chunks]}")
        while api.get("/health").status_code == 200:
            must(time.monotonic() < killed + 2, "/health was still green after 2 s")
        must(ask(api).status_code == 503, "a request was taken without an engine")
        must(api.get("/v1/masks").status_code == 200, "the masks could not be listed without an engine")
        back_s = wait_for_an_engine(api, killed)
        after = states(api)
        lost = {name for name, state in before[0].items() if (state == "known") != (after[name] == "known")}
        must(not lost, f"masks are not where they were: {lost}")
        must(after["general"] == "resident", f"a pinned mask is {after['general']}")
        must(cards(api) == before[1], f"masks are not what they were: {cards(api)}, and were {before[1]}")
        answered = {name: choices(api, name) for name in asked}
        must(answered == expected, f"the new engine answers otherwise: {answered}, not {expected}")
        return f"8 requests failed with 503 in {failed_s:.2f} s, the same masks are back after {back_s:.0f} s"


def engine_hangs(folder: Path, scale: Scale) -> str:  # noqa: ARG001
    """The engine's process stands still under requests."""
    patience = ("env", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=5")
    with (
        demo(folder, before=patience) as server,
        server.client() as api,
        ThreadPoolExecutor(32) as pool,
    ):
        expected, flying = choices(api), flights(server, pool, 8)
        server.engine.suspend()
        stopped = time.monotonic()
        answers = [flight.result(30) for flight in flying]
        failed_s = time.monotonic() - stopped
        must(failed_s < 12, f"requests in flight hung for {failed_s:.1f} s")
        must({a.status_code for a in answers} == {503}, f"answers: {[a.status_code for a in answers]}")
        must(api.get("/health").status_code == 503, "/health is green without an engine")
        back_s = wait_for_an_engine(api, stopped)
        must(choices(api) == expected, "the new engine answers otherwise")
        return (
            f"8 requests failed with 503 after {failed_s:.0f} s, another engine answers after {back_s:.0f} s"
        )


def told_to_stop(folder: Path, scale: Scale) -> str:  # noqa: ARG001
    """SIGTERM under load."""
    with demo(folder) as server, ThreadPoolExecutor(32) as pool:
        flying = flights(server, pool, 8) + flights(server, pool, 8, stream=True)
        server.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        time.sleep(0.5)
        with suppress(httpx.ConnectError), server.client() as late:
            status = ask(late).status_code
            must(status == 503, f"a request after SIGTERM was answered with {status}")
        answers = [flight.result(60) for flight in flying]
        done_s = time.monotonic() - begin
        must({a.status_code for a in answers} == {200}, f"answers: {[a.status_code for a in answers]}")
        must(
            all(a.json()["usage"]["completion_tokens"] == 300 for a in answers[:8]), "an answer was cut short"
        )
        must(all(a.text.endswith("data: [DONE]\n\n") for a in answers[8:]), "a stream was cut short")
        code = server.process.wait(60)
        must(code == 0, f"exit {code}")
        return f"16 requests finished in {done_s:.1f} s, exit 0"


def files_break(folder: Path, scale: Scale) -> str:  # noqa: ARG001
    """Mask files are truncated, garbled, deleted or unreadable in each state of a mask, and at a start."""

    def deny(path: Path) -> None:
        path.chmod(0)

    damages: dict[str, Callable[[Path], object]] = {
        "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
        "deleted": Path.unlink,
        "denied": deny,
    }
    masks = folder / "masks"
    masks.mkdir()
    lives = ("known", "packed", "resident", "pinned", "answering")
    cases = {f"{state}-{d}": (state, d) for state in lives for d in damages}
    for name in [*cases, "whole"]:
        mixed_mask(masks / f"{name}.safetensors", seed=1)
    # Root reads everything, unless it may not.
    root = os.geteuid() == 0
    before = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if root else ()
    with demo(folder, before=before) as server, server.client() as api, ThreadPoolExecutor(1) as pool:
        expected, others = choices(api, "whole"), choices(api)
        long = ask(api, "whole", **LONG).json()["choices"]
        for name, (state, damage) in cases.items():
            path = masks / f"{name}.safetensors"
            content, sha = path.read_bytes(), api.get(f"/v1/masks/{name}").json()["sha256"]
            if state == "packed":
                must(api.post(f"/v1/masks/{name}/load").status_code == 200, f"{name} does not load")
            if state == "resident":
                choices(api, name)
            if state == "pinned":
                must(api.put(f"/v1/masks/{name}/pin").is_success, f"{name} cannot be pinned")
            flying = flights(server, pool, 1, mask=name) if state == "answering" else []
            here = states(api)[name]
            must(here == (state if state in ("known", "packed") else "resident"), f"{name} is {here}")
            damages[damage](path)
            put = api.put(f"/v1/masks/{name}")
            must(not any(flight.done() for flight in flying), f"{name}'s request ended too early")
            must(put.status_code == 400, f"PUT {name}: {put.status_code} {put.text[:200]}")
            answer = ask(api, name)
            if state == "known":
                must(answer.status_code == 409, f"{name}: {answer.status_code} {answer.text[:200]}")
                must(path.name in answer.json()["error"]["message"], f"{name} does not name its file")
            else:
                must(answer.status_code == 200, f"{name}: {answer.status_code} {answer.text[:200]}")
                must(answer.json()["choices"][0]["text"] == expected, f"{name} answers otherwise, damaged")
            for flight in flying:
                must(flight.result(60).json()["choices"] == long, f"{name}'s request in flight went wrong")
            for text in (put.text, answer.text):
                must(str(folder) not in text, f"{name} tells where the folder is")
            must(api.get(f"/v1/masks/{name}").json()["sha256"] == sha, f"{name} lost its version")
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            must(choices(api, name) == expected, f"{name} answers otherwise")
            must(choices(api) == others, f"{name} disturbed another mask")
            if state == "pinned":
                must(api.delete(f"/v1/masks/{name}/pin").is_success, f"{name} stays pinned")
        lost, kept = "packed-deleted", "packed-garbage"
        (masks / f"{lost}.safetensors").unlink()
        server.engine.kill()
        while api.get("/health").status_code == 200:
            time.sleep(0.05)
        wait_for_an_engine(api, time.monotonic())
        must(ask(api, lost).status_code == 409, "a mask whose file is gone outlived its engine")
        must((choices(api, kept), choices(api)) == (expected, others), "a file that is gone disturbed others")
    for damage in damages:
        damages[damage](masks / f"known-{damage}.safetensors")
    with serving(masks, folder, *OPTIONS, before=before) as server, server.client() as api:
        listed = api.get("/v1/masks").json()
        broken = {f"known-{damage}" for damage in damages if damage != "deleted"}
        must(listed["refused"].keys() == broken, f"refused at a start: {listed['refused']}")
        shown = broken & {mask["id"] for mask in listed["data"]}
        must(not shown, f"listed though their files are damaged: {shown}")
        must((choices(api, "whole"), choices(api)) == (expected, others), "a damaged file disturbed others")
    return f"{len(cases)} cases: PUT is a 400, a first use a 409, whoever was loaded answers on"


def disk_full(folder: Path, scale: Scale) -> str:  # noqa: ARG001
    """The disk of the masks folder is full."""
    masks = folder / "masks"
    masks.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(masks)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise Skipped("no root who may mount a small disk")
    try:
        with demo(folder) as server, server.client() as api:
            others, sha = choices(api), api.get("/v1/masks/code").json()["sha256"]
            must(api.post("/v1/masks/medical/load").status_code == 200, "medical does not load")
            new = mixed_mask(folder / "new.safetensors", seed=2)
            with suppress(OSError), (masks / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
            tried = {
                "an upload": api.put("/v1/masks/new", content=new, headers=BINARY),
                "a new version of a known mask": api.put("/v1/masks/code", content=new, headers=BINARY),
                "a new version of a packed mask": api.put("/v1/masks/medical", content=new, headers=BINARY),
                "a new version of a resident mask": api.put("/v1/masks/legal", content=new, headers=BINARY),
                "an alias": api.put("/v1/aliases/law", json={"masks": {"legal": 1}}),
                "a pin": api.put("/v1/masks/legal/pin"),
            }
            for what, answer in tried.items():
                must(answer.status_code == 507, f"{what}: {answer.status_code} {answer.text[:200]}")
            must(api.get("/v1/masks/code").json()["sha256"] == sha, "a known mask lost its version")
            must(choices(api) == others, "a resident mask answers otherwise")
            choices(api, "medical")
            must(not list(masks.glob("*.partial")) and not list(masks.glob(".*")), "parts of files are left")
            (masks / "filler").unlink()
            done = api.put("/v1/masks/new", content=new, headers=BINARY)
            must(done.status_code == 201, f"with room again: {done.status_code} {done.text[:200]}")
            return (
                f"{len(tried)} kinds of writing are a 507, masks answer on, with room again an upload works"
            )
    finally:
        subprocess.run(["umount", "--lazy", str(masks)], check=False)


class Client(asyncio.Protocol):
    """A connection that asks the same each time, for a fifth of what a library takes.

    It runs on the processors of the server, of whose trouble with a flood it is to be no part.
    """

    closed = False

    def __init__(self) -> None:
        self._content = request({**SHORT, "mask": "legal"})

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def ask(self) -> tuple[int, float]:
        """The status of an answer, and its seconds."""
        self._answer, self._whole = b"", asyncio.get_running_loop().create_future()
        begin = time.monotonic()
        self._transport.write(self._content)
        head = await self._whole
        status, seconds = int(head[9:12]), time.monotonic() - begin
        must(status == 200 or b"retry-after: " in head, f"{status} without Retry-After")
        return status, seconds

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        head = head.lower()
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if end and len(body) == int(length):
            self._whole.set_result(head)

    def connection_lost(self, _: Exception | None) -> None:
        self.closed = True
        if not self._whole.done():
            self._whole.set_exception(Broken("somebody else was hung up on"))

    def close(self) -> None:
        self._transport.close()


async def connected(server: Server) -> Client:
    port = int(server.url.rpartition(":")[2])
    return (await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port))[1]


async def closed(server: Server, clients: int, seconds: float) -> list[float]:
    """Latencies of so many clients that ask again as soon as they are answered."""
    end, latencies = time.monotonic() + seconds, list[float]()

    async def keep_asking() -> None:
        client = await connected(server)
        while time.monotonic() < end:
            status, took = await client.ask()
            must(status == 200, f"somebody else got {status}")
            latencies.append(took)
        client.close()

    async with asyncio.timeout(seconds + ANSWER_S):
        await asyncio.gather(*(keep_asking() for _ in range(clients)))
    return latencies


def p50(server: Server, seconds: float) -> float:
    """Median latency of two clients that behave."""
    return statistics.median(uvloop.run(closed(server, 2, seconds)))


def overload(folder: Path, scale: Scale) -> str:
    """Ten times as many requests as the server can answer."""

    async def flood(server: Server, rate: float) -> tuple[Counter[int], list[float], dict[str, int]]:
        """Statuses, latencies of what was accepted, and the most memory of each process meanwhile."""
        statuses, latencies, idle = Counter[int](), list[float](), list[Client]()
        most = Counter(server.rss())

        async def one() -> None:
            while idle and idle[-1].closed:  # nobody needed it for so long
                idle.pop()
            client = idle.pop() if idle else await connected(server)
            status, took = await client.ask()
            idle.append(client)
            statuses[status] += 1
            if status == 200:
                latencies.append(took)

        tasks, begin = [], time.monotonic()
        at = sampled = begin
        while (at := at + 1 / rate) < begin + scale.load_s:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            tasks.append(asyncio.create_task(one()))
            if at > sampled + 1:
                sampled, most = at, most | Counter(server.rss())
        async with asyncio.timeout(ANSWER_S):
            await asyncio.gather(*tasks)
        for client in idle:
            client.close()
        return statuses, latencies, most | Counter(server.rss())

    with demo(folder, "--max-waiting", WAITING) as server:
        uvloop.run(closed(server, WAITING, 2))  # a warm-up
        alone = uvloop.run(closed(server, WAITING, scale.load_s / 2))
        rate = 10 * len(alone) / (scale.load_s / 2)
        uvloop.run(flood(server, rate))  # memory that is kept for good
        before = server.rss()
        statuses, latencies, most = uvloop.run(flood(server, rate))
        must({200, 503} <= statuses.keys() <= {200, 429, 503}, f"statuses: {dict(statuses)}")
        before_s, during_s = percentiles(alone), percentiles(latencies)
        factors = {q: during_s[q] / before_s[q] for q in before_s}
        times = ", ".join(f"{q} {factor:.2f}" for q, factor in factors.items())
        seen = f"accepted requests took {times} times as long as {WAITING} alone"
        must(all(factors[q] <= bound for q, bound in OVERLOAD.items()), seen)
        growth = {name: (size - before[name]) / before[name] for name, size in most.items()}
        must(max(growth.values()) < 0.02, f"memory grew: {growth}")
        must(server.in_flight() == 0, "requests were left behind")
        grown = ", ".join(f"{name} {share:+.1%}" for name, share in growth.items())
        return f"{rate:.0f} requests/s: {dict(statuses)}; {seen}; memory at its most: {grown}"


def clients(folder: Path, scale: Scale) -> str:
    """Half-open sockets, slow readers, large and broken bodies, floods of headers."""
    with demo(folder) as server, server.client() as api:
        alone, rss = p50(server, scale.load_s / 2), server.rss()["API"]
        seen = []
        for name, misbehave in {
            "half-open": half_open,
            "slow readers": slow_readers,
            "bodies": bodies,
        }.items():
            with misbehave(server, scale) as (normal_s, end):
                factor = p50(server, scale.load_s / 2) / (normal_s or alone)
                growth = server.rss()["API"] - rss
                print(f"{name}: others x {factor:.2f}, {growth / 1e6:+.0f} MB", flush=True)
                must(factor <= FACTOR, f"{name}: others took {factor:.2f} times as long")
                must(growth < GROWTH, f"{name}: the API process grew by {growth / 1e6:.0f} MB")
                ended = end()
            must(choices(api) != "", "no answer")
            seen.append(f"{name}: others x {factor:.2f}, {growth / 1e6:+.0f} MB, {ended}")
        return "; ".join(seen)


Trouble = tuple[float | None, Callable[[], str]]
"""Others' median latency without it, where that is not the idle server's, and what waits for its end."""


@contextmanager
def half_open(server: Server, scale: Scale) -> Iterator[Trouble]:
    """Connections that send nothing, half of their headers, or half of their body."""
    head = request({**SHORT, "mask": "legal"})
    parts = [b"", head[:60], head[:-10]]
    with sockets(server, [parts[number % 3] for number in range(3 * scale.sockets)]) as opened:

        def end() -> str:
            begin = time.monotonic()
            for each in opened:
                each.settimeout(PATIENCE_S + 10)
                try:
                    must(each.recv(1000) == b"", "half a request was answered")
                except TimeoutError:
                    raise Broken(f"half a request is waited for after {PATIENCE_S + 10} s") from None
            return f"{len(opened)} hung up on after {time.monotonic() - begin:.0f} s more"

        yield None, end


@contextmanager
def slow_readers(server: Server, scale: Scale) -> Iterator[Trouble]:
    """Streams of more than any buffer takes, whose clients never read."""
    body = {**LONG, "mask": "legal", "max_tokens": 400, "temperature": 1, "n": 16, "logprobs": 5}
    body |= {"stream": True}
    sizes = []

    def read() -> None:
        with server.client(600) as api:
            sizes.append(len(api.post("/v1/completions", json=body).raise_for_status().content))

    readers = [threading.Thread(target=read) for _ in range(4)]
    for each in readers:
        each.start()
    normal_s = p50(server, scale.load_s / 2)
    for each in readers:
        each.join()
    must(len(sizes) == len(readers), "streams that are read did not end")
    with sockets(server, [request(body)] * len(readers)) as opened:

        def end() -> str:
            begin = time.monotonic()
            while (left := server.in_flight()) > 0:
                must(
                    time.monotonic() < begin + 180,
                    f"{left} requests are still held by clients that do not read",
                )
                time.sleep(0.5)
            took = time.monotonic() - begin
            return f"{len(opened)} of {min(sizes) / 1e6:.0f} MB each cut off after {took:.0f} s more"

        yield normal_s, end


@contextmanager
def bodies(server: Server, scale: Scale) -> Iterator[Trouble]:  # noqa: ARG001
    """What cannot be read, from threads, again and again."""
    stop, statuses = threading.Event(), Counter[str]()
    bad = {
        "10 MB": b" " * 10_000_000,
        "deep JSON": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "not UTF-8": b'{"prompt": "\xff\xfe"}',
    }
    flood = b"GET /health HTTP/1.1\r\n" + b"".join(b"x-%d: a\r\n" % i for i in range(20_000))

    def send() -> None:
        with server.client() as api:
            while not stop.wait(0.2):
                for name, content in bad.items():
                    with suppress(httpx.TransportError):  # it may have closed before all was sent
                        status = api.post("/v1/completions", content=content, headers=JSON).status_code
                        statuses[f"{name}: {status}"] += 1
                with sockets(server, [flood]) as (each,), suppress(ConnectionError):
                    statuses[f"headers: {each.recv(12)[9:].decode()}"] += 1

    senders = [threading.Thread(target=send) for _ in range(4)]
    for each in senders:
        each.start()

    def end() -> str:
        stop.set()
        for each in senders:
            each.join()
        wrong = [status for status in statuses if ": 4" not in status and status != "headers: "]
        must(not wrong, f"answers: {dict(statuses)}")
        kinds = {status.partition(":")[0] for status in statuses}
        must(kinds == {*bad, "headers"}, f"not all were sent: {dict(statuses)}")
        must("headers: 400" in statuses, f"no flood of headers was told why: {dict(statuses)}")
        return str(dict(statuses))

    try:
        yield None, end
    finally:
        stop.set()


def request(body: dict[str, Any]) -> bytes:
    """A completion as bytes."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {ADMIN['Authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


@contextmanager
def sockets(server: Server, contents: list[bytes]) -> Iterator[list[socket.socket]]:
    """Connections that have sent something each, and take little at a time."""
    port, opened = int(server.url.rpartition(":")[2]), list[socket.socket]()
    try:
        for content in contents:
            each = socket.socket()
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.connect(("127.0.0.1", port))
            opened.append(each)
            with suppress(ConnectionError):
                each.sendall(content)
        yield opened
    finally:
        for each in opened:
            each.close()


def mutations(good: bytes) -> st.SearchStrategy[bytes]:
    """Files that were a mask: cut, flipped, overwritten, grown, or with another header."""
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    place = st.integers(0, len(good) - 1)
    near_front = st.integers(0, 8 + length)
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    values = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)
    )

    def flipped(changes: list[tuple[int, int]]) -> bytes:
        changed = bytearray(good)
        for at, value in changes:
            changed[at] ^= value
        return bytes(changed)

    def headed(entries: dict[str, Any]) -> bytes:
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + length :]

    def with_field(name: str, value: Any) -> bytes:
        inner = json.loads(header["__metadata__"][maskset.KEY])
        return headed({**header, "__metadata__": {maskset.KEY: json.dumps({**inner, name: value})}})

    def with_inner(layer: str, key: str, value: Any) -> bytes:
        return headed({**header, layer: {**header[layer], key: value}})

    inner = json.loads(header["__metadata__"][maskset.KEY])
    layers = st.sampled_from(list(inner["layers"]))
    return st.one_of(
        place.map(lambda at: good[:at]),
        st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=5).map(flipped),
        st.lists(st.tuples(near_front, st.integers(1, 255)), min_size=1, max_size=5).map(flipped),
        st.tuples(place, st.binary(min_size=1)).map(lambda c: good[: c[0]] + c[1] + good[c[0] :]),
        st.binary(min_size=1).map(lambda extra: good + extra),
        st.binary(),
        st.integers(0, 2**64 - 1).map(lambda size: size.to_bytes(8, "little") + good[8:]),
        st.tuples(st.sampled_from(list(header)), values).map(lambda c: headed({**header, c[0]: c[1]})),
        st.tuples(st.sampled_from(list(inner)), values).map(lambda c: with_field(*c)),
        st.tuples(layers, values).map(lambda c: with_field("layers", {**inner["layers"], c[0]: c[1]})),
        st.tuples(layers, st.sampled_from(["dtype", "shape", "data_offsets"]), values).map(
            lambda c: with_inner(*c)
        ),
    )


def same(content: bytes, good: bytes, folder: Path) -> bool:
    """Whether two files hold one mask, their headers written otherwise perhaps."""
    masks = []
    for name, each in (("ours", good), ("theirs", content)):
        (folder / name).write_bytes(each)
        mask = maskset.load(folder / name)
        packed = {layer: tensor.tolist() for layer, tensor in mask.packed.items()}
        masks.append((mask.n, mask.m, mask.base, mask.shapes, mask.provenance, mask.scores, packed))
    return masks[0] == masks[1]


def fuzzed_files(folder: Path, scale: Scale) -> str:
    """Mutated files through `maskset.load`, in this process."""
    base = Base("0" * 64, {"a.weight": (8, 24), "b.weight": (4, 48)})
    noise = torch.Generator().manual_seed(0)
    layers = {"a": best(torch.rand(8, 24, generator=noise)), "b": best(torch.rand(4, 48, generator=noise))}
    path = folder / "mask.safetensors"
    maskset.save(maskset.from_masks(layers, base), path)
    good, outcomes = path.read_bytes(), Counter[str]()

    @settings(max_examples=scale.files, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutations(good))
    def load(content: bytes) -> None:
        path.write_bytes(content)
        try:
            maskset.load(path, base)
        except MaskError as error:
            outcomes[type(error).__name__] += 1
        else:
            must(same(content, good, folder), "a mutated file is another mask")
            outcomes["the same mask"] += 1

    load()
    return f"{outcomes.total()} files: {dict(outcomes.most_common())}"


def fuzzed_uploads(folder: Path, scale: Scale) -> str:
    """Mutated files through PUT."""
    good, statuses = (MASKS / "legal.safetensors").read_bytes(), Counter[int]()
    with demo(folder) as server, server.client() as api:
        expected = choices(api)
        before = api.get("/v1/masks").json()["data"]

        @settings(
            max_examples=scale.puts, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(mutations(good))
        def put(content: bytes) -> None:
            answer = api.put("/v1/masks/legal", content=content, headers=BINARY)
            statuses[answer.status_code] += 1
            if answer.status_code == 200 and same(content, good, folder):
                api.put("/v1/masks/legal", content=good, headers=BINARY)
            else:
                must(answer.status_code in (400, 413), f"{answer.status_code} {answer.text[:200]}")

        put()
        after = api.get("/v1/masks").json()["data"]
        must([m["sha256"] for m in after] == [m["sha256"] for m in before], "a version was lost")
        must(choices(api) == expected, "the mask answers otherwise")
        left = [file.name for file in (folder / "masks").iterdir() if file.suffix != ".safetensors"]
        must(not left, f"files are left: {left}")
        return f"{statuses.total()} uploads: {dict(statuses)}, the previous version answers on"


def fuzzed_api(folder: Path, scale: Scale) -> str:
    """Values that the schema allows and forbids, to every route: schemathesis with all checks."""
    with demo(folder) as server, server.client() as api:
        expected = choices(api)
        command = [SCHEMATHESIS, "--config-file", ROOT / "tests/server/schemathesis.toml", "run"]
        command += [f"{server.url}/openapi.json", "--header", f"Authorization: {ADMIN['Authorization']}"]
        command += ["--max-examples", scale.examples, "--seed", 1, "--generation-database", "none"]
        words = [str(word) for word in [*command, "--request-timeout", 120, "--no-color"]]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        must(done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:])
        must(choices(api) == expected, "a mask answers otherwise")
        must(server.in_flight() == 0, "requests were left behind")
    statuses: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for line in map(json.loads, (folder / "requests.log").read_text().splitlines()):
        if line["status"] not in (401, 405):
            statuses["/".join([line["method"], *line["path"].split("/")[1:3]])][line["status"]] += 1
    cases = int(re.search(r"(\d+) generated", done.stdout)[1])  # type: ignore[index]
    must(cases >= scale.cases, f"there were only {cases} cases")
    return f"{cases} cases: " + ", ".join(f"{route} {dict(seen)}" for route, seen in sorted(statuses.items()))


FAULTS: dict[str, Callable[[Path, Scale], str]] = {
    "engine": engine_dies,
    "hang": engine_hangs,
    "sigterm": told_to_stop,
    "files": files_break,
    "disk": disk_full,
    "overload": overload,
    "clients": clients,
    "fuzz-files": fuzzed_files,
    "fuzz-uploads": fuzzed_uploads,
    "fuzz-api": fuzzed_api,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter load")
    args = parser.parse_args()
    if unknown := set(args.faults) - FAULTS.keys():
        parser.error(f"no fault {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    lines = ["| fault | held | seen |", "|---|---|---|"]
    broken = False
    for name in args.faults or FAULTS:
        print(f"{time.strftime('%H:%M:%S')} {name}: {FAULTS[name].__doc__}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                held, seen = "yes", FAULTS[name](Path(folder), QUICK if args.quick else FULL)
            except Skipped as why:
                held, seen = "not tried", str(why)
            except Exception as error:
                held, seen, broken = "**no**", str(error) or repr(error), True
        print(f"{time.strftime('%H:%M:%S')} {name}: {held}: {seen}", flush=True)
        lines.append(f"| {FAULTS[name].__doc__} | {held} | {seen} |")
    print("\n".join(lines))
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
