"""What a rank holds of a weight that vLLM divides among several, and so of its mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from maskllm.core.maskset import MaskError, MaskSet
from maskllm.core.patterns import pack, unpack

ONE_THREAD = 30_000
"""Elements that torch works on with the calling thread alone; from 32,768 on it takes others."""


class CannotShard(ValueError):
    """A layer of which it is not known here how vLLM divides it."""


@dataclass(frozen=True)
class Shard:
    """A rank's part of a checkpoint's weight: these rows, one range after the other, and these columns."""

    whole: tuple[int, int]
    rows: tuple[range, ...]
    columns: range

    @property
    def shape(self) -> tuple[int, int]:
        return sum(map(len, self.rows)), len(self.columns)


def shards(layer: LinearBase, names: Sequence[str]) -> dict[str, Shard]:
    """The layer's part of each of the checkpoint's weights that it is put together from.

    As vLLM's loaders divide them: row-parallel layers by columns, all others by rows, each output of a merged
    one by itself. Where there are more ranks than key and value heads, several have the same. Raises
    CannotShard.
    """
    rank, size = layer.tp_rank, layer.tp_size
    outputs = getattr(layer, "output_sizes", [layer.output_size])
    copies = [1] * len(outputs)
    columns = range(layer.input_size)
    if isinstance(layer, ReplicatedLinear):
        rank, size = 0, 1
    elif type(layer) is RowParallelLinear:
        width = layer.input_size_per_partition
        columns = range(rank * width, (rank + 1) * width)
        rank, size = 0, 1
    elif isinstance(layer, QKVParallelLinear):  # its output_sizes count each copy
        copies[1:3] = [layer.num_kv_head_replicas] * 2
    known = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)
    if size > 1 and type(layer) not in known:
        raise CannotShard(f"layer {layer.prefix}: masks of a {type(layer).__name__} cannot be divided yet")
    wholes, rows = [], []
    for output, copy in zip(outputs, copies, strict=True):
        wholes.append(output // copy)
        height = output // size
        rows.append(range(rank // copy * height, (rank // copy + 1) * height))
    if len(names) > 1:
        shapes = zip(wholes, rows, strict=True)
        parts = [Shard((whole, layer.input_size), (own,), columns) for whole, own in shapes]
    else:  # Phi-3's checkpoint is fused itself: three outputs, and still one part
        starts = accumulate(wholes, initial=0)
        own = tuple(range(at + r.start, at + r.stop) for at, r in zip(starts, rows, strict=False))
        parts = [Shard((sum(wholes), layer.input_size), own, columns)]
    return dict(zip(names, parts, strict=True))


def shard(mask_set: MaskSet, parts: Mapping[str, Shard]) -> MaskSet:
    """The rank's part of a mask, packed like a mask of its own; layers that are not in `parts` do not matter.

    Raises MaskError where a group would be divided.
    """
    if all(parts[layer].shape == shape for layer, shape in mask_set.shapes.items()):
        return mask_set
    packed = {layer: _cut(mask_set, layer, parts[layer]) for layer in mask_set.shapes}
    return replace(mask_set, shapes={layer: parts[layer].shape for layer in packed}, packed=packed)


def _cut(mask_set: MaskSet, layer: str, part: Shard) -> Tensor:
    """A copy, or the whole file would stay in memory. Codes of two ranks may share a byte."""
    n, m, columns = mask_set.n, mask_set.m, part.columns
    if columns.start % m or columns.stop % m:
        raise MaskError(f"layer {layer}: {len(columns)} columns a rank are no whole groups of {m} weights")
    groups = part.whole[1] // m
    first, last = columns.start // m, columns.stop // m
    height = max(1, ONE_THREAD // groups)
    cut = []
    for rows in part.rows:
        for start in range(rows.start, rows.stop, height):
            some = mask_set.packed[layer][start : min(start + height, rows.stop)]
            if last - first < groups:
                some = pack(unpack(some, groups, n, m)[:, first:last], n, m)
            cut.append(some)
    return torch.cat(cut)
