"""What a run or a sweep measured, as report.md, report.html and load.png in its folder.

    python loadtests/loadreport.py runs/sweep --slo-ttft-ms 500 --slo-tpot-ms 50
    python loadtests/loadreport.py runs/sweep --compare runs/before

A folder is what `--out` of locustfile.py filled, or has one such folder for each load, as sweep.py leaves it.
"""

import argparse
import base64
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import markdown
import matplotlib.figure
import numpy as np
from matplotlib.ticker import LogFormatter
from prometheus_client.parser import text_string_to_metric_families
from traffic import Request

DEFINITIONS = """
- All latencies count from the time at which a request was *to be sent*, so that waiting for a late generator
  or a full server counts. **TTFT** ends with the first token, **E2E** with the last.
- **TPOT** is vLLM's: (E2E - TTFT) / (output tokens - 1), of answers with more than one token.
- **Goodput** is the share of all requests that were answered with TTFT and TPOT within the SLO; failed ones
  are not.
- **Speed** of a mask is the output tokens of its requests over the seconds that they took (E2E), added up:
  what one who waits for it sees. **Fairness** is Jain's index of the masks' speeds, (sum x)^2 / (n sum x^2):
  1 where all are served alike, 1/n where one has everything. It does not reward being asked for more often.
- **Tokens/s** and **answered** count from the first request to the last token.
- **Lag** is how late the generator itself sent a request; where it is not far below TTFT, the generator was
  too slow.
- Requests of the warm-up are not counted, except in the server's own counts of swaps and reads.
"""
STYLE = (
    "body{font:15px sans-serif;max-width:60em;margin:2em auto}"
    "td,th{padding:.2em .7em;text-align:right}img{width:100%}"
)


@dataclass(frozen=True)
class Slo:
    """What an answer must keep to count as good."""

    ttft_s: float
    tpot_s: float

    def kept(self, request: Request) -> bool:
        return not request.error and request.ttft_s <= self.ttft_s and (request.tpot_s or 0) <= self.tpot_s


@dataclass(frozen=True)
class Point:
    """One load: what was asked, and what came of it."""

    name: str
    about: dict[str, Any]
    requests: list[Request]
    """Completions and chats, after the warm-up."""
    publishes: list[Request]
    before: str
    after: str
    """The server's metrics."""
    warmup_s: float

    @cached_property
    def answered(self) -> list[Request]:
        return [request for request in self.requests if not request.error]

    @property
    def offered(self) -> float:
        """Requests a second that were sent."""
        seconds: float = self.about["seconds"]
        return len(self.requests) / (seconds - self.warmup_s)

    @property
    def took_s(self) -> float:
        """From the first request that may count to the last token."""
        return max(request.due_s + request.e2e_s for request in self.answered) - self.warmup_s

    @property
    def tokens_per_s(self) -> float:
        return sum(request.output_tokens for request in self.answered) / self.took_s

    def goodput(self, slo: Slo) -> float:
        """Share of requests."""
        return sum(map(slo.kept, self.requests)) / len(self.requests)

    @cached_property
    def by_mask(self) -> dict[str, list[Request]]:
        """Answered requests of each mask, most wanted first."""
        masks: dict[str, list[Request]] = {}
        for request in self.answered:
            masks.setdefault(request.mask, []).append(request)
        return dict(sorted(masks.items(), key=lambda item: -len(item[1])))

    @property
    def speeds(self) -> dict[str, float]:
        """Output tokens over seconds of each mask's requests."""
        return {
            mask: sum(r.output_tokens for r in requests) / sum(r.e2e_s for r in requests)
            for mask, requests in self.by_mask.items()
        }

    def swaps(self, source: str) -> tuple[float, float]:
        """How many there were between the two looks at the server's metrics, and their seconds."""
        count, seconds = (
            counter(self.after, f"maskllm_swap_seconds_{what}", source=source)
            - counter(self.before, f"maskllm_swap_seconds_{what}", source=source)
            for what in ("count", "sum")
        )
        return count, seconds


