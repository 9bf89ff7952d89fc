"""Every way of making a 2:4 mask on stories260K, a model nobody here made.

    python benchmarks/stories260k.py --data ../shared/data

A pretrained Llama of 260,032 parameters (karpathy/tinyllamas, MIT), on held-out TinyStories.
Writes benchmarks/stories260k.json. Learning takes about ten minutes on one core.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from report import Row, write

from maskllm.core import maskset
from maskllm.data import load_tokens, sample, windows
from maskllm.evaluate.perplexity import masked, perplexity, protocol
from maskllm.learn.trainer import LearnConfig, run
from maskllm.models import load_base
from maskllm.prune.oneshot import prune

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and domains/")
    args = parser.parse_args()
    folder, text = args.data / "models/stories260K-hf", args.data / "domains/tinystories"

    model, tokenizer, base = load_base(str(folder))
    test = windows(load_tokens(tokenizer, [str(text / "test.txt")]), LENGTH)
    train = load_tokens(tokenizer, [str(text / "train.txt")])
    calibration = sample(train, LENGTH, 128, torch.Generator().manual_seed(0))

    figures = {"dense": perplexity(model, test)}
    for method in ("magnitude", "wanda", "sparsegpt"):
        with masked(model, prune(model, calibration, method)):
            figures[method] = perplexity(model, test)

    begin = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        config = LearnConfig(
            out=Path(scratch) / "stories.safetensors",
            data=[str(text / "train.txt")],
            heldout=[str(text / "valid.txt")],
            steps=600,
            eval_every=200,
            batch=8,
            micro_batch=2,
            length=LENGTH,
            lr=3e-3,
            dtype="bfloat16",
        )
        run(str(folder), config)
        learned = maskset.load(config.out, base)
    minutes = (time.process_time() - begin) / 60
    with masked(model, learned.masks()):
        figures["learned"] = perplexity(model, test)

    prune(model, calibration, "sparsegpt", update_weights=True)  # last: it changes the model
    figures["sparsegpt, weights updated (no longer the base's)"] = perplexity(model, test)

    must = {"dense": 4.1535, "learned": 9.0}
    rows = [Row(name, value, "perplexity", must.get(name)) for name, value in figures.items()]
    rows.append(Row("CPU minutes of learning", minutes, "minutes", must=15))
    how = protocol(model, tokenizer, test) + " of the tinystories test text"
    write("stories260k", "python benchmarks/stories260k.py --data ../shared/data", rows, how)


if __name__ == "__main__":
    main()
