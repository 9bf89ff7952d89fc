"""Perplexity of the demo base under every mask on held-out text of every domain.

    python examples/demo/table.py --data ../shared/data/domains

Writes benchmarks/demo.json. One-shot masks are made here: magnitude from the weights alone, Wanda,
SparseGPT and reconstruct from a mix of all domains' training text, and SparseGPT once more for each column
from its own.
"""

import argparse
import sys
from pathlib import Path

import torch
from make_masks import DOMAINS
from torch import Tensor
from tqdm import tqdm
from train_base import LENGTH, MIX

from maskllm.core import maskset
from maskllm.data import load_tokens, sample, windows
from maskllm.evaluate.perplexity import masked, perplexity, protocol
from maskllm.models import load_base
from maskllm.prune.oneshot import prune

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "benchmarks"))
from report import Row, write  # noqa: E402

CALIBRATION = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of domains")
    parser.add_argument("--windows", type=int, default=64, help="windows of each domain's test text")
    args = parser.parse_args()

    model, tokenizer, base = load_base(str(HERE / "base"))
    test = {
        d: windows(load_tokens(tokenizer, [str(args.data / d / "test.txt")]), LENGTH)[: args.windows]
        for d in MIX
    }
    own = {d: _calibration(tokenizer, [args.data / d / "train.txt"]) for d in MIX}
    mixed = _calibration(tokenizer, [args.data / d / "train.txt" for d in MIX])

    # Every row is a mask for each column; all but the "own text" row have one mask for all of them.
    rows: dict[str, dict[str, dict[str, Tensor]]] = {"dense": {domain: {} for domain in MIX}}
    rows["magnitude"] = dict.fromkeys(MIX, prune(model, None, "magnitude"))
    rows["wanda"] = dict.fromkeys(MIX, prune(model, mixed, "wanda"))
    rows["sparsegpt"] = dict.fromkeys(MIX, prune(model, mixed, "sparsegpt"))
    rows["reconstruct"] = dict.fromkeys(MIX, prune(model, mixed, "reconstruct"))
    rows["sparsegpt, on the column's own text"] = {d: prune(model, own[d], "sparsegpt") for d in MIX}
    for name in ("general", *DOMAINS):
        learned = maskset.load(HERE / "masks" / f"{name}.safetensors", base)
        rows[name] = dict.fromkeys(MIX, learned.masks())

    table: dict[str, dict[str, float]] = {}
    for name, masks in tqdm(rows.items(), unit="mask"):
        table[name] = {}
        for domain in MIX:
            with masked(model, masks[domain]):
                table[name][domain] = perplexity(model, test[domain])

    published = [
        Row(
            name=f"{name} | {domain}",
            value=value,
            unit="perplexity",
            must=_must(table, name, domain),
            aim=table["dense"][domain],
        )
        for name, columns in table.items()
        for domain, value in columns.items()
    ]
    note = protocol(model, tokenizer, next(iter(test.values()))) + " of each domain's test text"
    write("demo", "make table", published, note)


def _must(table: dict[str, dict[str, float]], name: str, domain: str) -> float | None:
    """A domain's own mask must be the best sparse mask of its column."""
    if DOMAINS.get(name) != domain:
        return None
    return min(row[domain] for other, row in table.items() if other not in ("dense", name))


def _calibration(tokenizer, files: list[Path]) -> Tensor:
    tokens = [load_tokens(tokenizer, [str(file)]) for file in files]
    noise = torch.Generator().manual_seed(0)
    return torch.cat([sample(t, LENGTH, -(-CALIBRATION // len(tokens)), noise) for t in tokens])[:CALIBRATION]


if __name__ == "__main__":
    main()
