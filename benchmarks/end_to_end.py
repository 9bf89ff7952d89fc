"""How fast a masked model decodes through the server's engine, against plain vLLM of the same version.

    python benchmarks/end_to_end.py                  # four contenders; writes benchmarks/end-to-end.json,
                                                     # end-to-end-fp32.json without bf16 instructions
    python benchmarks/end_to_end.py --quick          # two short rounds, only printed
    python benchmarks/end_to_end.py --threads 1 2    # each contender's at its better thread count

A random Llama of 320 M parameters and 8 random 2:4 masks. Each contender is an engine in processes of its
own; all stay alive, stopped but for the one that is measured, and take turns round after round. A decode step
is the median gap between two answers while the whole batch decodes; the first token is that of a prompt of
512 never seen before. Figures are medians over the rounds, with a thread a core;
`least` and `most` set the quartiles of the two sides against each other. Sparsity's own part is *x no mask*:
the same engine without a mask, whose kernels, processes and head are the same.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import Row, write
from serving import free_port
from transformers import LlamaConfig, LlamaForCausalLM

from maskllm.core import maskset
from maskllm.core.base import read_base
from maskllm.core.layers import maskable
from maskllm.core.maskset import MaskSet
from maskllm.core.patterns import pack
from maskllm.evaluate.speed import read_gb_s
from maskllm.kernels.masked_linear import bf16_on_cpu

VOCABULARY, BLOCKS, HIDDEN, FFN = 32_000, 24, 1024, 3072
MASKS, PROMPT, FIRST_TOKEN = 8, 32, 512
KV_BYTES = 512 << 20


@dataclass(frozen=True)
class Contender:
    """An engine: its dtype, and what it reads of each masked weight in a step."""

    dtype: str
    bytes_a_weight: float
    mask_dtype: str = ""
    """Of ours; plain vLLM has none."""
    head_dtype: str = "auto"

    @property
    def ours(self) -> bool:
        return bool(self.mask_dtype)


OURS = "bfloat16" if bf16_on_cpu() else "float32"
"""What the server computes in here."""
CONTENDERS = {
    "plain bf16": Contender("bfloat16", 2),
    "plain fp32": Contender("float32", 4),
    "bf16 slots": Contender(OURS, 9 / 8, "bfloat16"),
    "int8 slots and head": Contender(OURS, 5 / 8, "int8", "int8"),
    "bf16 slots, int8 head": Contender(OURS, 9 / 8, "bfloat16", "int8"),
    "int8 slots": Contender(OURS, 5 / 8, "int8"),
}


@dataclass(frozen=True)
class Case:
    """So many requests at once, under so many masks or none; must and aim are times plain vLLM's speed."""

    batch: int
    must: float
    aim: float
    masks: int = 1
    first_token: bool = False


USUAL = list(CONTENDERS)[:4]
"""Those that are published: more do not fit into 24 GB at a time."""


CASES = {
    "batch 1": Case(1, 2.0, 3.0),
    "batch 4": Case(4, 2.2, 3.0),
    "batch 16": Case(16, 1.5, 2.0),
    "first token of 512": Case(1, 1.0, 1.3, first_token=True),
}
READ = "read", "GB/s"
MIXED, MIXED_CASE = "batch 16, 8 masks", Case(16, 0.5, 0.7, masks=MASKS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count()])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=24, help="decode steps of one measurement")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=USUAL)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 4 steps, written nowhere")
    args = parser.parse_args()
    # A stopped engine would outlive a benchmark that was ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.quick:
        args.rounds, args.steps = 2, 4
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        weights = make(folder)
        measured = [compare(folder, args, threads) for threads in args.threads]
        gb_s = max(median(each.pop(READ)) for each in measured)
    rows = list(table(measured, args.only, weights, gb_s))
    if args.quick or args.only != USUAL:
        print("\n".join(f"{row.name}: {row.value:.4g}" for row in rows))
    else:
        note = (
            f"Random Llama of {weights / 1e6:.0f} M masked weights, medians of {args.rounds} rounds, threads "
            f"{args.threads}. Times: "
            "against the better plain vLLM, 8 masks against one. Ceiling: the weights of a step read once "
            f"at {gb_s:.1f} GB/s, the median of a plain read before each round"
        )
        topic = "end-to-end" if OURS == "bfloat16" else "end-to-end-fp32"
        write(topic, "python benchmarks/end_to_end.py", rows, note, of="a step")