def counter(metrics: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have the labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def read(folder: Path, warmup_s: float) -> list[Point]:
    """The loads of a folder, least first. Raises SystemExit where there are none."""
    folders = [log.parent for log in [*folder.glob("requests.jsonl"), *folder.glob("*/requests.jsonl")]]
    if not folders:
        sys.exit(f"no requests.jsonl in {folder} or a folder of it: give locust --out {folder}")
    return sorted((_point(each, warmup_s) for each in folders), key=lambda point: point.offered)


def _point(folder: Path, warmup_s: float) -> Point:
    lines = (folder / "requests.jsonl").read_text().splitlines()
    requests = [each for each in (Request(**json.loads(line)) for line in lines) if each.due_s >= warmup_s]
    point = Point(
        folder.name,
        json.loads((folder / "run.json").read_text()),
        [each for each in requests if each.kind != "publish"],
        [each for each in requests if each.kind == "publish"],
        (folder / "metrics-before.txt").read_text(),
        (folder / "metrics-after.txt").read_text(),
        warmup_s,
    )
    if not point.answered:
        sys.exit(f"{folder}: no request was answered after the first {warmup_s:g} s")
    return point


def jain(values: Iterable[float]) -> float:
    """Jain's fairness index."""
    x = np.array(list(values))
    return float(x.sum() ** 2 / (len(x) * (x**2).sum()))


def percentile(seconds: Iterable[float | None], q: float) -> float:
    """Milliseconds; nan where there are none."""
    known = [each for each in seconds if each is not None]
    return 1000 * float(np.percentile(known, q)) if known else float("nan")


def figures(point: Point, slo: Slo) -> dict[str, float]:
    """What is reported of a load, by name and unit."""
    answered, speeds = point.answered, point.speeds
    (swaps, swap_s), (loads, load_s) = point.swaps("host"), point.swaps("disk")
    return {
        "sent, requests/s": point.offered,
        "answered, requests/s": len(answered) / point.took_s,
        "failed, requests": len(point.requests) - len(answered),
        "tokens/s": point.tokens_per_s,
        **{
            f"{name} p{q}, ms": percentile(map(of, answered), q)
            for name, of in LATENCIES.items()
            for q in (50, 99)
        },
        "goodput, %": 100 * point.goodput(slo),
        "goodput, requests/s": point.goodput(slo) * point.offered,
        "fairness": jain(speeds.values()),
        "fastest / slowest mask": max(speeds.values()) / min(speeds.values()),
        "swaps into slots": swaps,
        "a swap, ms": 1000 * swap_s / swaps if swaps else 0,
        "reads from disk": loads,
        "a read, ms": 1000 * load_s / loads if loads else 0,
        "lag p99, ms": percentile((r.sent_s - r.due_s for r in point.requests), 99),
    }


LATENCIES: dict[str, Callable[[Request], float | None]] = {
    "TTFT": lambda request: request.ttft_s,
    "TPOT": lambda request: request.tpot_s,
    "E2E": lambda request: request.e2e_s,
}


def by_mask(point: Point, slo: Slo) -> Iterator[list[object]]:
    """A row for each mask."""
    for mask, requests in point.by_mask.items():
        asked = [request for request in point.requests if request.mask == mask]
        yield [
            mask,
            len(asked),
            len(asked) - len(requests),
            *(percentile(map(of, requests), q) for of in LATENCIES.values() for q in (50, 99)),
            100 * sum(map(slo.kept, asked)) / len(asked),
            point.speeds[mask],
        ]


def table(head: list[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *cells])


def text(points: list[Point], slo: Slo, other: list[Point]) -> str:
    """The report in Markdown."""
    about, found = points[-1].about, [figures(point, slo) for point in points]
    parts = [
        f"# Load of {about['host']}",
        f"{', '.join(about['users'])} over {len(about['masks'])} masks, arrivals: {about['arrivals']}, "
        f"begun {points[0].about['began']}, the first {points[0].warmup_s:g} s left out. "
        f"SLO: TTFT {1000 * slo.ttft_s:g} ms, TPOT {1000 * slo.tpot_s:g} ms.",
        "![Latency against throughput, goodput, latency by mask](load.png)",
        "## Loads",
        table(
            ["", *(point.name for point in points)],
            [[key, *(each[key] for each in found)] for key in found[0]],
        ),
    ]
    if other:
        parts += ["## Compared", *compared(points, other, slo)]
    columns = [f"{name} p{q}, ms" for name in LATENCIES for q in (50, 99)]
    for point in points:
        head = ["mask", "requests", "failed", *columns, "goodput, %", "speed, tokens/s"]
        parts += [f"## Masks, {point.name}", table(head, by_mask(point, slo))]
        if point.publishes:
            failed = sum(bool(each.error) for each in point.publishes)
            took = [each.e2e_s for each in point.publishes if not each.error]
            parts.append(
                f"{len(point.publishes)} publishes, {failed} failed; p50 {percentile(took, 50):.4g} ms, "
                f"p99 {percentile(took, 99):.4g} ms."
            )
    errors = {f"{each.mask}: {each.error}" for point in points for each in point.requests if each.error}
    if errors:
        parts += ["## Errors", *(f"- `{error}`" for error in sorted(errors)[:20])]
    return "\n\n".join([*parts, "## What the words mean", DEFINITIONS.strip()]) + "\n"


def compared(points: list[Point], other: list[Point], slo: Slo) -> Iterator[str]:
    """A table for each load that both have, by its folder's name."""
    before = {point.name: point for point in other}
    for point in points:
        if point.name in before:
            old, new = figures(before[point.name], slo), figures(point, slo)
            rows = [[key, old[key], new[key], new[key] / old[key] if old[key] else "-"] for key in new]
            yield table([point.name, "before", "now", "now / before"], rows)


def picture(points: list[Point], slo: Slo, other: list[Point], path: Path) -> None:
    """The four plots."""
    figure = matplotlib.figure.Figure((11, 8), layout="constrained")
    (ttft, tpot), (good, masks) = figure.subplots(2, 2)
    sweeps = [(points, "tab:blue", "")] + [(other, "tab:gray", "before, ")] * bool(other)
    for loads, colour, which in sweeps:
        x = [point.tokens_per_s for point in loads]
        for axis, name in ((ttft, "TTFT"), (tpot, "TPOT")):
            for q, style in ((50, "o-"), (99, "^--")):
                y = [percentile(map(LATENCIES[name], point.answered), q) for point in loads]
                axis.plot(x, y, style, color=colour, label=f"{which}p{q}")
        sent = [point.offered for point in loads]
        answered = [len(point.answered) / point.took_s for point in loads]
        good.plot(sent, answered, "o-", color=colour, label=f"{which}answered")
        good.plot(
            sent,
            [point.goodput(slo) * len(point.requests) / point.took_s for point in loads],
            "^--",
            color=colour,
            label=f"{which}within SLO",
        )
    for axis, name, limit in ((ttft, "TTFT", slo.ttft_s), (tpot, "TPOT", slo.tpot_s)):
        axis.axhline(1000 * limit, color="tab:red", lw=0.8, label="SLO")
        axis.set(
            title=f"{name} against throughput", xlabel="output tokens/s", ylabel=f"{name}, ms", yscale="log"
        )
    good.set(title="Requests/s sent and answered", xlabel="sent, requests/s", ylabel="requests/s")
    names = list(points[-1].by_mask)[:30]
    for point in points:
        y = [percentile((r.ttft_s for r in point.by_mask.get(mask, [])), 50) for mask in names]
        masks.plot(names, y, "o-", label=f"{point.offered:.3g} requests/s")
    masks.set(title="TTFT p50 by mask, most wanted first", ylabel="TTFT, ms", yscale="log")
    masks.tick_params(axis="x", rotation=60)
    for axis in (ttft, tpot, masks):
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axis in (ttft, tpot, good, masks):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def write(folder: Path, points: list[Point], slo: Slo, other: list[Point]) -> None:
    """The report's three files; the page holds its picture."""
    picture(points, slo, other, folder / "load.png")
    report = text(points, slo, other)
    (folder / "report.md").write_text(report)
    image = base64.b64encode((folder / "load.png").read_bytes()).decode()
    body = markdown.markdown(report, extensions=["tables"])
    body = re.sub(r'src="load.png"', f'src="data:image/png;base64,{image}"', body)
    title = report.partition("\n")[0].removeprefix("# ")
    page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>{body}"
    (folder / "report.html").write_text(page)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of a report, which sweep.py has, too."""
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="an earlier run or sweep")
    parser.add_argument("--slo-ttft-ms", type=float, default=500, help="longest good time to first token")
    parser.add_argument("--slo-tpot-ms", type=float, default=50, help="longest good time per output token")
    parser.add_argument("--warmup", type=float, default=3, help="seconds at the beginning to leave out")


def report(folder: Path, args: argparse.Namespace) -> list[Point]:
    """Write the report of a folder; returns its loads."""
    points = read(folder, args.warmup)
    other = read(args.compare, args.warmup) if args.compare else []
    write(folder, points, Slo(args.slo_ttft_ms / 1000, args.slo_tpot_ms / 1000), other)
    print(folder / "report.html")
    return points


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    add_options(parser)
    args = parser.parse_args()
    report(args.folder, args)


if __name__ == "__main__":
    main()
