"""What a base and its masks take, against the files that hold them."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from maskllm import capacity
from maskllm.capacity import PROGRAMS_BYTES, Capacity, measure, measure_gpu
from maskllm.core import maskset
from maskllm.kernels import cpu

DEMO = Path(__file__).parents[2] / "examples/demo"
HEAD = 4096 * 256
"""Its weights, bfloat16."""


def tensors() -> int:
    """Bytes of the base's file."""
    with safe_open(DEMO / "base/model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(("bf16", "copies"), [(True, 0), (False, 1)])
def test_a_base_takes_its_tensors_and_a_head_that_our_kernel_does_not_read_a_copy(monkeypatch, bf16, copies):
    monkeypatch.setattr(capacity, "bf16_on_cpu", lambda: bf16)
    monkeypatch.setattr(capacity, "holds_bf16", lambda _: False)  # as where there are no kernels
    assert measure(DEMO / "base").base == tensors()  # bfloat16, which nothing packs
    assert measure(DEMO / "base", torch.float32).base == 2 * tensors() + copies * HEAD * 4


def test_linear_layers_of_a_bfloat16_checkpoint_stay_so_under_every_dtype(monkeypatch):
    monkeypatch.setattr(capacity, "holds_bf16", lambda _: True)
    linear = 2 * maskset.load(DEMO / "masks/legal.safetensors").weights
    others = 2 * (tensors() - linear)  # embeddings and norms as float32
    assert measure(DEMO / "base", torch.float32).base == linear + others + 2 * HEAD  # which is tied
    assert measure(DEMO / "base", torch.bfloat16).base == tensors()
    assert measure(DEMO / "base", torch.float16).base == tensors() + 2 * HEAD


def test_without_kernels_a_head_in_8_bits_is_counted_as_a_byte_a_weight(monkeypatch):
    monkeypatch.setattr(cpu, "_library", lambda: None)  # the server refuses one, `maskllm inspect` can ask
    assert measure(DEMO / "base", int8_head=True).base == measure(DEMO / "base").base + HEAD


def test_a_mask_takes_what_its_file_holds():
    mask = maskset.load(DEMO / "masks/legal.safetensors")
    fits = measure(DEMO / "base", kv=7)
    assert fits.packed == sum(packed.nbytes for packed in mask.packed.values())
    bits = 8 if cpu.why_not() else 9  # a bool each, or 16 bits for half of them and a bit each
    assert fits.slot == mask.weights * bits / 8
    assert fits.kv == 7


def test_as_many_masks_fit_as_the_sum_leaves_room_for():
    fits = Capacity(base=100, slot=10, packed=1, kv=50, free=PROGRAMS_BYTES + 100 + 50 + 115)
    assert fits.most_slots() == 10  # 11 bytes each
    assert fits.needs(10, 10) <= fits.free < fits.needs(11, 11)
    assert fits.most_packed(slots=8) == 35
    assert fits.needs(8, 35) == fits.free
    assert Capacity(100, 10, 1, 50, free=20).most_slots() == 0


def test_two_processes_divide_a_base_and_its_masks_and_have_a_kv_cache_each():
    one, two = measure(DEMO / "base", kv=7), measure(DEMO / "base", kv=7, ranks=2)
    assert (two.base, two.slot, two.packed) == (one.base, one.slot, one.packed)
    assert two.kv == 14
    assert two.needs(0, 0) - one.needs(0, 0) == 7 + 2 * 750_000_000


def test_a_gpu_holds_base_slots_and_kv_and_of_two_each_its_half():
    weights = maskset.load(DEMO / "masks/legal.safetensors").weights
    one, two = (measure_gpu(DEMO / "base", free=10**9, kv=7, ranks=ranks) for ranks in (1, 2))
    assert one.base == tensors()
    # Half the weights as 16 bits, a bit each for where they belong, and another for cuSPARSELt.
    assert weights * 10 / 8 <= one.slot < weights * 10 / 8 * 1.01
    assert one.needs(3, 99) == one.base + 3 * one.slot + 7
    assert one.most_slots() == (10**9 - one.base - 7) // one.slot
    assert (two.base, two.slot, two.kv) == (one.base // 2, one.slot // 2, 7)


@pytest.mark.parametrize(("limit", "left"), [("5000", 4700), ("max", None)])
def test_in_a_container_its_limit_counts(tmp_path: Path, monkeypatch, limit: str, left: int | None):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("1000\n")  # of which 700 are files that were read
    (tmp_path / "memory.stat").write_text("anon 300\nfile 700\ninactive_file 600\nactive_file 100\n")
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    assert (capacity.free_bytes() == left) == (left is not None)


@pytest.mark.parametrize(
    ("limit", "threads"),
    [("max 100000", 7), ("200000 100000", 1), ("350000 100000", 2), ("50000 100000", 1), ("900000 50000", 7)],
)
def test_an_engine_leaves_one_of_the_cores_that_it_may_use(
    tmp_path: Path, monkeypatch, limit: str, threads: int
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    assert capacity.engine_threads() == 7  # no container
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert capacity.engine_threads() == threads
    for given, told in {"5,2": 5, "0": threads, "": threads}.items():  # OpenMP takes no 0
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert capacity.engine_threads() == told
