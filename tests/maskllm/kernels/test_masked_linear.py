"""The operator's promises, by every backend that this machine can run."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from maskllm.core.patterns import best, encode, pack
from maskllm.kernels import DENSE, cpu, gpu
from maskllm.kernels.masked_linear import (
    NoBackend,
    allocate,
    backend,
    chosen,
    fill,
    masked_linear,
    multiply,
)

HERE = Path(__file__).parent
CPU = Path(cpu.__file__).with_name("cpu")
FIRST_TWO, LAST_TWO, OUTER = [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]


def forced(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend, until the test ends."""
    monkeypatch.setenv("MASKLLM_BACKEND", name)
    yield name
    if cpu.available():
        cpu.use(cpu.available()[0])


@pytest.fixture(params=["reference", *cpu.available()])
def kernels(request, monkeypatch):
    """Every backend that this machine has, in turn."""
    yield from forced(request.param, monkeypatch)


NOT_BUILT = pytest.param("", marks=pytest.mark.skip(reason=str(cpu.why_not())))


@pytest.fixture(params=cpu.available() or [NOT_BUILT])
def fast(request, monkeypatch):
    """Every backend but the reference, which has bool slots only."""
    yield from forced(request.param, monkeypatch)


def test_kernels_are_there_where_a_compiler_is():
    """Without this the tests below would pass by having nothing to run."""
    assert "portable" in cpu.available() or not shutil.which("g++")


def packed(mask: Tensor) -> Tensor:
    return pack(encode(mask.bool()))


def masked(weight: Tensor, masks: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Slots that hold these masks."""
    slots = allocate(weight, len(masks), dtype)
    for slot, mask in enumerate(masks):
        fill(slots, slot, weight, packed(mask))
    return slots


def exact(x: Tensor, weight: Tensor, masks: list[Tensor], rows: Tensor, bias: Tensor | None) -> Tensor:
    """The oracle, row by row in float64."""
    out = []
    for row, slot in zip(x, rows.tolist(), strict=True):
        kept = weight if slot == DENSE else torch.where(masks[slot], weight, 0)
        out.append(kept.double() @ row.double() + (0 if bias is None else bias.double()))
    return torch.stack(out) if out else torch.empty(0, len(weight), dtype=torch.float64)


@pytest.fixture
def layer(kernels):  # noqa: ARG001
    """A weight (2, 4) and two masks: slot 0 keeps the first two inputs, slot 1 the last two."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0]])
    return weight, masked(weight, [torch.tensor([FIRST_TWO] * 2), torch.tensor([LAST_TWO] * 2)])


def test_every_row_is_answered_by_its_own_mask(layer):
    weight, slots = layer
    rows = torch.tensor([0, 1, DENSE, 0], dtype=torch.int32)
    out = masked_linear(torch.ones(4, 4), weight, slots, rows, None)
    assert out.tolist() == [[3, -3], [7, -7], [10, -10], [3, -3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_of_any_dtype_is_added_to_masked_and_dense_rows_alike(layer, dtype):
    weight, slots = layer
    bias = torch.tensor([100.0, 0.0], dtype=dtype)
    for rows, expected in (
        ([1, DENSE], [[107, -7], [110, -10]]),
        ([DENSE, DENSE], [[110, -10], [110, -10]]),
        ([0, 0], [[103, -3], [103, -3]]),
    ):
        out = masked_linear(torch.ones(2, 4), weight, slots, torch.tensor(rows, dtype=torch.int32), bias)
        assert out.dtype == torch.float32
        assert out.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_of_another_dtype_is_answered_in_that_of_the_inputs(layer, dtype, other):
    weight, slots = layer
    for rows, expected in (([0, 1, DENSE], [[3, -3], [7, -7], [10, -10]]), ([DENSE] * 2, [[10, -10]] * 2)):
        x, row_slots = torch.ones(len(rows), 4, dtype=dtype), torch.tensor(rows, dtype=torch.int32)
        out = masked_linear(x, weight.to(other), slots, row_slots, None)
        assert out.dtype == dtype
        assert out.tolist() == expected


def test_refilling_a_slot_replaces_its_mask(layer):
    weight, slots = layer
    fill(slots, 0, weight, packed(torch.tensor([OUTER] * 2)))
    out = masked_linear(torch.ones(1, 4), weight, slots, torch.zeros(1, dtype=torch.int32), None)
    assert out.tolist() == [[5, -5]]


def test_a_dropped_weight_is_gone_even_if_it_is_infinite(kernels):
    weight = torch.tensor([[1.0, 2.0, torch.inf, torch.nan]] * 2)
    slots = masked(
        weight, [torch.tensor([FIRST_TWO] * 2)], None if kernels == "reference" else torch.bfloat16
    )
    out = masked_linear(torch.ones(1, 4), weight, slots, torch.zeros(1, dtype=torch.int32), None)
    assert out.tolist() == [[3, 3]]
    if kernels != "reference":
        slots = masked(weight, [torch.tensor([FIRST_TWO] * 2)], torch.int8)
        out = masked_linear(torch.ones(1, 4), weight, slots, torch.zeros(1, dtype=torch.int32), None)
        torch.testing.assert_close(out, torch.tensor([[3.0, 3.0]]), rtol=1e-2, atol=0)


def test_zeros_of_either_sign_can_be_kept(kernels):
    weight = torch.tensor([[0.0, 5.0, -0.0, 7.0]])
    slots = masked(weight, [torch.tensor([[1, 0, 1, 0]])])
    out = masked_linear(torch.ones(1, 4), weight, slots, torch.zeros(1, dtype=torch.int32), None)
    assert out.tolist() == [[0]]
    if kernels != "reference":  # the first two values after 64 bytes of mask bits
        assert slots[0, 32:34].view(torch.int16).tolist() == [0, -(2**15)]


def test_rows_and_groups_of_zeros_are_answered_as_any_other(kernels):
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0, 127.0, 2.0, 3.0, 4.0], [0.0] * 8])
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0, -0.0, 127.0, 1.0, 1.0], [-0.0] * 8])
    for dtype in (None,) if kernels == "reference" else (None, torch.int8):
        slots = masked(weight, [torch.tensor([FIRST_TWO * 2, LAST_TWO * 2])], dtype)
        out = masked_linear(x, weight, slots, torch.zeros(2, dtype=torch.int32), None)
        assert out.tolist() == [[254, 0], [0, 0]]  # -0.0 x 127 + 127 x 2


