"""deploy/kubernetes, as kubectl builds it: valid for Kubernetes, locked down, and true to the server."""

import importlib
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = ["cpu", "gpu", "replicas"]
NAMES = sorted(file.stem for file in (ROOT / "examples/demo/masks").glob("*.safetensors"))
ME = {"app.kubernetes.io/name": "maskllm"}

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl, which is not here")


@cache
def built(overlay: str) -> dict[str, dict[str, Any]]:
    """The overlay's resources by kind."""
    command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {resource["kind"]: resource for resource in yaml.safe_load_all(text)}


def pod(overlay: str) -> dict[str, Any]:
    spec: dict[str, Any] = built(overlay)["Deployment"]["spec"]["template"]["spec"]
    return spec


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_kubernetes_own_is_valid(overlay: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        validate = importlib.import_module("kubernetes_validate").validate
    resources = built(overlay)
    own = {kind: each for kind, each in resources.items() if "coreos" not in each["apiVersion"]}
    assert set(resources) - set(own) == {"ServiceMonitor"}
    for resource in own.values():
        validate(resource, "1.33", strict=True)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_containers_run_as_nobody_who_can_change_anything(overlay: str):
    spec = pod(overlay)
    assert spec["securityContext"]["runAsNonRoot"]
    assert not spec["automountServiceAccountToken"]
    assert not spec["enableServiceLinks"]  # which would set MASKLLM_PORT, an option of the server's
    for container in spec["containers"] + spec["initContainers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]


@needs_kubectl
def test_each_overlay_has_its_image_and_a_gpu_only_where_it_says_so():
    for overlay, tag in (("cpu", "cpu"), ("gpu", "cuda"), ("replicas", "cpu")):
        (server,) = pod(overlay)["containers"]
        assert server["image"] == f"maskllm:{tag}"
        assert ("nvidia.com/gpu" in server["resources"]["limits"]) == (overlay == "gpu")


@needs_kubectl
def test_whoever_selects_pods_selects_these_and_no_others():
    resources = built("replicas")
    assert resources["Deployment"]["spec"]["template"]["metadata"]["labels"] == ME
    assert resources["Service"]["spec"]["selector"] == ME
    assert resources["Service"]["metadata"]["labels"] == ME
    for kind in ("Deployment", "PodDisruptionBudget", "ServiceMonitor"):
        assert resources[kind]["spec"]["selector"] == {"matchLabels": ME}
    llm_d = yaml.safe_load((KUBERNETES / "llm-d.yaml").read_text())
    assert llm_d["router"]["modelServers"]["matchLabels"] == ME


@needs_kubectl
def test_a_pod_outlives_its_last_request_and_an_engines_restart():
    spec = pod("replicas")
    (server,) = spec["containers"]
    grace_s = int(server["args"][server["args"].index("--grace-s") + 1])
    leaving_s = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= leaving_s + grace_s + 10
    alive = server["livenessProbe"]
    assert alive["periodSeconds"] * alive["failureThreshold"] >= 300


@needs_kubectl
def test_the_autoscaler_reads_what_the_adapter_makes():
    (rule,) = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    scaler = built("replicas")["HorizontalPodAutoscaler"]["spec"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["seriesQuery"].startswith(rule["name"]["matches"] + "{")
    assert scaler["scaleTargetRef"]["name"] == built("replicas")["Deployment"]["metadata"]["name"]
    assert scaler["minReplicas"] == 2


def test_every_plugin_that_llm_d_shall_score_with_is_there():
    epp = yaml.safe_load((KUBERNETES / "llm-d.yaml").read_text())["router"]["epp"]
    config = yaml.safe_load(epp["pluginsCustomConfig"][epp["pluginsConfigFile"]])
    (profile,) = config["schedulingProfiles"]
    used = {each["pluginRef"] for each in profile["plugins"]}
    assert used <= {each["type"] for each in config["plugins"]}


def test_the_init_container_fetches_the_demos_masks(tmp_path: Path):
    wanted = (KUBERNETES / "base/masks.txt").read_text().replace("/app/", f"{ROOT}/")
    done = fetch(wanted, tmp_path)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        source = ROOT / f"examples/demo/masks/{name}.safetensors"
        assert (tmp_path / f"masks/{name}.safetensors").read_bytes() == source.read_bytes()


def test_the_init_container_fails_on_a_mask_that_is_not_what_was_announced(tmp_path: Path):
    legal = f"file://{ROOT}/examples/demo/masks/legal.safetensors"
    done = fetch(f"legal {legal} {'0' * 64}\n", tmp_path)
    assert done.returncode == 1
    assert f"not {'0' * 64}" in done.stderr
    assert not list((tmp_path / "masks").iterdir())


def fetch(wanted: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "masks.txt").write_text(wanted)
    (folder / "masks").mkdir()
    command = [sys.executable, KUBERNETES / "base/fetch.py", folder / "masks.txt", folder / "masks"]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
