"""A rank's part of a mask is that of its weight."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    DCPGroupColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from maskllm.core.maskset import MaskError, MaskSet
from maskllm.core.patterns import best, encode, pack
from server.engine.shards import CannotShard, Shard, shard, shards

HIDDEN = 24


def packed(mask: torch.Tensor, n: int = 2, m: int = 4) -> MaskSet:
    """A mask of one layer."""
    return MaskSet(n, m, "", {"layer": tuple(mask.shape)}, {"layer": pack(encode(mask, n, m), n, m)})


def by_rows(whole: tuple[int, int], *rows: range) -> dict[str, Shard]:
    return {"layer": Shard(whole, rows, range(whole[1]))}


def by_columns(whole: tuple[int, int], columns: range) -> dict[str, Shard]:
    return {"layer": Shard(whole, (range(whole[0]),), columns)}


def test_a_row_of_four_groups_is_divided_within_its_first_byte():
    """Codes 0 1 2 3: bytes 0 + 1 * 6 + 2 * 36 and 3. Of each rank: 0 + 1 * 6, and 2 + 3 * 6."""
    mask_set = MaskSet(2, 4, "", {"layer": (1, 16)}, {"layer": torch.tensor([[78, 3]], dtype=torch.uint8)})
    left = shard(mask_set, by_columns((1, 16), range(8)))
    right = shard(mask_set, by_columns((1, 16), range(8, 16)))
    assert left.packed["layer"].tolist() == [[6]]
    assert right.packed["layer"].tolist() == [[20]]
    assert left.shapes == right.shapes == {"layer": (1, 8)}


def test_rows_are_taken_as_they_are_and_from_several_ranges():
    mask_set = MaskSet(2, 4, "", {"layer": (6, 4)}, {"layer": torch.arange(6, dtype=torch.uint8)[:, None]})
    part = shard(mask_set, by_rows((6, 4), range(1, 3), range(5, 6)))
    assert part.packed["layer"].tolist() == [[1], [2], [5]]
    assert part.shapes == {"layer": (3, 4)}


@given(
    st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (8, 16)]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(0, 9),
)
def test_the_shards_of_all_ranks_together_are_the_mask(pattern, size, height, groups, seed):
    n, m = pattern
    noise = torch.Generator().manual_seed(seed)
    mask = best(torch.rand(size * height, size * groups * m, generator=noise), n, m)
    mask_set, (rows, columns) = packed(mask, n, m), mask.shape
    width = groups * m
    across = [
        shard(mask_set, by_columns((rows, columns), range(rank * width, (rank + 1) * width)))
        for rank in range(size)
    ]
    down = [
        shard(mask_set, by_rows((rows, columns), range(rank * height, (rank + 1) * height)))
        for rank in range(size)
    ]
    assert torch.equal(torch.cat([part.mask("layer") for part in across], dim=1), mask)
    assert torch.equal(torch.cat([part.mask("layer") for part in down]), mask)


def test_a_rank_holds_no_more_than_its_shard():
    mask_set = packed(best(torch.rand(8, 48)))
    for part in (by_rows((8, 48), range(4)), by_columns((8, 48), range(24))):
        own = shard(mask_set, part).packed["layer"]
        assert own.untyped_storage().nbytes() == own.nbytes == 16  # 4 rows of 4 bytes, and 8 of 2


def test_a_mask_that_is_not_divided_is_not_copied():
    mask_set = packed(best(torch.rand(8, 48)))
    assert shard(mask_set, by_rows((8, 48), range(8))) is mask_set


def test_a_group_that_two_ranks_would_share_is_refused():
    mask_set = packed(best(torch.rand(1, 12)))
    with pytest.raises(MaskError, match="layer: 6 columns a rank are no whole groups of 4 weights"):
        shard(mask_set, by_columns((1, 12), range(6, 12)))


def test_masks_are_divided_without_the_threads_of_the_steps():
    mask_set, threads = packed(best(torch.rand(512, 4096))), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as reader:
            reader.submit(threading.get_ident).result()
            before = psutil.Process().num_threads()
            reader.submit(shard, mask_set, by_columns((512, 4096), range(2048, 4096))).result()
            assert psutil.Process().num_threads() == before
    finally:
        torch.set_num_threads(threads)


# vLLM's own layers and loaders, as one of several ranks.


@contextmanager
def as_rank(rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM asks its process group, which one process has none of, who it is."""
    group = SimpleNamespace(rank_in_group=rank, world_size=size)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
    with set_current_vllm_config(VllmConfig()):
        yield


