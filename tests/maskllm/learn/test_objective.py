"""The loss is the data's, the dense teacher's, or a mean of both: worked by hand for two classes."""

from math import log

import pytest
import torch
from torch import Tensor

from maskllm.learn.objective import loss

LABELS = torch.tensor([0, 1])
STUDENT = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()  # chances 3/4 and 1/4, then 1/2 and 1/2
TEACHER = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).log()  # 1/2 and 1/2 both times
CROSS_ENTROPY = (log(4 / 3) + log(2)) / 2
# the sum of p log(p / q), p being the teacher's chance and q the student's, who agree on the second
KL = (0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)) / 2


@pytest.mark.parametrize(
    ("distill", "expected"), [(0, CROSS_ENTROPY), (1, KL), (0.5, (CROSS_ENTROPY + KL) / 2)]
)
def test_distill_is_the_teachers_share_of_the_loss(distill: float, expected: float) -> None:
    teacher = TEACHER if distill else None
    assert float(loss(STUDENT, LABELS, teacher, distill)) == pytest.approx(expected)


def test_nothing_is_to_be_learned_from_a_teacher_that_agrees() -> None:
    student = STUDENT.clone().requires_grad_()
    of_student = loss(student, LABELS, STUDENT, 1)
    of_student.backward()
    assert float(of_student.detach()) == pytest.approx(0)
    torch.testing.assert_close(student.grad, torch.zeros(2, 2))


def test_a_loss_is_the_mean_over_targets_however_they_are_arranged() -> None:
    def arranged(tensor: Tensor) -> Tensor:
        return tensor.repeat(3, *[1] * (tensor.ndim - 1)).unflatten(0, (3, 2))

    value = loss(arranged(STUDENT), arranged(LABELS), arranged(TEACHER), 0.5)
    assert float(value) == pytest.approx((CROSS_ENTROPY + KL) / 2)


def test_a_loss_is_float32_whatever_the_model_computes_in() -> None:
    assert loss(STUDENT.bfloat16(), LABELS, TEACHER.bfloat16(), 0.5).dtype == torch.float32
