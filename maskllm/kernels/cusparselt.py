"""Prefill by the sparse tensor cores: cuSPARSELt's multiplication of a slot, where it is right and faster.

cuSPARSELt reads one buffer: the kept values row by row, then metadata in an order of its own, which it
documents for no GPU. So nothing is taken on trust: for each shape of weight `algorithm` compares our buffer
with the library's byte by byte and its product with the dense one, and lets it be used only if it also wins.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.benchmark import Timer

from maskllm.core.patterns import best, encode, expand, pack, unpack

with suppress(ImportError):  # gpu.why_not() says so
    from maskllm.kernels import triton_kernels as kernels

logger = logging.getLogger(__name__)

LEAST_ROWS = 512
"""Below, dense is as fast: public figures of H100 and bf16 give 1.1x to 1.4x at 512 rows and lose at 64."""


@cache
def algorithm(outs: int, ins: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The number of the algorithm to multiply weights (outs, ins) by; None where dense is to be used.

    Takes a second or so, once a shape.
    """
    if outs % 64 or ins % 32 or not _available(device):
        return None
    try:
        return _proven(outs, ins, dtype, device)
    except RuntimeError as error:  # a library older than the GPU, for one
        logger.warning("prefill of (%d, %d) is dense, as cuSPARSELt failed: %s", outs, ins, error)
        return None


def _proven(outs: int, ins: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The algorithm the library's search finds, if layout, results and speed are as they should be.

    Some algorithms give wrong products now and then (pytorch #155333), so each size is tried three times.
    """
    # No weight is zero: the library could not tell it from a dropped one.
    weight = (torch.rand(outs, ins, device=device) + 0.5).to(dtype)
    mask = best(torch.rand(outs, ins, device=device))
    masked = torch.where(mask, weight, 0)
    compressed = torch._cslt_compress(masked).view(outs, -1)
    metadata = torch.empty(outs * ins // 32, dtype=torch.int32, device=device)
    write_metadata(metadata, pack(encode(mask)), dtype)
    ours = torch.cat([weight[mask], metadata.view(dtype)])
    if not torch.equal(ours.view(torch.int16), compressed.view(-1).view(torch.int16)):
        return None
    x = torch.randn(4 * LEAST_ROWS, ins, dtype=dtype, device=device)
    number = torch._cslt_sparse_mm_search(compressed, x[:LEAST_ROWS].t(), transpose_result=True)
    for rows in (LEAST_ROWS, 4 * LEAST_ROWS) * 3:
        expected = functional.linear(x[:rows], masked).float()
        wrong = (linear(x[:rows], compressed, None, number).float() - expected).abs().max()
        if not wrong <= 0.02 * expected.abs().max():  # a nan is wrong too
            return None
    sparse_s = _seconds(lambda: linear(x, compressed, None, number))
    return number if sparse_s < _seconds(lambda: functional.linear(x, masked)) else None


def linear(x: Tensor, compressed: Tensor, bias: Tensor | None, number: int) -> Tensor:
    """x (rows, in) times a compressed weight (out, in * 9/16), plus bias -> (rows, out).

    The library wants rows in multiples of 8.
    """
    rows = x.shape[0]
    padded = functional.pad(x, (0, 0, 0, -rows % 8)) if rows % 8 else x.contiguous()
    out: Tensor = torch._cslt_sparse_mm(compressed, padded.t(), bias, transpose_result=True, alg_id=number)
    return out[:rows]


def write_metadata(metadata: Tensor, packed: Tensor, dtype: torch.dtype) -> None:
    """Write a mask's metadata, (out * in / 32,) int32, from its packed codes on the same device.

    By our kernel where it writes what the library does; else by the library, which compresses the mask
    itself for it, as its ones cannot be mistaken for dropped weights. That is slow and waits for the GPU.
    """
    if _knows_order(packed.device):
        _write_sm90(metadata, packed)
    else:
        outs, groups = packed.shape[0], metadata.numel() * 8 // packed.shape[0]
        mask = expand(unpack(packed, groups))
        compressed = torch._cslt_compress(mask.to(dtype)).view(-1)
        metadata.copy_(compressed[outs * groups * 2 :].view(torch.int32))


@cache
def _knows_order(device: torch.device) -> bool:
    """Whether our kernel writes the metadata that this GPU's cuSPARSELt does."""
    mask = best(torch.rand(256, 512, device=device))
    written = torch.empty(256 * 512 // 32, dtype=torch.int32, device=device)
    _write_sm90(written, pack(encode(mask)))
    compressed = torch._cslt_compress(mask.to(torch.bfloat16)).view(-1)
    return torch.equal(written, compressed[mask.numel() // 2 :].view(torch.int32))


def _write_sm90(metadata: Tensor, packed: Tensor) -> None:
    words = metadata.view(torch.int16)
    groups = words.numel() * 4 // packed.shape[0]
    grid = (-(-words.numel() // 512),)
    kernels.metadata_kernel[grid](packed, words, groups, packed.shape[1], words.numel(), WORDS=512)


def _available(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cusparselt.is_available()


def _seconds(work: Callable[[], Tensor]) -> float:
    """Median time of a call; Timer waits for the GPU."""
    return Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=0.05).median
