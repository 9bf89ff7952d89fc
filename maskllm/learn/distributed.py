"""One run over many processes, started by torchrun: who is who, and how the model is spread.

ddp    every process holds the whole model, and gradients of the logits are averaged
fsdp   weights and logits are sharded row by row, each on its own (FSDP2), so that they shard alike
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from maskllm.core.layers import decoder_blocks
from maskllm.learn.config import Parallel


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    device: str

    @property
    def first(self) -> bool:
        """Whether this process shows and writes."""
        return self.rank == 0


@contextmanager
def world(device: str) -> Iterator[World]:
    """This process's world: torchrun's where its variables are set, else itself alone."""
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, parallel: Parallel, world: World) -> nn.Module:
    """The model to call for a loss, spread over the world; `model` itself where there is one process."""
    if world.size == 1:
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    for block in decoder_blocks(model).values():
        fully_shard(block)
    fully_shard(model)
    return model


def any_of(flag: bool, world: World) -> bool:
    """Whether the flag is up in any process, such as Ctrl-C that only one of them heard."""
    if world.size == 1:
        return flag
    flags = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def mean(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Each value's mean over the processes."""
    if world.size == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return dict(zip(values, (total / world.size).tolist(), strict=True))
