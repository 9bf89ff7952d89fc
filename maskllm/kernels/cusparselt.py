"""Prefill by the sparse tensor cores: cuSPARSELt's product with a slot, called where it is right and faster.

cuSPARSELt reads one buffer: the kept values row by row, then metadata in an order of its own, which it
documents for no GPU (`gpu.prefill` proves ours). torch has an operator for it, but makes its plan anew in
each call: 570 us around a product of 70 (H200, torch 2.11). So the library that torch has loaded is called
here, with plans that are kept. Its constants and signatures are those of cusparseLt.h, version 0.8.
"""

from collections.abc import Callable
from contextlib import suppress
from ctypes import (
    CDLL,
    byref,
    c_float,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
    create_string_buffer,
    sizeof,
)
from functools import cache, lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.benchmark import Timer

DTYPES = {torch.float16: 2, torch.bfloat16: 14}
"""cudaDataType."""
COLUMNS, ROWS = 1, 2
"""cusparseOrder_t."""
AS_IT_IS, TRANSPOSED = 0, 1
"""cusparseOperation_t."""
COMPUTE_32F = 2
ONE, ZERO = byref(c_float(1)), byref(c_float(0))
BIAS_POINTER = 8
"""An attribute of a multiplication."""
ALGORITHM_ID = 0
"""An attribute of an algorithm selection."""
TUNED = {512: 256, 1 << 30: 2048}
"""Up to how many rows an algorithm is used that was the fastest at how many."""
PROVEN = {512: (128, 384, 512), 1 << 30: (640, 1024, 4096)}
"""Where else it has to be right: some are for some rows only (pytorch #155333)."""
TRIED = 32
"""Algorithms that are tried. H200, 0.8.0: 21 in bfloat16; in float16 more, of which those from 36 on end
the process's use of the GPU with an illegal instruction, and torch's own search runs into them."""
OPAQUE = 4096
"""Bytes for each of the library's structs, 512 in 0.8."""


def available(device: torch.device) -> bool:
    """Whether torch has loaded a version that is called here as it wants to be: 0.8 and no other was seen."""
    if device.type != "cuda" or not torch.backends.cusparselt.is_available():
        return False
    return 800 <= (torch.backends.cusparselt.version() or 0) < 900


def compress(masked: Tensor) -> Tensor:
    """The library's own buffer of a 2:4 weight (out, in): kept values and metadata, flat."""
    out: Tensor = torch._cslt_compress(masked)
    return out.view(-1)


def linear(x: Tensor, compressed: Tensor, outs: int, bias: Tensor | None, algorithm: int) -> Tensor:
    """x (rows, in) times the compressed weight (out, in) that a buffer begins with, plus bias -> (rows, out).

    Raises RuntimeError where the library refuses. The library wants rows in multiples of 8, at multiples of
    16 bytes; of 128 there are fewer, so that all of a server's plans are kept.
    """
    rows, ins = x.shape
    padding = -rows % 128
    padded = functional.pad(x, (0, 0, 0, padding)) if padding else x.contiguous()
    if padded.data_ptr() % 16:
        padded = padded.clone()
    plan = _plan(outs, ins, rows + padding, x.dtype, x.device, algorithm, bias is not None)
    out = x.new_empty(rows + padding, outs)
    plan.multiply(compressed, padded, bias, out)
    return out[:rows] if padding else out


def fastest(compressed: Tensor, weight: Tensor, mask: Tensor) -> dict[int, int]:
    """The algorithm for up to so many rows, as in TUNED, of a weight (out, in) that was compressed by a mask.

    Some give wrong products now and then, too, so each is tried three times; the fastest that is right is
    chosen. Empty if there is none, or it is slower than masking and a dense product.
    """
    masked = torch.where(mask, weight, 0)
    outs, ins = weight.shape
    chosen = {}
    for most_rows, rows in TUNED.items():
        x = torch.randn(rows, ins, dtype=weight.dtype, device=weight.device)
        seconds = {}
        for number in range(TRIED):
            with suppress(RuntimeError):  # there is no such algorithm, or not for this shape
                seconds[number] = _seconds(partial(linear, x, compressed, outs, None, number))
        proven = (rows, *PROVEN[most_rows])
        for number in sorted(seconds, key=seconds.__getitem__):
            if all(_is_right(number, compressed, masked, rows) for rows in proven):
                break
        else:
            return {}
        if seconds[number] > _seconds(partial(_by_torch, x, weight, mask)):
            return {}
        chosen[most_rows] = number
    return chosen


