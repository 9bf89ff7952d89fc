"""deploy/kubernetes, as kubectl builds it: valid, locked down, and true to the server and to who reads it."""

import importlib
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from jsonschema import validate as check

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = ["cpu", "gpu", "replicas"]
NAMES = sorted(file.stem for file in (ROOT / "examples/demo/masks").glob("*.safetensors"))
ME = {"app.kubernetes.io/name": "maskllm"}
SCHEMAS = yaml.safe_load((Path(__file__).parent / "kubernetes_schemas.yaml").read_text())

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


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((KUBERNETES / name).read_text())
    return content


def llm_ds() -> dict[str, Any]:
    """What llm-d's endpoint picker is configured with."""
    epp = read("llm-d.yaml")["router"]["epp"]
    config: dict[str, Any] = yaml.safe_load(epp["pluginsCustomConfig"][epp["pluginsConfigFile"]])
    return config


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_resource_is_valid(overlay: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        validate = importlib.import_module("kubernetes_validate").validate
    for kind, resource in built(overlay).items():
        if kind in SCHEMAS:
            check(resource, SCHEMAS[kind])
        else:
            validate(resource, "1.33", strict=True)


@needs_kubectl
@pytest.mark.parametrize("overlay", ["cpu", "replicas"])
def test_an_engine_on_a_cpu_leaves_one_of_the_requested_processors_to_the_api(overlay: str):
    (server,) = pod(overlay)["containers"]
    threads = next(each["value"] for each in server["env"] if each["name"] == "OMP_NUM_THREADS")
    assert int(threads) == int(server["resources"]["requests"]["cpu"]) - 1


@pytest.mark.parametrize(
    ("schema", "content"),
    [
        ("ServiceMonitor", read("base/servicemonitor.yaml")),
        ("llm-d.yaml", read("llm-d.yaml")),
        ("EndpointPickerConfig", llm_ds()),
        ("production-stack.yaml", read("production-stack.yaml")),
    ],
)
def test_a_misspelt_key_of_what_kubernetes_does_not_check_is_found(schema: str, content: dict[str, Any]):
    check(content, SCHEMAS[schema])
    for wrong in misspelt(content):
        with pytest.raises(ValidationError):
            check(wrong, SCHEMAS[schema])


def misspelt(content: Any) -> Iterator[Any]:
    """The content with one key wrong, for each key. One with a dot is a label or a file, of any name."""
    if isinstance(content, list):
        for at, value in enumerate(content):
            yield from ([*content[:at], wrong, *content[at + 1 :]] for wrong in misspelt(value))
    if isinstance(content, dict):
        for key, value in content.items():
            yield from (content | {key: wrong} for wrong in misspelt(value))
            if "." not in key:
                yield {f"{each}x" if each == key else each: content[each] for each in content}


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
    assert read("llm-d.yaml")["router"]["modelServers"]["matchLabels"] == ME
    (label,) = ME.items()
    options = read("production-stack.yaml")["routerSpec"]["extraArgs"]
    assert option(options, "--k8s-label-selector") == "=".join(label)


@needs_kubectl
def test_whoever_asks_a_pod_asks_at_its_port():
    resources = built("replicas")
    (server,) = pod("replicas")["containers"]
    (port,) = server["ports"]
    (service,) = resources["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    (endpoint,) = resources["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == service["name"]
    assert read("llm-d.yaml")["router"]["modelServers"]["targetPorts"] == [{"number": port["containerPort"]}]
    options = read("production-stack.yaml")["routerSpec"]["extraArgs"]
    assert option(options, "--k8s-port") == str(port["containerPort"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": port["name"]}


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@needs_kubectl
def test_a_pod_may_take_ten_minutes_to_start_and_is_left_alone_after_ten_seconds_of_trouble():
    (server,) = pod("replicas")["containers"]
    starting, ready = server["startupProbe"], server["readinessProbe"]
    assert starting["periodSeconds"] * starting["failureThreshold"] >= 600
    assert ready["periodSeconds"] * ready["failureThreshold"] <= 10


@needs_kubectl
def test_a_node_can_be_emptied_and_one_of_two_replicas_stays():
    resources = built("replicas")
    may_go = resources["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert 0 < may_go < resources["HorizontalPodAutoscaler"]["spec"]["minReplicas"]


@needs_kubectl
def test_a_pod_outlives_its_last_request_and_an_engines_restart():
    spec = pod("replicas")
    (server,) = spec["containers"]
    grace_s = int(option(server["args"], "--grace-s"))
    leaving_s = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= leaving_s + grace_s + 10
    alive = server["livenessProbe"]
    assert alive["periodSeconds"] * alive["failureThreshold"] >= 300


@needs_kubectl
def test_the_autoscaler_reads_what_the_adapter_makes():
    (rule,) = read("prometheus-adapter.yaml")["rules"]["custom"]
    scaler = built("replicas")["HorizontalPodAutoscaler"]["spec"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["seriesQuery"].startswith(rule["name"]["matches"] + "{")
    assert scaler["scaleTargetRef"]["name"] == built("replicas")["Deployment"]["metadata"]["name"]
    assert scaler["minReplicas"] == 2


def test_llm_d_scores_with_plugins_that_it_has_and_by_mask_above_all():
    config = llm_ds()
    plugins = [each.get("name", each["type"]) for each in config["plugins"]]
    assert len(set(plugins)) == len(plugins)
    (profile,) = config["schedulingProfiles"]
    weights = {each["pluginRef"]: each.get("weight", 0) for each in profile["plugins"]}
    assert set(weights) <= set(plugins)
    assert max(weights, key=weights.__getitem__) == "lora-affinity-scorer"


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
