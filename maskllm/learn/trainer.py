"""Learning one mask: MaskLLM's method (arXiv 2409.17481), its published settings as defaults.

The base is frozen. Every group of weights has logits over its patterns; Gumbel-softmax draws soft masks
from them, the loss of the model under these masks trains them, and temperature and scale move from
exploring to deciding. What is measured and saved is the hard mask: the likeliest pattern of each group.
"""

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from maskllm.core import maskset
from maskllm.core.layers import maskable
from maskllm.data import load_tokens, sample, source_names, windows
from maskllm.evaluate.perplexity import perplexity, protocol
from maskllm.learn import checkpoint, priors
from maskllm.learn.gates import Gate, Noise, install
from maskllm.learn.progress import Measured, Progress
from maskllm.learn.schedules import cosine, linear
from maskllm.models import Loaded, check_length, load_base

METHOD = "maskllm-categorical"
CALIBRATION = 128
"""Windows of training text for a one-shot prior."""
CLIP = 1.0
"""Largest norm of a step's gradient."""
NOT_THE_RESULT = {
    "out",
    "data",
    "heldout",
    "heldout_windows",
    "eval_every",
    "checkpoint_every",
    "resume",
    "log_dir",
}
"""Settings that may change when a run is resumed (the text itself may not)."""


class LearnConfig(BaseModel):
    """How to learn one mask. The defaults are the paper's, whose budget is 2.1 billion tokens."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", frozen=True)

    out: Path
    """Where the mask goes, a .safetensors file; an unfinished run keeps its checkpoint beside it."""
    data: list[str]
    """Training text: files, folders of *.txt, or hf:NAME[:SPLIT]."""
    heldout: list[str]
    """Text that the hard mask's perplexity is measured on while it learns and when it is done."""

    n: PositiveInt = 2
    """Weights kept in every group."""
    m: PositiveInt = 4
    """Weights in a group."""
    include: list[str] = []
    """Globs of layer names to mask; all linear layers of the decoder blocks if there is none."""
    exclude: list[str] = []
    """Globs of layer names to leave dense."""

    steps: PositiveInt = 2_000
    """Optimizer steps."""
    batch: PositiveInt = 256
    """Windows a step."""
    micro_batch: PositiveInt = 1
    """Windows that share one draw of soft masks and one pass through the model."""
    length: PositiveInt = 4_096
    """Tokens a window."""
    lr: PositiveFloat = 5e-4
    """Learning rate of the logits, which falls to a tenth along a cosine. A few hundred steps want 1e-3
    to 3e-3."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's decay of the logits."""
    tau: tuple[PositiveFloat, PositiveFloat] = (4.0, 0.05)
    """Gumbel temperature, first step to last."""
    scale: tuple[PositiveFloat, PositiveFloat] = (1e2, 5e2)
    """What the logits are multiplied by before the noise is added, first step to last."""
    prior: str = "sparsegpt"
    """What to start from: magnitude, wanda, sparsegpt, none, or a mask file of this base."""
    prior_strength: NonNegativeFloat = 3.0
    """How many standard deviations of the logits the prior's patterns are ahead."""
    weight_reg: NonNegativeFloat = 10.0
    """Reward for the share of the squared norm of the masked layers that the soft masks keep; falls to 0
    over the run. The paper's 1e-5 is not divided by that norm: it is 10 here where the norm is 1e6, that
    of 2.5 billion weights around 0.02."""
    seed: int = 0
    """Seed of the text's order, the first logits and the noise."""

    heldout_windows: PositiveInt = 128
    """Windows measured of each held-out source, from its beginning."""
    eval_every: PositiveInt = 100
    """Steps between two measurements of the hard mask."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints."""
    resume: bool = False
    """Go on from the checkpoint of a run that was stopped."""
    log_dir: Path | None = None
    """Folder for TensorBoard; nothing is written without one."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to learn: cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrix products compute in while learning; all else, and every measurement, is float32."""


@dataclass(frozen=True)
class Report:
    """What came out. Perplexities are of the held-out text, under `protocol`."""

    out: str
    sha256: str
    steps: int
    dense: float
    perplexity: float
    changed: float
    """Share of groups with another pattern than the prior."""
    protocol: str


class CannotLearn(ValueError):
    """Settings that contradict the base or an earlier run."""


