"""What our HTTP layer costs beside bare vLLM's own API server: first tokens and throughput.

    python benchmarks/overhead.py            # writes benchmarks/overhead.json
    python benchmarks/overhead.py --quick    # a few slices, only printed

Two servers of the demo base, both up, and stopped (SIGSTOP) unless it is their turn. *Ours* is
`maskllm serve` as it comes; *bare* is vLLM's `build_app`, `init_app_state` and `serve_http` around an engine
with the same configuration: our quantization and mask manager in the worker, our scheduler in the same
process, the same dtype, slots, KV cache and compilation. No request names a mask, so that engines do the same
and only what is around them differs: our routes, key, limits, strict bodies, request log and metrics. Neither
has uvicorn's access log.

First tokens are of requests one after another, streamed, to each server in turn: a median over all of them.
For throughput 16 requests are always on their way to each, and a quarter of a second of one server follows
one of the other: the machine's own speed changes by a tenth from second to second, and so meets both. It is
all tokens over all seconds of its own. Both are started anew several times, as two starts of one server
differ; the interval of the ratio is that of pairs drawn anew. The API process's CPU time is that of the
requests of the second kind.
"""

import argparse
import asyncio
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import uvloop
from report import Row, write
from serving import BASE, MASKS, Server, running, serving

PAIRS, TURNS, ONE_BY_ONE, AT_A_TIME = 8, 8, 15, 16
SLICES, SLICE_S, WARM_UP = 120, 0.25, 8
TOKENS, FIRST = 32, 4
PROMPT = "The Secretary of the Treasury shall"
NAMES = ("bare", "ours")


