"""Learning one mask: MaskLLM's method (arXiv 2409.17481), its published settings as defaults.

The base is frozen. Every group of weights has logits over its patterns or its weights; with Gumbel noise
they give soft masks, the loss of the model under these masks trains them, and temperature and scale move
from exploring to deciding. What is measured and saved is the hard mask: the likeliest pattern of a group.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint as checkpoint_block
from transformers import PreTrainedModel

from maskllm.core import maskset
from maskllm.core.layers import decoder_blocks, maskable
from maskllm.data import source_names
from maskllm.learn import checkpoint, priors, tasks
from maskllm.learn.checkpoint import Position
from maskllm.learn.config import NOT_THE_RESULT, LearnConfig
from maskllm.learn.distributed import World, any_of, average_gradients, mean, spread, world
from maskllm.learn.gates import Gate, Sampling, install, whole
from maskllm.learn.objective import loss
from maskllm.learn.progress import Measured, Progress, draw
from maskllm.learn.schedules import anneal, cosine, linear, passed
from maskllm.learn.tasks import Batch, Task
from maskllm.models import choose_device

CLIP = 1.0
"""Largest norm of a step's gradient."""
SETTLED = 1e-3
"""Share of groups, and of the hard loss, below which a measurement counts as no change."""


@dataclass(frozen=True)
class Report:
    """What came out. Scores are of the held-out examples, under `protocol`; `loss` is in nats."""

    out: str
    sha256: str
    steps: int
    """That were made: fewer than asked where the mask settled earlier."""
    scores: dict[str, float]
    dense: dict[str, float]
    changed: float
    """Share of groups with another pattern than the prior."""
    protocol: str


class CannotLearn(ValueError):
    """Settings that contradict the base, the processes or an earlier run."""


def run(model: str, config: LearnConfig) -> Report:
    """Learn one mask of a base (a folder or a Hugging Face name), save it, and draw the run beside it.

    Ctrl-C ends the run after the step at hand and leaves a checkpoint to resume from. Raises
    CannotLearn, CannotResume, NoPrior, and what device, base, data, layers and prior file raise: all
    ValueErrors.
    """
    stopped = config.out.with_suffix(".checkpoint")
    with world(choose_device(config.device)) as here:
        if stopped.exists() and not config.resume:
            raise CannotLearn(f"{stopped} is of a run that was stopped: go on with --resume, or delete it")
        prior = priors.identify(config.prior)
        _share_parts(config, here)
        task = tasks.load(model, config, here.device)
        settings = config.model_dump(mode="json", exclude=NOT_THE_RESULT) | {"prior": prior}
        identity = {"base": task.base.fingerprint, "text": task.data_sha256, **settings}
        dense = task.measure()
        gates, history = learn(task, config, here, stopped, identity)

        hard = history[-1]
        mask_set = maskset.from_masks(
            {name: gate.mask() for name, gate in gates.items()},
            task.base,
            config.n,
            config.m,
            {
                "method": f"maskllm-{config.parameterisation}",
                "data": source_names(config.data),
                "text": task.data_sha256,
                **settings,
                "steps": hard.step,
            },
            {
                task.figure: hard.scores[task.figure],
                "dense": dense[task.figure],
                "heldout": source_names(config.heldout),
                "protocol": task.protocol,
            },
        )
        sha256 = ""
        if here.first:
            sha256 = maskset.save(mask_set, config.out)
            title = f"{config.out.name}: {task.figure} {hard.scores[task.figure]:.4g}, {hard.step} steps"
            draw(history, task.figure, dense[task.figure], title, config.out.with_suffix(".png"))
            stopped.unlink(missing_ok=True)
    return Report(str(config.out), sha256, hard.step, hard.scores, dense, hard.changed, task.protocol)


def learn(
    task: Task, config: LearnConfig, here: World, stopped: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, Gate], list[Measured]]:
    """The run itself: the gates it leaves in the model, and what their hard masks were worth.

    `stopped` is the checkpoint's file, `identity` what must agree for it to be resumed.
    """
    sampling = Sampling(config.seed, config.scale[0], config.tau[0])
    gates = _install(task, config, sampling)
    spread(task.model, config.parallel, here)
    if config.gradient_checkpointing:
        _checkpoint_gradients(task.model)
    logits = [gate.logits for gate in gates.values()]
    optimizer = _optimizer(config, logits)
    norm = sum(whole(gate.weight).float().square().sum() for gate in gates.values())
    position, history = Position(0, {}, []), list[Measured]()
    if config.resume:
        position = checkpoint.restore(stopped, identity, gates, optimizer)
        task.restore(position.text)
        history = [Measured(**measured) for measured in position.history]

    def measure(step: int) -> Measured:
        sampling.mode = "hard"
        codes = {name: gate.codes() for name, gate in gates.items()}
        history.append(
            Measured(
                step=step,
                scores=task.measure(),
                changed=_differ(codes, {name: gate.prior for name, gate in gates.items()}),
                flipped=_differ(codes, {name: gate.seen for name, gate in gates.items()}),
                confidence={name: float(gate.confidence()) for name, gate in gates.items()},
            )
        )
        for name, gate in gates.items():
            gate.seen = codes[name]
        progress.measured(history[-1], task.figure)
        return history[-1]

    with (
        Progress(position.step, config.steps, config.log_dir, here.first) as progress,
        after_the_step() as interrupted,
    ):
        for step in range(position.step, config.steps):
            share = passed(step, config.steps)
            annealed = passed(step, round(config.steps * config.anneal_share))
            sampling.tau = anneal(config.schedule, annealed, *config.tau)
            sampling.scale = anneal(config.schedule, annealed, *config.scale)
            lr = cosine(share, config.lr, config.lr / 10)
            weight_reg = linear(share, config.weight_reg, 0)
            if step % config.eval_every == 0 and (not history or history[-1].step < step):
                measure(step)
                if any_of(_settled(history, config.settled), here):
                    progress.say(f"settled after {step} steps")
                    break

            step_loss = 0.0
            for number, part, weight in _parts(task.batch(step), step, config, here):
                teacher = None
                if config.distill:
                    sampling.mode = "dense"
                    with torch.no_grad():
                        teacher = task.logits(task.model, part.inputs)
                sampling.draw(number)
                part_loss = loss(task.logits(task.model, part.inputs), part.labels, teacher, config.distill)
                kept = sum(sampling.kept.values()) / norm
                torch.autograd.backward((part_loss - weight_reg * kept) * weight)
                step_loss += float(part_loss.detach()) * weight
            average_gradients(logits, config.parallel, here)
            clip_grad_norm_(logits, CLIP)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            if step == position.step:
                progress.say(_memory(gates, optimizer))
            optimizer.zero_grad()

            step_loss = mean({"loss": step_loss}, here)["loss"]
            progress.stepped(step + 1, step_loss, sampling.tau, sampling.scale, lr)
            stop = any_of(interrupted(), here)
            if stop or (step + 1) % config.checkpoint_every == 0:
                now = Position(step + 1, task.state(), [asdict(measured) for measured in history])
                checkpoint.save(stopped, identity, now, gates, optimizer, here.first)
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; {stopped} has it")
        else:
            measure(config.steps)
    return gates, history


