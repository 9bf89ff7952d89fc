"""How fast masks are packed and unpacked on one core: python benchmarks/packing.py

Packing is mask -> codes -> bytes, unpacking the way back, both with every check. 18.9 M weights, the
median of 15 runs. Writes benchmarks/packing.json.
"""

import statistics
import time
from collections.abc import Callable

import torch
from report import Row, write

from maskllm.core.patterns import best, encode, expand, pack, unpack

SHAPE, RUNS = (4096, 4608), 15


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for n, m in ((2, 4), (1, 4), (2, 8), (4, 8), (8, 16)):
        mask = best(torch.rand(SHAPE), n, m)
        packed = pack(encode(mask, n, m), n, m)
        pattern, groups = (n, m), SHAPE[1] // m
        pack_speed = speed(lambda mask=mask, p=pattern: pack(encode(mask, *p), *p))
        unpack_speed = speed(lambda packed=packed, g=groups, p=pattern: expand(unpack(packed, g, *p), *p))
        rows.append(Row(f"{n}:{m} | pack", pack_speed, "M weights/s", 200, better="higher"))
        rows.append(Row(f"{n}:{m} | unpack", unpack_speed, "M weights/s", 200, better="higher"))
        rows.append(Row(f"{n}:{m} | bits a weight", packed.numel() * 8 / mask.numel(), "bits"))
    write("packing", "python benchmarks/packing.py", rows, "M weights/s on one core")


def speed(work: Callable[[], object]) -> float:
    """Millions of weights a second, median."""
    seconds = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return SHAPE[0] * SHAPE[1] / 1e6 / statistics.median(seconds)


if __name__ == "__main__":
    main()