@dataclass
class Figures:
    """What one server did in all of its turns."""

    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(
            self.ttft_s + other.ttft_s,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.cpu_s + other.cpu_s,
        )

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Of the API process, for each request."""
        return 1000 * self.cpu_s * TOKENS / self.tokens


Pair = dict[str, Figures]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"how often both are started ({PAIRS})")
    parser.add_argument("--quick", action="store_true", help="one pair and a few slices, only printed")
    parser.add_argument("options", nargs="*", help="options of maskllm serve for both, after --")
    args = parser.parse_args()
    count, slices = (1, 8) if args.quick else (args.pairs, SLICES)
    pairs = [measure(f"pair {number + 1}", slices, args.options) for number in range(count)]
    rows = report(pairs)
    note = (
        f"{TOKENS} tokens of the dense base, {AT_A_TIME} requests at a time; {count} pairs of servers, of "
        f"each {slices} slices of {SLICE_S} s. First tokens of {TURNS * ONE_BY_ONE} requests one by one"
    )
    command = "python benchmarks/overhead.py" + (f" --pairs {count}" if count != PAIRS else "")
    write("overhead", command, rows, note, of="figure", keep=not args.quick)


def measure(label: str, slices: int, options: list[str]) -> Pair:
    """Start both, let them take turns, and stop them."""
    pair = {name: Figures() for name in NAMES}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ours = stack.enter_context(serving(MASKS, Path(folder), *options))
        pause(ours)
        stack.callback(resume, ours)
        bare = [sys.executable, __file__, "bare", *options]
        servers = {"bare": stack.enter_context(running(bare, Path(folder) / "bare.log")), "ours": ours}
        pause(servers["bare"])
        stack.callback(resume, servers["bare"])
        for turn in range(TURNS + 1):
            for name in in_turn(turn):
                with its_turn(servers[name]):
                    seconds = asyncio.run(one_by_one(servers[name]))
                if turn:  # the first is a warm-up
                    pair[name].ttft_s += seconds
        asyncio.run(together(servers, pair, slices))
    for name, figures in pair.items():
        ms = 1000 * statistics.median(figures.ttft_s)
        print(
            f"{label}, {name}: {ms:.2f} ms, {figures.tokens_per_s:.0f} tokens/s, {figures.cpu_ms:.2f} ms CPU"
        )
    print(f"{label}: {ratio([pair]):.3f}", flush=True)
    return pair


def in_turn(turn: int) -> tuple[str, ...]:
    """Who comes first changes."""
    return NAMES if turn % 2 else NAMES[::-1]


async def one_by_one(server: Server) -> list[float]:
    """Seconds to the first token, of requests one after another."""
    async with server.session() as session:
        return [await ask(session, stream=True) for _ in range(ONE_BY_ONE)]


async def together(servers: dict[str, Server], pair: Pair, slices: int) -> None:
    """Always as many requests for each, of which one runs while the other is stopped."""
    tokens, over = Counter[str](), False

    async def client(name: str, session: aiohttp.ClientSession) -> None:
        while not over:
            await ask(session, stream=False)
            tokens[name] += TOKENS

    async with AsyncExitStack() as stack:
        clients = []
        for name, server in servers.items():
            session = await stack.enter_async_context(server.session())
            clients += [asyncio.create_task(client(name, session)) for _ in range(AT_A_TIME)]
        for turn in range(WARM_UP + slices):
            if turn == WARM_UP:
                tokens.clear()
                before = {name: cpu_time(server) for name, server in servers.items()}
            for name in in_turn(turn):
                with its_turn(servers[name]):
                    begin = time.perf_counter()
                    await asyncio.sleep(SLICE_S)
                if turn >= WARM_UP:
                    pair[name].seconds += time.perf_counter() - begin
        over = True
        for name, server in servers.items():
            pair[name].tokens, pair[name].cpu_s = tokens[name], cpu_time(server) - before[name]
            resume(server)
        await asyncio.gather(*clients)


def report(pairs: list[Pair]) -> list[Row]:
    bare, ours = (total(pairs, name) for name in NAMES)
    bare_ms, ours_ms = (1000 * statistics.median(each.ttft_s) for each in (bare, ours))
    rng = random.Random(0)
    drawn = sorted(ratio(rng.choices(pairs, k=len(pairs))) for _ in range(2000))
    kind, cpu = "tokens/s, 16 at a time", "CPU of the API process, ms a request"
    return [
        Row("TTFT p50, ms | bare vLLM", bare_ms, "ms"),
        Row("TTFT p50, ms | ours", ours_ms, "ms", must=1.03 * bare_ms + 1),
        Row("TTFT p50, ms | difference", ours_ms - bare_ms, "ms", must=0.03 * bare_ms + 1),
        Row(f"{kind} | bare vLLM", bare.tokens_per_s, "tokens/s", better="higher"),
        Row(f"{kind} | ours", ours.tokens_per_s, "tokens/s", better="higher"),
        Row(f"{kind} | ours / bare", ratio(pairs), "x", must=0.97, better="higher"),
        Row(f"{kind} | 95 %, from", drawn[len(drawn) // 40], "x", better="higher"),
        Row(f"{kind} | to", drawn[-len(drawn) // 40], "x", better="higher"),
        Row(f"{cpu} | bare vLLM", bare.cpu_ms, "ms"),
        Row(f"{cpu} | ours", ours.cpu_ms, "ms"),
        Row(f"{cpu} | difference", ours.cpu_ms - bare.cpu_ms, "ms"),
    ]


def total(pairs: list[Pair], name: str) -> Figures:
    return sum((pair[name] for pair in pairs), Figures())


def ratio(pairs: list[Pair]) -> float:
    """Of ours to bare, in tokens a second."""
    return total(pairs, "ours").tokens_per_s / total(pairs, "bare").tokens_per_s


def cpu_time(server: Server) -> float:
    """Seconds that the API process has computed."""
    times = psutil.Process(server.process.pid).cpu_times()
    return float(times.user + times.system)


def pause(server: Server) -> None:
    for process in (server.engine, server.process):
        process.send_signal(signal.SIGSTOP)


def resume(server: Server) -> None:
    for process in (server.engine, server.process):
        process.send_signal(signal.SIGCONT)


@contextmanager
def its_turn(server: Server) -> Iterator[None]:
    resume(server)
    try:
        yield
    finally:
        pause(server)


async def ask(session: aiohttp.ClientSession, stream: bool) -> float:
    """Seconds to the first token, or to the whole answer."""
    tokens = FIRST if stream else TOKENS
    body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    begin = time.perf_counter()
    async with session.post("/v1/completions", json=body) as answer:
        answer.raise_for_status()
        await answer.content.readany()
        seconds = time.perf_counter() - begin
        await answer.read()
    return seconds


async def bare(options: list[str]) -> None:
    """vLLM's own API server around the engine that ours would start."""
    from pydantic_settings import CliApp
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.v1.engine.async_llm import AsyncLLM

    from server.engine.client import arguments, configuration
    from server.settings import Settings

    settings = CliApp.run(Settings, ["--model", str(BASE), "--masks", str(MASKS), *options])
    args = arguments(settings, BASE)
    address, sock = setup_server(args, reuse_port=False)
    llm = AsyncLLM.from_vllm_config(configuration(args))
    try:
        await (await build_and_serve(llm, address, sock, args))
    finally:
        llm.shutdown()


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        uvloop.run(bare(sys.argv[2:]))
    else:
        main()
