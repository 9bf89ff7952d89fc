import pytest
import torch

from maskllm.kernels.masked_linear import DENSE, allocate, fill, masked_linear


@pytest.fixture
def layer():
    """A weight (2, 4) and two masks: slot 0 keeps the first two inputs, slot 1 the last two."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0]])
    slots = allocate(weight, 2)
    fill(slots, 0, torch.tensor([[True, True, False, False]] * 2))
    fill(slots, 1, torch.tensor([[False, False, True, True]] * 2))
    return weight, slots


def test_every_row_is_answered_by_its_own_mask(layer):
    weight, slots = layer
    rows = torch.tensor([0, 1, DENSE, 0], dtype=torch.int32)
    out = masked_linear(torch.ones(4, 4), weight, slots, rows, None)
    assert out.tolist() == [[3, -3], [7, -7], [10, -10], [3, -3]]


def test_bias_is_added_to_masked_and_dense_rows_alike(layer):
    weight, slots = layer
    rows = torch.tensor([1, DENSE], dtype=torch.int32)
    out = masked_linear(torch.ones(2, 4), weight, slots, rows, torch.tensor([100.0, 0.0]))
    assert out.tolist() == [[107, -7], [110, -10]]


def test_a_dropped_weight_is_gone_even_if_it_is_infinite(layer):
    _, slots = layer
    weight = torch.tensor([[1.0, 2.0, torch.inf, torch.nan]] * 2)
    out = masked_linear(torch.ones(1, 4), weight, slots, torch.zeros(1, dtype=torch.int32), None)
    assert out.tolist() == [[3, 3]]


def test_refilling_a_slot_replaces_its_mask(layer):
    weight, slots = layer
    fill(slots, 0, torch.tensor([[True, False, False, True]] * 2))
    out = masked_linear(torch.ones(1, 4), weight, slots, torch.zeros(1, dtype=torch.int32), None)
    assert out.tolist() == [[5, -5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_contract_of_torch_library(layer, dtype):
    weight, slots = layer
    rows = torch.tensor([0, DENSE, 1], dtype=torch.int32)
    x = torch.randn(3, 4, dtype=dtype)
    torch.library.opcheck(masked_linear, (x, weight.to(dtype), slots, rows, None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_the_cpu_gives(dtype):
    weight, x = torch.randn(128, 256), torch.randn(37, 256)
    slots = allocate(weight, 3)
    for slot in range(3):
        fill(slots, slot, torch.rand(weight.shape) < 0.5)
    rows = torch.randint(-1, 3, (37,), dtype=torch.int32)
    expected = masked_linear(x, weight, slots, rows, None)
    got = masked_linear(x.cuda().to(dtype), weight.cuda().to(dtype), slots.cuda(), rows.cuda(), None)
    torch.testing.assert_close(
        got.cpu().float(), expected, rtol=2e-2, atol=0.3 if dtype == torch.bfloat16 else 1e-3
    )
