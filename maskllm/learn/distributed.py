"""One run over many processes, started by torchrun: who is who, and how the model is spread.

ddp    every process holds the whole model; gradients of the logits are averaged once a step
fsdp   weights and logits are sharded by rows, each on its own (FSDP2), so that they shard alike; a block
       is gathered while it computes, and its gradients are averaged after every micro-batch
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous

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


class OneDevice(ValueError):
    """Processes that would share a GPU."""


@contextmanager
def world(device: str) -> Iterator[World]:
    """This process's world: torchrun's where its variables are set, else itself alone.

    The process that meets trouble first raises it, the others, which met the same or lost the first, end in
    silence. They end as if all were well, because torchrun ends every process once one has failed, and
    would cut off the one that speaks.
    """
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, device)
        return
    if device.startswith("cuda:"):
        raise OneDevice(f"every process has a GPU of its own: say cuda instead of {device}")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, device)
    except (Exception, KeyboardInterrupt):
        if store.add("in trouble", 1) > 1:
            raise SystemExit(0) from None
        raise
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, parallel: Parallel, world: World) -> None:
    """Have the processes start from the same parameters that learn, and shard all parameters for fsdp."""
    if world.size == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.detach(), 0)
    if parallel == "fsdp":
        mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
        for block in decoder_blocks(model).values():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def average_gradients(parameters: Iterable[nn.Parameter], parallel: Parallel, world: World) -> None:
    """For ddp; fsdp has done it. In place, where DistributedDataParallel would hold them twice while it
    accumulates."""
    if world.size == 1 or parallel == "fsdp":
        return
    for parameter in parameters:
        if parameter.grad is None:  # nothing in this process, but perhaps in others
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, dist.ReduceOp.AVG)


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
