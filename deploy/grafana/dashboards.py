"""The Grafana dashboards, as code. Writes dashboards/*.json, which Grafana loads:

python deploy/grafana/dashboards.py
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("dashboards")
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
TAG = "maskllm"
ON = 'instance=~"$instance"'
"""Which servers; the variable `model` narrows `instance`, as only vLLM's own metrics have a model's name."""
MASKS = f'{ON},mask=~"$mask"'
ANSWERS = f'{ON},path=~"/v1/.*"'
WINDOW = "[$__rate_interval]"
FIRST_TOKEN_S = 2.5
"""The objective for the first token; prometheus/rules.yml has the same."""

Query = tuple[str, str]
"""PromQL, and the legend of its series."""
Steps = tuple[tuple[float | None, str], ...]
"""Thresholds: a colour from each value on, the first from None on."""
GOOD: Steps = ((None, "green"),)


def bad(red: float, yellow: float | None = None) -> Steps:
    """The more, the worse."""
    return ((None, "green"), *([(yellow, "yellow")] if yellow else []), (red, "red"))


def good(green: float, yellow: float | None = None) -> Steps:
    """The more, the better."""
    return ((None, "red"), *([(yellow, "yellow")] if yellow else []), (green, "green"))


FULL = bad(0.95, 0.8)


# PromQL.


def rate(metric: str, labels: str = ON, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}{WINDOW}))"


def quantile(q: float, metric: str, labels: str = ON, by: str = "") -> str:
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', labels, f'le, {by}' if by else 'le')})"


def quantiles(metric: str, *qs: float) -> list[Query]:
    return [(quantile(q, metric), f"p{100 * q:g}") for q in qs or (0.5, 0.95, 0.99)]


def mean(metric: str, labels: str = ON) -> str:
    """Of a histogram's observations."""
    return f"{rate(f'{metric}_sum', labels)} / ({rate(f'{metric}_count', labels)} > 0)"


# Panels.


def panel(kind: str, title: str, description: str, queries: list[Query], **rest: Any) -> dict[str, Any]:
    targets = [
        {
            "datasource": DATASOURCE,
            "refId": chr(ord("A") + at),
            "editorMode": "code",
            "expr": expr,
            "legendFormat": legend,
            "range": True,
        }
        for at, (expr, legend) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": targets,
        **rest,
    }


def thresholds(steps: Steps) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]}


def field(unit: str, steps: Steps = GOOD, **rest: Any) -> dict[str, Any]:
    return {"defaults": {"unit": unit, "thresholds": thresholds(steps), **rest}, "overrides": []}


def stat(title: str, description: str, unit: str, expr: str, steps: Steps = GOOD) -> dict[str, Any]:
    options = {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showPercentChange": False,
        "textMode": "auto",
        "wideLayout": True,
    }
    color = {"mode": "thresholds"}
    fields = field(unit, steps, color=color, noValue="no traffic")
    return panel("stat", title, description, [(expr, "")], options=options, fieldConfig=fields)


