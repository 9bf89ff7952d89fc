"""Ask a Prometheus for what every dashboard shows, and fail where a query is wrong or finds nothing.

    python deploy/check_dashboards.py --prometheus http://127.0.0.1:9090

Before it there must have been traffic, a minute of it with Prometheus' usual intervals: requests under
several masks, of more than one token each, and one for a mask that does not exist.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

DASHBOARDS = Path(__file__).with_name("grafana") / "dashboards"
STEP_S = 15


@dataclass(frozen=True)
class Series:
    """What Prometheus has of one label set: Unix times and values."""

    labels: dict[str, str]
    times: list[float]
    values: list[float]

    @property
    def empty(self) -> bool:
        return all(math.isnan(value) for value in self.values)


class Prometheus:
    """A Prometheus, over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def ask(self, path: str, **parameters: Any) -> Any:
        """The answer's data. Raises ValueError with Prometheus' own words."""
        answer = httpx.get(f"{self.url}{path}", params=parameters, timeout=30).json()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        return answer["data"]

    def range(self, expr: str, begin: float, end: float, step_s: float = STEP_S) -> list[Series]:
        """What an expression is over time."""
        data = self.ask("/api/v1/query_range", query=expr, start=begin, end=end, step=step_s)
        return [
            Series(each["metric"], [at for at, _ in each["values"]], [float(v) for _, v in each["values"]])
            for each in data["result"]
        ]


def boards() -> Iterator[dict[str, Any]]:
    for file in sorted(DASHBOARDS.glob("*.json")):
        yield json.loads(file.read_text())


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those that show something."""
    return (panel for panel in board["panels"] if panel["type"] != "row")


def options(prometheus: Prometheus, variable: dict[str, Any], chosen: dict[str, str]) -> list[str]:
    """What a variable can be, given those before it. Raises ValueError with Prometheus' own words."""
    match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
    assert match, variable
    series, label = filled_in(match[1], chosen), match[2]
    values: list[str] = prometheus.ask(f"/api/v1/label/{label}/values", **{"match[]": series})
    return values


def everything(variable: dict[str, Any], values: list[str]) -> str:
    """What Grafana puts into a query for a variable at All: its allValue, or each value it can have."""
    either = "|".join(map(re.escape, values)).replace("\\", "\\\\")
    return str(variable.get("allValue", f"({either})"))


def at_all(prometheus: Prometheus, board: dict[str, Any]) -> dict[str, str]:
    """Every variable at All."""
    chosen: dict[str, str] = {}
    for variable in board["templating"]["list"]:
        chosen[variable["name"]] = everything(variable, options(prometheus, variable, chosen))
    return chosen


def filled_in(expr: str, chosen: dict[str, str], window: str = "") -> str:
    """As Grafana would ask it, with `window` as its $__rate_interval."""
    for name, text in {**chosen, "__rate_interval": window}.items():
        expr = expr.replace(f"${name}", text)
    assert "$" not in expr, expr
    return expr


def check(prometheus: Prometheus, minutes: float, window: str, step_s: float = STEP_S) -> list[str]:
    """Ask for the last minutes; prints a line for each query, and returns what is wrong.

    Between steps longer than the window lies what no rate sees.
    """
    wrong = []
    end = time.time()

    def note(what: str, found: int, trouble: str = "") -> None:
        print(f"{'FAIL' if trouble else 'ok':4} {found:4} {what}{f': {trouble}' if trouble else ''}")
        if trouble:
            wrong.append(f"{what}: {trouble}")

    for board in boards():
        chosen: dict[str, str] = {}
        for variable in board["templating"]["list"]:
            what, values = f"{board['title']} / ${variable['name']}", []
            try:
                values = options(prometheus, variable, chosen)
            except ValueError as error:
                note(what, 0, str(error))
            else:
                note(what, len(values), "" if values else "no value")
            chosen[variable["name"]] = everything(variable, values)
        for panel in panels(board):
            for target in panel["targets"]:
                what = f"{board['title']} / {panel['title']} {target['refId']}"
                expr = filled_in(target["expr"], chosen, window)
                try:
                    answer = prometheus.range(expr, end - 60 * minutes, end, step_s)
                except ValueError as error:
                    note(what, 0, str(error))
                else:
                    found = [series for series in answer if not series.empty]
                    note(what, len(found), "" if found else f"no data for {expr}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", required=True, help="its address")
    parser.add_argument("--minutes", type=float, default=15, help="how far back to look (15)")
    parser.add_argument("--window", default="1m", help="of rates: four scrape intervals, as in Grafana (1m)")
    args = parser.parse_args()
    wrong = check(Prometheus(args.prometheus), args.minutes, args.window)
    sys.exit("\n" + "\n".join(wrong) if wrong else None)


if __name__ == "__main__":
    main()
