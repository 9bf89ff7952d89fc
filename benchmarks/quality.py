"""How good learned masks are: every published figure of quality, from scratch.

    python benchmarks/quality.py --data ../shared/data

Learns every mask named below for each seed (`maskllm learn`, one thread each, --jobs at a time), measures
hard masks on held-out test text in float32, and writes benchmarks/quality.json. What is finished is kept in
--work, and an interrupted run goes on where it was: delete that folder to start from nothing. About
three hours on two cores with three seeds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from report import Row, write
from torch import Tensor

from maskllm.core import maskset
from maskllm.core.layers import maskable
from maskllm.data import load_tokens, sample, windows
from maskllm.evaluate.perplexity import masked, perplexity
from maskllm.models import Loaded, load_base
from maskllm.prune.oneshot import prune

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples/demo"))
from make_masks import DEMO, DOMAIN, DOMAINS, GENERAL, MIXED  # noqa: E402

LENGTH = 512
WINDOWS = 64
"""Of each domain's test text."""
STORIES = GENERAL | {"steps": 250, "lr": 3e-3, "length": 512}
SHORT = GENERAL | {"steps": 100, "lr": 3e-3}
"""For comparing recipes at the same tokens."""
PAPER = {
    "parameterisation": "categorical",
    "prior_strength": 3.0,
    "prior": "sparsegpt",
    "schedule": "linear",
    "tau": [4, 0.05],
    "distill": 0.0,
}
SCRATCH = DOMAIN | {"lr": 3e-3}
FULL, QUARTER = 100, 25
"""Steps of the legal mask learned from scratch, and of the one learned from the general mask."""


@dataclass(frozen=True)
class Learning:
    """One mask to learn."""

    base: Path
    data: list[Path]
    settings: dict[str, Any]
    after: str | None = None
    """Another mask here whose first seed's is the prior."""


def learnings(data: Path) -> dict[str, Learning]:
    """Every mask of a seed by name; a prior comes before what is learned from it."""
    texts = {domain: data / "domains" / domain / "train.txt" for domain in DOMAINS.values()}
    mixed, legal = [texts[domain] for domain in MIXED], [texts["legal-us"]]
    general = {
        "stories260K": Learning(data / "models/stories260K-hf", [texts["tinystories"]], STORIES),
        "general": Learning(DEMO, mixed, GENERAL),
        "short": Learning(DEMO, mixed, SHORT),
        "short, no distillation": Learning(DEMO, mixed, SHORT | {"distill": 0.0}),
        "short, paper": Learning(DEMO, mixed, SHORT | PAPER),
        "legal, scratch": Learning(DEMO, legal, SCRATCH | {"steps": FULL, "prior": GENERAL["prior"]}),
        "legal, transfer": Learning(DEMO, legal, SCRATCH | {"steps": QUARTER}, "general"),
    }
    domains = {name: Learning(DEMO, [texts[domain]], DOMAIN, "general") for name, domain in DOMAINS.items()}
    return general | domains


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and domains/")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/quality", help="what is finished is kept here"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="masks learned at the same time")
    parser.add_argument("--only", nargs="*", help="learn these masks and measure nothing")
    parser.add_argument("--measure", action="store_true", help="learn nothing, measure what --work holds")
    args = parser.parse_args()

    speed = learning_speed() if not args.only else None  # first, while the machine is quiet
    if not args.measure:
        learn_all(args.data, args.work, args.seeds, args.jobs, args.only)
    if speed is None:
        return
    rows = [*stories_rows(args), *demo_rows(args), speed]
    note = f"Hard masks on test text, windows of {LENGTH}, float32; the last column counts the seeds"
    write("quality", "make quality", rows, note, of="figure")


