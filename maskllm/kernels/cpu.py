"""2:4 kernels for CPUs: the C++ in cpu/, built with the package, called through ctypes.

What a slot looks like is told in cpu/layout.h. Threads are torch's: the library binds to the OpenMP runtime
that torch has loaded, and uses as many threads as torch is set to.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maskllm.kernels import DENSE

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
INT8_DENSE = 3
READ, KEPT = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.int8)
"""What kernels read of inputs and weights, and what slots hold."""
NEVER = float(1 << 30)
LONG = (128, 512)
"""Rows for which it is measured whether torch multiplies a weight made dense faster."""
_sparse_rows = NEVER  # as in the costs, which are a call away
LARGE = 1 << 18
"""Below this many weights, times one for each 8 rows, a second thread costs more than it does."""
PIECE = 1 << 20
"""Weights of one that is made dense, or another type, at a time."""
CPUINFO = Path("/proc/cpuinfo")
AVX512 = {"avx512bw", "avx512dq", "avx512vl", "avx512_vbmi2", "avx512_vnni"}
NEEDS = {"avx512-bf16": AVX512 | {"avx512_bf16"}, "avx512": AVX512, "avx2": {"avx2", "fma"}}
"""What cpu/api.cpp asks x86 processors for, as Linux calls it."""


@dataclass(frozen=True)
class Costs:
    """What 64 weights cost, in ns, with all threads, as in cpu/api.cpp, which has one thread's of Zen 4."""

    slot: float
    """Of a slot, to read it at least."""
    slot_row: float
    """Of a slot for each of its rows."""
    once: float
    """Of the dense weight read once for several masks, at least."""
    fixed: float
    """The same before any row,"""
    once_row: float
    """for each row,"""
    once_mask: float
    """and for each mask."""
    dense_rows: float
    """More dense rows than this are torch's,"""
    sparse_rows: float
    """and so are more rows in all, where one mask has as many, by that mask's weight made dense."""


def why_not() -> str | None:
    """Why these kernels cannot run here, None if they can."""
    if not _library():
        return "the C++ kernels were not built: install the package where there is g++ 12 or newer"
    return None


def available() -> list[str]:
    """The instruction sets that can run here, the fastest first."""
    return _library().maskllm_available().decode().split() if _library() else []


def missing() -> dict[str, str]:
    """What the processor has not, for each x86 instruction set of ours that cannot run here."""
    flags = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set.union(*NEEDS.values())
    lacks = {name: sorted(needs - flags) for name, needs in NEEDS.items() if name not in available()}
    return {name: f"this processor has no {', '.join(lack)}" for name, lack in lacks.items() if lack}


def using() -> str:
    """The instruction set in use."""
    name: str = _library().maskllm_using().decode()
    return name


def use(name: str) -> None:
    """Use one of the available instruction sets from now on; slots filled under another stay valid."""
    _library().maskllm_use(name.encode())


def force_form(form: int) -> None:
    """How rows with different masks share a step, for tests and benchmarks.

    0 multiplies each slot by its rows; 1 reads the dense weight once for all (avx512-bf16, bfloat16 weights);
    -1, the default, does what the costs say is faster.
    """
    _library().maskllm_force_form(form)


def costs() -> Costs:
    """What the choices between two ways of doing the same go by."""
    numbers = (ctypes.c_double * len(fields(Costs)))()
    _library().maskllm_get_costs(numbers)
    return Costs(*numbers)


def set_costs(costs: Costs) -> None:
    """Go by these from now on."""
    global _sparse_rows
    _sparse_rows = costs.sparse_rows
    _library().maskllm_set_costs((ctypes.c_double * len(fields(costs)))(*astuple(costs)))


def reads_once(row_slots: Tensor) -> bool:
    """Whether rows with these slots, (rows,) int32, read the dense weight once for all their masks."""
    return bool(_library().maskllm_reads_once(row_slots.data_ptr(), row_slots.shape[0]))


def choices() -> str:
    """What the costs say, for people."""
    spread = (masks for masks in range(2, 17) if reads_once(torch.arange(16, dtype=torch.int32) % masks))
    once = next(spread, None) if using() == "avx512-bf16" else None
    many = f"from {once} masks on" if once else "under no number of masks"
    rows = costs().sparse_rows
    dense = "never made dense" if rows == NEVER else f"made dense for more than {rows:.0f} rows"
    return (
        f"threads: {torch.get_num_threads()}; 16 rows read the dense weight once {many}; up to "
        f"{costs().dense_rows:.0f} dense rows are multiplied here; a mask's weight is {dense}"
    )