def _is_right(algorithm: int, compressed: Tensor, masked: Tensor, rows: int) -> bool:
    """Whether an algorithm multiplies so many rows as torch does, three times, with a bias and without."""
    outs, ins = masked.shape
    x = torch.randn(rows, ins, dtype=masked.dtype, device=masked.device)
    bias = torch.randn(outs, dtype=masked.dtype, device=masked.device)
    for added in (bias, None) * 3:
        expected = functional.linear(x, masked, added).float()
        try:
            wrong = (linear(x, compressed, outs, added, algorithm).float() - expected).abs().max()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # not for so many rows
            return False
        if not wrong <= 0.02 * expected.abs().max():  # a nan is wrong too
            return False
    return True


def _by_torch(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return functional.linear(x, torch.where(mask, weight, 0))


class _Plan:
    """A multiplication of one shape; the library keeps pointers into the structs."""

    def __init__(
        self,
        outs: int,
        ins: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        algorithm: int,
        biased: bool,
    ) -> None:
        self._handle = _handle(device)
        self._sparse, self._x, self._out, self._product, self._chosen, self._it = (
            create_string_buffer(OPAQUE) for _ in range(6)
        )
        of = DTYPES[dtype], ROWS
        self._call("StructuredDescriptorInit", self._sparse, *_sizes(outs, ins, ins), *of, 0)
        self._call("DenseDescriptorInit", self._x, *_sizes(rows, ins, ins), *of)
        self._call("DenseDescriptorInit", self._out, *_sizes(outs, rows, outs), of[0], COLUMNS)
        operands = self._sparse, self._x, self._out, self._out
        self._call("MatmulDescriptorInit", self._product, AS_IT_IS, TRANSPOSED, *operands, COMPUTE_32F)
        if biased:  # which bias is said before each multiplication
            self._set_bias(1 << 20)
        self._call("MatmulAlgSelectionInit", self._chosen, self._product, 0)
        number = c_int(algorithm)
        self._call("MatmulAlgSetAttribute", self._chosen, ALGORITHM_ID, byref(number), c_size_t(4))
        self._call("MatmulPlanInit", self._it, self._product, self._chosen)
        size = c_size_t()
        self._call("MatmulGetWorkspace", self._it, byref(size))
        self._workspace = size.value

    def multiply(self, compressed: Tensor, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if bias is not None:
            self._set_bias(bias.data_ptr())
        workspace = x.new_empty(self._workspace, dtype=torch.uint8) if self._workspace else None
        stream = c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        self._call(
            "Matmul", self._it, ONE, _at(compressed), _at(x), ZERO, _at(out), _at(out),
            workspace if workspace is None else _at(workspace), byref(stream), 1,
        )  # fmt: skip

    def _set_bias(self, address: int) -> None:
        pointer = c_void_p(address)
        size = c_size_t(sizeof(pointer))
        self._call("MatmulDescSetAttribute", self._product, BIAS_POINTER, byref(pointer), size)

    def _call(self, name: str, *arguments: object) -> None:
        _call(name, self._handle, *arguments)


_plan = lru_cache(maxsize=512)(_Plan)
"""Half a millisecond to make; the layers of a model share a few shapes, and a prefill's rows change."""


@cache
def _handle(device: torch.device) -> object:
    handle = create_string_buffer(OPAQUE)
    with torch.cuda.device(device):
        _call("Init", handle)
    return handle


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), f"cusparseLt{name}")(*arguments)
    if status:
        raise RuntimeError(f"cusparseLt{name} failed with status {status}")


@cache
def _library() -> CDLL:
    return CDLL("libcusparseLt.so.0")  # torch has loaded it


def _sizes(rows: int, columns: int, stride: int) -> tuple[c_int64, c_int64, c_int64, c_uint32]:
    """Of a matrix, and its alignment in bytes."""
    return c_int64(rows), c_int64(columns), c_int64(stride), c_uint32(16)


def _at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _seconds(work: Callable[[], Tensor]) -> float:
    """Median time of a call; Timer waits for the GPU."""
    return Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=0.01).median
