"""What load the demo server bears, and that locust says so correctly: make load

    python benchmarks/load.py            # a quarter of an hour; writes benchmarks/load.json and capacity.json
    python benchmarks/load.py --quick    # two minutes, only printed

First locust itself is measured: `loadtests/stub.py` answers on a schedule, so what locust reports must be
that schedule, and it must be able to send far more than it is asked for. Then `vllm bench serve` and locust
take turns at the demo server with the same rate, lengths and masks, and must see the same times.

Then the demo server is swept (loadtests/sweep.py): 8 masks on 8 slots, wanted by Zipf's law; the same while a
mask is published every two seconds; 64 masks by Zipf's law; and 64 masks in turn, the worst there is. Rates
rise until less than half of the answers keep the SLO. The report of the first is in runs/load, its picture is
docs/load.png. Last come Azure's real requests, where their files are in --traces, at four times their speed
and with lengths scaled to the demo.

The server has one core, the last that the command may use, and locust has the others.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from report import Row, write
from serving import BASE, BENCH, ROOT, Server, mixed_mask, running, serving

sys.path.append(str(ROOT / "loadtests"))
import loadreport
from loadreport import Point, Slo
from sweep import sweep

MASKS, SLOTS = 64, 8
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 32
RATES = (4, 16, 24, 32, 48, 64, 96)
TURNS, TURN_RATE, TURN_S = 5, 8, 30
"""Of vllm bench serve and locust: the requests a second of both, and the seconds of each turn. What a request
takes goes with how many there are, so turns must be long enough for 8 a second at random to be about 8."""
STUB_TTFT_MS, STUB_TPOT_MS = 50, 20
WARMUP_S = 3
SLO = Slo(ttft_s=0.5, tpot_s=0.05)
LENGTHS = ["--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS)]
SWEEPS = {
    "8 masks": (["Zipf"], SLOTS),
    "8 masks, one published": (["Zipf", "Swapper"], SLOTS),
    "64 masks": (["Zipf"], MASKS),
    "64 masks in turn": (["AllDistinct"], MASKS),
}
"""Users, and how many of the masks they ask for."""
TRACES = {
    "Azure's conversations, times their speed": "AzureLLMInferenceTrace_conv.csv",
    "Azure's code, times its speed": "AzureLLMInferenceTrace_code.csv",
}
TRACE_SPEED, TRACE_S = 4, 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=15, help="of each load")
    parser.add_argument("--quick", action="store_true", help="two rates of ten seconds, only printed")
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared/data/traces", help="folder")
    args = parser.parse_args()
    seconds, rates, turns, turn_s = (
        (10, RATES[:2], 1, 10) if args.quick else (args.seconds, RATES, TURNS, TURN_S)
    )
    *mine, last = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, mine or [last])
    before = ("taskset", "-c", str(last))
    os.environ["LOAD_KEY"] = os.environ["OPENAI_API_KEY"] = "boss"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        masks = [f"m{number}" for number in range(MASKS)]
        for number, mask in enumerate(masks):
            mixed_mask(folder / "masks" / f"{mask}.safetensors", number)
        agreement = [*against_stub(folder, before, max(rates), seconds)]
        with serving(folder / "masks", folder, "--slots", SLOTS, before=before) as server:
            warm_up(server, masks, folder)
            agreement += against_vllm(server, masks[:SLOTS], folder, turns, turn_s)
            points = {
                name: swept(server, users, masks[:wanted], rates, seconds, folder / name)
                for name, (users, wanted) in SWEEPS.items()
            }
            if not args.quick:
                points |= replayed(server, masks[:SLOTS], args.traces, folder)
        if not args.quick:
            keep(folder / next(iter(SWEEPS)))
    capacity = [row for name, each in points.items() for point in each for row in figures(name, point)]
    others = ", ".join(map(str, mine)) or "the same"
    cores = f"the server on core {last}, locust and vllm bench serve on {others}"
    lengths = f"{PROMPT_TOKENS} tokens asked, {OUTPUT_TOKENS} answered"
    notes = {
        "load": f"{lengths}, {TURN_RATE} requests/s, Poisson, {turns} turns of {turn_s} s; {cores}",
        "capacity": f"{lengths}, Poisson, {seconds:g} s of each; SLO: TTFT {1000 * SLO.ttft_s:g} ms, TPOT "
        f"{1000 * SLO.tpot_s:g} ms; {SLOTS} slots; Azure's requests: {TRACE_S} s, times and lengths theirs; "
        f"{cores}",
    }
    for topic, rows, of in (("load", agreement, "figure"), ("capacity", capacity, "load, requests/s")):
        write(topic, "python benchmarks/load.py", rows, notes[topic], of, keep=not args.quick)


def against_stub(folder: Path, before: tuple[str, ...], rate: float, seconds: float) -> Iterator[Row]:
    """What locust makes of a known schedule at the highest rate of the sweeps, and the most it can send."""

    def measure(ttft_ms: float, tpot_ms: float, users: list[str], *options: str) -> Point:
        command = [*before, sys.executable, ROOT / "loadtests/stub.py"]
        command += ["--ttft-ms", ttft_ms, "--tpot-ms", tpot_ms]
        with running(command, folder / "stub.log") as stub:
            sweep(stub.url, users, [rate], seconds, folder / "stub", [*LENGTHS, *options])
        (point,) = loadreport.read(folder / "stub", WARMUP_S)
        return point

    point = measure(STUB_TTFT_MS, STUB_TPOT_MS, ["Uniform"])
    found = loadreport.figures(point, SLO)
    yield from agree("the schedule's TTFT p50, ms", found["TTFT p50, ms"], STUB_TTFT_MS)
    yield from agree("the schedule's TPOT p50, ms", found["TPOT p50, ms"], STUB_TPOT_MS)
    yield Row(f"lag p99 at {rate} requests/s, ms | locust", found["lag p99, ms"], "ms", must=10)
    point = measure(0, 0, ["Uniform"] * 32, "--arrivals", "closed")
    most = loadreport.figures(point, SLO)["answered, requests/s"]
    yield Row("most requests/s, of a server that takes no time | locust", most, "requests/s", better="higher")
    yield Row("most requests/s, times the highest rate here | locust", most / rate, "x", 3, better="higher")


def warm_up(server: Server, masks: list[str], folder: Path) -> None:
    """Every mask has been read once, and every size of batch has been met."""
    sweep(server.url, ["AllDistinct"], [16], 10, folder / "warm", [*LENGTHS, "--masks", ",".join(masks)])


def against_vllm(server: Server, masks: list[str], folder: Path, turns: int, seconds: float) -> Iterator[Row]:
    """Medians of each, and of these the median over turns."""
    seen: dict[str, list[dict[str, float]]] = {"locust": [], "vllm": []}
    for turn in range(turns):
        out = folder / f"turn-{turn}"
        options = [*LENGTHS, "--masks", ",".join(masks), "--seed", str(turn)]
        sweep(server.url, ["Uniform"], [TURN_RATE], seconds, out, options)
        (point,) = loadreport.read(out, WARMUP_S)
        found = loadreport.figures(point, SLO)
        seen["locust"].append({name: found[f"{name} p50, ms"] for name in ("TTFT", "TPOT")})
        seen["vllm"].append(vllm_bench(server, masks, out, seconds, turn))
    for name in ("TTFT", "TPOT"):
        ours, theirs = (statistics.median(each[name] for each in seen[who]) for who in seen)
        yield from agree(f"vllm bench serve's {name} p50, ms", ours, theirs)


def vllm_bench(server: Server, masks: list[str], out: Path, seconds: float, seed: int) -> dict[str, float]:
    options = {
        "--base-url": server.url, "--model": "base", "--tokenizer": BASE, "--dataset-name": "random",
        "--random-input-len": PROMPT_TOKENS, "--random-output-len": OUTPUT_TOKENS, "--temperature": 0,
        "--num-prompts": int(TURN_RATE * seconds), "--request-rate": TURN_RATE, "--seed": seed,
        "--result-dir": out, "--result-filename": "vllm.json",
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    words += ["--lora-modules", *masks, "--ignore-eos", "--save-result", "--disable-tqdm"]
    command = [sys.executable, "-c", BENCH, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    result = json.loads((out / "vllm.json").read_text())
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} requests of vllm bench serve failed")
    return {"TTFT": result["median_ttft_ms"], "TPOT": result["median_tpot_ms"]}


def agree(name: str, ours: float, reference: float) -> Iterator[Row]:
    yield Row(f"{name} | locust", ours, "ms")
    yield Row(f"{name} | reference", reference, "ms")
    yield Row(f"{name} | apart, %", 100 * abs(ours - reference) / reference, "%", must=10)


def swept(
    server: Server, users: list[str], masks: list[str], rates: tuple[float, ...], seconds: float, out: Path
) -> list[Point]:
    """A run at each rate, up to the first at which less than half of the answers are good."""
    points: list[Point] = []
    options = [*LENGTHS, "--masks", ",".join(masks), "--swap-every", "2"]
    for rate in rates:
        sweep(server.url, users, [rate], seconds, out, options)
        points = loadreport.read(out, WARMUP_S)
        if points[-1].goodput(SLO) < 0.5:
            break
    return points


def replayed(server: Server, masks: list[str], traces: Path, folder: Path) -> dict[str, list[Point]]:
    """Azure's requests, of each file that is there."""
    found = {}
    for name, file in TRACES.items():
        if (traces / file).exists():
            options = ["--masks", ",".join(masks), "--arrivals", "trace", "--trace", str(traces / file)]
            sweep(server.url, ["Zipf"], [TRACE_SPEED], TRACE_S, folder / file, options)
            found[name] = loadreport.read(folder / file, WARMUP_S)
    return found


def keep(folder: Path) -> None:
    """Write the report of a sweep into runs/load, and its picture where the docs show it."""
    loadreport.write(folder, loadreport.read(folder, WARMUP_S), SLO, [])
    shutil.rmtree(ROOT / "runs/load", ignore_errors=True)
    shutil.copytree(folder, ROOT / "runs/load")
    shutil.copy(folder / "load.png", ROOT / "docs/load.png")


def figures(name: str, point: Point) -> Iterator[Row]:
    found = loadreport.figures(point, SLO)
    load = f"{name}, {float(point.about['rate']):g}"
    for figure in (
        "answered, requests/s",
        "tokens/s",
        "TTFT p50, ms",
        "TTFT p99, ms",
        "TPOT p50, ms",
        "TPOT p99, ms",
        "goodput, %",
    ):
        better = "lower" if "ms" in figure else "higher"
        yield Row(f"{load} | {figure}", found[figure], figure.rpartition(" ")[2], better=better)
    yield Row(f"{load} | fairness", found["fairness"], "", better="higher")
    yield Row(f"{load} | swaps/s", found["swaps into slots"] / point.about["seconds"], "swaps/s")


if __name__ == "__main__":
    main()