def calibrate() -> Costs | None:
    """Measure the costs with the threads that torch has, and go by them from now on.

    Two seconds and 130 MB, out of reach of most caches. Whatever else runs only adds to a time, so that the
    fastest of several turns counts. None where there are no kernels, or where a busy machine made a slot
    cost more than the dense weight, of which it is 9 bits in 16: what the costs were they are then again.
    """
    if why_not():
        return None
    bf16, masks, outs, inputs = using() == "avx512-bf16", 16, 4096, 2048
    counts = (4, 8, 16, 32, 64)
    weights = [torch.ones(outs, inputs, dtype=torch.bfloat16) for _ in range(3)]
    # Slots in one memory, apart by their mask bits only: what the values are does not matter.
    size, apart = slot_bytes(outs, inputs, torch.bfloat16) // 2, outs * inputs // 16
    slots = [
        torch.ones(size + apart * masks, dtype=torch.bfloat16).as_strided((masks, size), (apart, 1))
        for _ in weights
    ]

    def inputs_of(rows: int) -> Tensor:
        return torch.ones(rows, inputs, dtype=torch.bfloat16 if bf16 else torch.float32)

    def ours(form: int, rows: list[int]) -> Callable[[int], object]:
        x, row_slots = inputs_of(len(rows)), torch.tensor(rows, dtype=torch.int32)

        def multiply(at: int) -> None:
            force_form(form)
            linear(x, weights[at], slots[at], row_slots, None)
            force_form(-1)

        return multiply

    def torchs(rows: int) -> Callable[[int], object]:
        x = inputs_of(rows)
        return lambda at: plain(x, weights[at], None)

    def made_dense(rows: int) -> Callable[[int], object]:
        x = inputs_of(rows)
        return lambda at: _made_dense(x, weights[at], slots[at], 0, None)

    before = costs()
    set_costs(replace(before, dense_rows=64, sparse_rows=NEVER))  # all that is timed here is ours
    works = {f"ours, {rows}": ours(0, [0] * rows) for rows in LONG}
    long = _fastest(works | {f"dense, {rows}": made_dense(rows) for rows in LONG}, range(1), turns=4)
    won = takewhile(lambda rows: long[f"dense, {rows}"] < long[f"ours, {rows}"], reversed(LONG))
    sparse_rows = min((rows / 2 for rows in won), default=NEVER)  # between that number and the one before
    works = {f"ours, {rows}": ours(-1, [DENSE] * rows) for rows in counts}
    works |= {f"torch's, {rows}": torchs(rows) for rows in counts}
    if bf16:
        works |= {
            "slot": ours(0, [0]),
            "slot, 16": ours(0, [0] * 16),
            "once": ours(1, [0, 1]),
            "2 masks, 8": ours(1, [0] * 4 + [1] * 4),
            "2 masks, 16": ours(1, [0] * 8 + [1] * 8),
            "16 masks, 16": ours(1, list(range(masks))),
        }
    each = _fastest(works, range(len(weights)))
    faster = takewhile(lambda rows: each[f"ours, {rows}"] <= each[f"torch's, {rows}"], counts)
    measured = replace(before, dense_rows=max(faster, default=0), sparse_rows=sparse_rows)
    if not bf16:
        set_costs(measured)
        return measured
    per = {name: 64e9 * seconds / (outs * inputs) for name, seconds in each.items()}
    once_row = max(0.0, per["2 masks, 16"] - per["2 masks, 8"]) / 8
    once_mask = max(0.0, per["16 masks, 16"] - per["2 masks, 16"]) / (masks - 2)
    measured = replace(
        measured,
        slot=per["slot"],
        slot_row=per["slot, 16"] / 16,
        once=per["once"],
        fixed=max(0.0, per["2 masks, 16"] - 16 * once_row - 2 * once_mask),
        once_row=once_row,
        once_mask=once_mask,
    )
    busy = measured.slot > measured.once
    set_costs(before if busy else measured)
    return None if busy else measured


def _fastest(works: dict[str, Callable[[int], object]], weights: range, turns: int = 5) -> dict[str, float]:
    """Seconds of each work over one of the weights, in its fastest of so many turns over all."""
    seconds = dict.fromkeys(works, float("inf"))
    for _ in range(turns):
        for name, work in works.items():
            for at in weights:
                begin = time.perf_counter()
                work(at)
                seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