def table(
    measured: list[dict[tuple[str, str], list[float]]], names: list[str], weights: int, gb_s: float
) -> Iterator[Row]:
    """The rows of the figures, from the milliseconds by contender and case of each thread count."""
    best = {key: min((each[key] for each in measured), key=median) for key in measured[0]}
    plain = [name for name in names if not CONTENDERS[name].ours]
    ours = [name for name in names if CONTENDERS[name].ours]
    for case, wanted in {**CASES, MIXED: MIXED_CASE}.items():
        for name in names:
            if (name, case) in best:
                yield Row(f"{case} | {name}, ms", round(median(best[name, case]), 2), "ms")
        for name in ours:
            rivals = [best[name, "batch 16"]] if case == MIXED else [best[each, case] for each in plain]
            if rivals:
                rival = min(rivals, key=median)
                times, least, most = ratio(rival, best[name, case])
                yield Row(f"{case} | {name}, times", times, "x", wanted.must, wanted.aim, better="higher")
                yield Row(f"{case} | {name}, least", least, "x")
                yield Row(f"{case} | {name}, most", most, "x")
            if (dense := best.get((name, f"{case}, no mask"))) is not None:
                yield Row(
                    f"{case} | {name}, x no mask", ratio(dense, best[name, case])[0], "x", better="higher"
                )
    for name in names:
        of = CONTENDERS[name]
        head = 1 if of.head_dtype == "int8" else 2 if of.ours or of.dtype == "bfloat16" else 4
        read = weights * of.bytes_a_weight + head * VOCABULARY * HIDDEN
        yield Row(f"ceiling of a decode step | {name}, ms", round(read / gb_s / 1e6, 2), "ms")


