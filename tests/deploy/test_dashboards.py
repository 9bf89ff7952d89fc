"""The dashboards against Grafana's own schema and its own SDK.

No Grafana draws them: this needs none, and what panels show is test_watching.py's.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from jsonschema.validators import validator_for

from server.metrics import SECONDS

sys.path += [str(Path(__file__).parents[2] / "deploy"), str(Path(__file__).parents[2] / "deploy/grafana")]
import dashboards
from check_dashboards import Prometheus, at_all, filled_in

DEPLOY = Path(__file__).parents[2] / "deploy"
GRAFANA = DEPLOY / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
SCHEMA = json.loads((GRAFANA / "schema/dashboard.schema.json").read_text())
RULES = (DEPLOY / "prometheus/rules.yml").read_text()


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def faults(board: dict[str, Any]) -> list[str]:
    return [
        f"{fault.json_path}: {fault.message}" for fault in validator_for(SCHEMA)(SCHEMA).iter_errors(board)
    ]


def keys(value: Any, path: str = "") -> set[str]:
    """Every key's path in what JSON holds."""
    if isinstance(value, dict):
        below = [keys(each, f"{path}.{name}") for name, each in value.items()]
        return set().union({f"{path}.{name}" for name in value}, *below)
    if isinstance(value, list):
        return set().union(*(keys(each, f"{path}[{at}]") for at, each in enumerate(value)))
    return set()


def through_sdk(board: dict[str, Any]) -> Any:
    """Read by Grafana's SDK and written again: it drops every key it does not know."""
    register_default_plugins()
    return json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_the_json_is_what_the_generator_writes():
    assert {path: path.read_text() for path in FILES} == dashboards.written()


def test_grafanas_own_schema_takes_every_dashboard_and_every_panels_options(board):
    assert faults(board) == []


@pytest.mark.parametrize("where", ["board", "options", "field", "value", "kind"])
def test_the_schema_refuses_what_grafana_does_not_know(board, where):
    panel = next(panel for panel in panels(board) if panel["type"] == "timeseries")
    match where:
        case "board":
            board["tag"] = []
        case "options":
            panel["options"]["tooltips"] = {}
        case "field":
            panel["fieldConfig"]["defaults"]["custom"]["lineWidht"] = 1
        case "value":
            panel["fieldConfig"]["defaults"]["custom"]["drawStyle"] = "lines"
        case "kind":
            panel["type"] = "graf"
    assert faults(board)


def test_grafanas_sdk_loses_no_key(board):
    assert keys(board) - keys(through_sdk(board)) == set()


def test_the_sdk_loses_a_key_that_prometheus_targets_do_not_have(board):
    panels(board)[0]["targets"][0]["exprr"] = "up"
    assert len(keys(board) - keys(through_sdk(board))) == 1


def test_panels_and_variables_ask_the_provisioned_datasource():
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    uids = {each["uid"] for each in provisioned["datasources"] if each["type"] == "prometheus"}
    assert len(uids) == 1
    for file in FILES:
        board = json.loads(file.read_text())
        asked = [*panels(board), *board["templating"]["list"]]
        asked += [target for panel in panels(board) for target in panel["targets"]]
        assert {each["datasource"]["uid"] for each in asked} == uids


