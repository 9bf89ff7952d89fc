"""How long swaps take in a server under load, by source, beside what the kernel alone needs for them.

    python benchmarks/swap.py            # a minute; writes benchmarks/swap.json
    python benchmarks/swap.py --quick    # ten seconds, only printed

24 masks, 8 slots, and room for 12 in host memory: 32 clients ask for one mask after another, so that masks
come from disk to host memory (*disk*, read beside the steps) and from there into a slot (*host*, between two
steps) all the time. Seconds are those of the server's metric `maskllm_swap_seconds`. What the kernel needs is
`maskllm bench swap` of each of the model's layers, measured when the server has gone, on as many threads as
the engine had; it includes no step that has just used the caches.

Then one stream runs, first alone, then while masks that nobody asks for are loaded and evicted all the time:
what that adds to the time between two of its tokens must be less than a swap.
"""

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from report import Row, write
from serving import BASE, Server, Swaps, mixed_mask, serving

from maskllm.capacity import engine_threads
from maskllm.evaluate import speed

MASKS, SLOTS, PACKED, CLIENTS, TOKENS = 24, 8, 12, 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--quick", action="store_true", help="ten seconds, only printed")
    parser.add_argument("options", nargs="*", help="options of maskllm serve, after --")
    args = parser.parse_args()
    seconds = 10 if args.quick else args.seconds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "masks"
        for number in range(MASKS):
            mixed_mask(folder / f"m{number}.safetensors", number)
        options = ["--slots", SLOTS, "--packed", PACKED, *args.options]
        with serving(folder, Path(temporary), *options) as server:
            asyncio.run(load(server, 3))
            before, begin = server.swaps(), time.monotonic()
            asyncio.run(load(server, seconds))
            took = time.monotonic() - begin
            swaps = {source: each.since(before.get(source)) for source, each in server.swaps().items()}
            turns = [
                asyncio.run(stream(server, loading)) for loading in (False, True) * (1 if args.quick else 5)
            ]
    rows = figures(swaps, took, *kernel()) + list(stalls(turns[::2], turns[1::2], swaps["host"]))
    note = f"{MASKS} masks, {SLOTS} slots, {PACKED} in host memory, {CLIENTS} clients, {seconds:g} s"
    write("swap", "python benchmarks/swap.py", rows, note, of="source", keep=not args.quick)


async def load(server: Server, seconds: float) -> None:
    """Clients that ask as fast as they can, each request for the next mask."""
    end, turn = time.monotonic() + seconds, itertools.count()
    async with server.session() as session:

        async def client() -> None:
            while time.monotonic() < end:
                mask = f"m{next(turn) % MASKS}"
                body = {"mask": mask, "prompt": "The Secretary shall", "max_tokens": TOKENS}
                async with session.post("/v1/completions", json=body) as answer:
                    await answer.read()
                    if answer.status not in (200, 503):  # 503: every mask in host memory is in use just now
                        answer.raise_for_status()

        await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def stream(server: Server, loading: bool) -> tuple[list[float], float]:
    """Seconds between the tokens of a stream, and masks read from disk a second meanwhile."""
    body = {
        "mask": "m0",
        "prompt": "The Secretary shall",
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
    }
    at, before = list[float](), server.swaps().get("disk")
    async with server.session() as session:

        async def load() -> None:
            for turn in itertools.count():
                async with session.post(f"/v1/masks/m{1 + turn % (MASKS - 1)}/load") as answer:
                    answer.raise_for_status()

        async with session.post("/v1/completions", json=body) as answer:
            answer.raise_for_status()
            beside = asyncio.create_task(load()) if loading else None
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    at.append(time.perf_counter())
            if beside:
                beside.cancel()
                await asyncio.gather(beside, return_exceptions=True)
    read = server.swaps()["disk"].since(before).count
    return [b - a for a, b in itertools.pairwise(at)], read / (at[-1] - at[0])


def stalls(
    alone: list[tuple[list[float], float]], beside: list[tuple[list[float], float]], swaps: Swaps
) -> Iterator[Row]:
    p99 = {}
    for name, turns in (("alone", alone), ("while masks are loaded", beside)):
        gaps = sorted(1000 * gap for each, _ in turns for gap in each)
        p99[name] = gaps[int(0.99 * len(gaps))]
        yield Row(f"between a stream's tokens, {name} | p50, ms", gaps[len(gaps) // 2], "ms")
        yield Row(f"between a stream's tokens, {name} | p99, ms", p99[name], "ms")
        yield Row(f"between a stream's tokens, {name} | mean, ms", sum(gaps) / len(gaps), "ms")
    rate = sum(each for _, each in beside) / len(beside)
    yield Row("between a stream's tokens, while masks are loaded | swaps/s", rate, "loads/s", better="higher")
    added = p99["while masks are loaded"] - p99["alone"]
    yield Row("p99 between tokens that loads add | p99, ms", added, "ms", must=1000 * swaps.quantile(0.99))


def kernel() -> tuple[float, int]:
    """Seconds that the kernel needs to write a slot of every layer, and how many weights they have."""
    torch.set_num_threads(engine_threads())
    config = json.loads((BASE / "config.json").read_text())
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    block = [
        ((heads + 2 * kv_heads) * head, hidden),
        (hidden, heads * head),
        (2 * ffn, hidden),
        (hidden, ffn),
    ]
    seconds, weights = 0.0, 0
    for rows, columns in block:
        layer = speed.Layer((rows, columns))
        seconds += speed.interleave(layer.swap(), 20, layer.calls)["swap bf16"].ms / 1000
        weights += rows * columns
    return seconds * config["num_hidden_layers"], weights * config["num_hidden_layers"]


def figures(swaps: dict[str, Swaps], took: float, kernel_s: float, weights: int) -> list[Row]:
    rows = []
    for source, what in (("disk", "disk to host memory"), ("host", "host memory to slot")):
        each = swaps[source]
        p50, p99 = each.quantile(0.5), each.quantile(0.99)
        rows += [
            Row(f"{what} | p50, ms", 1000 * p50, "ms"),
            Row(f"{what} | p99, ms", 1000 * p99, "ms"),
            Row(f"{what} | mean, ms", 1000 * each.seconds / each.count, "ms"),
            Row(f"{what} | ns a weight", 1e9 * p50 / weights, "ns"),
            Row(f"{what} | swaps/s", each.count / took, "swaps/s", better="higher"),
            Row(f"{what} | share of time, %", 100 * each.seconds / took, "%"),
        ]
    host = swaps["host"].quantile(0.5)
    return [
        *rows,
        Row("the kernel alone | p50, ms", 1000 * kernel_s, "ms"),
        Row("the kernel alone | ns a weight", 1e9 * kernel_s / weights, "ns"),
        Row("host memory to slot | times the kernel", host / kernel_s, "x"),
    ]


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