def series(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Steps = GOOD,
    stack: bool = False,
    **limits: float,
) -> dict[str, Any]:
    """Lines over time; thresholds beyond the first are drawn as dashed lines."""
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if stack else 0,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if len(steps) > 1 else "off"},
    }
    options = {
        "legend": {
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
            "calcs": ["mean", "max", "lastNotNull"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    limits = {"min": 0, **limits}
    fields = field(unit, steps, custom=custom, color={"mode": "palette-classic-by-name"}, **limits)
    return panel("timeseries", title, description, list(queries), options=options, fieldConfig=fields)


STATES = {
    "0": {"text": "known", "color": "gray", "index": 0},
    "1": {"text": "packed", "color": "blue", "index": 1},
    "2": {"text": "resident", "color": "green", "index": 2},
}
"""Where a mask is: on disk only, in host memory, or in a slot."""
IN_MEMORY = f"max by (mask) ((maskllm_packed_bytes{{{MASKS}}} > bool 0) + (maskllm_resident_bytes > bool 0))"


def residency(title: str, description: str) -> dict[str, Any]:
    options = {
        "alignValue": "left",
        "mergeValues": True,
        "rowHeight": 0.9,
        "showValue": "never",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    custom = {"fillOpacity": 80, "lineWidth": 0}
    mappings = [{"type": "value", "options": STATES}]
    fields = field("short", custom=custom, mappings=mappings, color={"mode": "thresholds"})
    return panel(
        "state-timeline", title, description, [(IN_MEMORY, "{{mask}}")], options=options, fieldConfig=fields
    )


def table(
    title: str, description: str, *columns: tuple[str, str, str], steps: dict[str, Steps]
) -> dict[str, Any]:
    """One row a mask, as things are now; a column is its name, its unit, and its query. Some have `steps`."""
    made = panel("table", title, description, [(expr, "") for _, _, expr in columns])
    for target in made["targets"]:
        del target["range"]
        target |= {"instant": True, "format": "table"}
    fields = field("short", noValue="-")
    chosen = "${__url_time_range}&${model:queryparam}&${instance:queryparam}&var-mask=${__value.text}"
    link = f"/d/maskllm-masks?{chosen}"
    fields["overrides"] = [
        {
            "matcher": {"id": "byName", "options": "mask"},
            "properties": [{"id": "links", "value": [{"title": "Only ${__value.text}", "url": link}]}],
        }
    ]
    for at, (name, unit, _) in enumerate(columns):
        properties: list[dict[str, Any]] = [
            {"id": "displayName", "value": name},
            {"id": "unit", "value": unit},
        ]
        if name == "state":
            properties.append({"id": "mappings", "value": [{"type": "value", "options": STATES}]})
        if name in steps:
            properties.append({"id": "thresholds", "value": thresholds(steps[name])})
        if name == "state" or name in steps:
            properties.append({"id": "custom.cellOptions", "value": {"type": "color-text"}})
        matcher = {"id": "byName", "options": f"Value #{chr(ord('A') + at)}"}
        fields["overrides"].append({"matcher": matcher, "properties": properties})
    return made | {
        "fieldConfig": fields,
        "options": {
            "frameIndex": 0,
            "showHeader": True,
            "sortBy": [{"displayName": "requests", "desc": True}],
        },
        "transformations": [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}}},
        ],
    }


# Dashboards.


def variable(name: str, label: str, query: str, description: str, **rest: str) -> dict[str, Any]:
    """At All it is every value that the query finds, unless `allValue` says otherwise."""
    return {
        "name": name,
        "label": label,
        "description": description,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 7,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
        "options": [],
        **rest,
    }


MODEL = variable(
    "model", "Model", "label_values(vllm:num_requests_running, model_name)", "The base that is served."
)
INSTANCE = variable(
    "instance",
    "Instance",
    'label_values(vllm:num_requests_running{model_name=~"$model"}, instance)',
    "The servers of that base.",
)
MASK = variable(
    "mask",
    "Mask",
    f"label_values(maskllm_requests_in_flight{{{ON}}}, mask)",
    "Masks that these servers know; none is the dense base. All has deleted and unknown ones, too.",
    allValue=".*",
)

Rows = list[tuple[str, int, list[dict[str, Any]]]]
"""Title, height, and the panels of a row, which share its width."""


def dashboard(uid: str, title: str, description: str, variables: list[dict[str, Any]], rows: Rows) -> Any:
    panels: list[dict[str, Any]] = []
    y = 0
    for name, height, row in rows:
        if name:
            place = {"x": 0, "y": y, "w": 24, "h": 1}
            panels.append(
                {
                    "type": "row",
                    "id": len(panels) + 1,
                    "title": name,
                    "collapsed": False,
                    "gridPos": place,
                    "panels": [],
                }
            )
            y += 1
        width = 24 // len(row)
        for at, each in enumerate(row):
            place = {"x": at * width, "y": y, "w": width, "h": height}
            panels.append({"id": len(panels) + 1, "gridPos": place, **each})
        y += height
    link = {
        "title": "maskllm",
        "type": "dashboards",
        "tags": [TAG],
        "icon": "external link",
        "tooltip": "",
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
    }
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": [TAG],
        "schemaVersion": 41,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [link],
        "templating": {"list": variables},
        "annotations": {"list": []},
        "panels": panels,
    }


