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

sys.path.append(str(Path(__file__).parents[2] / "deploy/grafana"))
import dashboards

DEPLOY = Path(__file__).parents[2] / "deploy"
GRAFANA = DEPLOY / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
SCHEMA = json.loads((GRAFANA / "schema/dashboard.schema.json").read_text())


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


def test_the_objective_for_the_first_token_is_the_same_everywhere():
    rules = (DEPLOY / "prometheus/rules.yml").read_text()
    assert set(re.findall(r'le="(.*?)"', rules)) == {str(dashboards.FIRST_TOKEN_S)}
    assert dashboards.FIRST_TOKEN_S in SECONDS
