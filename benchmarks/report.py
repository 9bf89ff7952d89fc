"""Published figures: writing them, checking them against their `must`, and drawing the tables of pages.

    python benchmarks/report.py check            # every figure that misses its must; fails if there is one
    python benchmarks/report.py readme           # redraw the tables between a page's markers
    python benchmarks/report.py readme --check   # fail if they are not what the files say

A topic is benchmarks/TOPIC.json, written by the command it names. The name of a figure is its row and
column, `legal | medical`, in the table; `better` says which way is up.
"""

import argparse
import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs/capacity.md")


@dataclass(frozen=True)
class Row:
    """One figure. It misses its `must` where it is on the wrong side of it; `aim` is what to reach for."""

    name: str
    value: float
    unit: str
    must: float | None = None
    aim: float | None = None
    better: str = "lower"

    @property
    def misses(self) -> bool:
        if self.must is None:
            return False
        return self.value > self.must if self.better == "lower" else self.value < self.must


def write(
    topic: str, command: str, rows: list[Row], note: str = "", of: str = "mask", keep: bool = True
) -> None:
    """Print a table whose rows are each `of` something, and `keep` it in TOPIC.json and the pages."""
    content = {
        "command": command,
        "machine": machine(),
        "date": date.today().isoformat(),
        "note": note,
        "of": of,
        "rows": [asdict(row) for row in rows],
    }
    print(table(content))
    if keep:
        (HERE / f"{topic}.json").write_text(json.dumps(content, indent=1) + "\n")
        readme(only_check=False)


def machine() -> str:
    """Processor, cores and GPU of this machine."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}"


def table(content: dict[str, Any]) -> str:
    """A topic as a Markdown table, its command under it; a column's best sparse perplexity is bold."""
    cells: dict[str, dict[str, float]] = {}
    for row in content["rows"]:
        name, _, column = row["name"].partition(" | ")
        cells.setdefault(name, {})[column or row["unit"]] = row["value"]
    columns = list(dict.fromkeys(column for values in cells.values() for column in values))
    lines = [
        "| " + " | ".join([content.get("of", "mask"), *columns]) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    rivals: dict[str, list[float]] = {column: [] for column in columns}
    for row in content["rows"]:
        name, _, column = row["name"].partition(" | ")
        if name != "dense" and row["unit"] == "perplexity":
            rivals[column or row["unit"]].append(row["value"])
    for name, values in cells.items():
        shown = [_cell(values[column], rivals[column]) if column in values else "" for column in columns]
        lines.append("| " + " | ".join([name, *shown]) + " |")
    about = f"`{content['command']}`, {content['date']}, {content['machine']}. {content['note']}."
    return "\n".join([*lines, "", about])


def _cell(value: float, rivals: list[float]) -> str:
    text = f"{value:.4g}" if value < 10_000 else f"{value:,.0f}"
    return f"**{text}**" if len(rivals) > 1 and value == min(rivals) else text


def missed() -> dict[str, Row]:
    """The figures that miss their must, by topic and name."""
    return {
        f"{file.stem}: {row.name}": row
        for file in sorted(HERE.glob("*.json"))
        for row in (Row(**entry) for entry in json.loads(file.read_text())["rows"])
        if row.misses
    }


def check() -> int:
    """Print the figures that miss their must; 1 if there are any."""
    lines = [
        f"{name}: {row.value:.4g} {row.unit}, must be {row.must:.4g}, {row.better} is better"
        for name, row in missed().items()
    ]
    print("\n".join(lines) or "every published figure keeps its must")
    return int(bool(lines))


def readme(only_check: bool) -> int:
    """Redraw each table between `<!-- table TOPIC -->` and `<!-- end -->`; 1 if one was out of date."""

    def redraw(match: re.Match[str]) -> str:
        content = json.loads((HERE / f"{match[1]}.json").read_text())
        return f"<!-- table {match[1]} -->\n{table(content)}\n<!-- end -->"

    stale = 0
    for page in PAGES:
        text = page.read_text()
        fresh = re.sub(r"<!-- table (\S+) -->.*?<!-- end -->", redraw, text, flags=re.S)
        if fresh != text and only_check:
            print(f"tables of {page.name} are out of date: python benchmarks/report.py readme")
            stale = 1
        elif fresh != text:
            page.write_text(fresh)
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="print every figure that misses its must")
    commands.add_parser("readme", help="redraw the tables of README and docs").add_argument(
        "--check", action="store_true"
    )
    args = parser.parse_args()
    return check() if args.command == "check" else readme(args.check)


if __name__ == "__main__":
    sys.exit(main())
