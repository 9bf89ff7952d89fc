"""What a soft mask is judged by: the task's own loss, the dense teacher's opinion, or some of both."""

import torch.nn.functional as F
from torch import Tensor


def loss(logits: Tensor, labels: Tensor, teacher: Tensor | None, distill: float) -> Tensor:
    """(1 - distill) * cross-entropy with the labels + distill * KL(teacher || student), in nats a target.

    logits (..., classes), labels (...) int64, teacher (..., classes) logits of the dense base, without
    gradient, or None where distill is 0. Computed in float32.
    """
    student = logits.flatten(0, -2).float().log_softmax(-1)
    total = F.nll_loss(student, labels.flatten()) * (1 - distill)
    if teacher is not None:
        dense = teacher.flatten(0, -2).float().log_softmax(-1)
        total += F.kl_div(student, dense, reduction="batchmean", log_target=True) * distill
    return total
