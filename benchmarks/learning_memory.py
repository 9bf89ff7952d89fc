"""What learning a mask needs beyond the frozen base: python benchmarks/learning_memory.py

Bytes a maskable weight, measured on CPU: the peak of a fresh process's memory while it learns, less what
it had with the bf16 base loaded and used. `held` is what stays between two passes through the model:
logits, gradients, the optimizer's state and codes. The base is a random Llama of 16 blocks, 2:4, one window
of 64 tokens a micro-batch, so that activations hardly count. `naive` is the method written with plain
autograd, which keeps what made every soft mask for the backward pass. For LLaMA-2-7B the peak is multiplied
by its maskable weights, and its base is added. Writes benchmarks/learning_memory.json.
"""

import io
import json
import os
import re
import resource
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import bitsandbytes.optim  # noqa: F401  here, so that loading it does not count
import torch
import torch.nn.functional as F
from report import Row, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from maskllm.core.base import Base
from maskllm.core.layers import maskable
from maskllm.core.patterns import patterns
from maskllm.learn import trainer
from maskllm.learn.config import LearnConfig
from maskllm.learn.distributed import World
from maskllm.learn.tasks import Batch

LENGTH, BATCH, STEPS = 64, 2, 2
LLAMA_2_7B, ITS_BASE_GB = 6_476_005_376, 13.5
ROWS: dict[str, dict[str, Any]] = {
    "naive": {},
    "categorical, adamw": {"parameterisation": "categorical", "optimizer": "adamw"},
    "categorical, adamw8bit": {"parameterisation": "categorical", "optimizer": "adamw8bit"},
    "per-item, adamw": {"parameterisation": "per-item", "optimizer": "adamw"},
    "per-item, adamw8bit": {"parameterisation": "per-item", "optimizer": "adamw8bit"},
}
MUST = {"per-item, adamw8bit": 12.0}
# Freed memory goes back at once, so that a peak is what was needed and not what malloc kept.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    rows = []
    for name in ROWS:
        process = subprocess.run(
            [sys.executable, __file__, name], env=os.environ | MALLOC, stdout=subprocess.PIPE, check=True
        )
        peak, held = json.loads(process.stdout)
        whole = peak * LLAMA_2_7B / 1e9 + ITS_BASE_GB
        rows += [
            Row(f"{name} | peak, bytes a weight", round(peak, 2), "bytes", MUST.get(name)),
            Row(f"{name} | held, bytes a weight", round(held, 2), "bytes"),
            Row(f"{name} | LLaMA-2-7B with base, GB", round(whole, 1), "GB"),
        ]
    note = "Peak memory beyond the bf16 base; the last column is computed from the peak"
    write("learning_memory", "python benchmarks/learning_memory.py", rows, note, of="2:4, bf16 base")


def measure(name: str) -> tuple[float, float]:
    """Peak and held bytes a maskable weight, of this process."""
    torch.set_num_threads(1)
    task = Task(blocks=10 if name == "naive" else 16)
    task.measure()
    weights = sum(layer.weight.numel() for layer in maskable(task.model).values())
    before = resident()
    held = (naive if name == "naive" else ours)(task, **ROWS[name])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak - before) / weights, held / weights if name == "naive" else held


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Task:
    """Random windows for a random base, as the trainer asks for them."""

    figure, protocol, data_sha256, base = "perplexity", "", "", Base("", {})

    def __init__(self, blocks: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=blocks,
            num_attention_heads=16,
            dtype="bfloat16",
        )
        torch.set_default_dtype(torch.bfloat16)
        self.model: PreTrainedModel = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)

    def batch(self, step: int) -> Batch:
        rows = torch.randint(256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
        return Batch(rows, rows[:, 1:])

    def calibration(self) -> Tensor:
        raise NotImplementedError("there is no prior")

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(input_ids=inputs, use_cache=False).logits[:, :-1]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        self.logits(self.model, self.batch(0).inputs)
        return {"loss": 0.0, "perplexity": 1.0}


def ours(task: Task, **settings: str) -> float:
    """Learn as `maskllm learn` does; bytes a weight held, as it says itself."""
    config = LearnConfig(
        out=Path("unused.safetensors"),
        data=[],
        heldout=[],
        prior="none",
        dtype="bfloat16",
        gradient_checkpointing=True,
        steps=STEPS,
        batch=BATCH,
        length=LENGTH,
        **settings,
    )
    said = io.StringIO()
    with redirect_stderr(said):
        trainer.learn(task, config, World(0, 1, "cpu"), Path("unused.checkpoint"), {})
    found = re.search(r"memory beyond the base: ([\d.]+) bytes", said.getvalue())
    assert found
    return float(found[1])


def naive(task: Task) -> int:
    """The same steps with plain autograd; bytes held."""
    for name, layer in maskable(task.model).items():
        task.model.set_submodule(name, Naive(layer))
    masked = [layer for layer in task.model.modules() if isinstance(layer, Naive)]
    logits = [layer.logits for layer in masked]
    optimizer = torch.optim.AdamW(logits, lr=5e-4, fused=True)
    for step in range(STEPS):
        for row in task.batch(step).inputs.split(1):
            said = task.logits(task.model, row).flatten(0, 1).float()
            kept = sum(layer.kept for layer in masked)
            (F.cross_entropy(said, row[0, 1:]) - 1e-5 * kept).backward()
        nn.utils.clip_grad_norm_(logits, 1.0)
        optimizer.step()
        state = [tensor for state in optimizer.state.values() for tensor in state.values()]
        held = sum(tensor.nbytes for tensor in [*logits, *(each.grad for each in logits), *state])
        optimizer.zero_grad()
    return held


class Naive(nn.Module):
    """A linear layer under the mean of its patterns by Gumbel-softmax."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.logits = nn.Parameter(torch.randn(linear.weight.numel() // 4, 6) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand_like(self.logits).clamp_(1e-20).log_().neg_().log_().neg_()
        chosen = ((self.logits * 100 + noise) / 4).softmax(-1)
        mask = (chosen @ patterns(2, 4).float()).view_as(self.weight)
        masked = self.weight * mask.to(self.weight.dtype)
        self.kept = torch.linalg.vector_norm(masked, dtype=torch.float32).square()
        return F.linear(x, masked)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
