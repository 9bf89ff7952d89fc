"""The GPU kernels: a mask's weights gathered into its slot, and linear layers whose rows differ in mask.

The kernels work on groups: an int64 is four 16-bit weights or inputs, an int32 the two weights that a
mask keeps, so that one load brings whole groups. A slot, in int32 words:

    kept values   outs x groups              row by row, the first kept weight in the low half
    metadata      outs x groups / 8          cuSPARSELt's own order; only where prefill uses it
    indices       outs x blocks x 4          4 bits a group: where the kept weights belong

A block is 32 groups (128 columns), the last one of a row padded with zeros. Byte q of its 16 holds group q in
the low half and group q + 16 in the high one. So the 16 bytes, shifted right by 0 or 4, belong to 16
neighbouring groups just as a load of 16 values does: unpacking moves nothing between threads.

An index names the two halves of the group as a product wants them: two bits for weights 0 and 1, two for
weights 2 and 3. Each is a choice of four, so a shift of a constant makes the selector of a byte permutation,
and two of those put a group in place (`_halves`).

Offsets within a slot are int32, as a slot is smaller than 8 GiB; the offset of a slot is int64.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
WIDTH = tl.constexpr(16)
"""Groups that are multiplied at once."""
BLOCK = tl.constexpr(32)
"""Groups in a block."""
DENSE = tl.constexpr(-1)
"""The slot of rows that use the base's own weights."""
NOBODY = tl.constexpr(-2)
"""The slot of the rows that a tile has beyond the last."""
END = tl.constexpr(1 << 30)
"""After the last slot."""

INDEX = tl.constexpr(0x2D9C87)
"""The index of each code 0 to 5, 4 bits each.

    kept      0,1   0,2   0,3   1,2   1,3   2,3
    weights 0 and 1 (low two bits):  3 both, 0 the first in place 0, 1 the first in place 1, 2 none
    weights 2 and 3 (high two bits): 1 none, 2 the second in place 2, 3 the second in place 3, 0 both
"""
LOW = tl.constexpr(0x3210_4444_1044_4410)
HIGH = tl.constexpr(0x3244_4432_4444_3210)
"""Selectors of `_permute` for the two halves, 16 bits for each choice; bytes 0 to 3 are the kept weights, 4
is zero."""


@triton.jit(do_not_specialize_on_alignment=["row_slots"])
def row_kernel(
    x,  # (1, ins)
    weight,  # (outs, ins)
    slots,  # (count, slot_words) int32
    row_slots,  # (1,) int32
    bias,  # (outs,) or None
    out,  # (1, outs)
    groups,
    slot_words,
    indices_at,
    PAIRS: tl.constexpr,
):
    """One row, on the CUDA cores: a warp for each output, grid (outs,).

    Nothing is shared, nothing waits for another warp, and an input is selected by a shift: 14 instructions
    for two products. `PAIRS` groups and the PAIRS groups 16 further on are multiplied at once.
    """
    n = tl.program_id(0)
    slot = tl.load(row_slots)
    x = x.to(tl.pointer_type(tl.int64), bitcast=True)
    total = tl.zeros((PAIRS,), tl.float32)
    q = tl.arange(0, PAIRS)
    if slot == DENSE:
        row = weight.to(tl.pointer_type(tl.int64), bitcast=True) + n.to(tl.int64) * groups
        for start in range(0, groups, PAIRS):
            group = tl.load(row + start + q, mask=start + q < groups, other=0)
            inputs = tl.load(x + start + q, mask=start + q < groups, other=0)
            for place in tl.static_range(4):
                left = _low_float((group >> (16 * place)).to(tl.int32), out.dtype.element_ty)
                total += left * _low_float((inputs >> (16 * place)).to(tl.int32), out.dtype.element_ty)
    else:
        slots += slot.to(tl.int64) * slot_words
        values = slots + n * groups
        indices = (slots + indices_at).to(tl.pointer_type(tl.uint8), bitcast=True)
        indices += n * (tl.cdiv(groups, BLOCK) * WIDTH)
        whole = groups // (2 * PAIRS) * PAIRS
        for start in range(0, whole, PAIRS):
            total = _kept_products(total, x, values, indices, start + q, groups, False, out.dtype.element_ty)
        if 2 * whole < groups:
            total = _kept_products(total, x, values, indices, whole + q, groups, True, out.dtype.element_ty)
    product = tl.sum(total)
    if bias is not None:
        product += tl.load(bias + n).to(tl.float32)
    tl.store(out + n, product.to(out.dtype.element_ty))


