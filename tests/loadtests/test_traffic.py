"""When requests come, how long they are, under which masks they ask, and what counts of their answers."""

from collections import Counter
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest
from loading import traffic
from traffic import Arrival, Request

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,300,100
2023-11-16 18:15:50.6805900,75,25
2023-11-16 18:15:51.1805900,2,1000
2023-11-16 18:16:46.6805900,40,6
"""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_poisson_arrivals_have_the_mean_and_the_spread_of_an_exponential_gap():
    times = [0.0, *(arrival.at_s for arrival in islice(traffic.poisson(5, (1, 1), rng()), 10_000))]
    gaps = np.diff(times)
    # The mean of n gaps of mean and deviation 1/5 deviates by 1/5/sqrt(n) = 0.002: four times that.
    assert gaps.mean() == pytest.approx(0.2, abs=0.008)
    assert gaps.std() == pytest.approx(0.2, rel=0.05)
    # P(gap > 0.4) = exp(-2) = 0.135, and 0.0034 of deviation.
    assert (gaps > 0.4).mean() == pytest.approx(0.1353, abs=0.014)


def test_two_sources_together_send_the_sum_of_their_rates():
    sources = [traffic.poisson(3, (1, 1), rng(seed)) for seed in (1, 2)]
    counts = [sum(1 for _ in takewhile(lambda arrival: arrival.at_s < 1000, each)) for each in sources]
    assert sum(counts) == pytest.approx(6000, abs=4 * 6000**0.5)


def test_a_seed_gives_the_same_arrivals_again():
    first, again = (list(islice(traffic.poisson(5, (64, 32), rng(7)), 20)) for _ in range(2))
    assert first == again
    assert {(arrival.prompt_tokens, arrival.output_tokens) for arrival in first} == {(64, 32)}


def test_a_trace_is_scaled_to_the_model_and_played_faster(tmp_path: Path):
    """Totals are 400, 100, 1002 and 46; 99 % of four requests are the three shorter ones: 400 fits.

    With a context of 200 lengths are halved, but those of the third times 200/1002: 0.4 and 199.6.
    """
    (tmp_path / "trace.csv").write_text(TRACE)
    assert traffic.trace(tmp_path / "trace.csv", context=200, speed=2) == [
        Arrival(0.0, 150, 50),
        Arrival(2.0, 37, 12),
        Arrival(2.25, 1, 199),
        Arrival(30.0, 20, 3),
    ]


def test_a_trace_that_fits_keeps_its_lengths(tmp_path: Path):
    (tmp_path / "trace.csv").write_text(TRACE)
    (first, *_) = traffic.trace(tmp_path / "trace.csv", context=4096, speed=1)
    assert (first.prompt_tokens, first.output_tokens) == (300, 100)


def test_each_kind_of_user_draws_masks_in_its_own_way():
    masks = ["a", "b", "c", "d"]
    assert list(islice(traffic.one(masks), 3)) == ["a", "a", "a"]
    assert list(islice(traffic.distinct(masks, first=2), 5)) == ["c", "d", "a", "b", "c"]
    drawn = Counter(islice(traffic.uniform(masks, rng()), 4000))
    assert all(drawn[mask] == pytest.approx(1000, abs=4 * 750**0.5) for mask in masks)
    # 1 + 1/4 + 1/9 + 1/16 = 205/144, so that the shares are 144, 36, 16 and 9 of 205.
    drawn = Counter(islice(traffic.zipf(masks, 2, rng()), 2050))
    expected = {"a": 1440, "b": 360, "c": 160, "d": 90}
    assert all(drawn[mask] == pytest.approx(number, abs=80) for mask, number in expected.items())


def test_latencies_count_from_when_a_request_was_due_and_tpot_from_the_first_token():
    request = Request("completion", "a", due_s=1.0, sent_s=1.5, first_s=2.0, last_s=3.0, output_tokens=5)
    assert (request.ttft_s, request.e2e_s, request.tpot_s) == (1.0, 2.0, 0.25)
    request.output_tokens = 1
    assert request.tpot_s is None