def engines_up() -> dict[str, Any]:
    return stat(
        "Engines up",
        "Servers whose engine can answer.",
        "none",
        f"sum(maskllm_engine_up{{{ON}}}) or vector(0)",
        good(1),
    )


def overview() -> Any:
    answers, errors = rate("maskllm_http_responses_total", ANSWERS), f'{ANSWERS},status=~"5.."'
    first_token = bad(FIRST_TOKEN_S)
    burning = ((None, "green"), (1.0, "yellow"), (6.0, "orange"), (14.4, "red"))
    now = [
        engines_up(),
        stat(
            "Alerts firing",
            "Of all servers, whichever are chosen above. What each means: docs/operations.md.",
            "none",
            'count(ALERTS{alertstate="firing"}) or vector(0)',
            bad(1),
        ),
        stat(
            "Requests",
            "Answers of /v1/completions and /v1/chat/completions, whatever their status.",
            "reqps",
            answers,
        ),
        stat(
            "Server errors",
            "Share of answers with a status of 500 and more. The objective is 0.5 %.",
            "percentunit",
            f"{rate('maskllm_http_responses_total', errors)} / ({answers} > 0)",
            bad(0.005, 0.001),
        ),
        stat(
            "First token, p95",
            f"Arrival to first token. The objective is {FIRST_TOKEN_S} s for 95 %.",
            "s",
            quantile(0.95, "maskllm_time_to_first_token_seconds"),
            first_token,
        ),
        stat("Generated", "Tokens of answers.", "tokens/s", rate("vllm:generation_tokens_total")),
        stat(
            "Waiting",
            "Requests in the engine's queue, for a place, for memory, or for their mask's turn.",
            "none",
            f"sum(vllm:num_requests_waiting{{{ON}}})",
            bad(100, 10),
        ),
        stat(
            "KV cache",
            "Most of any engine's that is in use.",
            "percentunit",
            f"max(vllm:kv_cache_usage_perc{{{ON}}})",
            FULL,
        ),
    ]
    traffic = [
        series(
            "Answers by status",
            "499 is a client that did not wait.",
            "reqps",
            (rate("maskllm_http_responses_total", ANSWERS, "status"), "{{status}}"),
            stack=True,
        ),
        series(
            "Answers that are errors",
            "From 500 on it is the server's fault; 429 and 503 say when to retry.",
            "reqps",
            (rate("maskllm_http_responses_total", f'{ANSWERS},status=~"[45].."', "status"), "{{status}}"),
        ),
        series(
            "Tokens",
            "Prompts are counted when they have been read, answers as they are generated.",
            "tokens/s",
            (rate("vllm:prompt_tokens_total"), "prompt"),
            (rate("vllm:generation_tokens_total"), "generated"),
        ),
    ]
    latency = [
        series(
            "First token",
            "Arrival to first token, waiting included. Dashed: the objective for p95.",
            "s",
            *quantiles("maskllm_time_to_first_token_seconds"),
            steps=first_token,
        ),
        series(
            "Between tokens",
            "Time between two tokens of an answer, each gap counted.",
            "s",
            *quantiles("vllm:inter_token_latency_seconds"),
        ),
        series(
            "End to end",
            "Arrival to last token, which depends on how many were asked for.",
            "s",
            *quantiles("maskllm_e2e_request_latency_seconds"),
        ),
    ]
    load = [
        series(
            "Running and waiting",
            "Requests in the engines.",
            "none",
            (f"sum(vllm:num_requests_running{{{ON}}})", "running"),
            (f"sum(vllm:num_requests_waiting{{{ON}}})", "waiting"),
        ),
        series(
            "KV cache in use",
            "Near 100 % requests wait for memory, or are put back and computed again.",
            "percentunit",
            (f"vllm:kv_cache_usage_perc{{{ON}}}", "{{instance}}"),
            steps=FULL,
            max=1,
        ),
        series(
            "Error budgets",
            "How many times as fast as 30 days allow the budget is used up, by the last hour and "
            "the last six. Alerts fire at 14.4 and at 6. Of all servers, whichever are chosen above.",
            "none",
            ("job:maskllm_errors:ratio_rate1h / 0.005", "errors, 1 h"),
            ("job:maskllm_errors:ratio_rate6h / 0.005", "errors, 6 h"),
            ("job:maskllm_slow_first_tokens:ratio_rate1h / 0.05", "first token, 1 h"),
            ("job:maskllm_slow_first_tokens:ratio_rate6h / 0.05", "first token, 6 h"),
            steps=burning,
        ),
    ]
    return dashboard(
        "maskllm-overview",
        "maskllm: Overview",
        "Is it well? Traffic, errors, latency and load of all masks together.",
        [MODEL, INSTANCE],
        [("", 4, now), ("Traffic", 8, traffic), ("Latency", 8, latency), ("Load", 8, load)],
    )


