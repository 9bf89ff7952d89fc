"""N:M masks as pure functions: a mask, its pattern codes, and the codes packed into bytes.

A *group* is M consecutive weights of one row (along the input dimension); a *pattern* is one of the
C(M,N) ways to keep N of them; a *code* is a pattern's number. Weights are (out, in) as in
`nn.Linear`, masks are bool of the same shape, codes are (out, in/M), packed rows are whole bytes.
"""

from functools import cache
from itertools import combinations
from math import ceil, comb, gcd, log2

import torch
from torch import Tensor

MAX_M = 16
"""The pattern table of 8:16 has 12,870 rows; 16:32 would have 601 million."""


class BadPattern(ValueError):
    """An N:M that does not exist, or a tensor that does not follow it."""


def check(n: int, m: int) -> None:
    """Raise BadPattern unless 1 <= N < M <= 16."""
    if not 1 <= n < m <= MAX_M:
        raise BadPattern(f"no pattern {n}:{m}: N:M needs 1 <= N < M <= {MAX_M}, as in 2:4 or 4:8")


@cache
def patterns(n: int = 2, m: int = 4) -> Tensor:
    """All patterns in the order of their codes, (C(m,n), m) bool; 2:4 starts 1100, 1010, 1001."""
    check(n, m)
    kept = torch.tensor(list(combinations(range(m), n)))
    return torch.zeros(len(kept), m, dtype=torch.bool).scatter_(1, kept, True)


