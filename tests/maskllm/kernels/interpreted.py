"""What the GPU's kernels compute, by Triton's interpreter on the CPU.

test_gpu_kernels.py runs this file in a process of its own, as TRITON_INTERPRET has to be set before triton
is imported: TRITON_INTERPRET=1 python -m pytest tests/maskllm/kernels/interpreted.py

The oracle multiplies in float64 by where(mask, weight, 0).
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from maskllm.core.patterns import best, encode, expand, pack
from maskllm.kernels import DENSE, cusparselt, gpu
from maskllm.kernels import triton_kernels as kernels

DTYPES = [torch.bfloat16, torch.float16]


class Layer:
    """A random weight and random resident masks."""

    def __init__(self, outs, ins, count=3, dtype=torch.bfloat16):
        self.weight = torch.randn(outs, ins, dtype=dtype)
        self.masks = [best(torch.rand(outs, ins)) for _ in range(count)]
        self.fill()

    def fill(self):
        self.slots = gpu.allocate(self.weight, len(self.masks), self.weight.dtype)
        for slot, mask in enumerate(self.masks):
            gpu.fill_layers(slot, [(self.slots, self.weight, pack(encode(mask)))])

    def masked(self, slot):
        return self.weight if slot == DENSE else torch.where(self.masks[slot], self.weight, 0)

    def check(self, x, rows, bias=None, present=None):
        """The answer, after it was compared with the oracle's."""
        row_slots = torch.tensor(rows, dtype=torch.int32)
        got = gpu.linear(x, self.weight, self.slots, row_slots, bias, present)
        expected = torch.zeros(len(rows), self.weight.shape[0], dtype=torch.float64)
        for row, slot in enumerate(rows):
            expected[row] = self.masked(slot).double() @ x[row].double()
        if bias is not None:
            expected += bias.double()
        assert got.dtype == x.dtype
        # A unit in the last of 8 bits (the interpreter cuts bf16 off, a GPU rounds) or half a unit in the
        # last of 11 (fp16); and the order of a sum in fp32.
        rtol = 2**-7 if torch.bfloat16 in (x.dtype, self.weight.dtype) else 2**-11
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-4)
        return got


def mixed(rows, count):
    """Dense rows and rows of each slot, in turns."""
    return [row % (count + 1) - 1 for row in range(rows)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), [(40, 172), (7, 4)])
def test_every_row_is_answered_by_its_own_mask(outs, ins, dtype):
    layer = Layer(outs, ins, dtype=dtype)
    layer.check(torch.randn(20, ins, dtype=dtype), mixed(20, 3), torch.randn(outs, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 70])
def test_every_number_of_rows_is_answered(rows):
    layer, x = Layer(8, 396, count=2), torch.randn(rows, 396, dtype=torch.bfloat16)
    for first in (0, 1):  # dense rows first, or masked ones
        layer.check(x, mixed(rows + 1, 2)[first:][:rows])