def masks() -> Any:
    def each(metric: str, labels: str = MASKS) -> Query:
        return rate(metric, labels, "mask"), "{{mask}}"

    def p95(metric: str) -> Query:
        return quantile(0.95, metric, MASKS, "mask"), "{{mask}}"

    ttft = "maskllm_time_to_first_token_seconds"
    in_flight = f"sum by (mask) (maskllm_requests_in_flight{{{MASKS}}})"
    known = f'max by (mask) (0 * maskllm_requests_in_flight{{{MASKS},mask!="none"}})'
    now = [
        table(
            "Masks now",
            "Rates are of the last minutes. A state of known means that only the file is there.",
            ("state", "none", f"{IN_MEMORY} or {known}"),
            ("in flight", "none", in_flight),
            ("requests", "reqps", rate("maskllm_requests_total", MASKS, "mask")),
            ("generated", "tokens/s", rate("maskllm_generation_tokens_total", MASKS, "mask")),
            ("first token, p95", "s", quantile(0.95, ttft, MASKS, "mask")),
            ("errors", "reqps", rate("maskllm_errors_total", MASKS, "mask")),
            (
                "swaps, 1 h",
                "none",
                f'sum by (mask) (increase(maskllm_swaps_total{{{MASKS},source="host"}}[1h]))',
            ),
            ("packed", "decbytes", f"sum by (mask) (maskllm_packed_bytes{{{MASKS}}})"),
            steps={"first token, p95": bad(FIRST_TOKEN_S)},
        ),
    ]
    traffic = [
        series(
            "Requests",
            "Requests that ended in the engine, cut off ones too.",
            "reqps",
            each("maskllm_requests_total"),
            stack=True,
        ),
        series(
            "Generated tokens",
            "Counted when a request ends.",
            "tokens/s",
            each("maskllm_generation_tokens_total"),
            stack=True,
        ),
        series(
            "Errors",
            "Requests refused or failed, by status. Those that name no known mask are unknown.",
            "reqps",
            (rate("maskllm_errors_total", MASKS, "mask, status"), "{{mask}} {{status}}"),
        ),
    ]
    latency = [
        series(
            "First token, p95",
            "Arrival to first token: waiting, swap and prompt. Dashed: the objective, "
            "which is for all masks together.",
            "s",
            p95(ttft),
            steps=bad(FIRST_TOKEN_S),
        ),
        series(
            "Between tokens, p95",
            "Of each request's mean time between its tokens.",
            "s",
            p95("maskllm_inter_token_latency_seconds"),
        ),
        series("End to end, p95", "Arrival to last token.", "s", p95("maskllm_e2e_request_latency_seconds")),
    ]
    of_each = f"({quantile(0.95, ttft, MASKS, 'mask')} > 0)"
    fairness = [
        series(
            "Longest wait",
            "Longest that a request of the mask has been without a new token. Masks that wait for "
            "a slot take turns, so that none waits for ever: docs/api.md has the bound.",
            "s",
            (f"max by (mask) (maskllm_longest_wait_seconds{{{MASKS}}})", "{{mask}}"),
            steps=bad(30),
        ),
        series(
            "In flight",
            "Requests that the engine has, running or waiting.",
            "none",
            (in_flight, "{{mask}}"),
            stack=True,
        ),
        series(
            "Slowest mask against the median",
            "The largest p95 of the first token over the median mask's: 1 is "
            "fair. A mask that few ask for pays its swap on each request.",
            "none",
            (f"max{of_each} / quantile(0.5, {of_each})", "times"),
            min=1,
        ),
    ]
    memory = [
        residency(
            "Residency", "Where each mask is that the engine has: in a slot, or packed in host memory."
        ),
        series(
            "Slots",
            "Slots that hold a mask, and all.",
            "none",
            (f"sum(maskllm_slots_total{{{ON}}})", "all"),
            (f"sum(maskllm_slots_used{{{ON}}})", "used"),
        ),
        series(
            "Packed bytes",
            "Host memory of the masks that the engine has.",
            "decbytes",
            (f"sum by (mask) (maskllm_packed_bytes{{{MASKS}}})", "{{mask}}"),
            stack=True,
        ),
    ]
    of_swaps = "maskllm_swap_seconds"
    swaps = [
        series(
            "Swaps by source",
            "disk: a file into host memory, beside the steps. host: host memory into a slot, "
            "between two steps.",
            "ops",
            (rate(f"{of_swaps}_count", by="source"), "{{source}}"),
        ),
        series(
            "Swaps into slots by mask",
            "Many for one mask: it shares its slot with others that are asked for as "
            "often. More --slots, or a pin, keep it in.",
            "ops",
            each("maskllm_swaps_total", f'{MASKS},source="host"'),
        ),
        series(
            "Swap seconds",
            "How long one takes.",
            "s",
            *((quantile(q, of_swaps, by="source"), f"{{{{source}}}} p{100 * q:g}") for q in (0.5, 0.99)),
        ),
        series(
            "Share of time in swaps",
            "Time that steps wait while a slot is filled.",
            "percentunit",
            (rate(f"{of_swaps}_sum", f'{ON},source="host"', "instance"), "{{instance}}"),
            steps=bad(0.3, 0.1),
        ),
    ]
    trouble = [
        series(
            "Loads that failed",
            "A mask's file is gone or changed, or all host memory is in use.",
            "none",
            (f"sum by (mask) (increase(maskllm_mask_load_failures_total{{{MASKS}}}{WINDOW}))", "{{mask}}"),
        ),
        series(
            "Refused masks",
            "Files of the folder that are no masks of this base, and PUTs of such.",
            "none",
            (f"sum(maskllm_refused_files{{{ON}}})", "files in the folder"),
            (f"sum(increase(maskllm_masks_refused_total{{{ON}}}{WINDOW}))", "PUTs"),
        ),
    ]
    return dashboard(
        "maskllm-masks",
        "maskllm: Masks",
        "How each mask fares: traffic, latency, fairness, where it is, and what swaps cost.",
        [MODEL, INSTANCE, MASK],
        [
            ("", 8, now),
            ("Traffic", 8, traffic),
            ("Latency", 8, latency),
            ("Fairness", 8, fairness),
            ("Memory", 10, memory),
            ("Swaps", 8, swaps),
            ("Trouble", 7, trouble),
        ],
    )


