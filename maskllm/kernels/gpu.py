"""The GPU's linear layer in which every row has its own mask, or none: slots of 9 bits a weight.

A slot holds the weights that its mask keeps and where they belong (`triton_kernels` draws it), so a step of
few rows reads little more than half of what a dense one reads. Slots never move and no kernel asks the host
which rows use which: a CUDA graph captured once serves every later swap.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from maskllm.core.patterns import best, encode, expand, pack, unpack
from maskllm.kernels import DENSE, cpu, cusparselt

with suppress(ImportError):  # why_not() says so
    from maskllm.kernels import triton_kernels as kernels

logger = logging.getLogger(__name__)

TRITON = "triton"
FEW_ROWS = 64
"""Up to here a step is bound by reading weights, and beyond by multiplying."""
PAIRS = 128
"""Of groups that a warp multiplies at once for one row."""
FEW_TILES = [
    ({"ROWS": 8, "OUTS": 32, "STAGES": 3}, {"num_warps": 2}, 6),
    ({"ROWS": 16, "OUTS": 32, "STAGES": 3}, {"num_warps": 2}, 6),
    ({"ROWS": 32, "OUTS": 32, "STAGES": 3}, {"num_warps": 2}, 4),
]
"""Tiles of `linear_kernel` for up to so many rows; how many of its programs a multiprocessor has room for."""
TOGETHER = 64 << 20
"""Bytes of packed masks that are on the GPU at a time, on the way to slots."""
MANY_TILE, MANY_OPTIONS = {"ROWS": 128, "OUTS": 128, "INS": 64}, {"num_warps": 8, "num_stages": 3}


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


def available() -> list[str]:
    """What MASKLLM_BACKEND may ask for here: Triton's kernels alone, without cuSPARSELt.

    No GPU is looked at, which would take some of its memory for this process.
    """
    return [TRITON] if torch.cuda.is_available() else []


def using() -> str:
    """The GPU and the architecture that kernels are compiled for, and what prefill uses."""
    major, minor = torch.cuda.get_device_capability()
    library = "cuSPARSELt where it is faster" if _may_use_cusparselt(torch.device("cuda")) else "dense"
    return f"{TRITON}, {torch.cuda.get_device_name()}, sm_{major}{minor}; prefill: {library}"


def _may_use_cusparselt(device: torch.device) -> bool:
    return os.environ.get("MASKLLM_BACKEND") != TRITON and cusparselt.available(device)


def allocate(weight: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Empty slots for `count` masks of a weight (out, in), (count, words) int32 on its device."""
    if dtype not in (torch.bfloat16, torch.float16) or weight.dtype != dtype:
        raise ValueError(
            f"slots of {dtype} for weights of {weight.dtype}: on a GPU both are bfloat16 or both are float16"
        )
    if weight.shape[1] % 4 or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} is no contiguous matrix of whole groups of 4 inputs")
    _arrived(weight.device)  # before any graph is captured
    return torch.zeros(count, Layout.of(weight).words, dtype=torch.int32, device=weight.device)


def slot_bytes(outs: int, ins: int) -> int:
    """Bytes of one mask of a weight (outs, ins) in a slot, where prefill uses cuSPARSELt; less where not."""
    return 4 * Layout.make(outs, ins, sparse_prefill=True).words


