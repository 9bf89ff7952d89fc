"""The mask under which a layer's frozen weights come nearest to its dense output, by coordinate descent.

Dropping the weights E = W * (1 - M) costs a row e the squared error e^T H e on the calibration tokens, with
H = X^T X. SparseGPT chooses its mask for weights that will be updated; these stay, so what matters is that
the dropped weights' errors cancel. Group after group takes the pattern that is best as all others stand,
which never makes the error larger, and a few sweeps over the row settle it. Each costs what SparseGPT does.
"""

from math import comb

import torch
from torch import Tensor

from maskllm.core.patterns import best, encode, expand, patterns

SWEEPS = 4
"""After which hardly a group still changes."""
CANDIDATES = 1 << 24
"""Most weights of candidate groups held at once; rows are independent, so they go in blocks."""


def solve(weight: Tensor, hessian: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Weight (out, in) and X^T X (in, in) -> mask (out, in) bool. Starts from Wanda's mask."""
    h = hessian / hessian.diag().mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    rows = max(1, CANDIDATES // (comb(m, n) * m))
    return torch.cat([_descend(block.float(), h, n, m) for block in torch.split(weight, rows)])


def _descend(w: Tensor, h: Tensor, n: int, m: int) -> Tensor:
    dropped = ~patterns(n, m).to(w.device)
    codes = encode(best(w.abs() * h.diag().sqrt(), n, m), n, m)
    errors = torch.where(expand(codes, n, m), 0, w)
    pull = errors @ h  # what the errors of the whole row do to each column
    for _ in range(SWEEPS):
        for group in range(codes.shape[1]):
            columns = slice(group * m, group * m + m)
            within, before = h[columns, columns], errors[:, columns]
            others = pull[:, columns] - before @ within
            candidates = w[:, None, columns] * dropped  # (out, patterns, m)
            cost = ((candidates @ within + 2 * others[:, None]) * candidates).sum(-1)
            chosen = cost.argmin(1)
            codes[:, group] = chosen.to(codes.dtype)
            after = torch.where(dropped[chosen], w[:, columns], 0)
            pull += (after - before) @ h[columns]
            errors[:, columns] = after
    return expand(codes, n, m)
