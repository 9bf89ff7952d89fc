"""docs/capacity.md computes from the figures of `maskllm inspect --capacity`, and its sums are right."""

import json
import re
from pathlib import Path

import pytest
from loading import ROOT

from maskllm.capacity import Capacity, measure
from maskllm.kernels import cpu

PAGE = (ROOT / "docs/capacity.md").read_text()
CARD, BANDWIDTH = 72e9, 3.35e12
CONFIG = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.S)[1])
KV = 2 * 32 * 32 * 128 * 2
OUTPUT_LAYER = 32_000 * 4096 * 2

pytestmark = pytest.mark.skipif(
    cpu.why_not() is not None, reason=f"a slot's size is that of the kernels: {cpu.why_not()}"
)


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Capacity:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return measure(folder)


def rows(head: str) -> list[list[str]]:
    """The cells of a table of the page, by its first column's name."""
    table = PAGE[PAGE.index(f"| {head} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_sum_is_that_of_the_command(fits: Capacity):
    assert fits.sum(4, 4).partition(", and")[0] in PAGE


def test_what_slots_leave_for_kv(fits: Capacity):
    for slots, used, left, tokens in rows("slots"):
        need = fits.base + int(slots) * fits.slot
        assert (used, left) == (f"{need / 1e9:.1f}", f"{(CARD - need) / 1e9:.1f}")
        assert tokens == f"{(CARD - need) / KV / 1e3:.1f}"


def test_what_a_decode_step_reads(fits: Capacity):
    dense = fits.base - 2 * OUTPUT_LAYER
    for masks, read, ms, tokens in rows("masks in the batch"):
        weights = dense if masks == "dense" else int(masks) * fits.slot
        step = weights + OUTPUT_LAYER + 16 * 1000 * KV
        assert (read, ms) == (f"{step / 1e9:.1f}", f"{1000 * step / BANDWIDTH:.1f}")
        assert tokens == f"{16 / (step / BANDWIDTH):.0f}"


def test_every_line_of_the_page_that_is_a_command_names_a_file_that_is_there():
    for script in re.findall(r"python ((?:loadtests|benchmarks)/\w+\.py)", PAGE):
        assert Path(ROOT / script).exists()