def fill_layers(slot: int, layers: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Make a mask resident in a slot of each of some layers: of (slots, weight (out, in), packed codes).

    The codes (out, bytes) uint8 are on the GPU or in host memory, from where they come without a wait if it
    is pinned. Layers of one shape are written together. After an error some are written and others not.
    """
    waiting: defaultdict[Layout, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    size = 0
    for slots, weight, packed in layers:
        _check_slots(slots, weight)
        codes = packed.to(weight.device, non_blocking=True).contiguous()
        waiting[Layout.of(weight)].append((slots, weight, codes))
        size += codes.nbytes
        if size >= TOGETHER:
            _fill_all(slot, waiting)
            size = 0
    _fill_all(slot, waiting)


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
    the host knows them; as they choose the kernels, leave them out where a CUDA graph is captured. They alone
    are checked: to look into `row_slots` is to wait for the GPU. Inputs of another dtype than the weight's
    are multiplied in the weight's.
    """
    cpu.check(x, weight, row_slots, bias)
    _check_slots(slots, weight)
    if present and not DENSE <= min(present) <= max(present) < slots.shape[0]:
        raise ValueError(f"rows use slots {sorted(present)}, and there are {len(slots)}")
    row_slots = cpu.int32(row_slots)
    if x.dtype != weight.dtype:
        return linear(x.to(weight.dtype), weight, slots, row_slots, bias, present).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    rows = x.shape[0]
    if rows == 0 or present == (DENSE,):
        return functional.linear(x, weight, bias)
    if rows == 1:
        return _one_row(x, weight, slots, row_slots, bias)
    if rows <= FEW_ROWS:
        return _few_rows(x, weight, slots, row_slots, bias)
    if present is not None and len(present) == 1:
        return _one_slot(x, weight, slots, present[0], bias)
    return _many_slots(x, weight, slots, row_slots, bias, present)


def _check_slots(slots: Tensor, weight: Tensor) -> None:
    """Raise ValueError where these are not slots of the weight, as `allocate` makes them."""
    words = Layout.of(weight).words
    fits = slots.shape[1:] == (words,) and slots.dtype == torch.int32 and slots.is_contiguous()
    if not fits or weight.dtype not in (torch.bfloat16, torch.float16) or not weight.is_contiguous():
        raise ValueError(
            f"slots {tuple(slots.shape)} of {slots.dtype} do not fit a weight {tuple(weight.shape)} of "
            f"{weight.dtype}: they must be (count, {words}) of int32, and it bfloat16 or float16, contiguous"
        )
    if (slots.data_ptr() | weight.data_ptr()) % 16:
        raise ValueError("slots and weight must begin at multiples of 16 bytes, as whole groups are read")


@dataclass(frozen=True)
class Layout:
    """Where the parts of a weight's slot are, in int32 words."""

    outs: int
    groups: int
    metadata: int
    """cuSPARSELt's metadata; 0 where prefill does not use it."""
    indices_at: int
    words: int

    @classmethod
    def of(cls, weight: Tensor) -> "Layout":
        return _layout(*weight.shape, weight.dtype, weight.device)

    @classmethod
    def make(cls, outs: int, ins: int, sparse_prefill: bool) -> "Layout":
        groups, metadata = ins // 4, outs * ins // 32 * sparse_prefill
        indices_at = _aligned(outs * groups + metadata)
        return cls(outs, groups, metadata, indices_at, _aligned(indices_at + outs * _tiles(groups, 32) * 4))


@cache
def _layout(outs: int, ins: int, dtype: torch.dtype, device: torch.device) -> Layout:
    return Layout.make(outs, ins, bool(prefill(outs, ins, dtype, device)))


@cache
def prefill(outs: int, ins: int, dtype: torch.dtype, device: torch.device) -> dict[int, int]:
    """cuSPARSELt's algorithm for up to so many rows of weights (outs, ins); empty where it is not to be used.

    Nothing is taken on trust: a slot must be what the library makes of the same mask, byte by byte, and a
    product must be the dense one's, and faster. Takes 3 seconds, once a shape.
    """
    if outs % 64 or ins % 32 or not _may_use_cusparselt(device):
        return {}
    try:
        weight = (torch.rand(outs, ins, device=device) + 0.5).to(dtype)  # a zero would seem dropped
        mask = best(torch.rand(outs, ins, device=device))
        masked = torch.where(mask, weight, 0)
        layout = Layout.make(outs, ins, True)
        slots = torch.zeros(1, layout.words, dtype=torch.int32, device=device)
        _fill(layout, [(slots, weight, pack(encode(mask)))], 0)
        compressed = _compressed(slots, 0, weight)
        if not torch.equal(compressed.view(torch.int16), cusparselt.compress(masked).view(torch.int16)):
            return {}
        return cusparselt.fastest(compressed, weight, mask)
    except (RuntimeError, OSError, AttributeError) as error:  # a library older than the GPU, for one
        logger.warning("prefill of (%d, %d) is dense, as cuSPARSELt failed: %s", outs, ins, error)
        return {}


@cache
def _knows_order(device: torch.device) -> bool:
    """Whether our kernel writes the metadata that this GPU's cuSPARSELt does."""
    mask = best(torch.rand(64, 128, device=device))
    layout = Layout.make(64, 128, True)
    slots = torch.zeros(1, layout.words, dtype=torch.int32, device=device)
    ones = torch.ones(64, 128, dtype=torch.bfloat16, device=device)
    _fill(layout, [(slots, ones, pack(encode(mask)))], 0, ours=True)
    expected = cusparselt.compress(mask.to(ones.dtype))
    return torch.equal(_compressed(slots, 0, ones).view(torch.int16), expected.view(torch.int16))


def _fill_all(slot: int, waiting: dict[Layout, list[tuple[Tensor, Tensor, Tensor]]]) -> None:
    while waiting:
        _fill(*waiting.popitem(), slot)


def _fill(
    layout: Layout, layers: Sequence[tuple[Tensor, Tensor, Tensor]], slot: int, ours: bool | None = None
) -> None:
    """Values and indices by one kernel, and metadata by another where it writes what the library does.

    Elsewhere the library compresses the mask itself, as its ones cannot be mistaken for dropped weights:
    slow, and it waits for the GPU. `ours` forces the kernel.
    """
    device, row_bytes = layers[0][0].device, layers[0][2].shape[1]
    addresses = torch.tensor(
        [[tensor.data_ptr() for tensor in each] for each in layers], pin_memory=device.type == "cuda"
    ).to(device, non_blocking=True)
    kernels.fill_kernel[layout.outs, _tiles(layout.groups, 1024), len(layers)](
        addresses, slot, layout.groups, row_bytes, layout.words, layout.indices_at, GROUPS=1024, num_warps=8
    )
    if not layout.metadata:
        return
    if ours or _knows_order(device):
        kernels.metadata_kernel[_tiles(layout.outs * _tiles(layout.groups, 32), 512), len(layers)](
            addresses, slot, layout.outs, layout.groups, layout.words, layout.indices_at, UNITS=512
        )
        return
    for slots, weight, packed in layers:
        mask = expand(unpack(packed, layout.groups)).to(weight.dtype)
        at = layout.outs * layout.groups
        metadata = cusparselt.compress(mask).view(torch.int32)[at:]
        slots[slot, at : at + layout.metadata].copy_(metadata)


def _compressed(slots: Tensor, slot: int, weight: Tensor) -> Tensor:
    """A slot's values and metadata, as cuSPARSELt reads them; flat."""
    return slots[slot].view(weight.dtype)[: weight.numel() * 9 // 16]


def _one_row(x: Tensor, weight: Tensor, slots: Tensor, row_slots: Tensor, bias: Tensor | None) -> Tensor:
    """By the kernel that waits for nothing."""
    layout = Layout.of(weight)
    if x.stride(1) != 1 or x.data_ptr() % 8:  # whole groups are loaded
        x = x.clone(memory_format=torch.contiguous_format)
    out = x.new_empty(1, layout.outs)
    kernels.row_kernel[layout.outs,](
        x, weight, slots, row_slots, bias, out, layout.groups, layout.words, layout.indices_at,
        PAIRS=PAIRS, num_warps=1,
    )  # fmt: skip
    return out


def _few_rows(x: Tensor, weight: Tensor, slots: Tensor, row_slots: Tensor, bias: Tensor | None) -> Tensor:
    """By the tensor cores, from weights read sparse."""
    layout, rows = Layout.of(weight), x.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(rows, layout.outs)
    tile, options, room = next((one for one in FEW_TILES if rows <= one[0]["ROWS"]), FEW_TILES[-1])
    tiles = _tiles(layout.outs, tile["OUTS"]), _tiles(rows, tile["ROWS"])
    splits = _splits(tiles[0] * tiles[1], room * _processors(x.device))
    partial = x.new_empty(tiles[0] * tiles[1] * splits * tile["OUTS"] * tile["ROWS"], dtype=torch.float32)
    kernels.linear_kernel[tiles[0], splits, tiles[1]](
        x, weight, slots, row_slots, bias, out, partial, _arrived(x.device),
        rows, layout.outs, layout.groups, x.stride(0), layout.words, layout.indices_at,
        SPLITS=splits, WHOLE=layout.groups % 32 == 0, **tile, **options,
    )  # fmt: skip
    return out


def _splits(tiles: int, room: int) -> int:
    """Into how many parts the inputs are divided so that the GPU is full: 1, 2, 4 or 8."""
    splits = 8
    while splits > 1 and splits * tiles > room:
        splits //= 2
    return splits


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _arrived(device: torch.device) -> Tensor:
    """Counters of the parts of a tile that are done, zero between launches, which must not overlap."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def _one_slot(x: Tensor, weight: Tensor, slots: Tensor, slot: int, bias: Tensor | None) -> Tensor:
    """By the sparse tensor cores where they win, else by a dense product with the expanded slot."""
    for most_rows, number in prefill(*weight.shape, weight.dtype, weight.device).items():
        if x.shape[0] <= most_rows:
            try:
                return cusparselt.linear(x, slots[slot], weight.shape[0], bias, number)
            except RuntimeError as error:
                logger.warning("%d rows of %s are multiplied dense: %s", len(x), tuple(weight.shape), error)
                break
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
        slots, slot, used, out, layout.groups, layout.words, layout.indices_at, GROUPS=1024
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
        **MANY_TILE, **MANY_OPTIONS,
    )  # fmt: skip


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def _aligned(words: int) -> int:
    """Up to whole cache lines, as loads of 16 bytes and cuSPARSELt need it."""
    return _tiles(words, 32) * 32
