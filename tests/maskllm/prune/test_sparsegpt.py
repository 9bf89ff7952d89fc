"""SparseGPT of one layer: what a dropped weight did, later ones take over as far as they can."""

import pytest
import torch
from torch import Tensor

from maskllm.core.patterns import best
from maskllm.prune.sparsegpt import DAMPING, hessian, solve


def test_the_hessian_sums_over_batches() -> None:
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])]
    assert hessian(batches).tolist() == [[1 + 9, 2], [2, 4 + 1]]


def test_inputs_that_have_nothing_in_common_make_it_magnitude() -> None:
    weight = torch.tensor([[0.1, -3.0, 2.0, 0.5]])
    mask, updated = solve(weight, torch.eye(4))
    assert mask.tolist() == [[False, True, True, False]]
    assert updated.tolist() == [[0, -3, 2, 0]]


def test_a_twin_takes_over_what_the_dropped_weight_did() -> None:
    # Both inputs are always equal. Left to right, only the first can be made good, so it goes, larger as
    # it is. Least squares moves H12 / H22 of it to its twin, and damping makes H22 1.01.
    mask, updated = solve(torch.tensor([[3.0, 2.0]]), torch.ones(2, 2), n=1, m=2)
    assert mask.tolist() == [[False, True]]
    torch.testing.assert_close(updated, torch.tensor([[0, 2 + 3 / 1.01]]))


def test_inputs_that_are_always_zero_are_dropped_first() -> None:
    alive = torch.diag(torch.tensor([0.0, 1, 1, 1]))
    mask, updated = solve(torch.tensor([[9.0, 3, 1, 2]]), alive)
    assert mask.tolist() == [[False, True, False, True]]
    assert updated.tolist() == [[0, 3, 0, 2]]


def test_a_layer_that_reads_only_zeros_still_gets_a_mask() -> None:
    mask, updated = solve(torch.ones(1, 4), torch.zeros(4, 4))
    assert mask.sum() == 2
    assert updated.isfinite().all()


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 136), (1, 3, 132), (4, 8, 24)])
def test_blocks_of_columns_change_nothing(n: int, m: int, columns: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, columns) + torch.randn(1000, 1)  # inputs that have something in common
    weight = torch.randn(4, columns)
    mask, updated = solve(weight, x.T @ x, n, m)
    expected_mask, expected = one_column_at_a_time(weight.double(), (x.T @ x).double(), n, m)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(updated, expected.float(), rtol=1e-3, atol=1e-4)


def one_column_at_a_time(w: Tensor, h: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The paper's equations without its shortcuts: the inverse is computed anew for what remains."""
    h = h + DAMPING * h.diag().mean() * torch.eye(len(h))
    w, mask = w.clone(), torch.zeros(w.shape, dtype=torch.bool)
    for column in range(len(h)):
        if column % m == 0:
            costs = torch.stack([h[j:, j:].inverse()[0, 0] for j in range(column, column + m)])
            mask[:, column : column + m] = best(w[:, column : column + m].square() / costs, n, m)
        inverse = h[column:, column:].inverse()
        dropped = torch.where(mask[:, column], 0, w[:, column])
        w[:, column:] -= dropped[:, None] / inverse[0, 0] * inverse[0]
    return mask, torch.where(mask, w, 0)