def qkv(heads: int, kv_heads: int) -> tuple[LinearBase, dict[str, int]]:
    """With heads of 4 rows each."""
    layer = QKVParallelLinear(HIDDEN, 4, heads, kv_heads, bias=False)
    return layer, {"q": 4 * heads, "k": 4 * kv_heads, "v": 4 * kv_heads}


def loaded(layer: LinearBase, names: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What vLLM's loader and `shards` make of weights of so many rows, in which every number is another."""
    wholes, at = {}, 0
    for name, rows in names.items():
        wholes[name] = torch.arange(at, at + rows * HIDDEN).view(rows, HIDDEN).float()
        at += rows * HIDDEN
        fused = [name] if len(names) > 1 else []
        layer.weight.weight_loader(layer.weight, wholes[name], *fused)
    ours = []
    for name, part in shards(layer, list(names)).items():
        assert part.whole == wholes[name].shape
        rows = torch.cat([wholes[name][rows.start : rows.stop] for rows in part.rows])
        ours.append(rows[:, part.columns.start : part.columns.stop])
    return layer.weight.data, torch.cat(ours)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (2, 4), (3, 4)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_queries_keys_and_values_are_divided_by_heads_and_keys_are_copied_where_there_are_few(
    rank, size, kv_heads, monkeypatch
):
    with as_rank(rank, size, monkeypatch):
        theirs, ours = loaded(*qkv(8, kv_heads))
    assert torch.equal(theirs, ours)


def test_two_of_four_ranks_have_the_same_keys_where_there_are_two_heads_of_them(monkeypatch):
    keys = []
    for rank in range(4):
        with as_rank(rank, 4, monkeypatch):
            layer, names = qkv(8, 2)
            keys.append(shards(layer, list(names))["k"])
    assert [part.rows for part in keys] == [(range(4),), (range(4),), (range(4, 8),), (range(4, 8),)]
    assert {part.whole for part in keys} == {(8, HIDDEN)}


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: (MergedColumnParallelLinear(HIDDEN, [8, 16], bias=False), {0: 8, 1: 16}),
        lambda: (RowParallelLinear(HIDDEN, 6, bias=False), {"o": 6}),
        lambda: (ColumnParallelLinear(HIDDEN, 6, bias=False), {"o": 6}),
        lambda: (ReplicatedLinear(HIDDEN, 6, bias=False), {"o": 6}),
        # Fused in the checkpoint, as Phi-3's are.
        lambda: (qkv(8, 2)[0], {"qkv": 48}),
        lambda: (qkv(8, 1)[0], {"qkv": 40}),
        lambda: (MergedColumnParallelLinear(HIDDEN, [8, 8], bias=False), {"gate_up": 16}),
    ],
)
def test_every_layer_is_divided_as_its_weight_is(make, rank, size, monkeypatch):
    with as_rank(rank, size, monkeypatch):
        theirs, ours = loaded(*make())
    assert torch.equal(theirs, ours)


def test_a_layer_that_is_divided_in_another_way_is_refused(monkeypatch):
    with as_rank(0, 2, monkeypatch):
        layer = DCPGroupColumnParallelLinear(HIDDEN, 8, bias=False, prefix="model.q_b_proj")
        with pytest.raises(CannotShard, match=r"model\.q_b_proj: masks of a DCPGroupColumnParallelLinear"):
            shards(layer, ["q"])