def test_an_input_that_is_not_finite_reaches_the_outputs_that_keep_it(fast):  # noqa: ARG001
    weight = torch.ones(2, 4)
    slots = masked(weight, [torch.tensor([FIRST_TWO, LAST_TWO])])
    x = torch.tensor([[torch.inf, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, torch.nan]])
    out = masked_linear(x, weight, slots, torch.zeros(2, dtype=torch.int32), None)
    assert out[0].tolist() == [torch.inf, 2]
    assert out[1, 0] == 2
    assert out[1, 1].isnan()


@pytest.mark.parametrize("form", [0, 1])
def test_whether_such_an_input_reaches_the_others_depends_on_how_masks_share_a_step(fast, form):
    """Where the dense weight is read once, dropped weights are zeros in it, and 0 x inf is NaN."""
    weight = torch.ones(2, 4).bfloat16()
    slots = masked(weight, [torch.tensor([FIRST_TWO] * 2), torch.tensor([LAST_TWO] * 2)])
    x = torch.tensor([[1.0, 1.0, torch.inf, 1.0], [1.0, 1.0, 1.0, 1.0]]).bfloat16()
    try:
        cpu.force_form(form)
        out = masked_linear(x, weight, slots, torch.tensor([0, 1], dtype=torch.int32), None)
    finally:
        cpu.force_form(-1)
    assert out[1].tolist() == [2, 2]
    if form == 1 and fast == "avx512-bf16":
        assert out[0].isnan().all()
    else:
        assert out[0].tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((64, 256), 9),
        ((172, 64), 5),
        ((64, 172), 3),
        ((7, 36), 70),
        ((130, 2308), 17),
        ((4, 4), 1),
        ((12, 128), 0),
    ],
)
def test_any_shape_and_dtype_of_a_decoder_is_right(kernels, dtype, shape, rows):
    torch.manual_seed(0)
    weight = (torch.randn(shape) / 8).bfloat16()
    masks = [best(torch.rand(shape)) for _ in range(3)]
    slots = masked(weight, masks)
    assert slots.dtype == (torch.bool if kernels == "reference" else torch.bfloat16)
    x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    row_slots = torch.randint(-1, 3, (rows,), dtype=torch.int32)
    out = masked_linear(x, weight.to(dtype), slots, row_slots, bias)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}[dtype]
    expected = exact(x, weight, masks, row_slots, bias)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance / 4, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 15, 33, 34, 35, 64, 129, 200, 4096])
