"""Learn the demo's masks: `general` on all text, then each domain's with `general` as its prior.

    python examples/demo/make_masks.py --data ../shared/data/domains

The text is that of train_base.py, and is not in this repository. Each mask is one call of
`maskllm learn`; the settings that differ from the paper's are for a model and a budget this small, and
benchmarks/quality.py measures what they are worth.
"""

import argparse
from pathlib import Path
from typing import Any

from train_base import LENGTH

from maskllm.learn.config import LearnConfig
from maskllm.learn.trainer import run

DEMO = Path(__file__).parent / "base"
DOMAINS = {
    "legal": "legal-us",
    "medical": "medical",
    "code": "code-python",
    "novels": "english-novels",
    "stories": "tinystories",
}
MIXED = [*DOMAINS.values(), *["tinystories"] * 3]
"""What `general` learns from; stories are few, so they repeat."""
GENERAL: dict[str, Any] = {
    "parameterisation": "per-item",
    "prior_strength": 6.0,
    "prior": "reconstruct",
    "schedule": "exponential",
    "tau": [4.0, 0.5],
    "distill": 1.0,
    "steps": 2000,
    "eval_every": 200,
    "batch": 8,
    "micro_batch": 8,
    "length": LENGTH // 2,
    "lr": 1.4e-3,
    "weight_reg": 0.0,
    "heldout_windows": 16,
    "dtype": "bfloat16",
}


DOMAIN = GENERAL | {"steps": 300, "eval_every": 100, "lr": 2e-3, "distill": 0.3, "heldout_windows": 64}
"""How a domain's mask is learned from the general one."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of domains")
    parser.add_argument("--out", type=Path, default=DEMO.with_name("masks"))
    parser.add_argument("--only", nargs="*", default=["general", *DOMAINS], help="masks to learn")
    args = parser.parse_args()

    for name in args.only:
        settings, domains = GENERAL, MIXED
        if name != "general":
            settings = DOMAIN | {"prior": str(args.out / "general.safetensors")}
            domains = [DOMAINS[name]]
        config = LearnConfig(
            out=args.out / f"{name}.safetensors",
            data=[str(args.data / domain / "train.txt") for domain in domains],
            heldout=[str(args.data / domain / "valid.txt") for domain in dict.fromkeys(domains)],
            **settings,
        )
        print(name, run(str(DEMO), config))


if __name__ == "__main__":
    main()