@triton.jit
def _kept_products(total, x, values, indices, q, groups, MASKED: tl.constexpr, dtype: tl.constexpr):
    """total + the products of a row's kept weights whose indices are in bytes q."""
    index = _load(indices + q, q // WIDTH * BLOCK < groups, MASKED).to(tl.int32)
    for half in tl.static_range(2):
        g = q // WIDTH * BLOCK + half * WIDTH + q % WIDTH
        kept = _load(values + g, g < groups, MASKED)
        inputs = _load(x + g, g < groups, MASKED)
        # The weight in place 0 or 3 has an index of its own if both of its half are kept: repeat its input.
        low, high = inputs.to(tl.int32), (inputs >> 32).to(tl.int32)
        first = _pair(low, _permute(low, high, 0x1054))
        second = _pair(_permute(low, high, 0x3276), high)
        i = index >> (4 * half)
        total += _low_float(kept, dtype) * _low_float((first >> ((i << 4) & 48)).to(tl.int32), dtype)
        total += _high_float(kept, dtype) * _low_float((second >> ((i << 2) & 48)).to(tl.int32), dtype)
    return total


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["row_slots"])
def linear_kernel(
    x,  # (rows, ins), rows x_stride apart
    weight,  # (outs, ins)
    slots,  # (count, slot_words) int32
    row_slots,  # (rows,) int32
    bias,  # (outs,) or None
    out,  # (rows, outs)
    partial,  # (row tiles, out tiles, SPLITS, OUTS, ROWS) float32
    arrived,  # (row tiles, out tiles) int32, zeros before and after
    rows,
    outs,
    groups,
    x_stride,
    slot_words,
    indices_at,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the last block is whole
):
    """A part of the inputs' share in a tile (OUTS, ROWS) of the output; grid (out tiles, SPLITS, row tiles).

    Slot after slot, 9 bits a weight each and 16 for dense rows; the slots are those that the rows use. So
    nothing is decided on the host, and a captured graph stays right whatever `row_slots` and the slots hold.
    The product is turned, as the tensor cores want their first operand in registers. Reading the dense
    weight once for four slots and masking it for each was slower for any number of slots (H200: 47 against
    30 us for four, 89 against 55 for eight): what binds is not the bits.

    The program that arrives last adds the parts up, always in the same order.
    """
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row_slot = tl.load(row_slots + m, mask=m < rows, other=NOBODY)
    each = tl.cdiv(tl.cdiv(groups, BLOCK), SPLITS)
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, tl.cdiv(groups, BLOCK))
    x += m.to(tl.int64)[None, :] * x_stride
    row = tl.minimum(n, outs - 1)[:, None]  # outputs beyond the last are computed and not stored
    product = tl.zeros((OUTS, ROWS), tl.float32)
    slot = _next(row_slot, NOBODY)
    while slot != END:
        mine = (row_slot == slot)[None, :]
        if slot == DENSE:
            alone = _dense_product(
                x, weight, row, mine, first, last, groups, ROWS, OUTS, WHOLE
            )  # fmt: skip
        else:
            alone = _kept_product(
                x, slots + slot.to(tl.int64) * slot_words, indices_at, row, mine, first, last, groups,
                ROWS, OUTS, STAGES, WHOLE, out.dtype.element_ty,
            )  # fmt: skip
        # By selection: an infinity that one mask keeps never meets the rows of another.
        product = tl.where(mine, alone, product)
        slot = _next(row_slot, slot)

    if SPLITS > 1:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        partial += tile.to(tl.int64) * (SPLITS * OUTS * ROWS)
        partial += tl.arange(0, OUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        tl.store(partial + tl.program_id(1) * (OUTS * ROWS), product)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1) != SPLITS - 1:
            return
        tl.store(arrived + tile, 0)
        product = tl.zeros((OUTS, ROWS), tl.float32)
        for split in tl.static_range(SPLITS):
            product += tl.load(partial + split * (OUTS * ROWS), cache_modifier=".cg")
    _store(product, bias, out, m[None, :], n[:, None], row_slot[None, :] != NOBODY, outs)


