"""How tests run locust, and a server that keeps to a schedule."""

import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "loadtests"), str(ROOT / "benchmarks")]

import loadreport  # noqa: E402
import traffic  # noqa: E402
from loadreport import Point  # noqa: E402
from serving import Server, running  # noqa: E402

__all__ = ["loadreport", "locust", "measured", "stub", "traffic"]


def stub(folder: Path, *options: object) -> AbstractContextManager[Server]:
    """loadtests/stub.py until the block ends."""
    return running([sys.executable, ROOT / "loadtests/stub.py", *options], folder / "stub.log")


def locust(host: str, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """One run of the locustfile, without its page."""
    command = [
        sys.executable,
        "-m",
        "locust",
        "--headless",
        "-f",
        ROOT / "loadtests/locustfile.py",
        "-H",
        host,
    ]
    return subprocess.run(
        list(map(str, [*command, *options])),
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", **environment},
    )


def measured(folder: Path, host: str, *options: object, **environment: str) -> Point:
    """What a run recorded."""
    done = locust(host, "--out", folder, *options, **environment)
    assert (folder / "run.json").exists(), done.stderr
    (point,) = loadreport.read(folder, warmup_s=0)
    return point
