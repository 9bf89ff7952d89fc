"""What locust reports is what the server did: seen on servers whose schedule is known."""

import statistics
from pathlib import Path

import pytest
from loading import locust, measured, stub


def test_times_are_those_of_the_servers_schedule(tmp_path: Path):
    """First token after 100 ms, then one each 50 ms: none comes earlier, and most hardly later."""
    with stub(tmp_path, "--ttft-ms", 100, "--tpot-ms", 50) as server:
        options = ["-u", 2, "-r", 2, "--rate", 5, "--output-tokens", 5, "-t", "5s", "Uniform", "Chat"]
        point = measured(tmp_path / "run", server.url, *options)
    assert {request.kind for request in point.answered} == {"completion", "chat"}
    assert len(point.answered) == len(point.requests) >= 20
    assert {request.output_tokens for request in point.answered} == {5}
    medians = {
        name: statistics.median(getattr(request, name) for request in point.answered)
        for name in ("ttft_s", "tpot_s", "e2e_s")
    }
    assert 0.1 <= medians["ttft_s"] < 0.15
    assert medians["tpot_s"] == pytest.approx(0.05, abs=0.005)
    assert 0.3 <= medians["e2e_s"] < 0.35


def test_a_server_that_falls_behind_is_charged_for_all_who_wait(tmp_path: Path):
    """It takes 200 ms for a request, one after another, and about ten a second come.

    Request k ends 200 ms after the later of its due time and the end of the one before. A generator that
    waited for answers would have sent no faster than they came and seen 200 ms each time.
    """
    with stub(tmp_path, "--ttft-ms", 200, "--tpot-ms", 0, "--one-at-a-time") as server:
        options = ["-u", 1, "--rate", 10, "--output-tokens", 1, "-t", "5s", "OneMask"]
        point = measured(tmp_path / "run", server.url, *options)
    free, expected = 0.0, []
    for request in sorted(point.requests, key=lambda request: request.due_s):
        free = max(free, request.due_s) + 0.2
        expected.append(free - request.due_s)
    assert len(point.answered) == len(expected) >= 25
    assert max(expected) > 1
    seen = [request.e2e_s for request in point.answered]
    assert max(seen) >= 0.99 * max(expected)
    assert statistics.fmean(seen) >= 0.99 * statistics.fmean(expected)


def test_users_that_wait_for_answers_have_one_request_each(tmp_path: Path):
    """Each answer takes 200 ms, so two users are answered less than ten times a second."""
    with stub(tmp_path, "--ttft-ms", 200) as server:
        options = ["-u", 2, "-r", 2, "--arrivals", "closed", "--output-tokens", 1, "-t", "4s", "AllDistinct"]
        point = measured(tmp_path / "run", server.url, *options)
    assert 10 <= len(point.answered) <= 10 * point.took_s
    in_order = sorted(point.answered, key=lambda request: request.sent_s)
    assert all(later.sent_s >= early.last_s for early, later in zip(in_order, in_order[2:], strict=False))
    assert {mask: len(each) for mask, each in point.by_mask.items()}.keys() == {"alpha", "beta", "gamma"}


def test_an_answer_that_breaks_off_is_a_failure(tmp_path: Path):
    with stub(tmp_path, "--ttft-ms", 10) as server:
        options = ["-u", 1, "--rate", 20, "-t", "3s", "--masks", "alpha,broken,cut", "AllDistinct"]
        point = measured(tmp_path / "run", server.url, *options)
    failed = [request.mask for request in point.requests if request.error]
    assert set(failed) == {"broken", "cut"}
    assert set(point.by_mask) == {"alpha"}


def test_what_a_run_cannot_do_without_is_said():
    no_trace = locust("http://127.0.0.1:1", "-t", "5s", "--arrivals", "trace", "--trace", "no.csv", "OneMask")
    assert no_trace.returncode == 1
    assert "there is no file 'no.csv'" in no_trace.stderr
    nobody = locust("http://127.0.0.1:1", "-t", "5s", "OneMask")
    assert nobody.returncode == 1
    assert "refused" in nobody.stderr
