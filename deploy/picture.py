"""Draw the dashboards' panels from a Prometheus' data into one picture, without Grafana.

    python deploy/picture.py --prometheus http://127.0.0.1:9090 --minutes 10 --out docs/dashboards.png

Places, units, thresholds and queries are those of grafana/dashboards/*.json; the rest is matplotlib's.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
from check_dashboards import DASHBOARDS, Prometheus, Series, at_all, filled_in
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LinearLocator, MaxNLocator

COLUMNS = [["overview", "engine"], ["masks"]]
"""Which dashboards stand above each other."""
GRID = 24
UNIT_IN = (0.42, 0.36)
"""Width and height of one unit of Grafana's grid."""
HEAD = 1.6
"""Units above a dashboard, for its title."""
COLORS = {
    "green": "#3a9d4f", "yellow": "#d9a300", "orange": "#e5761a", "red": "#cf3a34", "blue": "#4a7fd0",
    "gray": "#b8b8b8",
}  # fmt: skip
A_SECOND = ("reqps", "ops", "tokens/s")
LEGEND = 9
"""Most names in a legend."""


def written(value: float, unit: str) -> str:
    """A value as Grafana writes it, nearly."""
    if math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    scales = {
        "s": [(86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")],
        "decbytes": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")],
    }.get(unit, [(1e6, "M"), (1e3, "k"), (1, "")])
    size, name = next((each for each in scales if abs(value) >= each[0]), scales[-1])
    gap = " " if unit in ("s", "decbytes") else ""
    return f"{value / size:.3g}{gap}{name}"


class Picture:
    """All dashboards over one span of time."""

    def __init__(self, prometheus: Prometheus, minutes: float, window: str, step_s: float) -> None:
        self.prometheus = prometheus
        self.end = math.floor(time.time() / step_s) * step_s
        self.begin = self.end - 60 * minutes
        self.window = window
        self.step_s = step_s
        self.times = np.arange(self.begin, self.end + step_s / 2, step_s)
        self.dates = mdates.date2num(self.times.astype("datetime64[s]"))

    def draw(self, out: Path) -> None:
        boards = {file.stem: json.loads(file.read_text()) for file in DASHBOARDS.glob("*.json")}
        heights = {
            name: HEAD + max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in board["panels"])
            for name, board in boards.items()
        }
        self.width = len(COLUMNS) * (GRID + 1)
        self.height = max(sum(heights[name] for name in column) for column in COLUMNS)
        self.figure: Figure = plt.figure(figsize=(self.width * UNIT_IN[0], self.height * UNIT_IN[1]))
        for at, column in enumerate(COLUMNS):
            top = 0.0
            for name in column:
                self._board(boards[name], at * (GRID + 1), top)
                top += heights[name]
        self.figure.savefig(out, dpi=80)

    def _board(self, board: dict[str, Any], left: float, top: float) -> None:
        self._text(left + 0.3, top + 1, board["title"], size=15, weight="bold")
        chosen = at_all(self.prometheus, board)
        for panel in board["panels"]:
            place = panel["gridPos"]
            x, y = left + place["x"], top + HEAD + place["y"]
            if panel["type"] == "row":
                self._text(x + 0.3, y + 0.8, panel["title"], size=11, weight="bold", color="#555555")
                continue
            rate = panel["type"] == "timeseries" and panel["fieldConfig"]["defaults"]["unit"] in A_SECOND
            self._text(x + 0.3, y + 0.7, panel["title"] + (", a second" if rate else ""), size=9)
            draw = {
                "stat": self._stat,
                "timeseries": self._series,
                "state-timeline": self._timeline,
                "table": self._table,
            }[panel["type"]]
            draw(panel, chosen, (x, y, place["w"], place["h"]))

    def _text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)

    def _axes(self, box: tuple[float, ...], *, left: float, right: float, top: float, bottom: float) -> Axes:
        """Axes inside a panel's box, with margins in units of the grid."""
        x, y, w, h = box
        x, w, y, h = x + left, w - left - right, y + top, h - top - bottom
        return self.figure.add_axes(
            (x / self.width, 1 - (y + h) / self.height, w / self.width, h / self.height)
        )

    def _ask(self, target: dict[str, Any], chosen: dict[str, str]) -> list[tuple[Series, np.ndarray]]:
        """Each series, and its values at self.times: NaN where it has none."""
        expr = filled_in(target["expr"], chosen, self.window)
        asked = self.prometheus.range(expr, self.begin, self.end, self.step_s)
        values = [dict(zip(series.times, series.values, strict=True)) for series in asked]
        return [
            (series, np.array([known.get(at, math.nan) for at in self.times]))
            for series, known in zip(asked, values, strict=True)
            if not series.empty
        ]

    def _named(self, panel: dict[str, Any], chosen: dict[str, str]) -> list[tuple[str, np.ndarray]]:
        named = []
        for target in panel["targets"]:
            for series, values in self._ask(target, chosen):
                legend = target["legendFormat"]
                for label, text in series.labels.items():
                    legend = legend.replace(f"{{{{{label}}}}}", text)
                named.append((legend, values))
        return sorted(named, key=lambda each: each[0]) if len(panel["targets"]) == 1 else named

    def _stat(self, panel: dict[str, Any], chosen: dict[str, str], box: tuple[float, ...]) -> None:
        fields = panel["fieldConfig"]["defaults"]
        axes = self._axes(box, left=0.2, right=0.2, top=1, bottom=0.2)
        axes.set_axis_off()
        found = self._named(panel, chosen)
        text, color = fields["noValue"], "gray"
        if found:
            values = found[0][1]
            value = values[~np.isnan(values)][-1]
            text, color = written(value, fields["unit"]), _color(fields, value)
            text += "/s" if fields["unit"] in A_SECOND else ""
            axes.fill_between(self.dates, 0, values, color=COLORS[color], alpha=0.15, linewidth=0)
            axes.set_ylim(0, 1.1 * np.nanmax(values) or 1)
            axes.set_xlim(self.dates[0], self.dates[-1])
        style = {"size": 12 if len(text) > 9 else 15, "color": COLORS[color], "weight": "bold"}
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", **style)

    def _series(self, panel: dict[str, Any], chosen: dict[str, str], box: tuple[float, ...]) -> None:
        fields = panel["fieldConfig"]["defaults"]
        axes = self._axes(box, left=1.7, right=0.3, top=1.1, bottom=2.6)
        found = self._named(panel, chosen)
        colors = plt.get_cmap("tab10").colors
        if fields["custom"]["stacking"]["mode"] == "normal":
            layers = [np.nan_to_num(values) for _, values in found]
            axes.stackplot(self.dates, layers, labels=[name for name, _ in found], colors=colors, alpha=0.7)
            most = np.sum(layers, axis=0).max()
        else:
            for at, (name, values) in enumerate(found):
                axes.plot(self.dates, values, label=name, color=colors[at % len(colors)], linewidth=1.1)
            most = max(np.nanmax(values) for _, values in found)
        low = fields.get("min", 0)
        axes.set_ylim(low, fields.get("max") or (1.15 * most if most > low else low + 1))
        for step in fields["thresholds"]["steps"][1:]:
            if fields["custom"]["thresholdsStyle"]["mode"] != "off" and step["value"] < axes.get_ylim()[1]:
                axes.axhline(step["value"], color=COLORS[step["color"]], linewidth=0.8, linestyle="--")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value, fields["unit"])))
        axes.grid(color="#e6e6e6", linewidth=0.6)
        self._over_time(axes)
        shown = axes.get_legend_handles_labels()
        legend = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "fontsize": 6.5, "frameon": False}
        legend["ncol"] = max(1, min(4, int(7 * (box[2] - 2) / (5 + max(map(len, shown[1]))))))
        axes.legend(*(each[:LEGEND] for each in shown), handlelength=1, columnspacing=0.8, **legend)

    def _timeline(self, panel: dict[str, Any], chosen: dict[str, str], box: tuple[float, ...]) -> None:
        (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
        axes = self._axes(box, left=1.7, right=0.3, top=1.1, bottom=2.6)
        found = self._named(panel, chosen)
        width = self.dates[1] - self.dates[0]
        for at, (_, values) in enumerate(found):
            for state, look in mapping["options"].items():
                bars = [
                    (date, width)
                    for date, value in zip(self.dates, values, strict=True)
                    if value == float(state)
                ]
                axes.broken_barh(bars, (at - 0.4, 0.8), color=COLORS[look["color"]], linewidth=0)
        axes.set_yticks(range(len(found)), [name for name, _ in found])
        axes.invert_yaxis()
        self._over_time(axes)
        for look in mapping["options"].values():
            axes.bar(0, 0, color=COLORS[look["color"]], label=look["text"])
        axes.set_xlim(self.dates[0], self.dates[-1])
        legend = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "fontsize": 6.5, "frameon": False}
        axes.legend(ncol=3, handlelength=1, **legend)

    def _table(self, panel: dict[str, Any], chosen: dict[str, str], box: tuple[float, ...]) -> None:
        """One row a mask, with the last values."""
        looks = {
            override["matcher"]["options"]: {each["id"]: each["value"] for each in override["properties"]}
            for override in panel["fieldConfig"]["overrides"]
        }
        names, rows = ["mask"], {}
        for at, target in enumerate(panel["targets"]):
            look = looks[f"Value #{target['refId']}"]
            names.append(look["displayName"])
            for series, values in self._ask(target, chosen):
                text = written(values[-1], look["unit"])
                if "mappings" in look:
                    text = look["mappings"][0]["options"].get(text, {"text": text})["text"]
                rows.setdefault(series.labels["mask"], ["-"] * len(panel["targets"]))[at] = text
        axes = self._axes(box, left=0.3, right=0.3, top=1.1, bottom=0.3)
        axes.set_axis_off()
        cells = [[mask, *row] for mask, row in sorted(rows.items())]
        made = axes.table(cells, colLabels=names, loc="upper center", cellLoc="left", edges="horizontal")
        made.auto_set_font_size(False)
        made.set_fontsize(8)
        made.scale(1, min(1.4, 10 / len(cells)))

    def _over_time(self, axes: Axes) -> None:
        axes.set_xlim(self.dates[0], self.dates[-1])
        axes.xaxis.set_major_locator(LinearLocator(4))
        axes.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M"))
        axes.tick_params(labelsize=6.5, length=2, color="#999999")
        for spine in axes.spines.values():
            spine.set_color("#cccccc")


def _color(fields: dict[str, Any], value: float) -> str:
    """Of the last threshold that the value reaches."""
    steps = fields["thresholds"]["steps"]
    return [step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prometheus", required=True, help="its address")
    parser.add_argument("--minutes", type=float, default=60, help="how far back to look (60)")
    parser.add_argument("--window", default="1m", help="of rates: four scrape intervals, as in Grafana (1m)")
    parser.add_argument("--step-s", type=float, default=15, help="seconds between two points (15)")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    Picture(Prometheus(args.prometheus), args.minutes, args.window, args.step_s).draw(args.out)


if __name__ == "__main__":
    main()
