"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) for one layer and any N:M.

The layer's output on the calibration tokens is a quadratic function of its weights, with the same
Hessian H = X^T X for every row. Columns are pruned from left to right; each error is made good, as far
as it can be, by the columns still to come.
"""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from maskllm.core.patterns import best

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it (the paper's percdamp)."""
BLOCK = 128
"""Columns after which the errors reach the rest of the matrix, in one product (the paper's blocksize)."""


def hessian(inputs: Iterable[Tensor]) -> Tensor:
    """Batches of inputs (tokens, in) -> X^T X, (in, in) float32."""
    return reduce(torch.add, (x.float().T @ x.float() for x in inputs))


def solve(weight: Tensor, hessian: Tensor, n: int = 2, m: int = 4) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and its Hessian (in, in) -> mask (out, in) bool, updated weight (out, in).

    A group's pattern is chosen when its first column is reached, by w^2 / [H^-1]_jj on the weights as
    updated so far. The updated weight is float32, and zero wherever the mask drops. Columns that the
    tokens never excite count as zero.
    """
    w, columns = weight.float(), weight.shape[1]
    w = torch.where(hessian.diag() == 0, 0, w)
    factor = _factor(hessian)
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    block = BLOCK // m * m  # a group lies within one block
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(len(w), end - start, device=w.device)
        for column in range(start, end):
            if column % m == 0:
                group = slice(column, column + m)
                mask[:, group] = best((w[:, group] / factor.diag()[group]).square(), n, m)
            dropped = torch.where(mask[:, column], 0, w[:, column])
            errors[:, column - start] = error = dropped / factor[column, column]
            w[:, column:end] -= error[:, None] * factor[column, column:end]
        w[:, end:] -= errors @ factor[start:end, end:]
    return mask, torch.where(mask, w, 0)


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, (in, in).

    Its row j holds what dropping column j does to the columns after it, once those before are settled.
    """
    h = hessian.clone()
    dead = h.diag() == 0
    h.diagonal().add_(DAMPING * h.diag().mean()).masked_fill_(dead, 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
