"""A report says of a recorded run what a person reckons from its lines."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from loading import ROOT, loadreport, traffic
from loadreport import Slo

METRICS = """# TYPE maskllm_swap_seconds histogram
maskllm_swap_seconds_bucket{{source="host",le="+Inf"}} {count}
maskllm_swap_seconds_count{{source="host"}} {count}
maskllm_swap_seconds_sum{{source="host"}} {seconds}
"""
SLO = Slo(ttft_s=0.2, tpot_s=0.25)


def answer(mask: str, due_s: float, first_s: float, last_s: float, tokens: int) -> traffic.Request:
    return traffic.Request("completion", mask, due_s, due_s, first_s, last_s, 8, tokens)


A1, A2 = answer("a", 1.0, 1.1, 1.5, 5), answer("a", 2.0, 2.3, 2.5, 5)
A2.sent_s = 2.01
B1, B2 = answer("b", 3.0, 3.1, 5.0, 10), traffic.Request("chat", "b", 4.0, 4.0, error="503")
WARM_UP = answer("a", 0.5, 3.0, 4.0, 5)
PUBLISH = traffic.Request("publish", "p", 2.0, 2.0, last_s=2.25)


def recorded(folder: Path, *requests: traffic.Request) -> Path:
    """A run of five seconds."""
    folder.mkdir(parents=True)
    (folder / "requests.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in requests))
    about = {"host": "http://h", "users": ["Zipf"], "masks": ["a", "b"], "arrivals": "poisson"}
    (folder / "run.json").write_text(json.dumps({**about, "began": "now", "seconds": 5.0}))
    (folder / "metrics-before.txt").write_text(METRICS.format(count=2, seconds=0.01))
    (folder / "metrics-after.txt").write_text(METRICS.format(count=6, seconds=0.03))
    return folder


def test_the_figures_of_a_run(tmp_path: Path):
    run = recorded(tmp_path / "run", WARM_UP, A1, A2, B1, B2, PUBLISH)
    (point,) = loadreport.read(run, warmup_s=1)
    figures = loadreport.figures(point, SLO)
    expected = {
        "sent, requests/s": 1,  # four in the four seconds after the warm-up
        "answered, requests/s": 0.75,  # three, until 4 s after it
        "failed, requests": 1,
        "tokens/s": 5,  # 20 in 4 s
        "TTFT p50, ms": 100,
        "TTFT p99, ms": 296,  # of 100, 100, 300: 98 % of the way from the second to the third
        "TPOT p50, ms": 100,  # 0.4 / 4; the others are 0.2 / 4 and 1.9 / 9
        "goodput, %": 50,  # A1 and B1
        "goodput, requests/s": 0.5,
        "fairness": 0.9,  # speeds are 10 / 1 and 10 / 2: 15^2 / (2 * 125)
        "fastest / slowest mask": 2,
        "swaps into slots": 4,
        "a swap, ms": 5,
        "reads from disk": 0,
        "lag p99, ms": 9.7,  # of 0, 0, 0, 10
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_the_report_of_a_sweep_compares_it_with_another_and_holds_its_picture(tmp_path: Path):
    recorded(tmp_path / "now/rate-1", A1, A2, B1, B2, PUBLISH)
    recorded(tmp_path / "now/rate-2", A1, A1, A2, B1, B1, B2)
    recorded(tmp_path / "before/rate-1", A1)  # 5 tokens in half a second
    command = [sys.executable, ROOT / "loadtests/loadreport.py", tmp_path / "now", "--warmup", "1"]
    command += ["--slo-ttft-ms", "200", "--slo-tpot-ms", "250", "--compare", tmp_path / "before"]
    subprocess.run(command, check=True, capture_output=True)
    text = (tmp_path / "now/report.md").read_text()
    assert "| tokens/s | 10 | 5 | 0.5 |" in text
    assert "|  | rate-1 | rate-2 |" in text
    assert "| failed, requests | 1 | 1 |" in text
    # mask, requests, failed, TTFT, TPOT and E2E p50 and p99, good, tokens/s
    assert "| a | 2 | 0 | 200 | 298 | 75 | 99.5 | 500 | 500 | 50 | 10 |" in text
    assert "1 publishes, 0 failed; p50 250 ms" in text
    assert "`b: 503`" in text
    assert (tmp_path / "now/load.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "now/report.html").read_text()
    assert "data:image/png;base64,iVBOR" in page
    assert "<td>tokens/s</td>" in page.replace(' style="text-align: right;"', "")


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"no requests\.jsonl"):
        loadreport.read(tmp_path, warmup_s=0)
    recorded(tmp_path / "run", WARM_UP)
    with pytest.raises(SystemExit, match="no request was answered after the first 3 s"):
        loadreport.read(tmp_path, warmup_s=3)


def test_fairness_is_one_for_equals_and_one_nth_for_a_monopoly():
    assert loadreport.jain([3, 3, 3, 3]) == pytest.approx(1)
    assert loadreport.jain([5, 0, 0, 0]) == pytest.approx(0.25)