def test_grafana_looks_for_dashboards_where_they_are_mounted():
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/maskllm.yml").read_text())["providers"]
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())
    mounts = dict(mount.split(":")[:2] for mount in compose["services"]["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_every_panel_says_what_it_shows_and_in_which_unit(board):
    for panel in panels(board):
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None


def test_no_two_panels_share_a_place_an_id_or_a_title(board):
    places = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24  # Grafana's grid
    for name in ("id", "title"):
        assert len({panel[name] for panel in board["panels"]}) == len(board["panels"])


def test_every_dashboard_leads_to_the_others_with_its_variables():
    boards = [json.loads(file.read_text()) for file in FILES]
    assert {board["uid"] for board in boards} == {"maskllm-overview", "maskllm-masks", "maskllm-engine"}
    for board in boards:
        (link,) = board["links"]
        assert link["tags"] == board["tags"] == ["maskllm"]
        assert link["includeVars"]
        assert link["keepTime"]
        assert {"model", "instance"} <= {variable["name"] for variable in board["templating"]["list"]}


class TwoServers(Prometheus):
    """One with model a, one with model b."""

    def ask(self, path: str, **parameters: Any) -> Any:
        label = path.split("/")[-2]
        chosen = dict(re.findall(r'(\w+)=~"(.*?)"', parameters["match[]"]))
        servers = [
            {"model_name": "a", "instance": "10.0.0.1:80", "mask": "legal"},
            {"model_name": "b", "instance": "10.0.0.2:80", "mask": "tax"},
        ]
        return [
            server[label]
            for server in servers
            if all(re.fullmatch(each.replace("\\\\", "\\"), server[name]) for name, each in chosen.items())
        ]


def test_a_model_that_is_chosen_narrows_all_instances_to_its_servers(board):
    model, *rest = board["templating"]["list"]
    both = at_all(TwoServers(""), board)
    assert (both["model"], both["instance"]) == ("(a|b)", r"(10\\.0\\.0\\.1:80|10\\.0\\.0\\.2:80)")
    only = at_all(TwoServers(""), {"templating": {"list": [model | {"allValue": "a"}, *rest]}})
    assert only["instance"] == r"(10\\.0\\.0\\.1:80)"
    assert filled_in('up{instance=~"$instance"}', only) == r'up{instance=~"(10\\.0\\.0\\.1:80)"}'


def test_all_masks_are_deleted_and_unknown_ones_too():
    board = json.loads((GRAFANA / "dashboards/masks.json").read_text())
    assert at_all(TwoServers(""), board)["mask"] == ".*"


def test_every_query_asks_the_chosen_servers_or_the_panel_says_that_it_does_not(board):
    for panel in panels(board):
        of_all = "Of all servers, whichever are chosen above." in panel["description"]
        for target in panel["targets"]:
            assert (dashboards.ON in target["expr"]) != of_all, panel["title"]


def test_the_table_of_masks_leads_to_one_mask_of_the_same_servers():
    board = json.loads((GRAFANA / "dashboards/masks.json").read_text())
    (table,) = (panel for panel in panels(board) if panel["type"] == "table")
    for variable in board["templating"]["list"]:
        name = variable["name"]
        assert f"${{{name}:queryparam}}" in json.dumps(table) or f"var-{name}=" in json.dumps(table)


def thresholds(panel: dict[str, Any], expr: str) -> set[float]:
    """Those of a query's values."""
    (target,) = (target for target in panel["targets"] if target["expr"] == expr)
    looks = [panel["fieldConfig"]["defaults"]["thresholds"]]
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == f"Value #{target['refId']}":
            looks += [each["value"] for each in override["properties"] if each["id"] == "thresholds"]
    return {step["value"] for step in looks[-1]["steps"][1:]}


def test_what_shows_the_p95_of_the_first_token_has_its_objective_as_threshold():
    found = []
    for board in (json.loads(file.read_text()) for file in FILES):
        for panel in panels(board):
            for target in panel["targets"]:
                if re.match(r"histogram_quantile\(0.95, .*maskllm_time_to_first_token", target["expr"]):
                    assert thresholds(panel, target["expr"]) == {dashboards.FIRST_TOKEN_S}, panel["title"]
                    found.append(panel["title"])
    assert sorted(found) == ["First token", "First token, p95", "First token, p95", "Masks now"]


def test_the_budgets_thresholds_are_those_of_the_alerts():
    board = json.loads((GRAFANA / "dashboards/overview.json").read_text())
    titled = {panel["title"]: panel for panel in panels(board)}
    paces = {float(pace) for pace in re.findall(r"> ([\d.]+) \* 0\.0", RULES)}
    budgets = titled["Error budgets"]
    for target in budgets["targets"]:
        record, _, budget = target["expr"].partition(" / ")
        assert f"{record} > 6 * {budget} " in RULES or f"{record} > 14.4 * {budget} " in RULES
        assert thresholds(budgets, target["expr"]) == {1.0} | paces
    errors = titled["Server errors"]
    assert 0.005 in thresholds(errors, errors["targets"][0]["expr"])


def section(title: str) -> str:
    """Of docs/operations.md."""
    page = (DEPLOY.parent / "docs/operations.md").read_text()
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found


def in_italics(text: str) -> list[str]:
    return [" ".join(each.split()) for each in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", text)]


def rows(board: dict[str, Any]) -> dict[str, set[str]]:
    """Each row's panels; the first row has no title."""
    found: dict[str, set[str]] = {"Top": set()}
    for panel in board["panels"]:
        if panel["type"] == "row":
            found[panel["title"]] = set()
        else:
            found[list(found)[-1]].add(panel["title"])
    return found


def test_operations_goes_through_every_row_of_every_dashboard():
    told = re.split(r"^### ", section("Read the dashboards"), flags=re.MULTILINE)[1:]
    boards = [
        json.loads((GRAFANA / f"dashboards/{name}.json").read_text())
        for name in ("overview", "masks", "engine")
    ]
    for board, text in zip(boards, told, strict=True):
        assert f"maskllm: {text.partition(':')[0]}" == board["title"]
        said = dict(re.findall(r"^- \*\*(.*?)\*\*: (.*?)(?=^- |\Z)", text, re.MULTILINE | re.DOTALL))
        assert list(said) == list(rows(board))
        for row, titles in rows(board).items():
            assert set(in_italics(said[row])) & titles, row


def test_every_panel_that_operations_names_is_on_a_dashboard():
    boards = [json.loads(file.read_text()) for file in FILES]
    titles = {panel["title"] for board in boards for panel in panels(board)}
    for title, severities in (("Read the dashboards", set()), ("Alerts", {"critical", "warning"})):
        named = set(in_italics(section(title)))
        assert len(named) > 10
        assert named - severities <= titles


def test_the_objective_for_the_first_token_is_the_same_everywhere():
    assert set(re.findall(r'le="(.*?)"', RULES)) == {str(dashboards.FIRST_TOKEN_S)}
    assert dashboards.FIRST_TOKEN_S in SECONDS
