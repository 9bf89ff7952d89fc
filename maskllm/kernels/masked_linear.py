"""The one operator of serving: a linear layer in which every row has its own mask, or none.

`slots` holds the resident masks of one layer. Make it with `allocate`, write it with `fill`, and pass it to
`masked_linear`. A slot of bool is the mask itself, of any pattern: the reference, in plain torch, which runs
everywhere. Any other is the kept values of a 2:4 mask and where they belong, as this machine's kernels want
them: cpu.py and cpu/ (C++), gpu.py (Triton, and sparse tensor cores for prefill).
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from maskllm.core.base import is_bf16
from maskllm.core.patterns import expand, row_bytes, unpack
from maskllm.kernels import DENSE, cpu, gpu


class NoBackend(ValueError):
    """A backend, or a dtype of slots, that this machine or this weight does not have."""


def backend(device: torch.device) -> ModuleType | None:
    """The kernels for weights on a device; None is the reference.

    The environment's MASKLLM_BACKEND forces `reference`, one of the CPU's instruction sets
    (`cpu.available`) or the GPU's `triton` (`gpu.available`); the other device's kernels stay as they are.
    Raises NoBackend where it asks for what is not there.
    """
    forced = os.environ.get("MASKLLM_BACKEND", "")
    if forced == "reference":
        return None
    module = cpu if device.type == "cpu" else gpu
    if forced in cpu.available():
        if module is cpu:
            cpu.use(forced)
    elif forced and (forced not in gpu.available() or (module is gpu and gpu.why_not())):
        have = ", ".join(["reference", *cpu.available(), *gpu.available()])
        why = gpu.why_not() if forced == gpu.TRITON else cpu.missing().get(forced)
        raise NoBackend(
            f"MASKLLM_BACKEND={forced} is not on this machine, which has {have}" + (f": {why}" if why else "")
        )
    return None if module.why_not() else module


def bf16_on_cpu() -> bool:
    """Whether the CPU's kernels multiply bfloat16 inputs as they are."""
    return backend(torch.device("cpu")) is cpu and cpu.using() == "avx512-bf16"


def holds_bf16(folder: Path) -> bool:
    """Whether the CPU's kernels read a checkpoint's matrices as the bfloat16 they are."""
    return backend(torch.device("cpu")) is cpu and is_bf16(folder)


def dtype_on_cpu(folder: Path) -> torch.dtype:
    """What a checkpoint is computed in on this CPU.

    Never less than its own, and bfloat16, which halves the speed without instructions for it, only with them.
    """
    return torch.bfloat16 if bf16_on_cpu() and is_bf16(folder) else torch.float32


def chosen() -> dict[str, str]:
    """Which kernels run here, for people: by device, what is used or why nothing is, and what could be."""
    use = {}
    for device, module in (("cpu", cpu), ("cuda", gpu)):
        forced = backend(torch.device(device)) is None and not module.why_not()
        reason = "MASKLLM_BACKEND=reference" if forced else module.why_not()
        use[device] = f"reference: {reason}" if reason else module.using()
    if not use["cpu"].startswith("reference") and cpu.calibrate():
        use["cpu, measured now"] = cpu.choices()
    use["cpu could use"] = ", ".join(["reference", *cpu.available()])
    if gpu.available():
        use["cuda could use"] = ", ".join(["reference", *gpu.available()])
    if missing := cpu.missing():
        use["cpu could not use"] = "; ".join(f"{name}: {why}" for name, why in missing.items())
    return use


def allocate(weight: Tensor, count: int, dtype: torch.dtype | None = None) -> Tensor:
    """Empty slots for `count` masks of a weight (out, in), first dimension the slot; fill one before its use.

    `dtype` is that of the kept values, bfloat16 or int8 (on a GPU the weight's own, float16 too), or bool for
    the reference. None takes the kernels where they are exact, else bool. Raises NoBackend.
    """
    module = backend(weight.device)
    if dtype is None:
        dtype = (_exact(weight) if module else None) or torch.bool
    if dtype == torch.bool:
        return torch.zeros(count, *weight.shape, dtype=torch.bool, device=weight.device)
    if module is None:
        why = (cpu if weight.device.type == "cpu" else gpu).why_not() or "MASKLLM_BACKEND=reference"
        raise NoBackend(f"no {dtype} slots without kernels: {why}")
    if weight.shape[1] % 4:
        raise NoBackend(f"no {dtype} slots for {weight.shape[1]} inputs: 2:4 needs a multiple of 4")
    if module is cpu and dtype not in cpu.KEPT:
        raise NoBackend(f"no {dtype} slots on a CPU: kept values are bfloat16 or int8 there")
    if module is gpu and dtype != _exact(weight):
        raise NoBackend(f"no {dtype} slots for {weight.dtype} on a GPU: both must be bfloat16, or float16")
    slots: Tensor = module.allocate(weight, count, dtype)
    return slots


def _exact(weight: Tensor) -> torch.dtype | None:
    """The dtype in which kernels hold every weight as it is, if there is one."""
    if weight.is_cuda:
        return weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else None
    same = weight.dtype == torch.bfloat16 or torch.equal(weight.bfloat16().to(weight.dtype), weight)
    return torch.bfloat16 if same else None


