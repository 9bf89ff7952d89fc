"""The one operator of serving: a linear layer in which every row has its own mask, or none.

`slots` holds the resident masks of one layer. What a slot looks like is the backend's own affair:
make it with `allocate`, write it with `fill`, and pass it back. Today there is one backend, the
reference, whose slot is the bool mask itself and which runs wherever torch runs.
"""

import torch
from torch import Tensor
from torch.nn import functional

DENSE = -1
"""The row slot of a row that uses the base's own weights."""


def allocate(weight: Tensor, count: int) -> Tensor:
    """Empty slots for `count` masks of a weight (out, in); one byte a weight and slot."""
    return torch.zeros(count, *weight.shape, dtype=torch.bool, device=weight.device)


def fill(slots: Tensor, slot: int, mask: Tensor) -> None:
    """Make a mask (out, in) bool resident in a slot."""
    slots[slot].copy_(mask)


@torch.library.custom_op("maskllm::masked_linear", mutates_args=())
def masked_linear(x: Tensor, weight: Tensor, slots: Tensor, row_slots: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, in) times the masked weight (out, in) of each row's slot, plus bias -> (rows, out).

    `row_slots` (rows,) int32 gives each row's slot, or DENSE. The masked weight is selected with
    `where`, never multiplied: a product would leave -0.0 behind, and could not mask an infinity.
    """
    out = x.new_empty(x.shape[0], weight.shape[0])
    present = torch.unique(row_slots).tolist()
    for slot in present:
        effective = weight if slot == DENSE else torch.where(slots[slot], weight, 0)
        if len(present) == 1:
            return functional.linear(x, effective, bias)
        rows = (row_slots == slot).nonzero().squeeze(1)
        out[rows] = functional.linear(x[rows], effective, bias)
    return out


@masked_linear.register_fake
def _(x: Tensor, weight: Tensor, slots: Tensor, row_slots: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[0])