def learn_all(data: Path, work: Path, seeds: Iterable[int], jobs: int, only: list[str] | None) -> None:
    """Learn what is not there yet, seed by seed, in the order of `learnings`."""
    work.mkdir(parents=True, exist_ok=True)
    done: dict[Path, Future[None]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for seed in seeds:
            for name, learning in learnings(data).items():
                if only is None or name in only:
                    out = file(work, name, seed)
                    done[out] = pool.submit(learn, learning, seed, out, done)
    for future in done.values():
        future.result()


def learn(learning: Learning, seed: int, out: Path, done: dict[Path, Future[None]]) -> None:
    """One call of `maskllm learn`, which goes on from its checkpoint where there is one."""
    if out.exists():
        return
    settings = learning.settings
    if learning.after:
        prior = file(out.parent, learning.after, 0)
        if prior in done:
            done[prior].result()
        settings = settings | {"prior": prior}
    heldout = {text.with_name("valid.txt") for text in learning.data}
    options = settings | {
        "data": learning.data,
        "heldout": sorted(heldout),
        "seed": seed,
        "out": out,
    }
    command = [sys.executable, "-m", "maskllm.cli", "learn", str(learning.base)]
    for option, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        command += ["--" + option.replace("_", "-"), *map(str, values)]
    if out.with_suffix(".checkpoint").exists():
        command.append("--resume")
    begin = time.monotonic()
    with out.with_suffix(".log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"{out.name}: {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)


def file(work: Path, name: str, seed: int) -> Path:
    """Where a mask is kept."""
    return work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"


@dataclass
class Measured:
    """Perplexities of one base on its test texts, under any of the masks in a folder."""

    base: Loaded
    texts: dict[str, Tensor]
    work: Path
    _kept: dict[str, float] = field(default_factory=dict)

    def dense(self, text: str) -> float:
        """Of the base."""
        return perplexity(self.base.model, self.texts[text])

    def of(self, name: str, text: str, seeds: Iterable[int]) -> list[float]:
        """Of a mask, for the seeds for which it was learned."""
        masks = [file(self.work, name, seed) for seed in seeds]
        return [self._of(mask, text) for mask in masks if mask.exists()]

    def _of(self, mask: Path, text: str) -> float:
        kept = self.work / "figures.json"
        figures = json.loads(kept.read_text()) if kept.exists() else {}
        mask_set = maskset.load(mask, self.base.base)
        key = f"{mask_set.sha256} {text}"
        if key not in figures:
            with masked(self.base.model, mask_set.masks()):
                figures[key] = perplexity(self.base.model, self.texts[text])
            kept.write_text(json.dumps(figures))
        return float(figures[key])

    def one_shot(self, calibration: Tensor, text: str) -> dict[str, float]:
        """Of the one-shot methods; the last updates the weights, which ends the base."""
        figures = {}
        for method in ("magnitude", "wanda", "sparsegpt"):
            with masked(self.base.model, prune(self.base.model, calibration, method)):
                figures[method] = perplexity(self.base.model, self.texts[text])
        prune(self.base.model, calibration, "sparsegpt", update_weights=True)
        return figures | {"sparsegpt, weights updated": perplexity(self.base.model, self.texts[text])}


def stories_rows(args: argparse.Namespace) -> list[Row]:
    """Share of the gap between SparseGPT and dense that is closed on a base that others trained."""
    folder = args.data / "domains/tinystories"
    base = load_base(str(args.data / "models/stories260K-hf"))
    test = windows(load_tokens(base.tokenizer, [str(folder / "test.txt")]), LENGTH)
    train = load_tokens(base.tokenizer, [str(folder / "train.txt")])
    here = Measured(base, {"tinystories": test}, args.work)
    dense, learned = here.dense("tinystories"), here.of("stories260K", "tinystories", args.seeds)
    one_shot = here.one_shot(calibration([train]), "tinystories")
    best = min(one_shot["sparsegpt"], one_shot["sparsegpt, weights updated"])
    closed = [gap_closed(value, best, dense) for value in learned]
    return [
        *perplexities("stories260K", {"dense": [dense], "learned": learned}, one_shot),
        *spread("stories260K: gap closed", closed, "%", must=84, aim=90, better="higher"),
    ]


def demo_rows(args: argparse.Namespace) -> list[Row]:
    """The demo base: its general mask, its domains', transfer, and what each part of the recipe is worth."""
    base = load_base(str(DEMO))
    texts, trains = {}, []
    for domain in DOMAINS.values():
        folder = args.data / "domains" / domain
        texts[domain] = windows(load_tokens(base.tokenizer, [str(folder / "test.txt")]), LENGTH)[:WINDOWS]
        trains.append(load_tokens(base.tokenizer, [str(folder / "train.txt")]))
    texts["mixed"] = torch.cat(list(texts.values()))
    here = Measured(base, texts, args.work)
    dense = {text: here.dense(text) for text in texts}
    general = {
        name: here.of(name, "mixed", args.seeds)
        for name in ("general", "short", "short, no distillation", "short, paper")
    }
    domains = {name: here.of(name, domain, args.seeds) for name, domain in DOMAINS.items()}
    scratch, transfer = (
        here.of(name, "legal-us", args.seeds) for name in ("legal, scratch", "legal, transfer")
    )
    one_shot = here.one_shot(calibration(trains), "mixed")
    best = min(one_shot["sparsegpt"], one_shot["sparsegpt, weights updated"])
    closed = {
        name: [gap_closed(value, best, dense["mixed"]) for value in values]
        for name, values in general.items()
    }
    short, plain, paper = (closed[f"short{how}"] for how in ("", ", no distillation", ", paper"))
    ratios = {name: [value / dense[DOMAINS[name]] for value in values] for name, values in domains.items()}
    over_domains = [mean(of_seed) for of_seed in zip(*ratios.values(), strict=False)]
    gained = [ours - without for ours, without in zip(short, plain, strict=False)]
    against_paper = [ours - theirs for ours, theirs in zip(plain, paper, strict=False)]
    moved = [new / old for new, old in zip(transfer, scratch, strict=False)]
    return [
        *perplexities("demo", {"dense": [dense["mixed"]], "learned": general["general"]}, one_shot),
        *spread("demo, general mask: gap closed", closed["general"], "%", must=70, aim=85, better="higher"),
        *spread(f"{SHORT['steps']} steps", short, "%", better="higher"),
        *spread(f"{SHORT['steps']} steps, no distillation", plain, "%", better="higher"),
        *spread(f"{SHORT['steps']} steps, the paper's recipe", paper, "%", better="higher"),
        *spread("per-item, exponential - the paper's recipe", against_paper, "points", 0, 5, "higher"),
        *spread("distillation on - off", gained, "points", aim=0, better="higher"),
        *spread("demo, five domains: own mask / dense", over_domains, "ratio", must=1.02, aim=0.98),
        *(row for name, values in ratios.items() for row in spread(f"  {name} / dense", values, "ratio")),
        *spread("legal: transfer, a quarter of the steps / scratch", moved, "ratio", must=1.0, aim=0.99),
    ]


def learning_speed(steps: int = 5, batch: int = 8) -> Row:
    """Tokens a second of learning a mask against fine-tuning the same weights, steps in turn."""
    from maskllm.learn.gates import Sampling, install

    torch.set_num_threads(1)
    tuned, learned = (load_base(str(DEMO), torch.bfloat16).model for _ in range(2))
    weights = [layer.weight.requires_grad_() for layer in maskable(tuned).values()]
    sampling = Sampling(0, 100, 4)
    how = GENERAL["parameterisation"]
    gates = install(learned, maskable(learned), sampling, how, 2, 4)
    logits = [gate.logits for gate in gates.values()]
    optimizers = {id(tuned): torch.optim.AdamW(weights, fused=True)}
    optimizers[id(learned)] = torch.optim.AdamW(logits, fused=True)
    tokens = torch.randint(0, 4096, (batch, LENGTH))
    seconds: dict[int, list[float]] = {id(tuned): [], id(learned): []}
    for number in range(2 * (steps + 1)):
        model = (tuned, learned)[number % 2]
        sampling.number = number
        begin = time.process_time()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizers[id(model)].step()
        optimizers[id(model)].zero_grad()
        seconds[id(model)].append(time.process_time() - begin)
    fine, ours = (torch.tensor(seconds[id(model)][1:]).median() for model in (tuned, learned))
    name = f"tokens/s of learning a mask / fine-tuning, {batch} x {LENGTH} tokens a draw | mean"
    return Row(name, float(fine / ours), "ratio", must=0.5, aim=0.8, better="higher")


def calibration(trains: list[Tensor]) -> Tensor:
    """128 windows for SparseGPT, as many of each text."""
    noise = torch.Generator().manual_seed(0)
    return torch.cat([sample(train, LENGTH, -(-128 // len(trains)), noise) for train in trains])[:128]


def perplexities(base: str, ours: dict[str, list[float]], one_shot: dict[str, float]) -> list[Row]:
    """Rows of every method on one base and text."""
    figures = ours | {method: [value] for method, value in one_shot.items()}
    return [
        row for name, values in figures.items() for row in spread(f"{base}: {name}, perplexity", values, "")
    ]


def gap_closed(value: float, one_shot: float, dense: float) -> float:
    """Per cent of the way from a one-shot method's perplexity to the dense base's."""
    return 100 * (one_shot - value) / (one_shot - dense)


def spread(
    name: str,
    values: list[float],
    unit: str,
    must: float | None = None,
    aim: float | None = None,
    better: str = "lower",
) -> list[Row]:
    """A figure's mean over the seeds, which is what must be reached, and its least and most."""
    return [
        Row(f"{name} | mean", mean(values), unit, must, aim, better),
        Row(f"{name} | least", min(values), unit, better=better),
        Row(f"{name} | most", max(values), unit, better=better),
        Row(f"{name} | seeds", len(values), "", better=better),
    ]


if __name__ == "__main__":
    main()
