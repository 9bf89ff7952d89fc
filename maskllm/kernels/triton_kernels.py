"""The GPU kernels: a mask's weights gathered into its slot, and linear layers whose rows differ in mask.

The kernels work on groups: an int64 is four 16-bit weights or inputs, an int32 the two weights that a
mask keeps, so that one load brings whole groups and a group is put together by shifts. A slot:

    kept values   outs x groups int32        row by row, the first kept weight in the low half
    metadata      outs x groups / 4 int16    cuSPARSELt's own order; only where prefill uses it
    indices       outs x blocks x 16 uint8   4 bits a group: first kept | second kept << 2

A block is 32 groups (128 columns), the last one of a row padded with zeros. Its byte q holds group q in the
low half and group q + 16 in the high one. So the 16 bytes, shifted right by 0 or 4, belong to 16
neighbouring groups just as a load of 16 values does: unpacking moves nothing between threads.

Offsets within a slot are int32, as a slot is smaller than 8 GiB; the offset of a slot is int64.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

WIDTH = tl.constexpr(16)
"""Groups that are multiplied at once: the least depth of a tensor core product of 16-bit values."""
BLOCK = tl.constexpr(32)
"""Groups in a block."""
PASS = tl.constexpr(4)
"""Slots that share one reading of the dense weight."""
DENSE = tl.constexpr(-1)
"""The slot of rows that use the base's own weights."""
NOBODY = tl.constexpr(-2)
"""The slot of the rows that a tile has beyond the last."""


@triton.jit(do_not_specialize=["rows", "count"])
def linear_kernel(
    x,  # (rows, groups) int64, rows x_stride groups apart
    weight,  # (outs, groups) int64
    values,  # (count, outs, groups) int32, slots value_stride apart
    indices,  # (count, outs, blocks, 16) uint8, slots index_stride apart
    row_slots,  # (rows,) int32
    bias,  # (outs,) or None
    out,  # (rows, outs)
    rows,
    outs,
    groups,
    x_stride,
    value_stride,
    index_stride,
    count,
    SLOTS: tl.constexpr,  # a power of two, at least count + 1
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    STAGES: tl.constexpr,
    FP32: tl.constexpr,
):
    """A tile (ROWS, OUTS) of the output, for few rows; grid (out tiles, count + passes, row tiles).

    Few rows are bound by the bits read a weight. One slot alone reads 9 of them; a pass over the dense
    weight reads 16, serves PASS slots or dense rows, and reads 1 more for each slot. All programs of a
    tile see which slots its rows use and choose the lesser: program s is slot s alone, those from `count`
    on are passes, and a program that is not needed ends at once. Nothing is decided on the host, so a
    captured graph stays right whatever `row_slots` and the slots hold.
    """
    program = tl.program_id(1)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row_slot = tl.load(row_slots + m, mask=m < rows, other=NOBODY)

    each = tl.arange(0, SLOTS) - 1
    used = tl.max((row_slot[:, None] == each[None, :]).to(tl.int32), axis=0)
    dense = tl.max((row_slot == DENSE).to(tl.int32))
    parts = tl.sum(used)
    masks = parts - dense
    together = 9 * masks + 16 * dense > masks + 16 * tl.cdiv(parts, PASS)
    if program < count:
        mine = row_slot == program
        if together or tl.max(mine.to(tl.int32)) == 0:
            return
        product = _kept_product(
            x, values + program.to(tl.int64) * value_stride, indices + program.to(tl.int64) * index_stride,
            m, n, rows, outs, groups, x_stride, ROWS, OUTS, STAGES, out.dtype.element_ty, FP32,
        )  # fmt: skip
        _store(product, bias, out, m, n, mine, outs)
    else:
        # One after the other, the slots that this pass serves; NOBODY once there are no more.
        at = tl.where(together, used, used * (each == DENSE)) * tl.cumsum(used) - PASS * (program - count)
        slot0, slot1, slot2, slot3 = _at(each, at, 1), _at(each, at, 2), _at(each, at, 3), _at(each, at, 4)
        if slot0 == NOBODY:
            return
        product = _pass_product(
            x, weight, indices, row_slot, (slot0, slot1, slot2, slot3), m, n, rows, outs, groups, x_stride,
            index_stride, ROWS, OUTS, STAGES, out.dtype.element_ty, FP32,
        )  # fmt: skip
        mine = (row_slot == slot0) | (row_slot == slot1) | (row_slot == slot2) | (row_slot == slot3)
        _store(product, bias, out, m, n, mine & (row_slot != NOBODY), outs)


@triton.jit
def _at(each, at, place):
    """The slot whose place is given, else NOBODY."""
    return tl.max(tl.where(at == place, each, NOBODY))