def advise(memory: Tensor) -> None:
    """Ask for big pages, before memory is first used: to read it out of cache is up to 1.3 times as fast."""
    _library().maskllm_advise(memory.data_ptr(), memory.nbytes)


def in_big_pages(weight: Tensor) -> Tensor:
    """A copy of a weight where `advise` has been heard: dense rows and swaps read it 3 to 10 % faster."""
    copy = torch.empty_like(weight)
    advise(copy)
    return copy.copy_(weight)


def read(memory: Tensor) -> None:
    """Read an int64 tensor, a multiple of four, and do nothing else: the ceiling of what is bound by memory.

    In four streams, by which Zen 3 reads 1.3 times as fast as by one.
    """
    _library().maskllm_read(memory.data_ptr(), memory.numel() // 4, torch.get_num_threads())


def slot_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes of one mask of a weight (rows, columns) in a slot; without kernels one byte a weight."""
    return rows * columns if why_not() else _slot_bytes(rows, columns, TYPES[dtype])


@cache
def _slot_bytes(rows: int, columns: int, slot_type: int) -> int:
    return int(_library().maskllm_slot_bytes(rows, columns, slot_type))


def allocate(weight: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Empty slots (count, values) for a weight (out, in); `dtype` bfloat16 or int8.

    9 bits a weight as bfloat16; as int8 5, and a scale for each row: its largest finite dense weight over
    127, so that no mask changes it. An infinity becomes 127 steps of it, and NaN none. Rows are padded to 4,
    columns to 128. Memory is used as slots are filled.
    """
    size = slot_bytes(weight.shape[0], weight.shape[1], dtype)
    slots = torch.empty(count, size // dtype.itemsize, dtype=dtype)
    advise(slots)
    if dtype == torch.int8:
        _write_scales(slots, weight)
    return slots


def _write_scales(slots: Tensor, weight: Tensor) -> None:
    scales = weight.where(weight.isfinite(), 0).abs().amax(1).float() / 127
    scales.clamp_(min=torch.finfo(torch.float32).tiny)  # or one over it may be infinite
    slots[:, : 4 * len(scales)].copy_(scales.view(torch.int8))


def fill(slots: Tensor, slot: int, weight: Tensor, packed: Tensor) -> None:
    """Write the mask `packed` (out, bytes) uint8 of a weight (out, in) into a slot."""
    slot_type, weight = _slot_type(slots, weight), _readable(weight)
    if slot_type == INT8_DENSE:
        raise ValueError("these hold the whole weight in 8 bits, and no mask")
    packed = packed.contiguous()
    _library().maskllm_fill(
        slots[slot].data_ptr(),
        slot_type,
        weight.data_ptr(),
        TYPES[weight.dtype],
        weight.stride(0),
        packed.data_ptr(),
        *weight.shape,
        _threads(weight),
    )


def linear(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    row_slots: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The operator; see `masked_linear`. Dense rows that torch does better are torch's."""
    check(x, weight, row_slots, bias)
    if x.dtype not in READ:  # float16
        return linear(x.float(), weight, slots, row_slots, bias).to(x.dtype)
    slot_type = _slot_type(slots, weight)
    _contiguous(weight)
    x = x if x.stride(-1) == 1 else x.contiguous()
    row_slots = int32(row_slots)
    out = x.new_empty(x.shape[0], weight.shape[0])
    if x.shape[0] > _sparse_rows and slots.dtype == torch.bfloat16:
        for slot in (long := _long(row_slots, len(slots))):
            rows = row_slots == slot
            out[rows] = _made_dense(x[rows], weight, slots, slot, bias)
        if long:
            rest = ~torch.isin(row_slots, torch.tensor(long))
            out[rest] = linear(x[rest], weight, slots, row_slots[rest], bias)
            return out
    offset = bias.float().contiguous() if bias is not None else None
    left = _library().maskllm_multiply(
        x.data_ptr(),
        TYPES[x.dtype],
        x.stride(0),
        x.shape[0],
        row_slots.data_ptr(),
        weight.data_ptr(),
        TYPES.get(weight.dtype, -1),
        weight.stride(0),
        slots.data_ptr(),
        slots.shape[0],
        slots.stride(0) * slots.itemsize,
        slot_type,
        *weight.shape,
        None if offset is None else offset.data_ptr(),
        out.data_ptr(),
        _threads(weight, x.shape[0]),
    )
    if left < 0:
        raise ValueError(f"rows use slots {sorted(set(row_slots.tolist()))}, and there are {slots.shape[0]}")
    if left and left == x.shape[0]:
        return plain(x, weight, bias)
    if left:
        rows = (row_slots == DENSE).nonzero().squeeze(1)
        out[rows] = plain(x[rows], weight, bias)
    return out


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, in) times a weight (out, in) of any dtype, by torch, which takes one for all: x's."""
    wide = _wide(x)
    if weight.dtype == wide.dtype:
        return functional.linear(wide, weight, None if bias is None else bias.to(wide.dtype)).to(x.dtype)
    return _by_pieces(wide, weight, lambda begin, end: weight[begin:end].to(wide.dtype), bias).to(x.dtype)


def _made_dense(x: Tensor, weight: Tensor, slots: Tensor, slot: int, bias: Tensor | None) -> Tensor:
    """`plain` of the masked weight (out, in) in a bfloat16 slot."""
    wide = _wide(x)
    return _by_pieces(
        wide, weight, lambda begin, end: expand(slots, slot, weight.shape, wide.dtype, begin, end), bias
    ).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """x as torch multiplies it well: without instructions for it bfloat16 takes five times as long."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and _library() and using() != "avx512-bf16"
    return x.float() if slow else x


def _by_pieces(x: Tensor, weight: Tensor, piece: Callable[[int, int], Tensor], bias: Tensor | None) -> Tensor:
    """torch's product with rows of a weight that is made piece by piece, as new memory for all is slow."""
    outs, columns = weight.shape
    out = x.new_empty(x.shape[0], outs)
    bias = x.new_zeros(outs) if bias is None else bias.to(x.dtype)
    step = max(1, PIECE // (4 * columns)) * 4
    for begin in range(0, outs, step):
        end = min(outs, begin + step)
        torch.addmm(bias[begin:end], x, piece(begin, end).t(), out=out[:, begin:end])
    return out


def expand(slots: Tensor, slot: int, shape: torch.Size, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """Rows `begin` to `end` of a weight of that shape (out, in) under a bfloat16 slot's mask.

    float32 or bfloat16, with zeros where nothing is kept; `begin` is a multiple of 4.
    """
    out = torch.empty(end - begin, shape[1], dtype=dtype)
    _library().maskllm_expand(
        slots[slot].data_ptr(), out.data_ptr(), TYPES[dtype], *shape, begin, end, _threads(out)
    )
    return out


def _long(row_slots: Tensor, count: int) -> list[int]:
    """The slots, of so many, that more rows have than the kernels are best for."""
    slots, rows = torch.unique(row_slots, return_counts=True)
    return [
        slot
        for slot, rows in zip(slots.tolist(), rows.tolist(), strict=True)
        if rows > _sparse_rows and DENSE < slot < count
    ]


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, in) times the weight (out, in) itself.

    By our kernel where the weight is bfloat16 and rows are few, else by torch's.
    """
    rows = torch.full((x.shape[0],), DENSE, dtype=torch.int32)
    return linear(x, weight, torch.empty(0, 0, dtype=torch.bfloat16), rows, bias)


def quantized_bytes(rows: int, columns: int) -> int:
    """Bytes of a whole weight (rows, columns) as `quantize` writes it; without kernels one a weight."""
    return rows * columns if why_not() else _slot_bytes(rows, columns, INT8_DENSE)


def quantize(weight: Tensor) -> Tensor:
    """A weight (out, in) in 8 bits for `dense_int8`, with the scales of int8 slots."""
    weight = _readable(weight)
    quantized = torch.empty(1, quantized_bytes(*weight.shape), dtype=torch.int8)
    advise(quantized)
    _write_scales(quantized, weight)
    _library().maskllm_quantize(
        quantized.data_ptr(),
        weight.data_ptr(),
        TYPES[weight.dtype],
        weight.stride(0),
        *weight.shape,
        _threads(weight),
    )
    return quantized


def dense_int8(x: Tensor, weight: Tensor, quantized: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, in) times a weight (out, in), of which only what `quantize` made of it is read.

    Each row of x is rounded to 8 bits by its largest, as under int8 slots.
    """
    rows = torch.zeros(x.shape[0], dtype=torch.int32)
    return linear(x, weight, quantized, rows, bias)


def register(name: str) -> bool:
    """Let torch call C++ for `maskllm::<name>` on CPU, which leaves the rest to `maskllm::any_<name>`.

    `masked_linear`, or `layer`, which is `server.engine.linear`'s. False, and nothing done, where this torch
    has not what it needs.
    """
    torch_cpu = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"), None)
    if not _library() or torch_cpu is None:
        return False
    return bool(_library().maskllm_register(name.encode(), str(torch_cpu).encode(), LARGE))


def begin_step(row_slots: Tensor | None) -> None:
    """Tell `maskllm::layer` the slot of each row, contiguous int32, which must live until the next call."""
    if _library():
        rows = 0 if row_slots is None else row_slots.shape[0]
        _library().maskllm_begin_step(None if row_slots is None else row_slots.data_ptr(), rows)


def check(x: Tensor, weight: Tensor, row_slots: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError where these are no arguments of the operator, whatever computes it."""
    outs, ins = weight.shape
    if x.dim() != 2 or x.shape != (*row_slots.shape, ins):
        raise ValueError(
            f"x {tuple(x.shape)} and row_slots {tuple(row_slots.shape)} do not fit a weight {(outs, ins)}: "
            f"they must be (rows, {ins}) and (rows,)"
        )
    if bias is not None and bias.shape != (outs,):
        raise ValueError(
            f"bias {tuple(bias.shape)} does not fit a weight {(outs, ins)}: it must be {(outs,)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}: it must be float32, bfloat16 or float16")


def int32(row_slots: Tensor) -> Tensor:
    """Row slots as kernels read them."""
    if row_slots.dtype == torch.int32 and row_slots.is_contiguous():
        return row_slots
    return row_slots.to(torch.int32).contiguous()


def _slot_type(slots: Tensor, weight: Tensor) -> int:
    """How slots hold a weight: under masks or, as int8, the whole. Raises ValueError where they do not."""
    dtype, count = slots.dtype, slots.shape[0]
    if dtype not in KEPT:
        raise ValueError(f"slots are {dtype}: kept values are bfloat16 or int8")
    slot_type = TYPES[dtype]
    if dtype == torch.int8 and slots.shape[-1] == _slot_bytes(*weight.shape, INT8_DENSE):
        slot_type = INT8_DENSE
    size = _slot_bytes(*weight.shape, slot_type) // dtype.itemsize
    if count and (slots.shape != (count, size) or slots.stride(1) != 1):
        raise ValueError(
            f"slots {tuple(slots.shape)} of strides {slots.stride()} do not fit a weight "
            f"{tuple(weight.shape)}: they must be (count, {size}) of strides ({size}, 1)"
        )
    if count and (slots.data_ptr() | slots.stride(0) * dtype.itemsize) % 64:
        raise ValueError(f"slots begin at {slots.data_ptr():#x}: each must begin at a multiple of 64 bytes")
    return slot_type


def _readable(weight: Tensor) -> Tensor:
    """A weight as kernels read it."""
    _contiguous(weight)
    return weight if weight.dtype in READ else weight.float()


def _contiguous(weight: Tensor) -> None:
    if weight.stride(1) != 1:
        raise ValueError(f"the weight's rows are not contiguous: strides {weight.stride()}")


def _threads(weight: Tensor, rows: int = 1) -> int:
    return torch.get_num_threads() if weight.numel() * -(-rows // 8) >= LARGE else 1


@cache
def _library() -> Any:
    """The shared library beside this file, None where it was not built."""
    built = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not built:
        return None
    library = ctypes.CDLL(str(built[0]))
    pointer, integer, long, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p
    signatures: dict[str, tuple[Callable[..., Any] | None, list[Any]]] = {
        "available": (text, []),
        "using": (text, []),
        "use": (None, [text]),
        "force_form": (None, [integer]),
        "get_costs": (None, [pointer]),
        "set_costs": (None, [pointer]),
        "reads_once": (ctypes.c_bool, [pointer, long]),
        "read": (long, [pointer, long, integer]),
        "slot_bytes": (long, [long, long, integer]),
        "advise": (None, [pointer, long]),
        "register": (ctypes.c_bool, [text, text, long]),
        "begin_step": (None, [pointer, long]),
        "fill": (None, [pointer, integer, pointer, integer, long, pointer, long, long, integer]),
        "expand": (None, [pointer, pointer, integer, long, long, long, long, integer]),
        "quantize": (None, [pointer, pointer, integer, long, long, long, integer]),
        "multiply": (
            long,
            [
                *(pointer, integer, long, long, pointer),  # x, and the slot of each row
                *(pointer, integer, long),  # weight
                *(pointer, long, long, integer),  # slots
                *(long, long, pointer, pointer, integer),
            ],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"maskllm_{name}")
        function.restype, function.argtypes = result, arguments
    return library