@triton.jit
def _next(row_slot, slot):
    """The lowest slot above `slot` that a row uses, or END."""
    return tl.min(tl.where(row_slot > slot, row_slot, END))


@triton.jit
def _kept_product(
    x, slot, indices_at, row, mine, first, last, groups,
    ROWS: tl.constexpr, OUTS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The weights that one slot keeps times x, (OUTS, ROWS): read sparse, multiplied dense."""
    product = tl.zeros((OUTS, ROWS), tl.float32)
    indices = (slot + indices_at).to(tl.pointer_type(tl.uint8), bitcast=True)
    indices += row * (tl.cdiv(groups, BLOCK) * WIDTH)
    values = slot + row * groups
    for block in tl.range(first, last, num_stages=STAGES):
        index = tl.load(indices + block * WIDTH + tl.arange(0, WIDTH)[None, :]).to(tl.int32)
        for half in tl.static_range(2):
            start = block * BLOCK + half * WIDTH
            g = start + tl.arange(0, WIDTH)[None, :]
            kept = _load(values + g, g < groups, not WHOLE)
            product = _dot(
                _weights(kept, index >> (4 * half), OUTS, dtype),
                _inputs(x, mine, start, groups, WHOLE),
                product,
            )
    return product


@triton.jit
def _dense_product(
    x, weight, row, mine, first, last, groups,
    ROWS: tl.constexpr, OUTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The dense weight times x, (OUTS, ROWS). Not pipelined: that takes registers from `_kept_product`."""
    product = tl.zeros((OUTS, ROWS), tl.float32)
    weight += row.to(tl.int64) * (4 * groups)
    for start in tl.range(first * BLOCK, last * BLOCK, WIDTH, num_stages=1):
        k = 4 * start + tl.arange(0, 4 * WIDTH)[None, :]
        weights = _load(weight + k, k < 4 * groups, not WHOLE)
        product = _dot(weights, _inputs(x, mine, start, groups, WHOLE), product)
    return product


@triton.jit
def _inputs(x, mine, start, groups, WHOLE: tl.constexpr):
    """The inputs of WIDTH groups from `start` on, (4 WIDTH, rows), zeros for rows that are not `mine`."""
    k = 4 * start + tl.arange(0, 4 * WIDTH)[:, None]
    return _load(x + k, mine if WHOLE else mine & (k < 4 * groups), True)


@triton.jit
def _weights(kept, index, OUTS: tl.constexpr, dtype: tl.constexpr):
    """Kept weights (OUTS, WIDTH) in their places among zeros, (OUTS, 4 WIDTH)."""
    low, high = _halves(kept, index)
    even = tl.join(low.to(tl.int16), high.to(tl.int16))
    odd = tl.join((low >> 16).to(tl.int16), (high >> 16).to(tl.int16))
    return tl.join(even, odd).reshape(OUTS, 4 * WIDTH).to(dtype, bitcast=True)


@triton.jit
def _halves(kept, index):
    """Weights 0 and 1, and weights 2 and 3, of the groups whose two kept weights are given; int32."""
    low = tl.full(index.shape, LOW, tl.int64) >> ((index << 4) & 48)
    high = tl.full(index.shape, HIGH, tl.int64) >> ((index << 2) & 48)
    return _permute(kept, 0, low.to(tl.int32)), _permute(kept, 0, high.to(tl.int32))


@triton.jit
def _permute(low, high, selector):
    """Four of the eight bytes of two int32, by the four lowest hexadecimal digits of `selector`."""
    if INTERPRETED:
        both = _pair(low, high)
        out = low & 0
        for byte in tl.static_range(4):
            shift = ((selector >> (4 * byte)) & 7) * 8
            out |= ((both >> shift) & 255).to(tl.int32) << (8 * byte)
        return out
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _pair(low, high):
    """Two int32 as an int64."""
    if INTERPRETED:
        return (low.to(tl.int64) & 0xFFFFFFFF) | ((low * 0 + high).to(tl.int64) << 32)
    return tl.inline_asm_elementwise(
        "mov.b64 $0, {$1, $2};", "=l,r,r", [low, high], tl.int64, is_pure=True, pack=1
    )


@triton.jit
def _low_float(bits, dtype: tl.constexpr):
    """The 16-bit float in the low half of an int32."""
    if dtype == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _high_float(bits, dtype: tl.constexpr):
    """The 16-bit float in the high half of an int32."""
    if dtype == tl.bfloat16:
        return (bits & -65536).to(tl.float32, bitcast=True)
    return _low_float(bits >> 16, dtype)


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    """Zeros where masked."""
    if MASKED:
        return tl.load(pointers, mask=mask, other=0)
    return tl.load(pointers)


@triton.jit
def _dot(left, right, product):
    """product + left x right; the interpreter's dot of bf16 is wrong in Triton 3.9."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, product, input_precision="ieee")


@triton.jit
def _store(product, bias, out, m, n, mine, outs):
    """Store the rows m that are `mine`, bias added; one of m and n is a column."""
    if bias is not None:
        product += tl.load(bias + n, mask=n < outs, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * outs + n, product.to(out.dtype.element_ty), mask=mine & (n < outs))


@triton.jit(do_not_specialize=["rows", "slot"], do_not_specialize_on_alignment=["row_slots"])
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
        left = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
        right = weight + n.to(tl.int64)[None, :] * ins + k[:, None]
        product = _dot(
            _load(left, (m < rows)[:, None] & (k < ins)[None, :], True),
            _load(right, (n < outs)[None, :] & (k < ins)[:, None], True),
            product,
        )
    _store(product, bias, out, m[:, None], n[None, :], mine[:, None], outs)


@triton.jit(do_not_specialize=["slot"], do_not_specialize_on_alignment=["used"])
def expand_kernel(
    slots,  # (count, slot_words) int32
    slot,
    used,  # bool: whether any row uses the slot
    out,  # (outs, ins)
    groups,
    slot_words,
    indices_at,
    GROUPS: tl.constexpr,
):
    """A slot back to a dense weight with zeros, or nothing if it is not used; grid (outs, group tiles)."""
    if tl.load(used) == 0:
        return
    row = tl.program_id(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    slots += slot.to(tl.int64) * slot_words
    kept = tl.load(slots + row * groups + g, mask=g < groups, other=0)
    indices = (slots + indices_at).to(tl.pointer_type(tl.uint8), bitcast=True)
    q = row * tl.cdiv(groups, BLOCK) * WIDTH + g // BLOCK * WIDTH + g % WIDTH
    index = tl.load(indices + q, mask=g < groups, other=0).to(tl.int32) >> (g // WIDTH % 2 * 4)
    low, high = _halves(kept, index)
    out = out.to(tl.pointer_type(tl.int64), bitcast=True)
    tl.store(out + row.to(tl.int64) * groups + g, _pair(low, high), mask=g < groups)


@triton.jit(do_not_specialize=["slot"])
def fill_kernel(
    layers,  # (layers, 3) int64: the addresses of a layer's slots, weight and packed mask
    slot,
    groups,
    row_bytes,
    slot_words,
    indices_at,
    GROUPS: tl.constexpr,
):
    """Write kept values and indices into a slot of each of the layers; grid (outs, group tiles, layers).

    They have one shape: weights (outs, ins) and packed masks (outs, row_bytes) uint8. 3.2 bytes a weight
    pass: 2 of the dense weight, 1 + 1/8 of the slot, 1/12 of the packed mask. The values are moved as
    integers, so none of them changes, whatever it is.
    """
    row = tl.program_id(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    layers += 3 * tl.program_id(2)
    slots = _slot(layers, slot, slot_words)
    weight = tl.multiple_of(tl.load(layers + 1).to(tl.pointer_type(tl.int64)), 16)
    weight += row.to(tl.int64) * groups
    packed = tl.load(layers + 2).to(tl.pointer_type(tl.uint8))
    group = tl.load(weight + g, mask=g < groups, other=0)
    code = _code(packed, row, g, groups, row_bytes)
    places = 0xED9C84 >> (4 * code)  # 01, 02, 03, 12, 13, 23: the first in two bits, the second in two
    first = (group >> ((places & 3) * 16)) & 0xFFFF
    second = (group >> ((places >> 2 & 3) * 16)) & 0xFFFF
    tl.store(slots + row * groups + g, (first | (second << 16)).to(tl.int32), mask=g < groups)

    # The packed bytes are in the first-level cache by now: decoding them again beats exchanging indices.
    q = tl.program_id(1) * (GROUPS // 2) + tl.arange(0, GROUPS // 2)
    g = q // WIDTH * BLOCK + q % WIDTH
    low = INDEX >> (4 * _code(packed, row, g, groups, row_bytes)) & 15
    high = INDEX >> (4 * _code(packed, row, g + WIDTH, groups, row_bytes)) & 15
    row_indices = tl.cdiv(groups, BLOCK) * WIDTH
    indices = (slots + indices_at).to(tl.pointer_type(tl.uint8), bitcast=True) + row * row_indices
    tl.store(indices + q, (low | high << 4).to(tl.uint8), mask=q < row_indices)


@triton.jit
def _slot(layers, slot, slot_words):
    """A slot of the layer whose addresses `layers` begins with."""
    slots = tl.multiple_of(tl.load(layers).to(tl.pointer_type(tl.int32)), 16)
    return slots + slot.to(tl.int64) * slot_words


@triton.jit
def _code(packed, row, g, groups, row_bytes):
    """The base-6 codes of groups g of a row, int32; 0 beyond the last group.

    A byte is three digits, least first: b // 6 == b * 171 >> 10 for every b below 216.
    """
    byte = tl.load(packed + row * row_bytes + g // 3, mask=g < groups, other=0).to(tl.int32)
    sixth = (byte * 171) >> 10
    thirtysixth = (sixth * 171) >> 10
    place = g % 3
    return tl.where(
        place == 0,
        byte - 6 * sixth,
        tl.where(place == 1, sixth - 6 * thirtysixth, thirtysixth),
    )


@triton.jit(do_not_specialize=["slot"])
def metadata_kernel(
    layers,  # as of fill_kernel
    slot,
    outs,
    groups,
    slot_words,
    indices_at,
    UNITS: tl.constexpr,
):
    """Write a filled slot's metadata for cuSPARSELt on sm_90; grid (unit tiles, layers).

    `outs` is a multiple of 64 and `groups` of 8. Tiles of 64 rows and 8 groups follow each other along the
    row, 128 words of 16 bits each. A word is the places of groups g and g + 4 in rows r and r + 8,
    first | second << 2. The order is not documented by NVIDIA; FlagGems PR #5281 found it on an H100, and
    `gpu` compares it with the library's own before it is used. A unit is rows r and r + 8 in half of a
    block's bytes: four words in each of two tiles.
    """
    blocks = tl.cdiv(groups, BLOCK)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = unit < outs * blocks
    eight, half, block, rows = unit % 8, unit // 8 % 2, unit // 16 % blocks, unit // 16 // blocks
    slots = _slot(layers + 3 * tl.program_id(1), slot, slot_words)
    indices = (slots + indices_at).to(tl.pointer_type(tl.int64), bitcast=True)
    at = (rows * 16 + eight) * (2 * blocks) + 2 * block + half
    upper = _places(tl.load(indices + at, mask=inside, other=0))
    lower = _places(tl.load(indices + at + 16 * blocks, mask=inside, other=0))
    metadata = (slots + outs * groups).to(tl.pointer_type(tl.int64), bitcast=True)
    for nibble in tl.static_range(2):
        tile = 4 * block + 2 * nibble + half
        word = _nibbles(upper, nibble) | (_nibbles(lower, nibble) << 4)
        target = ((rows // 4 * (groups // 8) + tile) * 4 + rows % 4) * 8 + eight
        words = _spread(word) | (_spread(word >> 32) << 8)
        tl.store(metadata + target, words, mask=inside & (tile < groups // 8))


@triton.jit
def _places(index):
    """Sixteen indices as places of kept weights: a 3 in the low two bits is 0, a 0 in the high two is 3."""
    first, second = index & 0x3333333333333333, (index >> 2) & 0x3333333333333333
    both = first & (first >> 1) & 0x1111111111111111
    none = 0x1111111111111111 & ~(second | (second >> 1))
    return (first ^ (both * 3)) | ((second | (none * 3)) << 2)


@triton.jit
def _nibbles(bytes_, nibble: tl.constexpr):
    """The low or the high nibble of each of 8 bytes."""
    return (bytes_ >> (4 * nibble)) & 0x0F0F0F0F0F0F0F0F


@triton.jit
def _spread(bytes_):
    """The four lowest bytes, each in 16 bits."""
    pairs = ((bytes_ & 0xFFFFFFFF) | (bytes_ << 16)) & 0x0000FFFF0000FFFF
    return (pairs | (pairs << 8)) & 0x00FF00FF00FF00FF
