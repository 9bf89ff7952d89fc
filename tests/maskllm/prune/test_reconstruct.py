"""The mask for weights that stay: what is dropped together may cancel."""

from itertools import product

import pytest
import torch
from torch import Tensor

from maskllm.core.patterns import best, patterns
from maskllm.prune import reconstruct, sparsegpt
from maskllm.prune.reconstruct import solve


def error(weight: Tensor, mask: Tensor, hessian: Tensor) -> float:
    """What the mask changes in the layer's output on the tokens behind X^T X, squared and summed."""
    dropped = torch.where(mask, 0, weight).double()
    return float(((dropped @ hessian.double()) * dropped).sum())


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    """Weights (6, 16), and X^T X of inputs that have much in common."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=draw) @ torch.randn(4, 16, generator=draw)
    return torch.randn(6, 16, generator=draw), x.T @ x


def test_inputs_that_have_nothing_in_common_make_it_magnitude() -> None:
    assert solve(torch.tensor([[0.1, -3.0, 2.0, 0.5]]), torch.eye(4)).tolist() == [[False, True, True, False]]


def test_the_two_largest_are_dropped_where_they_cancel() -> None:
    # The first two inputs are always equal, so +3 and -3 do nothing together; the others are on their own.
    hessian = torch.block_diag(torch.ones(2, 2), torch.eye(2))
    assert solve(torch.tensor([[3.0, -3.0, 1.0, 1.0]]), hessian).tolist() == [[False, False, True, True]]


def test_what_another_group_drops_counts() -> None:
    # Input 4 always equals input 0. The first group drops +2, as 5 and 3 are larger; the second then does
    # best to drop -2, which makes it good, and keep 1 and 1.
    hessian = torch.eye(8)
    hessian[0, 4] = hessian[4, 0] = 1
    mask = solve(torch.tensor([[2.0, 5, 3, 0, -2, 1, 1, 0]]), hessian)
    assert mask.tolist() == [[False, True, True, False, False, True, True, False]]


def test_no_other_pattern_of_any_one_group_is_better(layer: tuple[Tensor, Tensor]) -> None:
    weight, hessian = layer
    mask = solve(weight, hessian)
    for row, group, pattern in product(range(6), range(4), patterns(2, 4)):
        other = mask[row].clone()
        other[4 * group : 4 * group + 4] = pattern
        one = weight[row : row + 1]
        assert error(one, mask[row : row + 1], hessian) <= error(one, other[None], hessian) + 1e-3


def test_the_error_is_below_that_of_wandas_and_sparsegpts_masks(layer: tuple[Tensor, Tensor]) -> None:
    weight, hessian = layer
    ours = error(weight, solve(weight, hessian), hessian)
    assert ours < error(weight, best(weight.abs() * hessian.diag().sqrt()), hessian)
    assert ours < error(weight, sparsegpt.solve(weight, hessian)[0], hessian)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 8), (8, 16)])
def test_any_pattern_and_rows_in_blocks(
    layer: tuple[Tensor, Tensor], n: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = layer
    at_once = solve(weight, hessian, n, m)
    assert (at_once.view(6, -1, m).sum(-1) == n).all()
    monkeypatch.setattr(reconstruct, "CANDIDATES", 1)
    assert torch.equal(solve(weight, hessian, n, m), at_once)


def test_a_layer_that_reads_only_zeros_still_gets_a_mask() -> None:
    assert solve(torch.ones(1, 4), torch.zeros(4, 4)).sum() == 2
