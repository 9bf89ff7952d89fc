"""What every test shares."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# An example is slow when the machine is: a deadline would only say so.
settings.register_profile("maskllm", deadline=None)
settings.load_profile("maskllm")

INTERPRETED = Path(__file__).parent / "maskllm/kernels/interpreted.py"


def pytest_collection_modifyitems(items):
    """Who waits for minutes of one core comes last: the others run meanwhile."""
    items.sort(key=_waits)


def _waits(item: pytest.Item) -> bool:
    return "interpreter" in item.name


@pytest.fixture(scope="session", autouse=True)
def interpreted(request, tmp_path_factory):
    """The GPU's kernels under Triton's interpreter, from the first test on: the process, and what it says.

    A process of its own, as a kernel is interpreted for good if the variable is set on import. Where no test
    asks for it there is none.
    """
    if not any(map(_waits, request.session.items)):
        yield None
        return
    out = tmp_path_factory.mktemp("interpreted") / "out"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Who has timers goes before it.
    command = ["nice", sys.executable, "-m", "pytest", "-q", str(INTERPRETED)]
    with out.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    yield process, out
    process.kill()
    process.wait()