@pytest.mark.parametrize("other", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "present"),
    [([DENSE], (DENSE,)), ([1], None), ([0, DENSE], None), ([1] * 65, (1,)), ([1] * 65, None)],
)
def test_inputs_and_a_bias_of_another_dtype_are_multiplied_in_the_weights(rows, present, other):
    layer, bias = Layer(8, 12, count=2), torch.randint(-8, 8, (8,)).float()
    layer.check(torch.randint(-8, 8, (len(rows), 12)).to(other), rows, bias, present)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(2, 48).bfloat16()}, r"x \(2, 48\) .* a weight \(8, 44\): .* \(rows, 44\)"),
        ({"row_slots": torch.zeros(5).int()}, r"row_slots \(5,\) do not fit a weight \(8, 44\)"),
        ({"bias": torch.ones(4).bfloat16()}, r"bias \(4,\) does not fit .* it must be \(8,\)"),
        ({"x": torch.ones(2, 44, dtype=torch.int8)}, "x is torch.int8: it must be float32"),
        ({"weight": torch.ones(64, 44).bfloat16()}, r"slots .* do not fit a weight \(64, 44\)"),
        ({"weight": torch.ones(8, 44)}, r"slots .* do not fit a weight \(8, 44\) of torch.float32"),
        ({"weight": torch.ones(44, 8).bfloat16().t()}, r"slots .* do not fit a weight \(8, 44\)"),
        ({"weight": torch.ones(8 * 44 + 1).bfloat16()[1:].view(8, 44)}, "begin at multiples of 16 bytes"),
        ({"present": (0, 3)}, r"rows use slots \[0, 3\], and there are 3"),
        ({"present": (-2,)}, r"rows use slots \[-2\], and there are 3"),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(wrong, message):
    layer = Layer(8, 44)
    fit = {"x": torch.ones(2, 44).bfloat16(), "weight": layer.weight, "slots": layer.slots}
    fit |= {"row_slots": torch.zeros(2).int(), "bias": None}
    assert gpu.linear(**fit).shape == (2, 8)
    with pytest.raises(ValueError, match=message):
        gpu.linear(**fit | wrong)


def test_a_mask_is_not_written_into_slots_of_another_weight():
    weight = torch.ones(64, 44).bfloat16()
    with pytest.raises(ValueError, match=r"slots .* do not fit a weight \(64, 44\)"):
        gpu.fill_layers(0, [(Layer(8, 44).slots, weight, pack(encode(best(weight))))])


@pytest.mark.parametrize("rows", [5, 70])
def test_no_rows_no_work_and_rows_of_one_kind_are_answered_alone(rows):
    layer, x = Layer(24, 44, count=2), torch.randn(rows, 44, dtype=torch.bfloat16)
    assert layer.check(x[:0], []).shape == (0, 24)
    for slot in (DENSE, 1):
        bias = torch.randn(48, dtype=torch.bfloat16)[::2]
        alone = layer.check(x, [slot] * rows, bias)
        torch.testing.assert_close(layer.check(x, [slot] * rows, bias, present=(slot,)), alone)


