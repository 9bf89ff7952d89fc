"""The GPU's linear layer in which every row has its own mask, or none: slots of 9 bits a weight.

A slot holds the weights that its mask keeps and where they belong (`triton_kernels` draws it), so a step of
few rows reads little more than half of what a dense one reads. Slots never move and no kernel asks the host
which rows use which: a CUDA graph captured once serves every later swap.
"""

from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from maskllm.kernels import DENSE, cusparselt

with suppress(ImportError):  # why_not() says so
    from maskllm.kernels import triton_kernels as kernels

FEW_ROWS = 64
"""Up to here a step is bound by reading weights, and beyond by multiplying."""
FEW_TILE = {"ROWS": 16, "OUTS": 32, "STAGES": 6}
SOME_TILE = {"ROWS": 32, "OUTS": 64, "STAGES": 3}
MANY_TILE, MANY_OPTIONS = {"ROWS": 128, "OUTS": 128, "INS": 64}, {"num_warps": 8, "num_stages": 3}
"""Tiles of up to 16 rows, up to FEW_ROWS, and more. Compiled for sm_80, sm_90 and sm_100 none spills, and all
keep as many loads in flight as 99 KiB of shared memory hold, the least among these GPUs (sm_86)."""


def why_not() -> str | None:
    """Why this backend cannot be used on this machine; None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {major}.{minor}; 8.0 (A100) or newer is needed"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def using() -> str:
    """The GPU and the architecture that kernels are compiled for."""
    major, minor = torch.cuda.get_device_capability()
    return f"triton, {torch.cuda.get_device_name()}, sm_{major}{minor}"


def allocate(weight: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Empty slots for `count` masks of a weight (out, in), (count, words) int32 on its device."""
    if dtype not in (torch.bfloat16, torch.float16) or weight.dtype != dtype:
        raise ValueError(
            f"slots of {dtype} for weights of {weight.dtype}: on a GPU both are bfloat16 or both are float16"
        )
    if weight.shape[1] % 4 or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} is no contiguous matrix of whole groups of 4 inputs")
    return torch.zeros(count, Layout.of(weight).words, dtype=torch.int32, device=weight.device)


def fill(slots: Tensor, slot: int, weight: Tensor, packed: Tensor) -> None:
    """Make a mask resident in a slot, from its packed codes (out, row_bytes) uint8 on the GPU or pinned."""
    layout = Layout.of(weight)
    packed = packed.to(weight.device, non_blocking=True)
    kernels.fill_kernel[layout.outs, _tiles(layout.groups, 1024)](
        weight.view(torch.int64), packed, slots[slot], layout.indices(slots)[slot],
        layout.groups, packed.shape[1], GROUPS=1024,
    )  # fmt: skip
    if layout.metadata:
        metadata = slots[slot, layout.values : layout.values + layout.metadata]
        cusparselt.write_metadata(metadata, packed, weight.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    row_slots: Tensor,
    bias: Tensor | None = None,
    present: tuple[int, ...] | None = None,
) -> Tensor:
    """x (rows, in) times the masked weight (out, in) of each row's slot, plus bias -> (rows, out).

    `row_slots` (rows,) int32 on the GPU gives each row's slot, or DENSE. `present` are the slots in it, if
    the host knows them; as they choose the kernels, leave them out where a CUDA graph is captured.
    """
    rows = x.shape[0]
    if rows == 0 or present == (DENSE,):
        return functional.linear(x, weight, bias)
    if rows <= FEW_ROWS:
        return _few_rows(x, weight, slots, row_slots, bias)
    if present is not None and len(present) == 1:
        return _one_slot(x, weight, slots, present[0], bias)
    return _many_slots(x, weight, slots, row_slots, bias, present)


