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
    ("n", "layers", "kernels", "refusal"),
    [
        (2, ["a", "b"], ["a", "b"], ""),
        (2, ["a"], ["a"], ""),  # kernels take no layer whose columns are no multiple of 4, and no mask has it
        (2, ["a"], ["a", "b"], "layer b is left out, or a part of it"),
        (2, ["a", "b"], ["a"], "layer b has no kernels here"),
        (1, ["a", "b"], ["a", "b"], "layer a would be masked 1:4"),
    ],
)
def test_a_mask_that_needs_other_slots_is_refused_where_there_can_be_none_and_others_are_not(
    manager, tmp_path, n, layers, kernels, refusal
):
    """Captured graphs would go on reading slots that such a mask replaces, or read none.

    And slots of int8 would grow by 60 %, to one byte a weight; a layer that has such ones from the start may
    have any mask.
    """
    packed = {layer: torch.zeros(2, 1, dtype=torch.uint8) for layer in layers}
    path = tmp_path / "odd.safetensors"
    sha256 = maskset.save(MaskSet(n, 4, "base", dict.fromkeys(layers, (2, 8)), packed), path)
    request = LoRARequest("odd", 1, f"{path}#{sha256}")
    manager.parts = {name: {name: Shard((2, 8), (range(2),), range(8))} for name in ("a", "b")}
    for name in manager.parts:
        manager.layers[name] = torch.nn.Module()
        manager.layers[name].slots = torch.nn.Buffer(torch.zeros(1, dtype=torch.int32).bool())
        if name in kernels:
            manager.layers[name].slots = torch.nn.Buffer(torch.zeros(1, dtype=torch.int32))
    assert until_read(manager, request) == ""
    manager.remove_adapter(1)
    manager.captures = True
    said = until_read(manager, request)
    assert said == (refusal and f"{refusal}, which needs the server's option --enforce-eager")
    manager.captures, manager.mask_dtype = False, torch.int8
    manager.remove_adapter(1)
    said = until_read(manager, request)
    grows = refusal and "has no kernels here" not in refusal
    assert said == (f"{refusal}, which needs the server's option --mask-dtype auto" if grows else "")


def test_a_gpu_s_swap_is_counted_when_the_gpu_has_done_it(manager, monkeypatch):
    """What it takes is what the GPU takes: 1.5 ms, however long it was asked before."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.number = len(done)
            done.append(False)

        def query(self):
            return done[self.number]

        def synchronize(self):
            done[: self.number + 1] = [True] * (self.number + 1)

        def elapsed_time(self, end):
            return 1.5 * (end.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    manager.device = torch.device("cuda")
    for mask_id in (1, 2):
        manager.packed[mask_id], manager.names[mask_id] = MaskSet(2, 4, "base", {}, {}), f"m{mask_id}"
        manager.pin(mask_id, True)
    assert manager.stats()["swaps"] == {}
    done[:2] = [True, True]
    ((counts, seconds),) = manager.stats()["swaps"].values()
    assert (sum(counts), seconds) == (1, 0.0015)
    assert manager.stats()["swapped"]["host"] == {"m1": 1}
    manager.forget("m2")  # which waits for the GPU
    assert manager.stats()["swapped"]["host"] == {"m1": 1}
    assert manager.stats()["swaps"]["host"][1] == 0.003


def test_masks_for_a_gpu_are_pinned_layer_by_layer(manager, tmp_path, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.nbytes) or self.clone())
    request = saved(tmp_path / "a.safetensors")
    assert until_read(manager, request) == ""
    assert pinned == []
    manager.remove_adapter(1)
    manager.device = torch.device("cuda")
    assert until_read(manager, request) == ""
    assert pinned == [ROWS * COLUMNS // 12]


def test_a_mask_is_pinned_after_one_that_made_slots_anew_in_a_step(manager):
    """vLLM's steps are in torch's inference mode, and what is made there cannot be written in any other."""
    manager.parts = {"a": {"a": Shard((2, 8), (range(2),), range(8))}}
    manager.layers["a"] = torch.nn.Module()
    manager.layers["a"].weight = torch.nn.Parameter(torch.ones(2, 8), requires_grad=False)
    manager.layers["a"].slots = torch.nn.Buffer(torch.zeros(2, 4, dtype=torch.int32))
    packed = {"a": torch.zeros(2, 1, dtype=torch.uint8)}
    for mask_id, n in ((1, 1), (2, 2)):
        manager.packed[mask_id], manager.names[mask_id] = (
            MaskSet(n, 4, "base", {"a": (2, 8)}, packed),
            f"m{mask_id}",
        )
    with torch.inference_mode():
        manager.set_active_adapters((), LoRAMapping((1,), (1,)))
    manager.pin(2, True)
    assert manager.resident == {1: 0, 2: 1}
    assert manager.layers["a"].slots.sum((1, 2)).tolist() == [4, 8]


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
