"""How fast the kernels are on this machine, against the best that torch has, in the same run.

Every contender takes its turn in every round, on weights that rotate through more memory than caches hold,
so that drifts of a shared machine meet all alike; the figures are medians.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.nn import functional

from maskllm.core.patterns import best, encode, pack
from maskllm.kernels import DENSE, cpu
from maskllm.kernels.masked_linear import allocate, fill, masked_linear

POOL_BYTES = 200_000_000
"""Of int8 slots, the smallest weights, that are gone through before one is met again: with 32 MB of cache a
sixth may be found there, and of dense weights a twentieth."""
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (768, 768)]
ROWS = [1, 4, 16, 64, 128, 256, 512]
MASKS = [1, 2, 4, 8, 16]


class NoKernels(ValueError):
    """There is nothing here to measure."""


@dataclass(frozen=True)
class Time:
    """Milliseconds of one call: median, and the middle half."""

    ms: float
    low: float
    high: float


def interleave(
    contenders: dict[str, Callable[[int], object]], rounds: int, calls: int = 1
) -> dict[str, Time]:
    """Time of a call of each contender, which is called with a running number; two rounds warm up.

    The order is another in each round: who follows one that left the threads asleep, or other code in the
    caches, waits for them (0.70 ms where 0.59 is true). Short work makes several `calls` in a row, as its
    first one finds its own code out of cache.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name in Random(turn).sample(list(contenders), len(contenders)):
            work, begin = contenders[name], time.perf_counter()
            for call in range(turn * calls, (turn + 1) * calls):
                work(call)
            seconds[name].append((time.perf_counter() - begin) / calls)
    return {name: _time(values[2:]) for name, values in seconds.items()}


def _time(seconds: list[float]) -> Time:
    low, _, high = quantiles(seconds, n=4)
    return Time(median(seconds) * 1e3, low * 1e3, high * 1e3)