def _parts(batch: Batch, step: int, config: LearnConfig, here: World) -> Iterator[tuple[int, Batch, float]]:
    """This process's micro-batches of a step: the number of the draw, the examples, the weight of the loss.

    Draws are numbered over all processes, so that each has its own noise, and two processes with a
    micro-batch each do what one does with two. Gradients are averaged over processes, hence the weight.
    """
    inputs, labels = (torch.split(tensor, config.micro_batch) for tensor in batch)
    for index in range(here.rank, len(inputs), here.size):
        part = Batch(inputs[index].to(here.device), labels[index].to(here.device))
        yield step * len(inputs) + index, part, len(part.inputs) / len(batch.inputs) * here.size


def _share_parts(config: LearnConfig, here: World) -> None:
    share = config.micro_batch * here.size
    if here.size > 1 and config.batch % share:
        raise CannotLearn(
            f"a batch of {config.batch} in micro-batches of {config.micro_batch} cannot be shared equally by "
            f"{here.size} processes: say --batch {ceil(config.batch / share) * share}"
        )


def _install(task: Task, config: LearnConfig, sampling: Sampling) -> dict[str, Gate]:
    """Gates in the place of the layers, leaning to the prior unless a checkpoint is to be restored."""
    prior = {}
    if not config.resume:
        n, m, rules = config.n, config.m, (config.include, config.exclude)
        prior = priors.make(config.prior, task.model, task.base, task.calibration, n, m, *rules)
    layers = maskable(task.model, config.include, config.exclude)
    gates = install(task.model, layers, sampling, config.parameterisation, config.n, config.m)
    for name, mask in prior.items():
        gates[name].start_from(mask, config.prior_strength)
    return gates


def _optimizer(config: LearnConfig, logits: list[nn.Parameter]) -> torch.optim.Optimizer:
    how: dict[str, Any] = {"lr": config.lr, "betas": (0.9, 0.95), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(logits, **how, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise CannotLearn("--optimizer adamw8bit needs bitsandbytes: pip install 'maskllm[8bit]'") from None
    optimizer: torch.optim.Optimizer = AdamW8bit(logits, **how)
    return optimizer


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    """Compute each block again going backwards instead of keeping what it did.

    transformers' own switch works only in training mode, where OPT, Falcon and others drop out.
    """
    for block in decoder_blocks(model).values():
        block.forward = partial(checkpoint_block, block.forward, use_reentrant=False)


def _memory(gates: Mapping[str, Gate], optimizer: torch.optim.Optimizer) -> str:
    """What learning holds beyond the base, right after a step, in bytes a maskable weight."""
    weights = sum(gate.weight.numel() for gate in gates.values())
    held: dict[str, list[Any]] = {
        "logits": [gate.logits for gate in gates.values()],
        "gradients": [gate.logits.grad for gate in gates.values()],
        "optimizer": [value for state in optimizer.state.values() for value in state.values()],
        "codes": [codes for gate in gates.values() for codes in (gate.prior, gate.seen)],
    }
    each = {
        name: sum(value.nbytes for value in values if isinstance(value, Tensor)) / weights
        for name, values in held.items()
    }
    parts = ", ".join(f"{name} {value:.2f}" for name, value in each.items())
    return f"memory beyond the base: {sum(each.values()):.2f} bytes a maskable weight ({parts})"


def _differ(codes: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Share of groups that have another pattern."""
    differing = sum(int(torch.count_nonzero(codes[name] != others[name])) for name in codes)
    return differing / sum(tensor.numel() for tensor in codes.values())


def _settled(history: list[Measured], looks: int) -> bool:
    """Whether the last `looks` measurements changed next to nothing; never where `looks` is 0."""
    if not looks or len(history) <= looks:
        return False
    losses = [hard.scores["loss"] for hard in history[-looks - 1 :]]
    still = max(losses) - min(losses) < SETTLED * losses[-1]
    return still and all(hard.flipped < SETTLED for hard in history[-looks:])


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