@triton.jit
def _kept_product(
    x, values, indices, m, n, rows, outs, groups, x_stride,
    ROWS: tl.constexpr, OUTS: tl.constexpr, STAGES: tl.constexpr, dtype: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """x times the weights that one slot keeps, (ROWS, OUTS): read sparse, multiplied dense."""
    product = tl.zeros((ROWS, OUTS), tl.float32)
    blocks = tl.cdiv(groups, BLOCK)
    for block in tl.range(blocks, num_stages=STAGES):
        index = _block_indices(indices, n, block, outs, blocks)
        for half in tl.static_range(2):
            g = block * BLOCK + half * WIDTH + tl.arange(0, WIDTH)
            kept = _load(values, n[None, :], g[:, None], outs, groups, groups)
            inputs = _load(x, m[:, None], g[None, :], rows, groups, x_stride)
            product = _add(product, inputs, _group(kept, index >> (4 * half)), dtype, FP32)
    return product


@triton.jit
def _pass_product(
    x, weight, indices, row_slot, slots, m, n, rows, outs, groups, x_stride, index_stride,
    ROWS: tl.constexpr, OUTS: tl.constexpr, STAGES: tl.constexpr, dtype: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """x times the dense weight as each of four slots masks it, (ROWS, OUTS); the weight is read once.

    Rows take the product of their slot by selection: an infinity that one mask keeps never meets the rows
    of another.
    """
    product = tl.zeros((ROWS, OUTS), tl.float32)
    blocks = tl.cdiv(groups, BLOCK)
    for block in tl.range(blocks, num_stages=STAGES):
        for half in tl.static_range(2):
            g = block * BLOCK + half * WIDTH + tl.arange(0, WIDTH)
            group = _load(weight, n[None, :], g[:, None], outs, groups, groups)
            inputs = _load(x, m[:, None], g[None, :], rows, groups, x_stride)
            for part in tl.static_range(PASS):
                slot = slots[part]
                rows_left = tl.where(slot >= 0, outs, 0)
                index = _block_indices(
                    indices + slot.to(tl.int64) * index_stride, n, block, rows_left, blocks
                )
                if slot != NOBODY:
                    kept = _group(tl.full((WIDTH, OUTS), -1, tl.int32), index >> (4 * half))
                    kept = tl.where(slot == DENSE, -1, kept)
                    added = _add(product, inputs, group & kept, dtype, FP32)
                    product = tl.where((row_slot == slot)[:, None], added, product)
    return product


@triton.jit
def _block_indices(indices, n, block, outs, blocks):
    """The indices of a block of rows n, (WIDTH, OUTS) int32 of 8 bits."""
    q = block * WIDTH + tl.arange(0, WIDTH)
    return _load(indices, n[None, :], q[:, None], outs, blocks * WIDTH, blocks * WIDTH).to(tl.int32)


@triton.jit
def _load(base, row, g, rows, groups, stride):
    """Elements g of each row, the rows being `stride` apart; zeros beyond the last row and element."""
    return tl.load(base + row.to(tl.int64) * stride + g, mask=(row < rows) & (g < groups), other=0)


@triton.jit
def _group(kept, index):
    """Two kept values, int32, put in the places that the lowest 4 bits of `index` name -> int64."""
    first, second = (index & 3) * 16, ((index >> 2) & 3) * 16
    return ((kept & 0xFFFF).to(tl.int64) << first) | (((kept >> 16) & 0xFFFF).to(tl.int64) << second)


@triton.jit
def _add(product, inputs, group, dtype: tl.constexpr, FP32: tl.constexpr):
    """product + inputs (ROWS, WIDTH) times group (WIDTH, OUTS), one place of the groups after the other."""
    for place in tl.static_range(4):
        left = (inputs >> (16 * place)).to(tl.int16).to(dtype, bitcast=True)
        right = (group >> (16 * place)).to(tl.int16).to(dtype, bitcast=True)
        product = _dot(left, right, product, FP32)
    return product


@triton.jit
def _dot(left, right, product, FP32: tl.constexpr):
    """product + left x right; FP32 is for the interpreter, whose dot of bf16 is wrong in Triton 3.9."""
    if FP32:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, product, input_precision="ieee")


@triton.jit
def _store(product, bias, out, m, n, mine, outs):
    """Store the rows that are `mine`, bias added."""
    if bias is not None:
        product += tl.load(bias + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + m[:, None].to(tl.int64) * outs + n[None, :],
        product.to(out.dtype.element_ty),
        mask=mine[:, None] & (n < outs)[None, :],
    )


@triton.jit(do_not_specialize=["rows", "slot"])
def rows_of_slot_kernel(
    x,  # (rows, ins), rows x_stride apart
    weight,  # (outs, ins), already masked
    row_slots,  # (rows,) int32
    slot,
    bias,  # (outs,) or None
    out,  # (rows, outs)
    rows,
    outs,
    ins,
    x_stride,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
    FP32: tl.constexpr,
):
    """A tile of the output for the rows of one slot, for many rows; grid (row tiles, out tiles).

    Only tiles that have such rows are computed. Tokens of one request lie side by side, so few tiles have
    rows of two slots.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    mine = tl.load(row_slots + m, mask=m < rows, other=NOBODY) == slot
    if tl.max(mine.to(tl.int32)) == 0:
        return
    product = tl.zeros((ROWS, OUTS), tl.float32)
    for start in range(0, ins, INS):
        k = start + tl.arange(0, INS)
        left = _load(x, m[:, None], k[None, :], rows, ins, x_stride)
        right = _load(weight, n[None, :], k[:, None], outs, ins, ins)
        product = _dot(left, right, product, FP32)
    _store(product, bias, out, m, n, mine, outs)


@triton.jit(do_not_specialize_on_alignment=["used"])
def expand_kernel(
    values,  # (outs, groups) int32
    indices,  # (outs, blocks, 16) uint8
    used,  # bool: whether any row uses the slot
    out,  # (outs, groups) int64
    groups,
    GROUPS: tl.constexpr,
):
    """A slot back to a dense weight with zeros, or nothing if it is not used; grid (outs, group tiles)."""
    if tl.load(used) == 0:
        return
    row = tl.program_id(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    kept = tl.load(values + row * groups + g, mask=g < groups, other=0)
    q = row * tl.cdiv(groups, BLOCK) * WIDTH + g // BLOCK * WIDTH + g % WIDTH
    index = tl.load(indices + q, mask=g < groups, other=0).to(tl.int32) >> (g // WIDTH % 2 * 4)
    tl.store(out + row.to(tl.int64) * groups + g, _group(kept, index), mask=g < groups)


@triton.jit
def fill_kernel(
    weight,  # (outs, groups) int64
    packed,  # (outs, row_bytes) uint8
    values,  # (outs, groups) int32
    indices,  # (outs, blocks, 16) uint8
    groups,
    row_bytes,
    GROUPS: tl.constexpr,
):
    """Write a mask's kept values and indices into a slot; grid (outs, group tiles).

    3.2 bytes a weight pass: 2 of the dense weight, 1 + 1/8 of the slot, 1/12 of the packed mask. The
    values are moved as integers, so none of them changes, whatever it is.
    """
    row = tl.program_id(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    group = tl.load(weight + row.to(tl.int64) * groups + g, mask=g < groups, other=0)
    index = _index(packed, row, g, groups, row_bytes)
    first = (group >> ((index & 3) * 16)) & 0xFFFF
    second = (group >> ((index >> 2) * 16)) & 0xFFFF
    tl.store(values + row * groups + g, (first | (second << 16)).to(tl.int32), mask=g < groups)

    # The packed bytes are in the first-level cache by now: decoding them again beats exchanging indices.
    q = tl.program_id(1) * (GROUPS // 2) + tl.arange(0, GROUPS // 2)
    g = q // WIDTH * BLOCK + q % WIDTH
    pair = _index(packed, row, g, groups, row_bytes) | _index(packed, row, g + WIDTH, groups, row_bytes) << 4
    row_indices = tl.cdiv(groups, BLOCK) * WIDTH
    tl.store(indices + row * row_indices + q, pair.to(tl.uint8), mask=q < row_indices)


@triton.jit
def metadata_kernel(
    packed,  # (outs, row_bytes) uint8
    metadata,  # (outs * groups / 4,) int16
    groups,
    row_bytes,
    words,
    WORDS: tl.constexpr,
):
    """Write the metadata of cuSPARSELt on sm_90; grid (word tiles,). outs % 64 == 0, groups % 8 == 0.

    Tiles of 64 rows and 8 groups follow each other along the row, 128 words each. A word is the indices of
    groups g and g + 4 in rows r and r + 8. The order is not documented by NVIDIA; FlagGems PR #5281 found
    it on an H100, and `cusparselt` compares it with the library's own before it is used.
    """
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    tile, i = word // 128, word % 128
    r = tile // (groups // 8) * 64 + i // 64 * 32 + i // 32 % 2 * 16 + i // 4 % 8
    g = tl.where(word < words, tile % (groups // 8) * 8 + i % 4, groups)
    index = _index(packed, r, g, groups, row_bytes)
    index |= _index(packed, r + 8, g, groups, row_bytes) << 4
    index |= _index(packed, r, g + 4, groups, row_bytes) << 8
    index |= _index(packed, r + 8, g + 4, groups, row_bytes) << 12
    tl.store(metadata + word, index.to(tl.int16), mask=word < words)


@triton.jit
def _index(packed, row, g, groups, row_bytes):
    """First kept | second kept << 2 of groups g of a row, int32; 0 beyond the last group.

    A byte is three base-6 digits, least first: b // 6 == b * 171 >> 10 for every b below 216. The constant
    lists the indices of codes 0 to 5, 4 bits each: 01, 02, 03, 12, 13, 23.
    """
    byte = tl.load(packed + row * row_bytes + g // 3, mask=g < groups, other=0).to(tl.int32)
    sixth = (byte * 171) >> 10
    thirtysixth = (sixth * 171) >> 10
    place = g % 3
    code = tl.where(
        place == 0,
        byte - 6 * sixth,
        tl.where(place == 1, sixth - 6 * thirtysixth, thirtysixth),
    )
    return tl.where(g < groups, (0xED9C84 >> (4 * code)) & 15, 0)
