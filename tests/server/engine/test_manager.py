"""Masks come into a worker's memory beside its steps."""

import time
from pathlib import Path

import pytest
import torch
from vllm.config import LoRAConfig, VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

from maskllm.core import maskset
from maskllm.core.maskset import MaskSet
from maskllm.kernels import DENSE
from server.engine import linear
from server.engine.manager import MaskManager
from server.engine.shards import Shard
from server.metrics import SWAP_SECONDS

LAYER, ROWS, COLUMNS = "model.layer", 8192, 288_000
"""2,359 M weights; twelve of them, three groups, in a byte: 196.6 MB."""


@pytest.fixture
def manager() -> MaskManager:
    config = VllmConfig(lora_config=LoRAConfig(max_loras=2, max_cpu_loras=2, lora_dtype="bfloat16"))
    manager = MaskManager(config, torch.device("cpu"), None)
    manager.parts = {LAYER: {LAYER: Shard((ROWS, COLUMNS), (range(ROWS),), range(COLUMNS))}}
    return manager


def saved(path: Path, rows: int = ROWS, mask_id: int = 1) -> LoRARequest:
    """A mask of the layer's first rows, all groups of one pattern, as the API names it to the worker."""
    packed = {LAYER: torch.zeros(rows, COLUMNS // 12, dtype=torch.uint8)}
    sha256 = maskset.save(MaskSet(2, 4, "base", {LAYER: (rows, COLUMNS)}, packed), path)
    return LoRARequest(path.stem, mask_id, f"{path}#{sha256}")


def until_read(manager: MaskManager, request: LoRARequest) -> str:
    while (refusal := manager.read(request.lora_int_id, request.lora_path)) is None:
        time.sleep(0.001)
    return refusal


def test_steps_go_on_while_a_mask_of_200_mb_is_read(manager, tmp_path):
    request = saved(tmp_path / "big.safetensors")
    mapping, calls = LoRAMapping((0,) * 64, (0,) * 64), []
    begin = time.perf_counter()
    while manager.read(1, request.lora_path) is None:
        before = time.perf_counter()
        manager.set_active_adapters((), mapping)
        manager.stats()
        calls.append(time.perf_counter() - before)
    took = time.perf_counter() - begin
    assert sorted(calls)[len(calls) // 2] < 0.005
    assert max(calls) < took / 2  # none waited for the file
    assert manager.list_adapters() == set()

    before = time.perf_counter()
    assert manager.add_adapter(request)
    assert time.perf_counter() - before < took / 2
    assert manager.stats()["packed_bytes"] == {"big": ROWS * COLUMNS // 12}
    assert manager.reads == {}
    (counts, seconds), *others = manager.stats()["swaps"].values()
    assert (others, sum(counts)) == ([], 1)
    slowest = SWAP_SECONDS[counts.index(1)]
    assert slowest / 2**0.5 < seconds <= slowest


def test_two_masks_are_read_at_the_same_time(manager, tmp_path):
    requests = [saved(tmp_path / f"{i}.safetensors", mask_id=i) for i in (1, 2)]
    assert [manager.read(r.lora_int_id, r.lora_path) for r in requests] == [None, None]
    assert [until_read(manager, request) for request in requests] == ["", ""]
    assert all(manager.add_adapter(request) for request in requests)
    assert manager.list_adapters() == {1, 2}


def test_a_file_that_cannot_be_read_any_more_is_refused_with_its_reason_and_leaves_nothing(manager, tmp_path):
    path = tmp_path / "a.safetensors"
    wrong, gone, folder, changed = (saved(path, rows=8, mask_id=i) for i in range(1, 5))
    assert "model.layer is (8, 288000), but (8192, 288000) in the engine's model" in until_read(
        manager, wrong
    )
    path.write_bytes(path.read_bytes()[:-1])
    assert until_read(manager, changed) == "a.safetensors has changed since it was registered"
    path.unlink()
    assert until_read(manager, gone) == "no file 'a.safetensors' in the masks folder"
    path.mkdir()
    assert until_read(manager, folder) == "a.safetensors cannot be read: Is a directory"
    assert not any(manager.add_adapter(request) for request in (wrong, gone, folder, changed))
    assert (manager.packed, manager.names, manager.reads) == ({}, {}, {})
    assert manager.stats()["swaps"] == {}


@pytest.mark.parametrize(
    ("n", "layers", "message"),
    [(1, [LAYER], "it is 1:4 or leaves out"), (2, [], "it is 2:4 or leaves out")],
)
def test_where_cuda_graphs_serve_a_mask_that_kernels_do_not_take_is_refused(
    manager, tmp_path, n, layers, message
):
    """A captured graph would go on reading the slots that such a mask replaces by the reference's."""
    manager.parts = {LAYER: {LAYER: Shard((2, 8), (range(2),), range(8))}}
    packed = {layer: torch.zeros(2, 1, dtype=torch.uint8) for layer in layers}
    path = tmp_path / "odd.safetensors"
    sha256 = maskset.save(MaskSet(n, 4, "base", dict.fromkeys(layers, (2, 8)), packed), path)
    request = LoRARequest("odd", 1, f"{path}#{sha256}")
    assert until_read(manager, request) == ""
    manager.remove_adapter(1)
    manager.captures = True
    assert message in until_read(manager, request)
    assert "start the server with --enforce-eager" in until_read(manager, request)


def test_a_graph_is_captured_for_any_masks_with_vllm_s_stand_ins_and_for_none_without(manager, monkeypatch):
    noted = []
    manager.device, manager.captures, manager.captured_rows = torch.device("cuda"), True, 64
    monkeypatch.setattr(linear, "begin_capture", lambda rows, _: noted.append(rows))
    monkeypatch.setattr(linear, "begin_step", lambda *step: noted.append(step))
    manager.add_dummy_lora(LoRARequest("warmup_1", 1, "/none"), 8)
    manager.set_active_adapters((), LoRAMapping((1, 1, 1), (1, 1, 1)))
    manager.set_active_adapters((), LoRAMapping((0, 0), (0, 0)))
    manager.remove_all_adapters()
    manager.packed[1], manager.resident[1] = MaskSet(2, 4, "base", {}, {}), 1
    manager.set_active_adapters((), LoRAMapping((1, 0), (1, 0)))
    assert noted == [3, (None, manager.device), ([1, DENSE], manager.device, 64)]


def test_a_load_that_nobody_waits_for_any_more_leaves_nothing(manager, tmp_path):
    request = saved(tmp_path / "big.safetensors")
    assert manager.read(1, request.lora_path) is None
    manager.remove_adapter(1)
    assert (manager.packed, manager.reads) == ({}, {})
