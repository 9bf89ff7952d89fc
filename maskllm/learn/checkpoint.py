"""The state of an unfinished run in one `.safetensors` file, from which it goes on bit for bit.

For each gate its logits, their two AdamW moments and the codes of its prior; the state of every random
generator; and in the header the step, and what the run depends on: base, training text and settings.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskllm.learn.gates import Gate

KEY = "maskllm-checkpoint"
MOMENTS = ("exp_avg", "exp_avg_sq")


class CannotResume(ValueError):
    """No checkpoint to go on from, one that is damaged, or one of another run."""


def save(
    path: Path,
    identity: Mapping[str, Any],
    step: int,
    gates: Mapping[str, Gate],
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
) -> None:
    """Write the state after `step` steps whole or not at all; the last one stays until then."""
    tensors = {f"generator.{name}": generator.get_state() for name, generator in generators.items()}
    for name, gate in gates.items():
        tensors |= {f"{name}.logits": gate.logits.detach(), f"{name}.prior": gate.prior}
        tensors |= {f"{name}.{moment}": optimizer.state[gate.logits][moment] for moment in MOMENTS}
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        safetensors.torch.save_file(tensors, partial, {KEY: json.dumps({"step": step, **identity})})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def restore(
    path: Path,
    identity: Mapping[str, Any],
    gates: Mapping[str, Gate],
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
) -> int:
    """Put the saved state back in place, and return how many steps it has behind it."""
    header, tensors = _read(path)
    for name, now in identity.items():
        if header.get(name) != now:
            raise CannotResume(f"{path} is of another run: {name} was {header.get(name)}, and is {now}")
    for name, generator in generators.items():
        generator.set_state(tensors[f"generator.{name}"])
    for name, gate in gates.items():
        gate.logits.copy_(tensors[f"{name}.logits"])
        gate.prior.copy_(tensors[f"{name}.prior"])
        optimizer.state[gate.logits] = {
            "step": torch.tensor(float(header["step"]), device=gate.logits.device),
            **{moment: tensors[f"{name}.{moment}"].to(gate.logits.device) for moment in MOMENTS},
        }
    return int(header["step"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CannotResume(f"there is no {path} to resume from: start without --resume")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()[KEY])
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise CannotResume(f"{path} is no checkpoint, or a damaged one: {error}") from None