def ratio(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """How many times faster, by medians; and with the quartiles set against and for us."""
    low, _, high = statistics.quantiles(theirs, method="inclusive")
    fast, _, slow = statistics.quantiles(ours, method="inclusive")
    middle = median(theirs) / median(ours)
    return round(middle, 3), round(low / slow, 3), round(high / fast, 3)


def make(folder: Path) -> int:
    """A random base and its masks in a folder; how many weights a mask decides on."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 256,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base")
    shapes = {name: tuple(layer.weight.shape) for name, layer in maskable(model).items()}
    base = read_base(folder / "base")
    for number in range(MASKS):
        codes = {name: torch.randint(6, (rows, columns // 4)) for name, (rows, columns) in shapes.items()}
        packed = {name: pack(each) for name, each in codes.items()}
        mask = MaskSet(2, 4, base.fingerprint, shapes, packed)
        maskset.save(mask, folder / "masks" / f"m{number}.safetensors")
    return mask.weights


def compare(folder: Path, args: argparse.Namespace, threads: int) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of every round, by contender and case: round after round, one contender at a time."""
    found: dict[tuple[str, str], list[float]] = {}
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        engines = {name: stack.enter_context(running(name, folder, threads)) for name in args.only}
        # Each of ours without a mask, too.
        bare = {f"{case}, no mask": replace(wanted, masks=0) for case, wanted in CASES.items()}
        for turn in range(args.rounds + 1):
            found.setdefault(READ, []).append(read_gb_s())
            for case, wanted in {**CASES, MIXED: MIXED_CASE, **bare}.items():
                for name, engine in engines.items():
                    if wanted.masks != 1 and not CONTENDERS[name].ours:
                        continue
                    ms = engine.measure(wanted, args.steps)
                    if turn:  # the first is a warm-up
                        found.setdefault((name, case), []).append(ms)
                        print(f"{threads} threads, round {turn}, {case}, {name}: {ms:.2f} ms", flush=True)
    return found


@dataclass(frozen=True)
class Running:
    """A contender's process, stopped unless it is measured."""

    process: subprocess.Popen[str]
    answers: Iterator[str]

    def measure(self, case: Case, steps: int) -> float:
        """Milliseconds of a step, or to the first token."""
        question = {"batch": case.batch, "masks": case.masks, "steps": 0 if case.first_token else steps}
        os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer: float = json.loads(next(self.answers))
        os.killpg(self.process.pid, signal.SIGSTOP)
        return answer


@contextmanager
def running(name: str, folder: Path, threads: int) -> Iterator[Running]:
    """Start a contender in its own group of processes; what it logs goes to a file beside the model."""
    ours, theirs = os.pipe()
    # vLLM would leave a core free; here each contender has as many threads as it is asked to have.
    settings = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = folder / f"{name}.log"
    with log.open("w") as out, os.fdopen(ours) as answers:
        process = subprocess.Popen(
            [sys.executable, __file__, "contend", name, str(folder), str(theirs)],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[theirs],
            start_new_session=True,
        )
        os.close(theirs)
        try:
            if not answers.readline():
                sys.exit(f"{name} did not start:\n{log.read_text()[-4000:]}")
            os.killpg(process.pid, signal.SIGSTOP)
            yield Running(process, iter(answers))
        finally:
            os.killpg(process.pid, signal.SIGCONT)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


async def contend(name: str, folder: Path, answers: int) -> None:
    """The contender's own process: answer each question, a line of JSON, by milliseconds."""
    starting = ours if CONTENDERS[name].ours else plain
    with os.fdopen(answers, "w") as out:
        async with starting(CONTENDERS[name], folder) as (llm, masks):
            print("ready", file=out, flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                question = json.loads(line)
                count = question["masks"]
                chosen = [masks[row % count] if count else None for row in range(question["batch"])]
                steps = question["steps"]
                ms = await (decode(llm, chosen, steps) if steps else first(llm, chosen))
                print(json.dumps(ms), file=out, flush=True)


@asynccontextmanager
async def plain(contender: Contender, folder: Path) -> AsyncIterator[tuple[Any, list[Any]]]:
    """vLLM as it comes."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(
        model=str(folder / "base"),
        dtype=contender.dtype,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=KV_BYTES,
    )
    llm = AsyncLLM.from_engine_args(args)
    try:
        yield llm, [None]
    finally:
        llm.shutdown()


@asynccontextmanager
async def ours(contender: Contender, folder: Path) -> AsyncIterator[tuple[Any, list[Any]]]:
    """The server's engine with every mask loaded."""
    from server.engine.client import start
    from server.masks import Masks
    from server.metrics import Metrics
    from server.settings import Settings

    options = ["--dtype", contender.dtype, "--kv-cache-memory-bytes", str(KV_BYTES), "--skip-tokenizer-init"]
    settings = Settings(
        model=str(folder / "base"),
        masks=folder / "masks",
        host="127.0.0.1",
        port=free_port(),
        slots=MASKS,
        mask_dtype=contender.mask_dtype,
        head_dtype=contender.head_dtype,
        engine=options,
    )
    metrics = Metrics()
    with start(settings, folder / "base", metrics) as (engine, _):
        base = read_base(folder / "base")
        place = engine.capacity.packed
        masks = Masks(settings.masks, settings.name, base, engine, MASKS, MASKS * place, place, metrics)
        masks.scan()
        for mask in masks.known.values():
            assert await masks.ready(mask)
        await engine.llm.get_supported_tasks()  # as the API has asked before the first request
        yield engine.llm, list(engine.adapters.values())


async def decode(llm: Any, masks: list[Any], steps: int) -> float:
    """Milliseconds between two tokens of a request while all of them decode, the median."""
    times = await asyncio.gather(*(ask(llm, mask, PROMPT, steps + len(masks)) for mask in masks))
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    last = max(times, key=lambda each: each[0])
    seen = [at for at in last if begin <= at <= end]
    return 1000 * median(b - a for a, b in pairwise(seen))


async def first(llm: Any, masks: list[Any]) -> float:
    """Milliseconds to the first token of a long prompt."""
    begin = time.perf_counter()
    return 1000 * ((await ask(llm, masks[0], FIRST_TOKEN, 1))[0] - begin)


async def ask(llm: Any, mask: Any, length: int, tokens: int) -> list[float]:
    """When each answer to a random prompt came."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    prompt = tokens_input(torch.randint(VOCABULARY, (length,)).tolist())
    outputs = llm.generate(prompt, parameters, os.urandom(8).hex(), lora_request=mask)
    return [time.perf_counter() async for _ in outputs]


if __name__ == "__main__":
    if sys.argv[1:2] == ["contend"]:
        asyncio.run(contend(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
    else:
        main()