@dataclass(frozen=True)
class Layout:
    """Where the parts of a weight's slot are, in int32 words."""

    outs: int
    groups: int
    metadata: int
    """cuSPARSELt's metadata; 0 where prefill does not use it."""

    @classmethod
    def of(cls, weight: Tensor) -> "Layout":
        outs, ins = weight.shape
        number = cusparselt.algorithm(outs, ins, weight.dtype, weight.device)
        return cls(outs, ins // 4, 0 if number is None else outs * ins // 32)

    @property
    def values(self) -> int:
        return self.outs * self.groups

    @property
    def words(self) -> int:
        return _aligned(self._indices_at + self.outs * _tiles(self.groups, 32) * 4)

    def indices(self, slots: Tensor) -> Tensor:
        """The indices of all slots, (count, bytes) uint8, a view."""
        return slots[:, self._indices_at :].view(torch.uint8)

    @property
    def _indices_at(self) -> int:
        return _aligned(self.values + self.metadata)


def _few_rows(x: Tensor, weight: Tensor, slots: Tensor, row_slots: Tensor, bias: Tensor | None) -> Tensor:
    """All slots at once, by the kernel that reads the fewest bits."""
    layout, count, rows = Layout.of(weight), slots.shape[0], x.shape[0]
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
        x = x.contiguous()
    out = x.new_empty(rows, layout.outs)
    indices = layout.indices(slots)
    tile = FEW_TILE if rows <= FEW_TILE["ROWS"] else SOME_TILE
    passes = _tiles(count + 1, 4)
    grid = (_tiles(layout.outs, tile["OUTS"]), count + passes, _tiles(rows, tile["ROWS"]))
    kernels.linear_kernel[grid](
        x.view(torch.int64), weight.view(torch.int64), slots, indices, row_slots, bias, out,
        rows, layout.outs, layout.groups, x.stride(0) // 4, slots.stride(0), indices.stride(0), count,
        SLOTS=1 << count.bit_length(), **tile, FP32=not x.is_cuda,
    )  # fmt: skip
    return out


def _one_slot(x: Tensor, weight: Tensor, slots: Tensor, slot: int, bias: Tensor | None) -> Tensor:
    """By the sparse tensor cores where they win, else by a dense product with the expanded slot."""
    outs, ins = weight.shape
    number = cusparselt.algorithm(outs, ins, weight.dtype, weight.device)
    if number is not None and x.shape[0] >= cusparselt.LEAST_ROWS:
        compressed = slots[slot].view(weight.dtype)[: weight.numel() * 9 // 16].view(outs, -1)
        return cusparselt.linear(x, compressed, bias, number)
    masked = torch.empty_like(weight)
    _expand(slots, slot, torch.ones((), dtype=torch.bool, device=x.device), masked)
    return functional.linear(x, masked, bias)


def _many_slots(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    row_slots: Tensor,
    bias: Tensor | None,
    present: tuple[int, ...] | None,
) -> Tensor:
    """Slot after slot: expanded, and multiplied with the tiles that have rows of it.

    Expanding costs less than decoding the slot for each tile again. A slot that no row uses costs two
    empty launches.
    """
    out = x.new_empty(x.shape[0], weight.shape[0])
    count = slots.shape[0]
    used = (row_slots == torch.arange(count, device=x.device, dtype=torch.int32)[:, None]).any(1)
    masked = torch.empty_like(weight)
    for slot in range(-1, count) if present is None else present:
        if slot == DENSE:
            _rows_of_slot(x, weight, row_slots, slot, bias, out)
        else:
            _expand(slots, slot, used[slot], masked)
            _rows_of_slot(x, masked, row_slots, slot, bias, out)
    return out


def _expand(slots: Tensor, slot: int, used: Tensor, out: Tensor) -> None:
    """Write a slot's weights (out, in), zeros where they are dropped, if the bool `used` says so."""
    layout = Layout.of(out)
    kernels.expand_kernel[layout.outs, _tiles(layout.groups, 1024)](
        slots[slot], layout.indices(slots)[slot], used, out.view(torch.int64), layout.groups, GROUPS=1024
    )


def _rows_of_slot(
    x: Tensor, weight: Tensor, row_slots: Tensor, slot: int, bias: Tensor | None, out: Tensor
) -> None:
    """Write the rows of `out` that use `slot`, whose weights are given."""
    rows, (outs, ins) = x.shape[0], weight.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    grid = (_tiles(rows, MANY_TILE["ROWS"]), _tiles(outs, MANY_TILE["OUTS"]))
    kernels.rows_of_slot_kernel[grid](
        x, weight, row_slots, slot, bias, out, rows, outs, ins, x.stride(0),
        **MANY_TILE, **MANY_OPTIONS, FP32=not x.is_cuda,
    )  # fmt: skip


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def _aligned(words: int) -> int:
    """Up to whole cache lines, as loads of 16 bytes and cuSPARSELt need it."""
    return _tiles(words, 32) * 32
