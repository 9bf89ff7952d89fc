"""What our HTTP layer costs beside bare vLLM's own API server: first tokens and throughput.

    python benchmarks/overhead.py            # writes benchmarks/overhead.json
    python benchmarks/overhead.py --quick    # few rounds, only printed

Two servers of the demo base, both up, and stopped (SIGSTOP) unless it is their turn. *Ours* is
`maskllm serve` as it comes; *bare* is vLLM's `build_app`, `init_app_state` and `serve_http` around an engine
with the same configuration: our quantization and mask manager in the worker, our scheduler in the same
process, the same dtype, slots, KV cache and compilation. No request names a mask, so that engines do the same
and only what is around them differs: our routes, key, limits, strict bodies, request log and metrics. Neither
has uvicorn's access log.

A round is one turn of each: requests one after another, streamed, for the time to the first token, then
16 at a time for throughput. The order changes from round to round, and turns are short, so that what else
happens on the machine meets both. Figures are medians over all requests, and over the rounds' ratios; the
API process's CPU time is that of all requests of the second kind.
"""

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
import psutil
import uvloop
from report import Row, table, write
from serving import BASE, MASKS, Server, running, serving

ROUNDS, ONE_BY_ONE, TOGETHER, AT_A_TIME = 60, 15, 64, 16
TOKENS = 32
PROMPT = "The Secretary of the Treasury shall"
NAMES = ("bare", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="two short rounds, only printed")
    parser.add_argument("options", nargs="*", help="options of maskllm serve for both, after --")
    args = parser.parse_args()
    rounds, one_by_one, together = (2, 10, 32) if args.quick else (args.rounds, ONE_BY_ONE, TOGETHER)
    ttft_s: dict[str, list[float]] = {name: [] for name in NAMES}
    per_s: dict[str, list[float]] = {name: [] for name in NAMES}
    cpu_s: dict[str, list[float]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ours = stack.enter_context(serving(MASKS, Path(folder), *args.options))
        pause(ours)
        bare = [sys.executable, __file__, "bare", *args.options]
        servers = {"bare": stack.enter_context(running(bare, Path(folder) / "bare.log")), "ours": ours}
        pause(servers["bare"])
        stack.callback(lambda: [resume(server) for server in servers.values()])
        for turn in range(rounds + 1):
            for name in NAMES if turn % 2 else reversed(NAMES):
                with its_turn(servers[name]):
                    first = asyncio.run(first_tokens(servers[name], one_by_one))
                    before = cpu_time(servers[name])
                    speed = asyncio.run(throughput(servers[name], together))
                    cpu = cpu_time(servers[name]) - before
                if turn:  # the first is a warm-up
                    ttft_s[name] += first
                    per_s[name].append(speed)
                    cpu_s[name].append(cpu / together)
                    ms = 1000 * statistics.median(first)
                    print(f"round {turn}, {name}: {ms:.2f} ms, {speed:.1f} tokens/s", flush=True)
    rows = figures(ttft_s, per_s, cpu_s)
    note = (
        f"{TOKENS} tokens of the dense base, {rounds} rounds of {one_by_one} requests one by one and "
        f"{together} of which {AT_A_TIME} at a time"
    )
    if args.quick:
        about = {"command": "--quick", "date": "", "machine": "", "note": note, "of": "figure"}
        print(table({**about, "rows": [vars(row) for row in rows]}))
    else:
        write("overhead", "python benchmarks/overhead.py", rows, note, of="figure")


def figures(
    ttft_s: dict[str, list[float]], per_s: dict[str, list[float]], cpu_s: dict[str, list[float]]
) -> list[Row]:
    bare, ours = (1000 * statistics.median(ttft_s[name]) for name in NAMES)
    bare_cpu, ours_cpu = (1000 * statistics.mean(cpu_s[name]) for name in NAMES)
    ratios = [ours / bare for bare, ours in zip(per_s["bare"], per_s["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [
        Row("TTFT p50, ms | bare vLLM", bare, "ms"),
        Row("TTFT p50, ms | ours", ours, "ms", must=1.03 * bare + 1),
        Row("TTFT p50, ms | difference", ours - bare, "ms", must=0.03 * bare + 1),
        Row("tokens/s, 16 at a time | bare vLLM", statistics.median(per_s["bare"]), "tokens/s"),
        Row("tokens/s, 16 at a time | ours", statistics.median(per_s["ours"]), "tokens/s", better="higher"),
        Row("tokens/s, 16 at a time | ours / bare", middle, "x", must=0.97, better="higher"),
        Row("tokens/s, 16 at a time | lower quartile", low, "x", better="higher"),
        Row("tokens/s, 16 at a time | upper quartile", high, "x", better="higher"),
        Row("CPU of the API process, ms a request | bare vLLM", bare_cpu, "ms"),
        Row("CPU of the API process, ms a request | ours", ours_cpu, "ms"),
        Row("CPU of the API process, ms a request | difference", ours_cpu - bare_cpu, "ms"),
    ]


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


async def first_tokens(server: Server, count: int) -> list[float]:
    """Seconds to the first token of each request, one after another."""
    seconds = []
    async with server.session() as session:
        for _ in range(count):
            seconds.append(await ask(session, stream=True))
    return seconds


async def throughput(server: Server, count: int) -> float:
    """Tokens a second of so many requests, AT_A_TIME of them in flight."""
    async with server.session() as session:
        places, begin = asyncio.Semaphore(AT_A_TIME), time.perf_counter()

        async def one() -> None:
            async with places:
                await ask(session, stream=False)

        await asyncio.gather(*(one() for _ in range(count)))
        return count * TOKENS / (time.perf_counter() - begin)


async def ask(session: aiohttp.ClientSession, stream: bool) -> float:
    """Seconds to the first token, or to the whole answer."""
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": stream}
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
