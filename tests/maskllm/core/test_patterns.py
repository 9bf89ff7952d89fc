"""Masks, codes and bytes turn into each other without loss, for any N:M."""

from math import ceil, comb, log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskllm.core.patterns import BadPattern, best, check, encode, expand, pack, patterns, row_bytes, unpack

N_M = [(2, 4), (1, 4), (3, 4), (1, 2), (3, 5), (2, 6), (2, 8), (4, 8), (1, 16), (8, 16)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64]


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Scores (rows, groups * m) of any dtype, full of ties, and an N:M."""
    n, m = draw(st.sampled_from(N_M))
    shape = draw(st.integers(1, 6)), m * draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randint(-9, 10, shape, generator=generator)
    return values.to(draw(st.sampled_from(DTYPES))), n, m


@given(scores())
def test_a_mask_survives_codes_and_bytes(drawn: tuple[Tensor, int, int]) -> None:
    values, n, m = drawn
    mask = best(values, n, m)
    codes = encode(mask, n, m)
    packed = pack(codes, n, m)
    assert torch.equal(unpack(packed, codes.shape[1], n, m), codes)
    assert torch.equal(expand(codes, n, m), mask)


@given(scores())
def test_best_keeps_n_of_every_group_and_drops_nothing_larger(drawn: tuple[Tensor, int, int]) -> None:
    values, n, m = drawn
    kept = best(values, n, m).view(-1, m)
    assert (kept.sum(1) == n).all()
    smallest_kept = values.double().view(-1, m).masked_fill(~kept, float("inf")).amin(1)
    largest_dropped = values.double().view(-1, m).masked_fill(kept, -float("inf")).amax(1)
    assert (smallest_kept >= largest_dropped).all()


@given(scores())
def test_packed_rows_are_never_larger_than_whole_bits_a_group(drawn: tuple[Tensor, int, int]) -> None:
    values, n, m = drawn
    packed = pack(encode(best(values, n, m), n, m), n, m)
    groups = values.shape[1] // m
    assert packed.dtype == torch.uint8
    assert packed.shape == (values.shape[0], row_bytes(groups, n, m))
    assert row_bytes(groups, n, m) <= ceil(groups * ceil(log2(comb(m, n))) / 8)


def test_the_six_patterns_of_2_of_4_in_the_order_of_their_codes() -> None:
    assert patterns(2, 4).int().tolist() == [
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 1],
        [0, 1, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 1, 1],
    ]


def test_best_keeps_the_two_largest_of_four() -> None:
    assert best(torch.tensor([[0.1, -3.0, 2.0, 0.5]])).int().tolist() == [[0, 0, 1, 1]]


def test_best_keeps_equal_scores_from_the_left() -> None:
    assert best(torch.tensor([[5, 5, 5, 5], [1, 7, 1, 1]])).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_first_and_last_pattern_have_the_first_and_last_code() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1]]).bool()
    assert encode(mask).tolist() == [[0, 5]]


def test_three_groups_of_2_of_4_are_one_byte_in_base_6() -> None:
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[1 + 2 * 6 + 3 * 36]]


def test_the_last_byte_of_a_row_is_padded_with_zeros() -> None:
    codes = torch.tensor([[0, 0, 0, 5, 4]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0, 5 + 4 * 6]]


@pytest.mark.parametrize(
    ("n", "m", "codes", "packed"),
    [
        (1, 4, [3, 2, 1, 0], [3 + 2 * 4 + 1 * 16]),  # four digits of base 4
        (3, 5, [7, 9], [7 + 9 * 10]),  # two digits of base 10
        (4, 8, [1, 2, 69], [0b0000_0001, 0b0100_0001, 0b0001_0001]),  # 7 bits each, lowest first
        (8, 16, [1, 3], [0b0000_0001, 0b1100_0000, 0, 0]),  # 14 bits each
    ],
)
def test_other_patterns_pack_as_digits_or_as_bits(
    n: int, m: int, codes: list[int], packed: list[int]
) -> None:
    assert pack(torch.tensor([codes]), n, m).tolist() == [packed]
    assert unpack(torch.tensor([packed], dtype=torch.uint8), len(codes), n, m).tolist() == [codes]


def test_a_group_that_keeps_three_is_named() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1, 0]]).bool()
    with pytest.raises(BadPattern, match="row 1, group 1 keeps 3 of 4 weights, not 2"):
        encode(mask)


def test_a_byte_or_code_out_of_range_is_refused() -> None:
    with pytest.raises(BadPattern, match="below 216"):  # 6 * 6 * 6
        unpack(torch.tensor([[216]], dtype=torch.uint8), 3)
    with pytest.raises(BadPattern, match="codes 0 to 69"):  # 70 patterns of 4:8, in 7 bits
        unpack(torch.tensor([[70]], dtype=torch.uint8), 1, 4, 8)
    with pytest.raises(BadPattern, match="codes 0 to 5"):
        expand(torch.tensor([[6]], dtype=torch.uint8))


def test_padding_that_is_not_zero_is_refused() -> None:
    with pytest.raises(BadPattern, match="padding"):
        unpack(torch.tensor([[0 + 0 * 6 + 1 * 36]], dtype=torch.uint8), 2)


def test_too_few_bytes_for_the_groups_are_refused() -> None:
    with pytest.raises(BadPattern, match="1 bytes a row cannot hold 4 groups"):
        unpack(torch.zeros(1, 1, dtype=torch.uint8), 4)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2), (2, 17)])
def test_an_n_m_that_does_not_exist_is_refused(n: int, m: int) -> None:
    with pytest.raises(BadPattern, match=f"no pattern {n}:{m}"):
        check(n, m)


def test_a_width_that_is_no_multiple_of_m_is_refused() -> None:
    with pytest.raises(BadPattern, match="multiple of 4"):
        best(torch.zeros(2, 6))