def fill(slots: Tensor, slot: int, weight: Tensor, packed: Tensor) -> None:
    """Make a 2:4 mask of the weight (out, in) resident in a slot, in place.

    `packed` is (out, bytes) uint8 as `maskllm.core.patterns.pack` writes it. Kept values are copied and
    dropped ones left out, never multiplied: a product would leave -0.0 behind and could not mask an infinity.
    No byte may be 216 or more. Mask files are checked for that where they are read; here only the reference
    looks, and raises BadPattern.
    """
    _check_fill(slots, slot, weight, packed)
    if slots.dtype == torch.bool:
        _check_slots(slots, weight)
        slots[slot].copy_(expand(unpack(packed, weight.shape[1] // 4)))
    elif slots.device.type == "cpu":
        cpu.fill(slots, slot, weight, packed)
    else:
        gpu.fill_layers(slot, [(slots, weight, packed)])


def fill_layers(slot: int, layers: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    """`fill` for each (slots, weight, packed) of a model; a GPU takes layers of one shape together.

    After an error some are written and others not.
    """

    def on_gpu() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for slots, weight, packed in layers:
            if slots.is_cuda and slots.dtype != torch.bool:
                _check_fill(slots, slot, weight, packed)
                yield slots, weight, packed
            else:
                fill(slots, slot, weight, packed)

    gpu.fill_layers(slot, on_gpu())


def _check_fill(slots: Tensor, slot: int, weight: Tensor, packed: Tensor) -> None:
    expected = weight.shape[0], row_bytes(weight.shape[1] // 4)
    if packed.shape != expected or packed.dtype != torch.uint8:
        raise ValueError(
            f"packed {tuple(packed.shape)} of {packed.dtype} is no 2:4 mask of a weight "
            f"{tuple(weight.shape)}: it must be {expected} of uint8"
        )
    if not 0 <= slot < len(slots):
        raise ValueError(f"there is no slot {slot}: there are {len(slots)}, numbered from 0")


def multiply(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    row_slots: Tensor,
    bias: Tensor | None,
    present: list[int] | None = None,
) -> Tensor:
    """`masked_linear` in Python: what C++ leaves, and for who needs no operator of torch."""
    if slots.dtype == torch.bool:
        return reference(x, weight, slots, row_slots, bias)
    if slots.device.type == "cpu":
        return cpu.linear(x, weight, slots, row_slots, bias)
    return gpu.linear(x, weight, slots, row_slots, bias, None if present is None else tuple(present))


def reference(x: Tensor, weight: Tensor, slots: Tensor, row_slots: Tensor, bias: Tensor | None) -> Tensor:
    """`masked_linear` in plain torch, obviously right; slots are (count, out, in) bool.

    Of two dtypes it multiplies in the one that holds both.
    """
    cpu.check(x, weight, row_slots, bias)
    _check_slots(slots, weight)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    out = x.new_empty(x.shape[0], weight.shape[0])
    present = torch.unique(row_slots).tolist()
    if present and not DENSE <= present[0] <= present[-1] < len(slots):
        raise ValueError(f"rows use slots {present}, and there are {len(slots)}")
    for slot in present:
        effective = weight if slot == DENSE else torch.where(slots[slot], weight, 0)
        if len(present) == 1:
            return cpu.plain(x.to(dtype), effective, bias).to(x.dtype)
        rows = (row_slots == slot).nonzero().squeeze(1)
        out[rows] = cpu.plain(x[rows].to(dtype), effective, bias).to(x.dtype)
    return out


def _check_slots(slots: Tensor, weight: Tensor) -> None:
    if slots.shape[1:] != weight.shape:
        raise ValueError(
            f"slots {tuple(slots.shape)} do not fit a weight {tuple(weight.shape)}: they must be "
            f"(count, {weight.shape[0]}, {weight.shape[1]})"
        )


def _fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# On a CPU C++ does the usual case of `masked_linear`, at a third of the price of a call: 4 us instead of 14.
for _name in ("masked_linear", "any_masked_linear"):
    torch.library.define(
        f"maskllm::{_name}",
        "(Tensor x, Tensor weight, Tensor slots, Tensor row_slots, Tensor? bias, int[]? present=None)"
        " -> Tensor",
    )
    torch.library.register_fake(f"maskllm::{_name}", _fake)
torch.library.impl("maskllm::any_masked_linear", "CPU", multiply)
torch.library.impl("maskllm::masked_linear", "CUDA", multiply)
if not cpu.register("masked_linear"):
    torch.library.impl("maskllm::masked_linear", "CPU", multiply)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    slots: Tensor,
    row_slots: Tensor,
    bias: Tensor | None,
    present: list[int] | None = None,
) -> Tensor:
    """x (rows, in) times the masked weight (out, in) of each row's slot, plus bias -> (rows, out).

    `row_slots` (rows,) int32 gives each row's slot, or DENSE; `present` are the slots in it, where the host
    knows them and no CUDA graph is captured. Raises ValueError where arguments do not fit each other; of the
    slots in `row_slots` a GPU's kernels check those that `present` names, as it would have to be waited for.
    The result is of x's dtype.

    An input that only dropped weights would meet takes no part, an infinity or NaN included, where a CPU's
    kernels multiply slot by slot, and by a GPU's for one row. All else multiplies it by 0: the reference, a
    GPU's kernels for more rows, and a CPU's where rows are many enough for a weight made dense, or where
    avx512-bf16 reads the dense weight once for bfloat16 rows of several masks. With int8 slots inputs, too,
    are rounded to 8 bits, by each row's largest; a row that is not finite then answers NaN, and
    a weight that is not counts as its row's largest that is, or as 0 if it is NaN.
    """
    try:
        out: Tensor = torch.ops.maskllm.masked_linear.default(x, weight, slots, row_slots, bias, present)
    except RuntimeError:  # which is what C++ makes of any error of Python's
        if x.device.type != "cpu":
            raise
        out = multiply(x, weight, slots, row_slots, bias, present)
    return out