def run(model: str, config: LearnConfig) -> Report:
    """Learn one mask of a base (a folder or a Hugging Face name) and save it.

    Ctrl-C ends the run after the step at hand and leaves a checkpoint to resume from. Raises
    CannotLearn, CannotResume, NoPrior, and what base, text, layers and prior file raise: all ValueErrors.
    """
    stopped = config.out.with_suffix(".checkpoint")
    if stopped.exists() and not config.resume:
        raise CannotLearn(f"{stopped} is of a run that was stopped: go on with --resume, or delete it")
    prior = priors.identify(config.prior)
    base = load_base(model, device=config.device)
    check_length(base.model, config.length)
    text = load_tokens(base.tokenizer, config.data)
    most = config.heldout_windows * config.length + 1
    heldout = torch.cat(
        [windows(load_tokens(base.tokenizer, [s], most), config.length) for s in config.heldout]
    )
    settings = config.model_dump(mode="json", exclude=NOT_THE_RESULT) | {"prior": prior}
    text_sha256 = hashlib.sha256(text.numpy().data).hexdigest()

    dense = perplexity(base.model, heldout)
    identity = {"base": base.base.fingerprint, "text": text_sha256, **settings}
    gates, hard = learn(base, text, heldout, config, stopped, identity)

    how = protocol(base.model, base.tokenizer, heldout)
    mask_set = maskset.from_masks(
        {name: gate.mask() for name, gate in gates.items()},
        base.base,
        config.n,
        config.m,
        {
            "method": METHOD,
            "data": source_names(config.data),
            "text": text_sha256,
            **settings,
        },
        {
            "perplexity": hard.perplexity,
            "dense": dense,
            "heldout": source_names(config.heldout),
            "protocol": how,
        },
    )
    sha256 = maskset.save(mask_set, config.out)
    stopped.unlink(missing_ok=True)
    return Report(str(config.out), sha256, config.steps, dense, hard.perplexity, hard.changed, how)


def learn(
    base: Loaded,
    text: Tensor,
    heldout: Tensor,
    config: LearnConfig,
    stopped: Path,
    identity: Mapping[str, Any],
) -> tuple[dict[str, Gate], Measured]:
    """The run itself: the gates it leaves in the model, and what their hard masks are worth.

    `text` is a row of tokens, `heldout` windows (count, length), `stopped` the checkpoint's file.
    """
    model, device = base.model, config.device
    order = torch.Generator().manual_seed(config.seed)
    noise = Noise(config.scale[0], config.tau[0], torch.Generator(device).manual_seed(config.seed))
    prior = {} if config.resume else _prior(base, sample(text, config.length, CALIBRATION, order), config)
    gates = install(model, maskable(model, config.include, config.exclude), noise, config.n, config.m)
    for name, mask in prior.items():
        gates[name].start_from(mask, config.prior_strength)
    logits = [gate.logits for gate in gates.values()]
    optimizer = torch.optim.AdamW(
        logits, config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    state = gates, optimizer, {"order": order, "noise": noise.generator}
    first = checkpoint.restore(stopped, identity, *state) if config.resume else 0
    norm = sum(gate.weight.float().square().sum() for gate in gates.values())

    with Progress(first, config.steps, config.log_dir) as progress, after_the_step() as interrupted:
        for step in range(first, config.steps):
            noise.tau = linear(step, config.steps, *config.tau)
            noise.scale = linear(step, config.steps, *config.scale)
            lr = cosine(step, config.steps, config.lr, config.lr / 10)
            weight_reg = linear(step, config.steps, config.weight_reg, 0)
            if step == first or step % config.eval_every == 0:
                progress.measured(step, measure(model, gates, heldout))

            for gate in gates.values():
                gate.train()  # the base stays in evaluation mode: no dropout
            batch = sample(text, config.length, config.batch, order).to(device)
            loss = torch.zeros((), device=device)
            for part in torch.split(batch, config.micro_batch):
                with torch.autocast(batch.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                    part_loss = model(input_ids=part, labels=part, use_cache=False).loss
                kept = sum(gate.kept for gate in gates.values()) / norm
                share = len(part) / len(batch)
                ((part_loss - weight_reg * kept) * share).backward()
                loss += part_loss.detach() * share
            clip_grad_norm_(logits, CLIP)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            progress.stepped(step + 1, loss.item(), noise.tau, noise.scale, lr)
            if interrupted() or (step + 1) % config.checkpoint_every == 0:
                checkpoint.save(stopped, identity, step + 1, *state)
            if interrupted():
                raise KeyboardInterrupt(f"stopped after step {step + 1}; {stopped} has it")
        hard = measure(model, gates, heldout)
        progress.measured(config.steps, hard)
    return gates, hard


def measure(model: PreTrainedModel, gates: Mapping[str, Gate], heldout: Tensor) -> Measured:
    """The hard masks as they are now."""
    model.train(False)
    groups = sum(gate.prior.numel() for gate in gates.values())
    certain = sum(float(gate.confidence().sum()) for gate in gates.values())
    changed = sum(int((gate.codes() != gate.prior).sum()) for gate in gates.values())
    return Measured(perplexity(model, heldout), certain / groups, changed / groups)


@contextmanager
def after_the_step() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed, instead of breaking off half a step; a second one breaks off."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread receives signals
        return
    pressed = threading.Event()

    def press(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _prior(base: Loaded, calibration: Tensor, config: LearnConfig) -> dict[str, Tensor]:
    n, m, include, exclude = config.n, config.m, config.include, config.exclude
    return priors.make(config.prior, base.model, base.base, calibration, n, m, include, exclude)