def best(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """The mask that keeps the N largest scores of each group, (out, in) -> (out, in) bool.

    Equal scores are kept from the left, so the result does not depend on the device.
    """
    groups = split(scores, n, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return kept.scatter_(-1, order[..., :n], True).view(scores.shape)


def encode(mask: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Mask (out, in) bool -> codes (out, in/m), uint8 (int16 where there are more than 256).

    Raises BadPattern, naming the first group that does not keep exactly N.
    """
    groups = split(mask, n, m)
    bits = _bits(groups)
    codes = _codes_of_bits(n, m).to(mask.device)[bits]
    if (invalid := codes < 0).any():
        row, group = invalid.nonzero()[0].tolist()
        kept = int(groups[row, group].sum())
        raise BadPattern(f"row {row}, group {group} keeps {kept} of {m} weights, not {n}")
    return codes.to(code_dtype(n, m))


def expand(codes: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Codes (out, in/m) -> mask (out, in) bool. Raises BadPattern on a code out of range."""
    if codes.numel() and (int(codes.max()) >= comb(m, n) or int(codes.min()) < 0):
        raise BadPattern(f"code out of range: {n}:{m} has codes 0 to {comb(m, n) - 1}")
    table = patterns(n, m).to(codes.device)
    if m == 4:  # a whole group at once, as one int32
        return table.view(torch.int32).squeeze(-1)[codes.int()].view(torch.bool)
    return table[codes.int()].flatten(-2)


def pack(codes: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Codes (out, groups) -> packed (out, row_bytes) uint8; every row is padded to whole bytes.

    Where several codes fit one byte as digits of base C(m,n) and that beats whole bits, they are
    stored so (2:4: three digits of base 6, 2.67 bits a group); else as ceil(log2 C(m,n)) bits.
    """
    base, digits = comb(m, n), digits_per_byte(n, m)
    rows, groups = codes.shape
    if digits:
        padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -groups % digits))
        places = padded.view(rows, -1, digits).unbind(-1)
        packed = places[-1].clone()
        for place in reversed(places[:-1]):
            packed.mul_(base).add_(place)
        return packed
    width, period = _bit_layout(n, m)
    padded = torch.nn.functional.pad(codes.int(), (0, -groups % period)).view(rows, -1, period)
    packed = torch.zeros(*padded.shape[:2], width * period // 8, dtype=torch.int32, device=codes.device)
    for index, byte, shift in _overlaps(width, period):
        code = padded[..., index]
        packed[..., byte] |= code << shift if shift >= 0 else code >> -shift
    return packed.bitwise_and_(255).flatten(1)[:, : row_bytes(groups, n, m)].to(torch.uint8)


def unpack(packed: Tensor, groups: int, n: int = 2, m: int = 4) -> Tensor:
    """Packed (out, row_bytes) uint8 -> codes (out, groups).

    Raises BadPattern on a byte that `pack` cannot have written: a code out of range, or padding
    that is not zero.
    """
    base, digits = comb(m, n), digits_per_byte(n, m)
    rows = packed.shape[0]
    if packed.shape[1] != row_bytes(groups, n, m):
        raise BadPattern(f"{packed.shape[1]} bytes a row cannot hold {groups} groups of {n}:{m}")
    if digits:
        if packed.numel() and int(packed.max()) >= base**digits:
            raise BadPattern(f"code out of range: a byte of {n}:{m} is below {base**digits}")
        table = _digits_of_byte(base, digits).to(packed.device)
        codes = table.index_select(0, packed.int().flatten()).view(rows, -1)
    else:
        width, period = _bit_layout(n, m)
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % (width * period // 8)))
        bytes_ = padded.int().view(rows, -1, width * period // 8)
        fields = torch.zeros(*bytes_.shape[:2], period, dtype=torch.int32, device=packed.device)
        for index, byte, shift in _overlaps(width, period):
            part = bytes_[..., byte]
            fields[..., index] |= part >> shift if shift >= 0 else part << -shift
        codes = fields.bitwise_and_((1 << width) - 1).flatten(1)
        if codes.numel() and int(codes.max()) >= base:
            raise BadPattern(f"code out of range: {n}:{m} has codes 0 to {base - 1}")
    if codes[:, groups:].any():
        raise BadPattern("code out of range: the padding after the last group is not zero")
    return codes[:, :groups].to(code_dtype(n, m))


def row_bytes(groups: int, n: int = 2, m: int = 4) -> int:
    """Bytes of one packed row of `groups` groups."""
    digits = digits_per_byte(n, m)
    return ceil(groups / digits) if digits else ceil(groups * ceil(log2(comb(m, n))) / 8)


def digits_per_byte(n: int, m: int) -> int:
    """How many base-C(m,n) digits share a byte; 0 where whole bits a group are as small."""
    base = comb(m, n)
    digits = next(k for k in range(8, -1, -1) if base**k <= 256)
    return digits if digits and 8 / digits <= ceil(log2(base)) else 0


def code_dtype(n: int, m: int) -> torch.dtype:
    """The smallest dtype that holds every code of N:M."""
    return torch.uint8 if comb(m, n) <= 256 else torch.int16


def split(tensor: Tensor, n: int, m: int) -> Tensor:
    """(out, in) -> (out, in/m, m). Raises BadPattern where the row is not a whole number of groups."""
    check(n, m)
    if tensor.ndim != 2 or tensor.shape[1] % m:
        raise BadPattern(f"shape {tuple(tensor.shape)} is not (out, in) with in a multiple of {m}")
    return tensor.reshape(tensor.shape[0], -1, m)


def _bits(groups: Tensor) -> Tensor:
    """Bool (out, groups, m) -> each group as an integer, its first weight in the lowest bit."""
    m = groups.shape[-1]
    if m == 4:  # four bools read as one int32; the product gathers them into the top byte
        return (groups.contiguous().view(torch.int32).squeeze(-1) * 0x01020408 >> 24) & 15
    if m == 8:
        return (groups.contiguous().view(torch.int64).squeeze(-1) * 0x0102040810204080 >> 56) & 255
    if m == 16:
        return _bits(groups[..., :8]) | _bits(groups[..., 8:]) << 8
    return (groups * (1 << torch.arange(m, device=groups.device))).sum(-1)


def _bit_layout(n: int, m: int) -> tuple[int, int]:
    """(bits a code, codes until the layout meets a byte boundary again)."""
    width = ceil(log2(comb(m, n)))
    return width, 8 // gcd(width, 8)


def _overlaps(width: int, period: int) -> list[tuple[int, int, int]]:
    """(code, byte, left shift of the code into that byte) for each byte a code touches."""
    return [
        (index, byte, index * width - 8 * byte)
        for index in range(period)
        for byte in range(index * width // 8, (index * width + width - 1) // 8 + 1)
    ]


@cache
def _codes_of_bits(n: int, m: int) -> Tensor:
    """For each of the 2^m subsets of a group its code, or -1, (2^m,) int16."""
    codes = torch.full((2**m,), -1, dtype=torch.int16)
    codes[(patterns(n, m) * (1 << torch.arange(m))).sum(-1)] = torch.arange(comb(m, n)).short()
    return codes


@cache
def _digits_of_byte(base: int, digits: int) -> Tensor:
    """The digits of each byte in base `base`, least first, (256, digits) uint8."""
    byte = torch.arange(256)
    return torch.stack([byte // base**k % base for k in range(digits)], dim=1).byte()
