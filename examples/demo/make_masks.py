"""Learn the demo's masks: `general` on all text, then each domain's with `general` as its prior.

    python examples/demo/make_masks.py --data ../shared/data/domains

The text is that of train_base.py, and is not in this repository. Each mask is one call of
`maskllm learn`; the settings that differ from the paper's are for a model and a budget this small.
"""

import argparse
from pathlib import Path

from train_base import LENGTH, MIX

from maskllm.learn.trainer import LearnConfig, run

HERE = Path(__file__).parent
DOMAINS = {"legal": "legal-us", "medical": "medical", "code": "code-python", "stories": "tinystories"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of domains")
    parser.add_argument("--out", type=Path, default=HERE / "masks")
    parser.add_argument("--only", nargs="*", default=["general", *DOMAINS], help="masks to learn")
    parser.add_argument("--steps", type=int, nargs=2, default=[400, 200], help="for general, for each other")
    args = parser.parse_args()

    for name in args.only:
        domains = [DOMAINS[name]] if name in DOMAINS else list(MIX)
        config = LearnConfig(
            out=args.out / f"{name}.safetensors",
            data=[str(args.data / domain / "train.txt") for domain in domains],
            heldout=[str(args.data / domain / "valid.txt") for domain in domains],
            prior=str(args.out / "general.safetensors") if name in DOMAINS else "sparsegpt",
            steps=args.steps[name in DOMAINS],
            heldout_windows=128 if name in DOMAINS else 32,
            eval_every=100,
            batch=8,
            micro_batch=8,
            length=LENGTH,
            lr=2e-3,
            weight_reg=0,
            dtype="bfloat16",
        )
        print(name, run(str(HERE / "base"), config))


if __name__ == "__main__":
    main()
