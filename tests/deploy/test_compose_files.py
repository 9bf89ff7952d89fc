"""What compose, .env.example and the Dockerfile say agrees; deploy/test_compose.py runs them."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]
PUBLIC = {"server", "haproxy"}
"""Whom other machines may reach; the others watch or load, and are published to this machine only."""


def test_every_variable_is_explained_with_its_default():
    read = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE))
    explained = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert read == explained
    assert len(re.findall(r"\$\{", COMPOSE)) == len(re.findall(r"\$\{\w+:-", COMPOSE))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_bounded_and_comes_back(name: str):
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service.get("read_only") or name == "grafana"
    image, _, tag = service["image"].partition(":")
    assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag) or image in {"maskllm", "maskllm-load", "maskllm-haproxy"}


def test_only_the_api_is_open_to_other_machines():
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:") == (name not in PUBLIC), (name, port)


def test_whoever_needs_another_waits_until_it_is_healthy():
    needs = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    assert {name: set(others) for name, others in needs.items() if others} == {
        "prometheus": {"alertmanager"},
        "grafana": {"prometheus"},
        "load": {"server"},
        "haproxy": {"server", "replica"},
    }
    conditions = {other["condition"] for others in needs.values() for other in others.values()}
    assert conditions == {"service_healthy"}


def test_each_replica_has_a_gpu_of_its_own():
    override = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())["services"]
    devices = [
        service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for service in override.values()
    ]
    assert devices == [["0"], ["1"]]
    assert all(service["build"]["args"]["DEVICE"] == "cuda" for service in override.values())


def test_the_images_label_is_the_packages_version():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    labels = re.findall(r'image\.version="(.*)"', (ROOT / "Dockerfile").read_text())
    assert labels == [package]
