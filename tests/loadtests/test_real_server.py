"""Locust against a real server of the demo: both count the same."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

from loading import ROOT, loadreport, measured
from serving import MASKS, serving

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.0000000,4000,100
2023-11-16 18:15:46.5000000,12000,800
2023-11-16 18:15:47.0000000,100,1
"""
FAST = ("--enforce-eager", "--kv-cache-memory-bytes", 134217728)


def test_locust_and_the_server_count_the_same(tmp_path: Path):
    """Four kinds of users, one of which publishes a mask; then a trace, the longest as long as may be.

    Then the commands that docs/capacity.md prints.
    """
    shutil.copytree(MASKS, tmp_path / "masks")
    (tmp_path / "trace.csv").write_text(TRACE)
    with serving(tmp_path / "masks", tmp_path, *FAST) as server:
        users = ["Zipf", "AllDistinct", "Chat", "Swapper"]
        options = [
            "-u",
            4,
            "-r",
            4,
            "--rate",
            2,
            "--output-tokens",
            8,
            "--swap-every",
            2,
            "-t",
            "12s",
            *users,
        ]
        mixed = measured(tmp_path / "mixed", server.url, *options, LOAD_KEY="boss")
        options = ["-u", 1, "--arrivals", "trace", "--trace", tmp_path / "trace.csv", "-t", "6s", "Chat"]
        trace = measured(tmp_path / "trace", server.url, *options, LOAD_KEY="boss")
        printed = re.search(r"```sh\n(.*?)```", (ROOT / "docs/capacity.md").read_text(), re.S)
        environment = {**os.environ, "URL": server.url, "LOAD_KEY": "boss"}
        path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
        commands = printed[1].replace("loadtests/", f"{ROOT}/loadtests/")
        subprocess.run(
            ["bash", "-eux", "-c", commands], cwd=tmp_path, env={**environment, "PATH": path}, check=True
        )
        with server.client() as client:
            masks = {mask["id"] for mask in client.get("/v1/masks").json()["data"]}
    assert "| now / before |" in (tmp_path / "runs/load/report.md").read_text()
    demo = {file.stem for file in MASKS.glob("*.safetensors")}
    for point in (mixed, trace):
        assert [each.error for each in point.requests + point.publishes if each.error] == []
        finished, tokens = (
            {
                mask: loadreport.counter(point.after, f"maskllm_{name}_total", mask=mask)
                - loadreport.counter(point.before, f"maskllm_{name}_total", mask=mask)
                for mask in [*demo, "loadtest"]
            }
            for name in ("requests", "generation_tokens")
        )
        assert finished == {mask: len(point.by_mask.get(mask, [])) for mask in finished}
        assert tokens == {mask: sum(r.output_tokens for r in point.by_mask.get(mask, [])) for mask in tokens}
    assert Counter(request.kind for request in mixed.answered).keys() == {"completion", "chat"}
    assert len(mixed.publishes) >= 3
    assert mixed.swaps("host")[0] >= len(mixed.publishes)
    assert masks == demo  # what the swapper published is gone
    # 480 of the context for 4100 tokens, and for the 12800 of the second: 11.7, 30 and 0.1 of output.
    answers = sorted(trace.answered, key=lambda request: request.due_s)
    assert [request.output_tokens for request in answers] == [11, 30, 1]