def test_any_number_of_rows_is_right_under_one_mask(kernels, rows):  # noqa: ARG001
    torch.manual_seed(rows)
    weight = torch.randn(20, 1160).bfloat16()
    masks = [best(torch.rand(weight.shape)), best(torch.rand(weight.shape))]
    slots = masked(weight, masks)
    x = torch.randn(rows, 1160)
    row_slots = torch.ones(rows, dtype=torch.int32)
    out = masked_linear(x, weight.float(), slots, row_slots, None)
    torch.testing.assert_close(out.double(), exact(x, weight, masks, row_slots, None), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_and_outputs_than_are_multiplied_together_are_right(fast, dtype):  # noqa: ARG001
    """Five panels of 16 rows for each mask, and 150 quads for one thread, which takes 64 at a time."""
    torch.manual_seed(0)
    weight = torch.randn(600, 260).bfloat16()
    masks = [best(torch.rand(weight.shape)) for _ in range(2)]
    slots = masked(weight, masks)
    x, row_slots = torch.randn(150, 260).to(dtype), torch.arange(150, dtype=torch.int32) % 2
    try:
        cpu.force_form(0)
        out = masked_linear(x, weight, slots, row_slots, None)
    finally:
        cpu.force_form(-1)
    expected = exact(x, weight, masks, row_slots, None)
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 0.1)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


