"""Settings move from their first value to their last as the paper says, or by a factor."""

import pytest

from maskllm.learn.schedules import anneal, cosine, linear, passed


def test_the_share_that_has_passed_goes_from_0_to_1() -> None:
    assert [passed(step, 5) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_what_anneals_in_half_the_steps_stays_at_its_end_in_the_rest() -> None:
    assert [passed(step, 3) for step in range(6)] == [0, 0.5, 1, 1, 1, 1]


def test_a_run_of_one_step_stays_at_its_start() -> None:
    assert passed(0, 1) == 0
    assert passed(0, 0) == 0  # a share of the steps that rounds to none


def test_temperature_falls_on_a_straight_line() -> None:
    assert [linear(share, 4.0, 0.0) for share in (0, 0.25, 0.5, 0.75, 1)] == [4, 3, 2, 1, 0]
    assert anneal("linear", 0.25, 4.0, 0.0) == 3


def test_temperature_and_scale_end_where_the_paper_does() -> None:
    assert anneal("linear", passed(1_999, 2_000), 4.0, 0.05) == pytest.approx(0.05)
    assert anneal("linear", passed(1_999, 2_000), 100.0, 500.0) == pytest.approx(500)


def test_exponentially_every_step_multiplies_by_the_same_factor() -> None:
    assert [anneal("exponential", passed(step, 5), 16.0, 1.0) for step in range(5)] == [16, 8, 4, 2, 1]
    assert anneal("exponential", passed(1, 3), 1.0, 100.0) == pytest.approx(10)


def test_learning_rate_falls_along_half_a_cosine() -> None:
    assert cosine(0, 1.0, 0.1) == pytest.approx(1.0)
    assert cosine(0.5, 1.0, 0.1) == pytest.approx(0.55)  # half-way, cos = 0
    assert cosine(0.25, 1.0, 0.0) == pytest.approx((1 + 0.5**0.5) / 2)  # cos 45 degrees
    assert cosine(1, 1.0, 0.1) == pytest.approx(0.1)
