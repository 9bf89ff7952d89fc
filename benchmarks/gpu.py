"""How fast masked layers of LLaMA-2 7B are on this GPU, against dense ones: python benchmarks/gpu.py

bf16. Decode is captured in a CUDA graph, prefill is not, as in the server. Dense (cuBLAS) and masked take
turns, each time over copies of the weights that no cache can hold; figures are medians of 30 turns. A layer
is four weights 4096x4096, two 11008x4096 and one 4096x11008; a swap writes one mask into all 32 layers.
Writes benchmarks/gpu-NAME.json, NAME being the GPU's.
"""

import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from report import Row, write
from torch import Tensor
from torch.nn import functional

from maskllm.core.patterns import best, encode, pack
from maskllm.kernels import gpu

SHAPES = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
"""The weights of a layer, and how many it has of each."""
WEIGHTS = sum(count * outs * ins for (outs, ins), count in SHAPES.items())
BYTES_READ, BYTES_SWAPPED = 9 / 8, 2 + 1 / 12 + 9 / 8
"""A weight: by a step of one mask, and by a swap that reads base and packed mask and writes a slot."""
LAYERS, COPIES, SLOTS, TURNS = 32, 8, 8, 30
HELD = (1, 1), (16, 1)
"""The batches and masks that have a must."""
MUST_DECODE, AIM_DECODE = 1.4, 1.6
MUST_PREFILL, AIM_PREFILL = 1.3, 1.6
MUST_SWAP_MS, AIM_SWAP_MS = 10.0, 6.0


@dataclass(frozen=True)
class Layer:
    """One weight, its slots, and the packed mask that all of them hold, on the GPU and pinned."""

    weight: Tensor
    slots: Tensor
    packed: Tensor
    pinned: Tensor


def main() -> None:
    if reason := gpu.why_not():
        sys.exit(f"nothing to measure on: {reason}")
    copies = {shape: [layer(*shape) for _ in range(COPIES)] for shape in SHAPES}
    rows = [Row("a copy in memory | GB/s", copy_speed(), "GB/s", better="higher")]
    for batch, masks in ((1, 1), (2, 1), (8, 1), (16, 1), (32, 1), (64, 1), (16, 4), (16, 8)):
        name = f"decode, batch {batch}" + (f", {masks} masks" if masks > 1 else "")
        rows += ratios(
            name, copies, batch, masks, MUST_DECODE if (batch, masks) in HELD else None, AIM_DECODE
        )
    rows += ratios("prefill, 2048 tokens", copies, 2048, 1, MUST_PREFILL, AIM_PREFILL)
    rows += swaps(copies)
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    note = (
        "x: times as fast as dense bf16 by cuBLAS in the same run; ms: one mask swapped in all 32 layers; "
        f"torch {torch.__version__}, triton {triton.__version__}"
    )
    write(f"gpu-{slug}", "make gpu", rows, note, of="LLaMA-2 7B")


def layer(outs: int, ins: int) -> Layer:
    weight = torch.randn(outs, ins, dtype=torch.bfloat16, device="cuda")
    slots = gpu.allocate(weight, SLOTS, weight.dtype)
    packed = pack(encode(best(torch.rand(outs, ins, device="cuda"))))
    for slot in range(SLOTS):
        gpu.fill_layers(slot, [(slots, weight, packed)])
    return Layer(weight, slots, packed, packed.cpu().pin_memory())


def ratios(
    name: str,
    copies: dict[tuple[int, int], list[Layer]],
    batch: int,
    masks: int,
    must: float | None,
    aim: float,
) -> list[Row]:
    """How many times as fast as dense each shape is, and a whole layer; and how fast it reads one mask."""
    row_slots = torch.arange(batch, dtype=torch.int32, device="cuda") % masks
    captured = batch <= gpu.FEW_ROWS
    present = None if captured else (0,)
    rows, dense_layer, masked_layer = [], 0.0, 0.0
    for shape, count in SHAPES.items():
        x = torch.randn(batch, shape[1], dtype=torch.bfloat16, device="cuda")

        def dense(x: Tensor = x, layers: list[Layer] = copies[shape]) -> None:
            for one in layers:
                functional.linear(x, one.weight)

        def masked(x: Tensor = x, layers: list[Layer] = copies[shape]) -> None:
            for one in layers:
                gpu.linear(x, one.weight, one.slots, row_slots, None, present)

        dense_ms, masked_ms = in_turns([graph(work) if captured else work for work in (dense, masked)])
        rows.append(Row(f"{name} | {shape[0]}x{shape[1]}, x", dense_ms / masked_ms, "x", better="higher"))
        dense_layer, masked_layer = dense_layer + count * dense_ms, masked_layer + count * masked_ms
    ratio = dense_layer / masked_layer
    rows.append(Row(f"{name} | layer, x", ratio, "x", must, aim if must else None, better="higher"))
    if captured and masks == 1:
        speed = COPIES * WEIGHTS * BYTES_READ / masked_layer / 1e6
        rows.append(Row(f"{name} | GB/s", speed, "GB/s", better="higher"))
    return rows


def swaps(copies: dict[tuple[int, int], list[Layer]]) -> list[Row]:
    """Milliseconds to write one mask into all layers, from packed masks on the GPU and in host memory."""
    layers = [
        copies[shape][index % COPIES] for shape, count in SHAPES.items() for index in range(LAYERS * count)
    ]

    def from_gpu() -> None:
        gpu.fill_layers(0, ((one.slots, one.weight, one.packed) for one in layers))

    def from_host() -> None:
        gpu.fill_layers(0, ((one.slots, one.weight, one.pinned) for one in layers))

    gpu_ms, host_ms = in_turns([from_gpu, from_host])
    speed = LAYERS * WEIGHTS * BYTES_SWAPPED / gpu_ms / 1e6
    return [
        Row("swap, packed mask on the GPU | ms", gpu_ms, "ms", MUST_SWAP_MS, AIM_SWAP_MS),
        Row("swap, packed mask on the GPU | GB/s", speed, "GB/s", better="higher"),
        Row("swap, packed mask in host memory | ms", host_ms, "ms"),
    ]


def copy_speed() -> float:
    """GB read and written a second by a copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    (ms,) = in_turns([lambda: target.copy_(source)])
    return 2 * source.nbytes / ms / 1e6


def graph(work: Callable[[], object]) -> Callable[[], object]:
    """The work as a captured CUDA graph."""
    work()  # compiled before the capture
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        work()
    return captured.replay


def in_turns(works: list[Callable[[], object]]) -> list[float]:
    """Median milliseconds of each work; they take turns, so that a slow moment hits all of them."""
    times: list[list[float]] = [[] for _ in works]
    for work in works * 3:
        work()
    for _ in range(TURNS):
        for work, of_work in zip(works, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            of_work.append(begin.elapsed_time(end))
    return [statistics.median(of_work) for of_work in times]


if __name__ == "__main__":
    main()
