"""Prometheus' and Alertmanager's files, as their own tools see them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
TESTS = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())
ALERTS = {rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}


def run(tool: str, *arguments: str | Path) -> str:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed (apt-get install prometheus prometheus-alertmanager)")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_its_configuration():
    run("promtool", "check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")


def test_prometheus_takes_the_rules():
    run("promtool", "check", "rules", PROMETHEUS / "rules.yml")


def test_alerts_fire_when_they_should_and_only_then():
    run("promtool", "test", "rules", PROMETHEUS / "rules_test.yml")


def test_alertmanager_takes_its_configuration():
    run("amtool", "check-config", ROOT / "deploy/alertmanager/alertmanager.yml")


def test_each_alert_is_tested_firing_and_silent():
    checks = [check for test in TESTS["tests"] for check in test["alert_rule_test"]]
    for fires in (True, False):
        assert {check["alertname"] for check in checks if bool(check["exp_alerts"]) is fires} == ALERTS


def test_a_start_that_compose_and_kubernetes_wait_for_wakes_nobody():
    (rule,) = (r for group in RULES["groups"] for r in group["rules"] if r.get("alert") == "ServerDown")
    (period_s,) = map(
        int, re.findall(r"start-period=(\d+)s.*\n.*:8000/health", (ROOT / "Dockerfile").read_text())
    )
    deployment = yaml.safe_load((ROOT / "deploy/kubernetes/base/deployment.yaml").read_text())
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    probe = server["startupProbe"]
    assert period_s == probe["periodSeconds"] * probe["failureThreshold"] == 60 * int(rule["for"].rstrip("m"))


def test_each_alert_has_a_paragraph_that_it_links_to_and_no_paragraph_is_left_over():
    for group in RULES["groups"]:
        for rule in filter(lambda rule: "alert" in rule, group["rules"]):
            assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"
            assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
            assert rule["labels"]["severity"] in ("critical", "warning")
    section = (ROOT / "docs/operations.md").read_text().partition("## Alerts")[2].partition("\n## ")[0]
    assert set(re.findall(r"^### (\w+)$", section, re.M)) == ALERTS