@dataclass
class Layer:
    """Weights (out, in) in turn, as every contender wants them."""

    shape: tuple[int, int]

    def __post_init__(self) -> None:
        outs, inputs = self.shape
        self.calls = max(1, (1 << 22) // (outs * inputs))
        self.count = min(512, max(2, -(-POOL_BYTES * 8 // (5 * outs * inputs))))
        # All in big pages, as the server has weights and slots.
        self.weights = [cpu.in_big_pages(torch.randn(self.shape).bfloat16()) for _ in range(self.count)]
        self.floats = [cpu.in_big_pages(weight.float()) for weight in self.weights[: max(2, self.count // 2)]]
        self.quantized = [_torch_int8(weight) for weight in self.floats]
        self.packed = pack(encode(best(torch.rand(self.shape))))
        self.bf16 = [self._slots(weight, torch.bfloat16) for weight in self.weights]
        self.int8 = [self._slots(weight, torch.int8) for weight in self.weights]
        self.dense_int8 = [cpu.quantize(weight) for weight in self.weights]

    def _slots(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        slots = allocate(weight, 1, dtype)
        fill(slots, 0, weight, self.packed)
        return slots

    def contenders(self, rows: int) -> dict[str, Callable[[int], object]]:
        """By name; `rows` inputs under one mask. Ours take bfloat16 inputs, "fp32 inputs" excepted.

        "Reading" does nothing but to read a slot: what no product with it can be faster than.

        Each goes through the pool from a place of its own: no one meets weights that another has just read.
        """
        x = torch.randn(rows, self.shape[1])
        half, masked = x.bfloat16(), torch.zeros(rows, dtype=torch.int32)
        dense = torch.full((rows,), DENSE, dtype=torch.int32)

        def ours(slots: list[Tensor], x: Tensor, rows: Tensor, place: float) -> Callable[[int], object]:
            start = int(place * self.count)

            def work(turn: int) -> None:
                at = (turn + start) % self.count
                masked_linear(x, self.weights[at], slots[at], rows, None)

            return work

        def dense_int8(turn: int) -> None:
            at = (turn + self.count // 2) % self.count
            masked_linear(half, self.weights[at], self.dense_int8[at], masked, None)

        def read(slots: list[Tensor]) -> Callable[[int], object]:
            numbers, start = [each.view(torch.int64) for each in slots], self.count // 3
            return lambda turn: cpu.read(numbers[(turn + start) % self.count])

        extra = {"ours, dense bf16": ours(self.bf16, half, dense, 0.5)}
        if rows > cpu.costs().dense_rows:  # it would be torch's
            extra.clear()
        linear, quantized = functional.linear, torch.ops.quantized.linear_dynamic
        if rows == 1:  # which torch has a faster product for
            extra["torch fp32, mv"] = lambda turn: torch.mv(self.floats[turn % len(self.floats)], x[0])
        return {
            "torch fp32": lambda turn: linear(x, self.floats[turn % len(self.floats)]),
            "torch bf16": lambda turn: linear(half, self.weights[turn % self.count]),
            "torch int8": lambda turn: quantized(x, self.quantized[turn % len(self.quantized)]),
            "2:4 bf16": ours(self.bf16, half, masked, 0),
            "2:4 bf16, fp32 inputs": ours(self.bf16, x, masked, 0.5),
            "2:4 int8": ours(self.int8, half, masked, 0),
            "ours, dense int8": dense_int8,
            "reading bf16": read(self.bf16),
            "reading int8": read(self.int8),
        } | extra

    def swap(self) -> dict[str, Callable[[int], object]]:
        """Writing a mask into a slot, against copying the dense weight."""
        count = len(self.weights)
        copies = [cpu.in_big_pages(weight) for weight in self.weights]  # not empty: pages must be there

        def swap(slots: list[Tensor], place: float) -> Callable[[int], object]:
            start = int(place * count)

            def work(turn: int) -> None:
                at = (turn + start) % count
                fill(slots[at], 0, self.weights[at], self.packed)

            return work

        return {
            "memcpy of the dense weight": lambda turn: copies[turn % count].copy_(self.weights[turn % count]),
            "swap bf16": swap(self.bf16, 1 / 3),
            "swap int8": swap(self.int8, 2 / 3),
        }


def many_masks(shape: tuple[int, int], rows: int, masks: int) -> dict[str, Callable[[int], object]]:
    """`rows` inputs under so many masks: each slot for its rows, the dense weight once, and the choice.

    Each goes through the weights from a place of its own, as a layer's contenders do.
    """
    count = 6
    weights = [cpu.in_big_pages(torch.randn(shape).bfloat16()) for _ in range(count)]
    packed = [pack(encode(best(torch.rand(shape)))) for _ in range(masks)]
    slots = [allocate(weight, masks, torch.bfloat16) for weight in weights]
    for weight, each in zip(weights, slots, strict=True):
        for slot in range(masks):
            fill(each, slot, weight, packed[slot])
    x, row_slots = torch.randn(rows, shape[1]).bfloat16(), torch.arange(rows, dtype=torch.int32) % masks

    def run(form: int, start: int) -> Callable[[int], object]:
        def work(turn: int) -> None:
            at = (turn + start) % count
            cpu.force_form(form)
            masked_linear(x, weights[at], slots[at], row_slots, None)
            cpu.force_form(-1)

        return work

    return {"each slot": run(0, 0), "dense once": run(1, 2), "chosen": run(-1, 4)}


def read_gb_s() -> float:
    """GB/s at which torch's threads together read memory in a plain loop."""
    memory = torch.empty(POOL_BYTES // 4, dtype=torch.int64)  # no cache holds a twelfth of it
    cpu.advise(memory)  # as slots are
    memory.zero_()
    took = interleave({"read": lambda _: cpu.read(memory)}, 15)["read"].ms
    return memory.nbytes / took / 1e6


def _torch_int8(weight: Tensor) -> object:
    """The weight packed for torch's dynamic int8 product, a scale for each row."""
    scales = weight.abs().amax(1) / 127
    with warnings.catch_warnings():  # torch means to drop these tensors; nothing else of its is int8 on a CPU
        warnings.simplefilter("ignore", UserWarning)
        rows = torch.quantize_per_channel(weight, scales, torch.zeros_like(scales).int(), 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(rows, None)
