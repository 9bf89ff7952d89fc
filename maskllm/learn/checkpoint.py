"""The state of an unfinished run in one `.safetensors` file, from which it goes on bit for bit.

For each gate its logits, what the optimizer remembers of them, and the codes of its prior and of the last
measurement; and in the header the step, the measurements so far, where the text was, and what the run
depends on: base, text and settings. Noise needs no state: it is a function of seed, draw and layer.
Sharded tensors are saved whole, so that a run may go on with another number of processes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from maskllm.learn.gates import Gate, whole

KEY = "maskllm-checkpoint"


class CannotResume(ValueError):
    """No checkpoint to go on from, one that is damaged, or one of another run."""


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int
    text: dict[str, Any]
    """Where a stream of text stands; empty for text that is held in memory."""
    history: list[dict[str, Any]]
    """The measurements so far."""


def save(
    path: Path,
    identity: Mapping[str, Any],
    position: Position,
    gates: Mapping[str, Gate],
    optimizer: torch.optim.Optimizer,
    write: bool,
) -> None:
    """Write the state whole or not at all; the last one stays until then.

    Every process takes part in gathering what is sharded, and the one told to `write` writes.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, gate in gates.items():
        tensors[f"{name}.logits"] = gate.logits.detach()
        tensors |= {f"{name}.prior": gate.prior, f"{name}.seen": gate.seen}
        for key, value in optimizer.state[gate.logits].items():
            if isinstance(value, Tensor):  # bitsandbytes' tables are one tensor for all gates
                value = value if value.shape == gate.logits.shape else value.clone()
                tensors[f"{name}.optimizer.{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    for key, tensor in tensors.items():  # one at a time: together they may be more than a GPU holds
        gathered = whole(tensor)
        tensors[key] = gathered.cpu() if write else torch.empty(0)
    if not write:
        return
    header = {"identity": identity, "position": vars(position), "optimizer": numbers}
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        safetensors.torch.save_file(tensors, partial, {KEY: json.dumps(header)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def restore(
    path: Path, identity: Mapping[str, Any], gates: Mapping[str, Gate], optimizer: torch.optim.Optimizer
) -> Position:
    """Put the saved state back in place, and return how far it had come."""
    header, tensors = _read(path)
    for name, now in identity.items():
        if (then := header["identity"].get(name)) != now:
            raise CannotResume(f"{path} is of another run: {name} was {then}, and is {now}")
    for name, gate in gates.items():
        gate.logits.copy_(_sharded_like(tensors[f"{name}.logits"], gate.logits))
        gate.prior = tensors[f"{name}.prior"].to(gate.prior.device)
        gate.seen = tensors[f"{name}.seen"].to(gate.seen.device)
        of_optimizer = f"{name}.optimizer."
        optimizer.state[gate.logits] = header["optimizer"].get(name, {}) | {
            key.removeprefix(of_optimizer): _sharded_like(tensor, gate.logits)
            for key, tensor in tensors.items()
            if key.startswith(of_optimizer)
        }
    return Position(**header["position"])


def _sharded_like(tensor: Tensor, logits: Tensor) -> Tensor:
    """A tensor where the logits are, and sharded as they are where it has their shape."""
    tensor = tensor.to(logits.device)
    if not isinstance(logits, DTensor) or tensor.shape != logits.shape:
        return tensor
    return distribute_tensor(tensor, logits.device_mesh, logits.placements, src_data_rank=None)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CannotResume(f"there is no {path} to resume from: start without --resume")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()[KEY])
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise CannotResume(f"{path} is no checkpoint, or a damaged one: {error}") from None
