"""The published figures: each keeps its `must`, and a figure that does not is noticed."""

import asyncio
import random
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from report import Row, missed, table  # noqa: E402
from serving import Swaps  # noqa: E402
from soak import RIGHT, TIE, WRONG, Answer, Ask, Reference, Soak, judge, prove  # noqa: E402

KNOWN_MISSES = {
    # A plain read of the slot takes 0.95 of our time at 4 rows, and a third of torch's: 4 wants the hours in
    # which memory is read at 60 GB/s, as 1.8 against torch's int8 does here, where the read would be 1.87.
    "kernels: 4096 x 4096, 4 | x torch": 2.3,
    "kernels: 11008 x 4096, 4 | x torch": 2.4,
    "kernels: 4096 x 11008, 4 | x torch": 2.4,
    "kernels: 11008 x 4096, 1 | x torch int8": 1.5,
    # Small layers are calls from Python, and at 512 rows permuting.
    "kernels-avx2: 768 x 768, 1 | x torch": 1.0,
    "kernels-avx2: 768 x 768, 1 | x own dense": 1.35,
    # Its processors are shared, and torch's time changes by a quarter beside ours: 2.07 to 2.59 in five runs.
    "kernels-avx2: 4096 x 4096, 1 | x torch": 2.0,
    "kernels-avx2: 768 x 768, 4 | x torch": 2.1,
    "kernels-avx2: 768 x 768, 4 | x own dense": 1.4,
    "kernels-avx2: 768 x 768, 256 | x torch": 0.9,
    "kernels-avx2: 768 x 768, 512 | x torch": 0.8,
    # Between 0.95 and 1.6 by the hour: small copies here take 90 to 140 us, and swaps 150 to 220.
    "kernels-avx2: 768 x 768, swap bf16 | time / memcpy": 1.6,
    "kernels-avx2: 768 x 768, swap int8 | time / memcpy": 1.7,
    "kernels-avx2: 4096 x 4096, 1 | x torch int8": 1.4,
    "kernels-avx2: 11008 x 4096, 1 | x torch int8": 1.4,
    "kernels-avx2: 4096 x 11008, 1 | x torch int8": 1.4,
    "kernels-avx2: 768 x 768, 1 | x torch int8": 1.3,
    # Of our steps 6 to 9 ms are the head, attention and Python, which do not shrink with the weights.
    "end-to-end: batch 1 | bf16 slots, times": 1.7,
    "end-to-end: batch 4 | bf16 slots, times": 1.45,
    "end-to-end: batch 16 | bf16 slots, times": 1.3,
    # One mask's step is what became faster, by the head.
    "end-to-end: batch 16, 8 masks | int8 slots and head, times": 0.45,
    # Reads of 128 bytes a row reach 2 of the 4.2 TB/s, whatever is computed with them.
    "gpu-nvidia-h200: decode, batch 16 | layer, x": 1.15,
}
"""Figures we publish although they miss their must, and what they may not get worse than; whoever mends one
takes it out here."""


def test_a_figure_misses_its_must_only_on_the_wrong_side():
    assert Row("a", 9.1, "perplexity", must=9.0).misses
    assert not Row("a", 9.0, "perplexity", must=9.0).misses
    assert Row("a", 1.9, "x", must=2.0, better="higher").misses
    assert not Row("a", 9.1, "perplexity").misses


def test_a_table_has_a_row_for_each_mask_and_marks_the_best_sparse_figure_of_a_column():
    values = {"dense | law": 2.0, "legal | law": 3.0, "code | law": 4.0}
    rows = [{"name": name, "value": value, "unit": "perplexity"} for name, value in values.items()]
    content = {"command": "make table", "machine": "m", "date": "d", "note": "n", "rows": rows}
    assert table(content).splitlines()[:5] == [
        "| mask | law |",
        "|---|---:|",
        "| dense | 2 |",
        "| legal | **3** |",
        "| code | 4 |",
    ]


class Alone(Soak):
    """A soak whose server, asked alone, goes on after the near tie of mask a with 5, 6."""

    async def refer(self, mask: str, ids: list[int], tokens: int) -> Reference:
        assert (mask, ids, tokens) == ("a@1", [0, 1, 8], 2)
        return Reference([5, 6], [0, 0], [1.0, 1.0])


def test_a_soak_tells_another_masks_answer_from_a_near_tie():
    soak = Alone(None, None, {}, random.Random(0), ["a", "b"], prompts=[[0]])
    soak.references = {
        ("a@1", 0): Reference([1, 2, 3, 4], [7, 8, 9, 9], [1.0, 0.0001, 0.5, 0.5]),
        ("b@2", 0): Reference([1, 8, 5, 7], [0, 0, 0, 0], [1.0, 1.0, 1.0, 1.0]),
    }

    def answers(label: str, *tokens: int) -> Answer:
        return Answer(Ask("a", 0, len(tokens), False, None), 0.0, label=label, tokens=list(tokens))

    right, left_early = answers("a@1", 1, 2, 3, 4), answers("a@1", 1, 2)
    far, other_label = answers("a@1", 1, 2, 9, 4), answers("b@2", 1, 8, 5, 7)
    tie, looks_like_one = answers("a@1", 1, 8, 5, 6), answers("a@1", 1, 8, 5, 7)
    assert judge(soak, [right, left_early]) == [RIGHT, RIGHT]
    assert judge(soak, [far, other_label]) == [WRONG, WRONG]
    assert judge(soak, [tie, looks_like_one]) == [TIE, TIE]
    assert asyncio.run(prove(soak, [tie])) == 0
    assert asyncio.run(prove(soak, [looks_like_one])) == 1


def test_percentiles_of_swaps_are_those_of_the_swaps_between_two_looks():
    before = Swaps({0.001: 5.0, 0.002: 5.0, float("inf"): 5.0}, seconds=0.005)
    later = Swaps({0.001: 5.0, 0.002: 105.0, float("inf"): 106.0}, seconds=0.155)
    between = later.since(before)
    assert between.count == 101
    assert abs(between.quantile(0.5) - 0.001505) < 1e-9  # 50.5 of the 100 between 1 and 2 ms
    assert between.quantile(1) == 0.002  # what is beyond every bucket


def test_every_published_figure_keeps_its_must_but_those_that_are_known_not_to():
    misses = missed()
    assert misses.keys() == KNOWN_MISSES.keys()
    for name, worst in KNOWN_MISSES.items():
        assert misses[name].value >= worst if misses[name].better == "higher" else misses[name].value <= worst