def test_what_the_host_knows_of_the_rows_does_not_change_the_answer():
    layer, x = Layer(8, 44), torch.randn(70, 44, dtype=torch.bfloat16)
    rows = [DENSE] * 20 + [2] * 30 + [0] * 20
    assert torch.equal(layer.check(x, rows), layer.check(x, rows, present=(0, 2, DENSE)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("dense", [0, 1])
def test_a_row_gets_the_same_answer_whatever_masks_share_its_batch(count, dense):
    """Each slot is read alone, whatever others are."""
    layer, x = Layer(8, 132, count), torch.randn(16, 132, dtype=torch.bfloat16)
    rows = [row % count for row in range(16 - dense)] + [DENSE] * dense
    together = layer.check(x, rows)
    for row in (1, 15):
        alone = layer.check(x[row : row + 1], rows[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=2**-7, atol=1e-4)


def test_a_batch_without_masks_does_not_read_the_slots():
    layer = Layer(8, 44)
    layer.slots.fill_(-1)  # nan, all of them
    layer.check(torch.randn(3, 44, dtype=torch.bfloat16), [DENSE] * 3)


def test_only_the_slots_of_a_batch_are_read():
    layer = Layer(8, 44, count=6)
    layer.slots[1].fill_(-1)
    for rows in ([0, 2, 0], [0, 2, 3, 4, 5, DENSE], [0, 2, 3, 4, 5] * 13):
        layer.check(torch.randn(len(rows), 44, dtype=torch.bfloat16), rows)


@pytest.mark.parametrize("rows", [1, 6, 66])
def test_rows_may_lie_apart(rows):
    layer, base = Layer(8, 172, count=1), torch.randn(2 * rows, 400, dtype=torch.bfloat16)
    for x in (
        base[:rows, 100:272],
        base[::2, :172],
        base[:rows, 3:175],
        torch.randn(172, rows).bfloat16().t(),
    ):
        layer.check(x, mixed(rows, 1))


@pytest.mark.parametrize("rows", [2, 70])
def test_row_slots_may_lie_apart_and_be_of_another_dtype(rows):
    layer, x = Layer(8, 44, count=2), torch.randn(rows, 44, dtype=torch.bfloat16)
    apart = torch.tensor([0, 0, 1, 0] * (rows // 2), dtype=torch.int32)[::2]
    expected = layer.check(x, [0, 1] * (rows // 2))
    for row_slots in (apart, apart.long()):
        assert torch.equal(gpu.linear(x, layer.weight, layer.slots, row_slots), expected)


@pytest.mark.parametrize("start", [0, 3])
def test_a_row_that_lies_anywhere_is_loaded_in_whole_groups(start, monkeypatch):
    """A GPU ends at a load of 8 bytes that is not aligned; the interpreter does not mind."""
    layer, addresses = Layer(8, 172, count=1), []
    launch = kernels.row_kernel[8,]

    def noted(x, *others, **options):
        addresses.append(x.data_ptr())
        launch(x, *others, **options)

    monkeypatch.setattr(kernels, "row_kernel", {(8,): noted})
    layer.check(torch.randn(1, 400, dtype=torch.bfloat16)[:, start : start + 172], [0])
    assert [address % 8 for address in addresses] == [0]


@pytest.mark.parametrize("rows", [3, 70])
def test_refilling_a_slot_replaces_its_mask_in_place(rows):
    layer, x = Layer(8, 44, count=2), torch.randn(rows, 44, dtype=torch.bfloat16)
    old, pointer = layer.check(x, [1] * rows), layer.slots.data_ptr()
    layer.masks[1] = best(torch.rand(8, 44))
    gpu.fill_layers(1, [(layer.slots, layer.weight, pack(encode(layer.masks[1])))])
    assert not torch.equal(layer.check(x, [1] * rows), old)
    assert layer.slots.data_ptr() == pointer
    layer.check(x, [0] * rows)


@pytest.mark.parametrize("rows", [[0], [0, 0, 1, 2], [0] * 70, [0] * 66 + [1] * 4])
def test_a_dropped_weight_is_gone_whatever_it_is(rows):
    layer = Layer(8, 44)
    for slot, value in enumerate((torch.inf, torch.nan, -torch.inf)):
        layer.weight[slot, 8] = value
    layer.masks = [mask.clone() for mask in layer.masks]
    for mask in layer.masks:
        mask[:, 8:12] = torch.tensor([False, True, False, True])
    layer.fill()
    assert layer.check(torch.randn(len(rows), 44).bfloat16(), rows).isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # numpy's
@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2, 3], [0] * 30 + [1] * 40])
def test_an_infinity_that_one_mask_keeps_stays_out_of_the_rows_of_another(rows):
    layer = Layer(8, 44, count=4)
    layer.weight[:, 8] = torch.inf
    for slot, mask in enumerate(layer.masks):
        mask[:, 8:12] = torch.tensor([slot == 0, True, False, slot != 0])
    layer.fill()
    out = layer.check(torch.rand(len(rows), 44).bfloat16() + 0.1, rows)
    assert out.isinf().all(1).tolist() == [slot == 0 for slot in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), [(5, 172), (3, 4), (2, 4104)])
def test_a_slot_holds_every_kept_weight_bit_by_bit(outs, ins, dtype):
    """Also zeros, -0.0 and values that are no numbers."""
    bits = torch.randint(-(2**15), 2**15, (outs, ins), dtype=torch.int16)
    bits[torch.rand(outs, ins) < 0.2] = 0
    bits[torch.rand(outs, ins) < 0.2] = -(2**15)
    layer = Layer(outs, ins)
    layer.weight = bits.view(dtype)
    layer.fill()
    for slot, mask in enumerate(layer.masks):
        dense = torch.full((outs, ins), 7.0, dtype=dtype)
        gpu._expand(layer.slots, slot, torch.tensor(True), dense)
        assert torch.equal(dense.view(torch.int16), torch.where(mask, bits, 0))
        kept = layer.slots[slot, : outs * ins // 4].view(torch.int16)
        assert torch.equal(kept, bits[mask])


def test_every_byte_of_a_packed_mask_is_read_as_its_three_patterns():
    codes = torch.cartesian_prod(*[torch.arange(6, dtype=torch.uint8)] * 3).flip(1).reshape(1, -1)
    layer = Layer(1, codes.numel() * 4, count=1)
    layer.masks = [expand(codes)]
    gpu.fill_layers(0, [(layer.slots, layer.weight, pack(codes))])
    dense = torch.empty_like(layer.weight)
    gpu._expand(layer.slots, 0, torch.tensor(True), dense)
    assert torch.equal(dense, layer.masked(0))


def test_a_slot_is_9_bits_a_weight():
    weight = torch.empty(4096, 11008, dtype=torch.bfloat16)
    assert gpu.Layout.of(weight).words * 32 == 9 * weight.numel()


@pytest.mark.usefixtures("library")
def test_a_slot_is_10_bits_a_weight_where_prefill_uses_the_sparse_tensor_cores():
    weight = torch.empty(128, 256, dtype=torch.bfloat16)
    assert gpu.Layout.of(weight).words * 32 == 10 * weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slots_that_do_not_fit_the_weight_are_refused(dtype):
    with pytest.raises(ValueError, match="both are bfloat16"):
        gpu.allocate(torch.empty(4, 8, dtype=torch.float32), 1, dtype)


@pytest.mark.parametrize("weight", [torch.empty(4, 6), torch.empty(8, 4).t()])
def test_a_weight_without_whole_groups_in_memory_is_refused(weight):
    with pytest.raises(ValueError, match="groups of 4"):
        gpu.allocate(weight.bfloat16(), 1, torch.bfloat16)


# Prefill by the sparse tensor cores. A library that keeps cuSPARSELt's contract on the CPU takes its place.


class Library:
    """cuSPARSELt on sm_90: compresses 2:4 weights, and multiplies by them with three algorithms."""

    off_by = 0.0
    """What its products are off by."""
    refused = None
    """Rows that it does not multiply."""
    wrong = None
    """An algorithm, and rows of which it makes something else."""
    xor = 0
    """Changes the order of its metadata: another GPU's."""
    values_in_rows = True
    seconds = (3.0, 1.0, 2.0, 9.0, 2.0, 3.0, 1.0, 9.0)
    """What the three algorithms take, and then torch: of few rows, and of more."""

    def __init__(self):
        self.multiplied = []

    def compress(self, dense):
        outs, ins = dense.shape
        kept = dense != 0
        codes = encode(kept)
        index = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE])[codes.long()]
        nibbles = torch.zeros(outs * ins // 4, dtype=torch.int64)
        nibbles[self.places(outs, ins) ^ self.xor] = index
        words = (nibbles.view(-1, 4) << torch.tensor([0, 4, 8, 12])).sum(1).to(torch.int16)
        values = dense[kept] if self.values_in_rows else dense[kept].flip(0)
        return torch.cat([values, words.view(dense.dtype)])

    def places(self, outs, ins):
        """Where in the metadata the nibble of each group is: FlagGems' formula, commit cb2fbcb2b."""
        r, g = torch.arange(outs)[:, None], torch.arange(ins // 4)[None]
        return (
            (r // 32 % 2) * 256 + g // 8 * 512 + r // 64 * (ins // 32 * 512) + r % 8 * 16
            + r % 32 // 8 % 2 + r % 32 // 16 * 128 + g % 4 * 4 + (g % 8 >= 4) * 2
        )  # fmt: skip

    def plan(self, outs, ins, rows, _dtype, _device, algorithm, _biased):
        if algorithm > 2 or rows == self.refused:
            raise RuntimeError("cusparseLtMatmulAlgSetAttribute failed with status 3")
        assert rows % 8 == 0
        return SimpleNamespace(multiply=partial(self.multiply, outs, ins, algorithm))

    def multiply(self, outs, ins, algorithm, compressed, x, bias, out):
        self.multiplied.append(algorithm)
        compressed = compressed.view(x.dtype)[: outs * ins * 9 // 16]
        words = compressed[outs * ins // 2 :].view(torch.int16).int()
        nibbles = ((words[:, None] >> torch.tensor([0, 4, 8, 12])) & 15).view(-1)
        index = nibbles[self.places(outs, ins) ^ self.xor].long()
        columns = torch.stack([index & 3, index >> 2], -1) + torch.arange(0, ins, 4)[:, None]
        dense = torch.zeros(outs, ins, dtype=x.dtype)
        values = compressed[: outs * ins // 2]
        values = values if self.values_in_rows else values.flip(0)
        dense.scatter_(1, columns.view(outs, -1), values.view(outs, -1))
        off_by = 1 if (algorithm, len(x)) == self.wrong else self.off_by
        out.copy_(torch.nn.functional.linear(x, dense, bias) + off_by)


@pytest.fixture
def library(monkeypatch):
    library, clock = Library(), []

    def seconds(work):
        work()
        clock.append(None)
        return library.seconds[len(clock) - 1]

    monkeypatch.setattr(cusparselt, "TUNED", {70: 16, 1 << 30: 24})
    monkeypatch.setattr(cusparselt, "PROVEN", {70: (256,), 1 << 30: (384,)})
    monkeypatch.setattr(cusparselt, "available", lambda _: True)
    monkeypatch.setattr(cusparselt, "compress", library.compress)
    monkeypatch.setattr(cusparselt, "_plan", library.plan)
    monkeypatch.setattr(cusparselt, "_seconds", seconds)
    yield library
    for known in (gpu.prefill, gpu._layout, gpu._knows_order):
        known.cache_clear()


def prefill(outs=128, ins=96):
    return gpu.prefill(outs, ins, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(("outs", "ins"), [(64, 32), (192, 160), (64, 128)])
def test_a_slot_is_what_the_library_of_sm_90_makes_of_a_mask(outs, ins, library):
    layer = Layer(outs, ins, count=2)
    assert gpu._knows_order(layer.weight.device)  # or the library itself would have written the metadata
    for slot in range(2):
        ours = gpu._compressed(layer.slots, slot, layer.weight)
        assert torch.equal(ours.view(torch.int16), library.compress(layer.masked(slot)).view(torch.int16))


@pytest.mark.parametrize("xor", [0, 1])
def test_prefill_of_one_mask_uses_the_fastest_algorithm_of_any_gpu(library, xor):
    library.xor = xor
    layer, bias = Layer(64, 32, count=1), torch.randn(64, dtype=torch.bfloat16)
    library.multiplied.clear()
    for rows, used in ((64, []), (65, [1]), (70, [1, 1]), (71, [1, 1, 2])):
        layer.check(torch.randn(rows, 32, dtype=torch.bfloat16), [0] * rows, bias, present=(0,))
        assert library.multiplied == used
    layer.check(torch.randn(9, 32, dtype=torch.bfloat16), mixed(9, 1))


@pytest.mark.usefixtures("library")
def test_a_swap_reaches_prefill_and_decode_alike():
    layer = Layer(64, 32, count=1)
    layer.masks[0] = best(torch.rand(64, 32))
    gpu.fill_layers(0, [(layer.slots, layer.weight, pack(encode(layer.masks[0])))])
    for rows in (1, 2, 72):
        layer.check(torch.randn(rows, 32, dtype=torch.bfloat16), [0] * rows, present=(0,))


@pytest.mark.usefixtures("library")
def test_layers_of_one_shape_are_written_together_each_with_its_own_mask(monkeypatch):
    """Three of one shape, which packed are 512 bytes each, and one of another; 1,000 bytes at a time."""
    layers = [Layer(64, 96, count=2) for _ in range(3)] + [Layer(8, 44, count=2)]
    for layer in layers:
        layer.masks[1] = best(torch.rand(layer.weight.shape))
    grids = {"fill_kernel": [], "metadata_kernel": []}
    for name, noted in grids.items():
        kernel = getattr(kernels, name)

        class Noting:
            def __getitem__(self, grid, noted=noted, kernel=kernel):
                noted.append(grid)
                return kernel[grid]

        monkeypatch.setattr(kernels, name, Noting())
    monkeypatch.setattr(gpu, "TOGETHER", 1000)
    gpu.fill_layers(1, ((each.slots, each.weight, pack(encode(each.masks[1]))) for each in layers))
    assert grids == {"fill_kernel": [(64, 1, 2), (8, 1, 1), (64, 1, 1)], "metadata_kernel": [(1, 2), (1, 1)]}
    for layer in layers:
        for rows in (1, 2, 72):  # the last by the library, from metadata
            for slot in range(2):
                x = torch.randn(rows, layer.weight.shape[1], dtype=torch.bfloat16)
                layer.check(x, [slot] * rows, present=(slot,))


def test_rows_that_the_library_refuses_are_multiplied_dense(library):
    layer, library.refused = Layer(64, 32, count=1), 256
    library.multiplied.clear()
    for rows in (72, 130):
        layer.check(torch.randn(rows, 32, dtype=torch.bfloat16), [0] * rows, present=(0,))
    assert library.multiplied == [2]


def test_dense_is_used_where_sparse_is_wrong(library):
    library.off_by = torch.nan
    assert prefill() == {}


@pytest.mark.parametrize(("rows", "chosen"), [(256, {70: 2, 1 << 30: 2}), (384, {70: 1, 1 << 30: 2})])
def test_the_fastest_that_is_right_wherever_it_is_used_is_chosen(library, rows, chosen):
    library.wrong = 1, rows
    assert prefill() == chosen


def test_dense_is_used_where_the_library_stores_values_in_another_order(library):
    library.values_in_rows = False
    assert prefill() == {}


def test_dense_is_used_where_sparse_is_slower(library):
    library.seconds = (3.0, 3.0, 3.0, 2.0)
    assert prefill() == {}


@pytest.mark.usefixtures("library")
def test_dense_is_used_where_the_library_has_no_algorithm(monkeypatch):
    monkeypatch.setattr(cusparselt, "TRIED", 0)
    assert prefill() == {}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: architecture mismatch when calling `cusparseLtInit(&handle)`"),
        OSError("libcusparseLt.so.0: cannot open shared object file"),
    ],
)
def test_dense_is_used_where_the_library_does_not_know_the_gpu_or_is_not_there(library, monkeypatch, error):
    def compress(_dense):
        raise error

    monkeypatch.setattr(cusparselt, "compress", compress)
    assert prefill() == {}
    assert library.multiplied == []


@pytest.mark.usefixtures("library")
def test_dense_is_used_where_the_shape_does_not_fit():
    assert prefill() == {70: 1, 1 << 30: 2}
    assert prefill(outs=96) == {}
    assert prefill(ins=172) == {}


@pytest.mark.usefixtures("library")
def test_dense_is_used_where_only_tritons_kernels_are_asked_for(monkeypatch):
    monkeypatch.setenv("MASKLLM_BACKEND", "triton")
    assert prefill() == {}


def test_the_kernels_are_interpreted_here():
    assert type(kernels.linear_kernel).__name__ == "InterpretedFunction"
