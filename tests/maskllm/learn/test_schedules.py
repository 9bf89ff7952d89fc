"""Settings move from their first value to their last as the paper says."""

import pytest

from maskllm.learn.schedules import cosine, linear


def test_temperature_falls_on_a_straight_line() -> None:
    assert [linear(step, 5, 4.0, 0.0) for step in range(5)] == [4, 3, 2, 1, 0]


def test_temperature_and_scale_end_where_the_paper_does() -> None:
    assert linear(1_999, 2_000, 4.0, 0.05) == pytest.approx(0.05)
    assert linear(1_999, 2_000, 100.0, 500.0) == pytest.approx(500)


def test_learning_rate_falls_along_half_a_cosine() -> None:
    assert cosine(0, 5, 1.0, 0.1) == pytest.approx(1.0)
    assert cosine(2, 5, 1.0, 0.1) == pytest.approx(0.55)  # half-way, cos = 0
    assert cosine(1, 5, 1.0, 0.0) == pytest.approx((1 + 0.5**0.5) / 2)  # cos 45 degrees
    assert cosine(4, 5, 1.0, 0.1) == pytest.approx(0.1)


def test_a_run_of_one_step_stays_at_its_start() -> None:
    assert linear(0, 1, 4.0, 0.05) == 4
    assert cosine(0, 1, 1.0, 0.1) == 1