def test_two_threads_share_a_prefill(fast):  # noqa: ARG001
    torch.manual_seed(0)
    weight = torch.randn(520, 512).bfloat16()
    assert weight.numel() >= cpu.LARGE
    mask = best(torch.rand(weight.shape))
    slots = masked(weight, [mask])
    x, threads = torch.randn(4096, 512).bfloat16(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        out = masked_linear(x, weight, slots, torch.zeros(4096, dtype=torch.int32), None)
    finally:
        torch.set_num_threads(threads)
    expected = x.double() @ torch.where(mask, weight, 0).double().T
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("outs", "columns", "rows"), [(524, 512, 7), (52, 128, 400)])
def test_threads_leave_each_others_outputs_alone(fast, dtype, outs, columns, rows):  # noqa: ARG001
    """The weights or the rows are enough to be shared, by quads that no 16 outputs divide."""
    torch.manual_seed(0)
    weight = torch.randn(outs, columns).bfloat16()
    assert cpu._threads(weight, rows) == torch.get_num_threads()
    slots = masked(weight, [best(torch.rand(outs, columns)) for _ in range(2)], dtype)
    row_slots = torch.tensor([0, 1, 0, 0, 0, 1, 0] * (rows // 7) + [0] * (rows % 7), dtype=torch.int32)
    x, threads = torch.randn(rows, columns).bfloat16(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = masked_linear(x, weight, slots, row_slots, None)
        torch.set_num_threads(3)
        for _ in range(200):
            assert torch.equal(masked_linear(x, weight, slots, row_slots, None), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_slot_is_the_same_whoever_fills_it_and_from_whichever_weight(fast, dtype):  # noqa: ARG001
    """By one thread or by three, from bf16 or from fp32 of the same values."""
    torch.manual_seed(0)
    weight, threads = torch.randn(528, 1196).bfloat16(), torch.get_num_threads()
    weight[0, :16] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0] * 4)
    mask = best(torch.rand(weight.shape))
    filled = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            filled += [masked(each, [mask], dtype).view(torch.uint8) for each in (weight, weight.float())]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(slots, filled[0]) for slots in filled)


@pytest.mark.parametrize("form", [0, 1])
def test_both_forms_of_many_masks_are_right(fast, form):  # noqa: ARG001
    """Where a backend has only the first form, 1 means that one."""
    torch.manual_seed(0)
    weight = torch.randn(300, 1196).bfloat16()
    masks = [best(torch.rand(weight.shape)) for _ in range(5)]
    slots = masked(weight, masks)
    x = torch.randn(23, 1196).bfloat16()
    row_slots = torch.randint(-1, 5, (23,), dtype=torch.int32)
    try:
        cpu.force_form(form)
        out = masked_linear(x, weight, slots, row_slots, None)
    finally:
        cpu.force_form(-1)
    torch.testing.assert_close(out.double(), exact(x, weight, masks, row_slots, None), rtol=1e-2, atol=0.2)


@pytest.fixture
def costs():
    """The costs as they are, which are so again afterwards."""
    if not cpu.available():
        pytest.skip("the C++ kernels were not built")
    before = cpu.costs()
    yield before
    cpu.set_costs(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows_of_a_mask_are_multiplied_by_its_weight_made_dense(costs, dtype, monkeypatch):
    """Where that is faster: here from 9 rows of one mask on."""
    cpu.set_costs(replace(costs, sparse_rows=8))
    torch.manual_seed(0)
    weight = torch.randn(30, 140).bfloat16()
    masks = [best(torch.rand(weight.shape)) for _ in range(3)]
    slots, x = masked(weight, masks), torch.randn(40, 140, dtype=dtype)
    made = []
    expand = cpu.expand
    monkeypatch.setattr(cpu, "expand", lambda *args: made.append(args[1]) or expand(*args))
    for rows in ([0] * 8, [0] * 9, [0] * 9 + [1] * 8 + [DENSE] * 10 + [2] * 12, [0, 1] * 8):
        row_slots = torch.tensor(rows, dtype=torch.int32)
        out = masked_linear(x[: len(rows)], weight.to(dtype), slots, row_slots, torch.arange(30).to(dtype))
        expected = exact(x[: len(rows)], weight, masks, row_slots, torch.arange(30))
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=0.1)
    assert made == [0, 0, 2]


def test_rows_with_several_masks_take_the_form_that_costs_less(costs):
    def takes_once(masks: int, **changed: float) -> bool:
        nothing = {"slot": 0, "slot_row": 0, "once": 0, "fixed": 0, "once_row": 0, "once_mask": 0}
        cpu.set_costs(replace(costs, **nothing | changed))
        return cpu.reads_once(torch.arange(16, dtype=torch.int32) % masks)

    # 16 rows of M masks: M slots at 10 apart, or 40 + 2 M for the dense weight once.
    slots = {"slot": 10, "fixed": 40, "once_mask": 2}
    assert [takes_once(masks, **slots) for masks in (4, 5, 6, 16)] == [False, False, True, True]
    # 16 rows at 1 each apart; once as many and half a row more, or half a row less, or at least 17.
    rows = {"slot_row": 1, "once_row": 1}
    assert not any(takes_once(masks, **rows, fixed=0.5) for masks in range(2, 17))
    assert [takes_once(masks, **rows, fixed=-0.5) for masks in (1, 2, 16)] == [False, True, True]
    assert not takes_once(2, **rows, fixed=-0.5, once=17)


def test_without_kernels_it_is_said_why(monkeypatch):
    monkeypatch.setattr(cpu, "_library", lambda: None)
    assert chosen()["cpu"].startswith("reference: the C++ kernels were not built")


def test_costs_are_measured_where_there_is_a_choice(costs):
    measured = cpu.calibrate()
    assert cpu.costs() == (measured or costs)  # a busy machine measures nothing
    if measured and cpu.using() == "avx512-bf16":
        assert measured.slot > 0
        assert 0 < measured.slot_row < measured.once  # a row is less than reading all weights


@pytest.mark.parametrize(
    ("won", "more_than"), [((), cpu.NEVER), ((128,), cpu.NEVER), ((512,), 256), ((128, 512), 64)]
)
@pytest.mark.usefixtures("costs")
def test_a_weight_is_made_dense_from_where_that_wins_for_all_more_rows(monkeypatch, won, more_than):
    faster = {f"dense, {rows}" for rows in won}
    monkeypatch.setattr(
        cpu, "_fastest", lambda works, *_, **__: {work: 2 - (work in faster) for work in works}
    )
    assert cpu.calibrate() == cpu.costs()
    assert cpu.costs().sparse_rows == more_than


def test_rows_that_are_not_contiguous_are_read_where_they_lie(kernels):  # noqa: ARG001
    weight = torch.randn(8, 64).bfloat16()
    masks = [best(torch.rand(8, 64))]
    slots = masked(weight, masks)
    wide, rows = torch.randn(6, 128), torch.zeros(6, dtype=torch.int32)
    for x in (wide[:, 64:], wide.T.contiguous().T[:, :64], wide[::2, :64]):
        out = masked_linear(x, weight.float(), slots, rows[: len(x)], None)
        expected = exact(x, weight, masks, rows[: len(x)], None)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_int8_slots_answer_within_the_rounding_of_weights_and_inputs(fast):  # noqa: ARG001
    torch.manual_seed(0)
    weight = torch.randn(30, 1196).bfloat16()
    masks = [best(torch.rand(weight.shape)) for _ in range(2)]
    slots = masked(weight, masks, torch.int8)
    x = torch.randn(13, 1196)
    row_slots = torch.randint(-1, 2, (13,), dtype=torch.int32)
    out = masked_linear(x, weight.float(), slots, row_slots, None).double()
    expected = exact(x, weight, masks, row_slots, None)
    # Half a step of the weight's scale and half of the input's, uncorrelated over 598 kept weights.
    step = (weight.abs().amax(1).double() / 127)[None] + (x.abs().amax(1).double() / 127)[:, None]
    assert ((out - expected).abs() < 4 * step * 598**0.5 / 12**0.5).all()


@pytest.mark.parametrize(("outs", "columns", "rows"), [(8, 256, 5), (30, 2308, 43)])
def test_int8_is_exact_where_weights_and_inputs_are_whole_numbers_up_to_127(fast, outs, columns, rows):  # noqa: ARG001
    torch.manual_seed(0)
    weight, x = (torch.randint(-127, 128, (n, columns)).float() for n in (outs, rows))
    weight[:, 0], x[:, 0] = 127, -127
    mask = best(torch.rand(outs, columns))
    slots = masked(weight, [mask], torch.int8)
    out = masked_linear(x, weight, slots, torch.zeros(rows, dtype=torch.int32), None)
    torch.testing.assert_close(out, x @ torch.where(mask, weight, 0).T, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("outs", "columns", "rows"), [(8, 256, 5), (7, 140, 33), (1, 4, 1), (130, 2048, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_whole_weight_in_8_bits_is_exact_where_all_is_whole_numbers(fast, dtype, outs, columns, rows):  # noqa: ARG001
    torch.manual_seed(0)
    weight, x = (torch.randint(-127, 128, (n, columns)).float() for n in (outs, rows))
    weight[:, 0], x[:, 0] = 127, -127
    bias = torch.arange(outs).float()
    assert backend(torch.device("cpu")) is cpu
    out = cpu.dense_int8(x, weight, cpu.quantize(weight.to(dtype)), bias)
    torch.testing.assert_close(out, x @ weight.T + bias, rtol=1e-6, atol=0)


def test_a_whole_weight_in_8_bits_saturates_what_is_not_finite(fast):  # noqa: ARG001
    """Its scale is that of the largest finite weight, 2, as an int8 slot's is."""
    weight = torch.tensor([[1.0, -2.0, torch.inf, -torch.inf]])
    assert backend(torch.device("cpu")) is cpu
    out = cpu.dense_int8(torch.eye(4), weight, cpu.quantize(weight))
    torch.testing.assert_close(out[:, 0], torch.tensor([1.0, -2, 2, -2]), rtol=1e-2, atol=0)


def in_8_bits(weight: Tensor, mask: list[int]) -> list[tuple[Tensor, Tensor]]:
    """What identity inputs answer by an int8 slot of one mask, and by the whole weight in 8 bits."""
    x, rows = torch.eye(weight.shape[1]), torch.zeros(weight.shape[1], dtype=torch.int32)
    slots = masked(weight, [torch.tensor([mask] * len(weight))], torch.int8)
    return masked_linear(x, weight, slots, rows, None).T, cpu.dense_int8(x, weight, cpu.quantize(weight)).T


def test_a_weight_that_is_nan_is_0_in_8_bits(fast):  # noqa: ARG001
    for out in in_8_bits(torch.tensor([[1.0, torch.nan, 0.0, 0.0]]), FIRST_TWO):
        torch.testing.assert_close(out, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_a_row_of_weights_so_small_that_one_over_their_scale_is_infinite_keeps_its_zeros(fast):  # noqa: ARG001
    weight = torch.tensor([[2.0**-123, 0.0, 0.0, 0.0]])  # eight of the smallest scale
    for out in in_8_bits(weight, FIRST_TWO):
        torch.testing.assert_close(out * 2.0**123, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_a_row_that_is_not_finite_answers_nan_under_int8_and_no_other_row_does(fast):  # noqa: ARG001
    weight = torch.ones(4, 4)
    slots = masked(weight, [torch.tensor([FIRST_TWO] * 4)], torch.int8)
    x = torch.tensor([[1.0, 1.0, torch.inf, 1.0], [1.0, 1.0, 1.0, 1.0]])
    out = masked_linear(x, weight, slots, torch.zeros(2, dtype=torch.int32), None)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1], torch.full((4,), 2.0), rtol=1e-6, atol=0)


def test_a_slot_that_is_not_there_and_a_mask_of_another_shape_are_refused(kernels):  # noqa: ARG001
    weight = torch.ones(4, 8)
    slots = masked(weight, [torch.tensor([FIRST_TWO * 2] * 4)] * 3)
    for slot in (3, -2):
        with pytest.raises(ValueError, match=rf"rows use slots \[{slot}\], and there are 3"):
            masked_linear(torch.ones(1, 8), weight, slots, torch.tensor([slot], dtype=torch.int32), None)
    for shape in ((4, 4), (4, 16), (3, 2)):
        with pytest.raises(ValueError, match="is no 2:4 mask of a weight"):
            fill(slots, 0, weight, packed(torch.tensor([FIRST_TWO * shape[1]] * shape[0])))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(2, 256)}, r"x \(2, 256\) .* a weight \(4, 128\): .* \(rows, 128\) and \(rows,\)"),
        ({"x": torch.ones(128)}, r"x \(128,\) .* a weight \(4, 128\): .* \(rows, 128\) and \(rows,\)"),
        ({"row_slots": torch.zeros(5).int()}, r"row_slots \(5,\) do not fit .* \(rows, 128\) and \(rows,\)"),
        ({"bias": torch.ones(3)}, r"bias \(3,\) does not fit a weight \(4, 128\): it must be \(4,\)"),
        ({"x": torch.ones(2, 128, dtype=torch.int8)}, "x is torch.int8: it must be float32, bfloat16 or"),
        ({"weight": torch.ones(8, 128)}, r"slots .* do not fit a weight \(8, 128\): they must be \(count, "),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(kernels, wrong, message):  # noqa: ARG001
    weight = torch.ones(4, 128)
    fit = {"x": torch.ones(2, 128), "weight": weight, "row_slots": torch.zeros(2).int(), "bias": None}
    fit["slots"] = masked(weight, [torch.tensor([FIRST_TWO * 32] * 4)])
    assert masked_linear(**fit).tolist() == [[64] * 4] * 2
    with pytest.raises(ValueError, match=message):
        masked_linear(**fit | wrong)


def test_a_mask_is_written_into_a_slot_of_its_weight_and_nowhere_else(kernels):  # noqa: ARG001
    weight, mask = torch.ones(4, 128), torch.tensor([FIRST_TWO * 32] * 4)
    slots = masked(weight, [mask])
    for slot in (-1, 1):
        with pytest.raises(ValueError, match=f"no slot {slot}: there are 1, numbered from 0"):
            fill(slots, slot, weight, packed(mask))
    with pytest.raises(ValueError, match=r"packed \(4, 11\) of torch.int64 is no 2:4 mask .* of uint8"):
        fill(slots, 0, weight, packed(mask).long())
    twice = packed(torch.cat([mask, mask]))
    with pytest.raises(ValueError, match=r"slots .* do not fit a weight \(8, 128\): they must be \(count, "):
        fill(slots, 0, torch.ones(8, 128), twice)


def test_what_is_no_slot_of_the_kernels_is_refused(fast):  # noqa: ARG001
    weight, mask = torch.ones(4, 128), torch.tensor([FIRST_TWO * 32] * 4)
    slots = masked(weight, [mask, mask])
    row = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"slots are torch.float32: .* bfloat16 or int8"):
        masked_linear(torch.ones(1, 128), weight, slots.float(), row, None)
    with pytest.raises(ValueError, match=r"slots .* do not fit a weight"):
        masked_linear(torch.ones(1, 128), weight, slots.T.contiguous().T, row, None)
    with pytest.raises(ValueError, match=r"slots .* do not fit a weight"):
        cpu.dense_int8(torch.ones(1, 128), weight, cpu.quantize(weight)[:, :-64])
    with pytest.raises(ValueError, match=r"the whole weight in 8 bits, and no mask"):
        fill(cpu.quantize(weight), 0, weight, packed(mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_slots_that_do_not_begin_at_whole_vectors_are_refused(fast, dtype):  # noqa: ARG001
    """They are written past the caches, which takes whole lines of 64 bytes."""
    weight, mask = torch.ones(4, 128), torch.tensor([FIRST_TWO * 32] * 4)
    slots = masked(weight, [mask, mask], dtype)
    count, size = slots.shape
    memory = torch.zeros(count * size + 64, dtype=dtype)
    for off in (
        memory[1 : 1 + count * size].view(count, size),
        memory.as_strided((count, size), (size + 1, 1)),
    ):
        with pytest.raises(ValueError, match="each must begin at a multiple of 64 bytes"):
            masked_linear(torch.ones(1, 128), weight, off, torch.zeros(1, dtype=torch.int32), None)
        with pytest.raises(ValueError, match="each must begin at a multiple of 64 bytes"):
            fill(off, 1, weight, packed(mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slots_of_a_dtype_that_kernels_do_not_hold_are_refused(fast, dtype):  # noqa: ARG001
    with pytest.raises(NoBackend, match=f"no {dtype} slots on a CPU: .* bfloat16 or int8"):
        allocate(torch.ones(4, 8), 1, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_without_slots_is_multiplied_as_it_is(fast, dtype):  # noqa: ARG001
    weight, x = torch.tensor([[1, 2, 3, 4], [0, -1, 0, 1]]), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 2]])
    assert cpu.dense(x.to(dtype), weight.to(dtype)).tolist() == [[10, 0], [9, 2]]
    bias = torch.tensor([0.5, -1])
    assert cpu.dense(x.to(dtype), weight.to(dtype), bias).tolist() == [[10.5, -1], [9.5, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("outs", "columns"), [(8, 32), (7, 172), (30, 1160), (12, 4100)])
def test_dense_rows_of_a_bfloat16_weight_are_right_in_every_dtype(fast, costs, outs, columns, rows, dtype):  # noqa: ARG001
    torch.manual_seed(0)
    wide = torch.full((outs, columns + 4), torch.nan).bfloat16()  # a row's neighbours are no part of it
    weight = wide[:, :columns].copy_(torch.randn(outs, columns))
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(outs)
    expected = x.double() @ weight.double().T + bias.double()
    rtol, atol = {torch.float32: (1e-5, 1e-3), torch.float16: (1e-3, 0.2), torch.bfloat16: (1e-2, 0.2)}[dtype]
    for most in (rows, 0):  # by our kernel, and by torch
        cpu.set_costs(replace(costs, dense_rows=most))
        out = cpu.dense(x, weight, bias)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("most", [64, 0])
def test_dense_and_masked_rows_of_a_bfloat16_weight_share_a_step(fast, costs, most, dtype):  # noqa: ARG001
    cpu.set_costs(replace(costs, dense_rows=most))
    torch.manual_seed(0)
    weight, x = torch.randn(20, 300).bfloat16(), torch.randn(9, 300)
    masks = [best(torch.rand(weight.shape)) for _ in range(2)]
    row_slots = torch.tensor([DENSE, 0, 1, DENSE, 1, DENSE, DENSE, DENSE, 0], dtype=torch.int32)
    out = masked_linear(x, weight, masked(weight, masks, dtype), row_slots, torch.arange(20)).double()
    expected, dense = exact(x, weight, masks, row_slots, torch.arange(20)), row_slots == DENSE
    torch.testing.assert_close(out[dense], expected[dense], rtol=1e-5, atol=1e-4)
    atol = 1e-4 if dtype == torch.bfloat16 else 1
    torch.testing.assert_close(out[~dense], expected[~dense], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("made_dense", [False, True])
def test_a_weight_is_converted_and_made_dense_in_pieces(costs, monkeypatch, made_dense):
    """Here of 12 rows of 32 columns each: 16 would be 512 weights."""
    monkeypatch.setattr(cpu, "PIECE", 511)
    cpu.set_costs(replace(costs, dense_rows=0, sparse_rows=0))
    torch.manual_seed(0)
    weight, x, bias = torch.randn(21, 32).bfloat16(), torch.randn(5, 32), torch.randn(21)
    mask = best(torch.rand(weight.shape))
    row_slots = torch.full((5,), 0 if made_dense else DENSE, dtype=torch.int32)
    pieces, addmm = [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda b, x, w, out: pieces.append(w.shape[1]) or addmm(b, x, w, out=out)
    )
    out = masked_linear(x, weight, masked(weight, [mask]), row_slots, bias)
    assert pieces == [12, 9]
    expected = exact(x, weight, [mask], row_slots, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("outs", [3, 16, 76, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_is_right_however_many_quads_are_read_at_once(monkeypatch, fast, outs, dtype, threads):  # noqa: ARG001
    """Some quads are left over, a last one is not whole, and the last chunk of columns is not full."""
    monkeypatch.setattr(cpu, "LARGE", 1)
    torch.manual_seed(0)
    weight, x = torch.randn(outs, 1160).bfloat16(), torch.randn(1, 1160).to(dtype)
    mask, before = best(torch.rand(weight.shape)), torch.get_num_threads()
    slots, row_slots = masked(weight, [mask]), torch.zeros(1, dtype=torch.int32)
    try:
        torch.set_num_threads(threads)
        out = masked_linear(x, weight, slots, row_slots, None)
    finally:
        torch.set_num_threads(before)
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 0.2)
    torch.testing.assert_close(out.double(), exact(x, weight, [mask], row_slots, None), rtol=rtol, atol=atol)


def test_a_weight_whose_rows_are_not_contiguous_is_refused(fast):  # noqa: ARG001
    weight = torch.ones(8, 4).T
    slots = allocate(weight.contiguous(), 1)
    with pytest.raises(ValueError, match="rows are not contiguous"):
        fill(slots, 0, weight, packed(torch.tensor([FIRST_TWO * 2] * 4)))


def test_slots_are_exact_unless_told_otherwise(kernels):
    """A float32 weight that bfloat16 cannot hold is served by the reference."""
    weight = torch.full((4, 4), 1 + 2**-20)
    assert allocate(weight, 1).dtype == torch.bool
    if kernels != "reference":
        assert allocate(weight, 1, torch.bfloat16).dtype == torch.bfloat16


def test_a_slot_takes_nine_bits_a_weight_as_bfloat16_and_five_as_int8(fast):  # noqa: ARG001
    weight = torch.zeros(256, 1024, dtype=torch.bfloat16)
    assert allocate(weight, 3, torch.bfloat16).nbytes * 8 == 3 * 9 * 256 * 1024
    assert allocate(weight, 3, torch.int8).nbytes * 8 == 3 * (5 * 256 * 1024 + 32 * 256)
    assert cpu.quantize(weight).nbytes == cpu.quantized_bytes(256, 1024) == 256 * 1024 + 4 * 256


def test_a_backend_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("MASKLLM_BACKEND", "abacus")
    with pytest.raises(NoBackend, match="MASKLLM_BACKEND=abacus is not on this machine, which has reference"):
        backend(torch.device("cpu"))


def test_a_gpus_kernels_are_refused_without_one_and_leave_the_cpus_as_they_are_with_one(monkeypatch, fast):
    backend(torch.device("cpu"))
    monkeypatch.setenv("MASKLLM_BACKEND", "triton")
    for there, why_not in ((False, "torch sees no CUDA device"), (True, "an old GPU")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(gpu, "why_not", lambda why=why_not: why)
        with pytest.raises(NoBackend, match=f"=triton is not on this machine, which has .*: {why_not}"):
            backend(torch.device("cuda"))
    assert backend(torch.device("cpu")) is cpu
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    assert backend(torch.device("cuda")) is gpu
    assert backend(torch.device("cpu")) is cpu
    assert cpu.using() == fast


def test_the_reference_refuses_slots_that_need_kernels(monkeypatch):
    monkeypatch.setenv("MASKLLM_BACKEND", "reference")
    with pytest.raises(NoBackend, match=r"no torch.int8 slots without kernels"):
        allocate(torch.zeros(4, 4), 1, torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_contract_of_torch_library(layer, dtype):
    weight, slots = layer
    rows = torch.tensor([0, DENSE, 1], dtype=torch.int32)
    x = torch.randn(3, 4, dtype=dtype)
    operator = torch.ops.maskllm.masked_linear.default
    torch.library.opcheck(operator, (x, weight.to(dtype), slots, rows, None))


@pytest.mark.parametrize(
    ("what", "python"),
    {
        "the usual case": False,
        "a bias": False,
        "the whole weight in 8 bits": False,
        "no rows": True,
        "slots that are named": True,
        "float16": True,
        "row slots of int64": True,
        "row slots that are apart": True,
        "columns that are apart": True,
        "dense rows that torch does better": True,
    }.items(),
)
def test_what_kernels_do_alone_takes_no_python_and_nothing_is_kept_of_a_call(fast, what, python):  # noqa: ARG001
    weight = torch.randn(12, 140).bfloat16()
    slots = masked(weight, [best(torch.rand(weight.shape)) for _ in range(2)])
    x, row_slots = torch.randn(3, 140), torch.tensor([1, 0, 1], dtype=torch.int32)
    bias = present = None
    match what:
        case "no rows":
            x, row_slots = x[:0], row_slots[:0]
        case "a bias":
            bias = torch.randn(12).bfloat16()
        case "the whole weight in 8 bits":
            slots, row_slots = cpu.quantize(weight), torch.zeros(3, dtype=torch.int32)
        case "slots that are named":
            present = [0, 1]
        case "float16":
            x = x.half()
        case "row slots of int64":
            row_slots = row_slots.long()
        case "row slots that are apart":
            row_slots = torch.tensor([1, 9, 0, 9, 1, 9], dtype=torch.int32)[::2]
        case "columns that are apart":
            x = torch.randn(3, 280)[:, ::2]
        case "dense rows that torch does better":
            x, row_slots = torch.randn(99, 140), torch.full((99,), DENSE, dtype=torch.int32)
    given = [each for each in (x, weight, slots, row_slots, bias) if each is not None]
    kept = [each._use_count() for each in given]
    with torch.no_grad(), profile() as profiled:
        out = masked_linear(x, weight, slots, row_slots, bias, present)
    assert any(event.name == "maskllm::any_masked_linear" for event in profiled.events()) == python
    assert [each._use_count() for each in given] == kept
    assert torch.equal(out, multiply(x, weight, slots, row_slots, bias))


def test_one_openmp_runtime_serves_torch_and_the_kernels(fast):  # noqa: ARG001
    program = (
        "from maskllm.kernels import cpu; cpu.using();"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]}))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"1\n"


def test_arm_kernels_agree_with_the_portable_ones(tmp_path):
    """Compiled for Arm, and run by an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if not compiler or not emulator:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user-static, which are not all here")
    sources = [str(CPU / f"{name}.cpp") for name in ("neon", "portable")]
    program = tmp_path / "compare"
    command = [compiler, "-std=c++20", "-O2", "-static", f"-I{CPU}", str(HERE / "compare.cpp"), *sources]
    subprocess.run([*command, "-o", str(program)], check=True)
    assert (
        subprocess.run([emulator, str(program)], capture_output=True, check=True).stdout == b"neon agrees\n"
    )