def engine() -> Any:
    def each(metric: str) -> Query:
        return f"{metric}{{{ON}}}", "{{instance}}"

    now = [
        engines_up(),
        stat(
            "Restarts, 1 h",
            "Times that an engine died, and the server started another.",
            "none",
            f"sum(increase(maskllm_engine_restarts_total{{{ON}}}[1h]))",
            bad(1),
        ),
        stat(
            "Up since",
            "The youngest server process.",
            "s",
            f"min(time() - process_start_time_seconds{{{ON}}} and on (instance) maskllm_engine_up)",
        ),
        stat(
            "Steps",
            "Steps of the engines that gave tokens.",
            "ops",
            rate("vllm:iteration_tokens_total_count"),
        ),
        stat(
            "Prefix cache hits",
            "Share of prompt tokens that were in the KV cache.",
            "percentunit",
            f"{rate('vllm:prefix_cache_hits_total')} / ({rate('vllm:prefix_cache_queries_total')} > 0)",
        ),
        stat(
            "Host memory left",
            "Memory that can be had without swapping, the least of any server's.",
            "percentunit",
            f"min(maskllm_host_memory_available_bytes{{{ON}}} / maskllm_host_memory_total_bytes)",
            good(0.15, 0.05),
        ),
    ]
    steps = [
        series(
            "Tokens a step",
            "Prompt and generated tokens together.",
            "none",
            (mean("vllm:iteration_tokens_total"), "mean"),
            (quantile(0.95, "vllm:iteration_tokens_total"), "p95"),
        ),
        series(
            "Where a request's time goes",
            "Means of requests that ended.",
            "s",
            (mean("vllm:request_queue_time_seconds"), "queue"),
            (mean("vllm:request_prefill_time_seconds"), "prompt"),
            (mean("vllm:request_decode_time_seconds"), "answer"),
            stack=True,
        ),
        series(
            "Waiting, by reason",
            "capacity: no place or no memory. deferred: something else, a mask's turn too.",
            "none",
            (f"sum by (reason) (vllm:num_requests_waiting_by_reason{{{ON}}})", "{{reason}}"),
        ),
        series(
            "Put back",
            "Running requests that lost their KV blocks and are computed again.",
            "ops",
            (rate("vllm:num_preemptions_total", by="instance"), "{{instance}}"),
        ),
    ]
    memory = [
        series(
            "KV cache in use",
            "Share of its blocks.",
            "percentunit",
            each("vllm:kv_cache_usage_perc"),
            steps=FULL,
            max=1,
        ),
        series(
            "What the engine holds",
            "base: dense weights. slots: resident masks. packed: masks in host memory.",
            "decbytes",
            (f"sum by (part) (maskllm_engine_memory_bytes{{{ON}}})", "{{part}}"),
            stack=True,
        ),
        series(
            "Memory of processes",
            "RSS: API serves HTTP, engine computes.",
            "decbytes",
            (
                f"process_resident_memory_bytes{{{ON}}} and on (instance) maskllm_engine_up",
                "API {{instance}}",
            ),
            (f"maskllm_engine_resident_memory_bytes{{{ON}}}", "engine {{instance}}"),
        ),
        series(
            "Host memory available",
            "Of the machine that a server sees.",
            "decbytes",
            each("maskllm_host_memory_available_bytes"),
        ),
    ]
    host = [
        series(
            "Cores in use",
            "CPU time a second. An engine that uses all cores but one computes without a pause; an API that "
            "uses one whole core is itself the bottleneck.",
            "none",
            (
                f"rate(process_cpu_seconds_total{{{ON}}}{WINDOW}) and on (instance) maskllm_engine_up",
                "API {{instance}}",
            ),
            (f"rate(maskllm_engine_cpu_seconds_total{{{ON}}}{WINDOW})", "engine {{instance}}"),
        ),
        series(
            "Load a core",
            "Processes that run or want to, mean of a minute, over cores. Above 1 they wait.",
            "none",
            (f"maskllm_host_load1{{{ON}}} / maskllm_host_cpus", "{{instance}}"),
            steps=bad(2, 1),
        ),
        series(
            "Open files",
            "Of the API process, connections too, as a share of how many it may have.",
            "percentunit",
            (
                f"process_open_fds{{{ON}}} / process_max_fds and on (instance) maskllm_engine_up",
                "{{instance}}",
            ),
            steps=FULL,
        ),
        series(
            "Scrapes",
            "How long /metrics takes. It asks the engine, between two steps.",
            "s",
            (f'scrape_duration_seconds{{job="maskllm",{ON}}}', "{{instance}}"),
            steps=bad(5),
        ),
    ]
    return dashboard(
        "maskllm-engine",
        "maskllm: Engine and host",
        "What the engines do, and what they and their machines have left.",
        [MODEL, INSTANCE],
        [("", 4, now), ("At work", 8, steps), ("Memory", 8, memory), ("Host", 8, host)],
    )


def written() -> dict[Path, str]:
    """Every file and what is to be in it."""
    made = {"overview": overview(), "masks": masks(), "engine": engine()}
    return {FOLDER / f"{name}.json": json.dumps(each, indent=1) + "\n" for name, each in made.items()}


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)
