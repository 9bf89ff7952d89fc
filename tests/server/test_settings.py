import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp
from running import BASE, MASKS, SLOTS, Server
from serving import free_port
from transformers import DeepseekV2Config

from maskllm import cli
from maskllm.capacity import Capacity, memory
from server import __main__ as server_main
from server.engine import client
from server.settings import Settings


def parse(*args: str) -> Settings:
    return CliApp.run(Settings, cli_args=list(args))


def test_options_of_vllm_pass_through_unchanged(tmp_path):
    settings = parse("--model", "some/base", "--masks", str(tmp_path), "--max-model-len", "64", "--port=9000")
    assert settings.engine == ["--max-model-len", "64"]
    assert settings.port == 9000


def test_the_base_is_named_after_its_folder_unless_told_otherwise(tmp_path):
    assert parse("--model", "some/base", "--masks", str(tmp_path)).name == "base"
    assert parse("--model", "some/base", "--masks", str(tmp_path), "--name", "llama").name == "llama"


def test_a_server_listens_to_its_own_machine_unless_told_otherwise(tmp_path):
    assert parse("--model", "some/base", "--masks", str(tmp_path)).host == "127.0.0.1"


def test_every_option_can_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKLLM_MODEL", "some/base")
    monkeypatch.setenv("MASKLLM_MASKS", str(tmp_path))
    monkeypatch.setenv("MASKLLM_SLOTS", "3")
    assert (parse().model, parse().slots) == ("some/base", 3)
    assert parse("--slots", "5").slots == 5


def test_requests_are_read_strictly_unless_told_otherwise(tmp_path):
    needed = ["--model", "some/base", "--masks", str(tmp_path)]
    assert (parse(*needed).lenient, parse(*needed, "--lenient").lenient) == (False, True)


@pytest.mark.parametrize("option", ["--enable-lora", "--lora-modules=a=b", "--max-loras"])
def test_lora_options_are_refused_in_so_many_words(tmp_path, option):
    with pytest.raises(ValidationError, match="LoRA adapters and masks cannot be used together yet"):
        parse("--model", "base", "--masks", str(tmp_path), option)


def test_a_value_that_has_lora_in_it_is_nobodys_business(tmp_path):
    settings = parse("--model", "base", "--masks", str(tmp_path), "--api-key", "floral7")
    assert settings.engine == ["--api-key", "floral7"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--served-model-name", "prod"],
            "--served-model-name ['prod'] does not work with masks yet: use --name",
        ),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2 does not work with masks yet"),
        (["--distributed-executor-backend", "ray"], "vLLM has none on cpu: leave the option out"),
        (["--root-path", "/llm"], "--root-path /llm does not work with masks yet: leave the option out"),
        (["--kv-sharing-fast-prefill"], "--kv-sharing-fast-prefill True does not work with masks yet"),
        (["--ssl-keyfile", "key.pem"], "--ssl-keyfile: give a --ssl-certfile, too"),
        (["--ssl-certfile", "gone.pem"], "--ssl-certfile: No such file or directory"),
        (["--api-key", "secret"], "make a key with `maskllm key ID`, and use --keys FILE"),
        (["--keys", "gone.json"], "--keys gone.json: No such file or directory"),
    ],
)
def test_options_that_masks_cannot_keep_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(server_main, "Metrics", lambda: None)  # of which there is one in a process
    monkeypatch.setattr(server_main.logs, "write_to", lambda _: None)
    assert message in refusal(monkeypatch, "--model", str(BASE), "--masks", str(tmp_path), *options)


def refusal(monkeypatch, *options: str) -> str:
    """What `maskllm serve` says as it ends at once."""
    monkeypatch.setattr(sys, "argv", ["maskllm serve", *options])
    monkeypatch.setattr(server_main.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"^maskllm serve: ") as ended:
        server_main.main()
    return str(ended.value)


@pytest.mark.parametrize(
    ("option", "slots", "masks"), [("--slots=100000", 100_000, 1), ("--packed=1000000000", 8, 1_000_000_000)]
)
def test_more_than_memory_holds_is_refused_at_start_with_the_sum(tmp_path, option, slots, masks):
    command = [sys.executable, "-m", "server", "--model", str(BASE), "--masks", str(tmp_path), option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    size = r"([\d,.]+) ([GM])B"
    pattern = rf"fit in memory: base {size} \+ {slots} slots of {size} \+ {masks} packed masks of {size} "
    pattern += rf"\+ KV {size} \+ programs {size} = {size}, and {size} are free: use fewer --slots or"
    found = re.search(pattern, done.stderr)
    assert found, done.stderr
    amounts = zip(found.groups()[::2], found.groups()[1::2], strict=True)
    base, slot, packed, kv, programs, needed, free = (
        float(amount.replace(",", "")) * {"G": 1000, "M": 1}[unit] for amount, unit in amounts
    )
    assert needed == pytest.approx(base + slots * slot + masks * packed + kv + programs, rel=0.02)
    assert needed > free


def test_what_memory_holds_is_logged_at_start(server: Server):
    """With the masks of the folder: the demo's and the victim; no more are packed for now."""
    with server.client() as api:
        held = api.get("/v1/capacity").json()
    line = next(line for line in server.log.read_text().splitlines() if "INFO maskllm: memory: " in line)
    taken, free = line.partition(" = ")[0], held["sum"].rpartition(" and ")[2]
    assert f" + {SLOTS} slots of " in taken
    assert f" + {len(list(MASKS.glob('*.safetensors'))) + 1} packed masks of " in taken
    assert "memory: base " in taken
    assert " + KV " in taken
    assert line.endswith(free)


def inspected(capsys, *options: str) -> dict:
    assert cli.main(["inspect", "--capacity", str(BASE), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_says_beforehand_what_a_server_will_hold(server: Server, capsys):
    said = inspected(capsys, "--slots", str(SLOTS), "--dtype", "float32")
    with server.client() as api:
        held = api.get("/v1/capacity").json()["bytes"]
    for part in ("base", "slot", "packed", "kv", "programs"):
        assert said[part] == held[part]


@pytest.mark.parametrize("backend", ["", "reference"])
def test_inspect_counts_the_base_in_the_dtype_that_a_server_here_takes(
    tmp_path, monkeypatch, capsys, backend
):
    """The demo's is bfloat16, which is computed in float32 by what has no instructions for it."""
    monkeypatch.setenv("MASKLLM_BACKEND", backend)
    settings = parse("--model", str(BASE), "--masks", str(tmp_path))
    host, _ = client._capacity(settings, BASE, client.arguments(settings, BASE))
    said = inspected(capsys)["base"]
    assert said == host.base
    if backend == "reference":
        assert said == inspected(capsys, "--dtype", "float32")["base"]
        assert said > inspected(capsys, "--dtype", "bfloat16")["base"]


def test_what_each_gpu_holds_is_logged_beside_the_hosts_packed_masks():
    host, gpu = Capacity(0, 0, 1, 0, 9, programs=1), Capacity(100, 10, 0, 50, 999, programs=0)
    host_sum, gpu_sum = memory(host, gpu, slots=3, packed=7).split("; GPU: ")
    assert host_sum.startswith("base 0.0 MB + 3 slots of 0.0 MB + 7 packed masks of ")
    assert gpu_sum == gpu.sum(3, 0)


def test_more_slots_than_a_gpu_holds_are_refused_at_start_with_the_sum(tmp_path, monkeypatch):
    card = SimpleNamespace(is_cpu=lambda: False, get_device_total_memory=lambda: 2 * 10**9)
    monkeypatch.setattr(client, "current_platform", card)
    args = Namespace(
        dtype="bfloat16", kv_cache_memory_bytes=None, tensor_parallel_size=1, gpu_memory_utilization=0.5
    )
    few, many = (Settings(model=str(BASE), masks=tmp_path, slots=slots) for slots in (8, 100_000))
    host, gpu = client._capacity(few, BASE, args)
    assert (host.base, host.slot, host.kv, gpu.packed) == (0, 0, 0, 0)
    said = r"not fit in the GPU: base .* \+ 100000 slots of .* and 1.00 GB are free: use fewer --slots"
    with pytest.raises(client.BadOptions, match=said):
        client._capacity(many, BASE, args)


def test_a_head_in_8_bits_is_refused_without_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKLLM_BACKEND", "reference")
    settings = Settings(model=str(BASE), masks=tmp_path, head_dtype="int8")
    with pytest.raises(client.BadOptions, match="--head-dtype int8 needs the CPU's kernels"):
        client.arguments(settings, BASE)


def test_what_a_request_may_ask_for_bounds_what_the_operator_lets_it_default_to(tmp_path):

    def generation(*given: str) -> dict:
        settings = parse("--model", str(BASE), "--masks", str(tmp_path), "--max-completion-tokens=50", *given)
        return client.arguments(settings, BASE).override_generation_config

    option = "--override-generation-config"
    assert generation() == {"max_new_tokens": 50}
    assert generation(option, '{"top_p": 0.5}') == {"top_p": 0.5, "max_new_tokens": 50}
    assert generation(option, '{"max_new_tokens": 20}') == {"max_new_tokens": 20}
    assert generation(option, '{"max_new_tokens": 90}') == {"max_new_tokens": 50}


def test_metrics_have_a_port_of_the_hosts_family(tmp_path, monkeypatch):

    def start(*_: object) -> None:  # the engine, which comes after the ports
        raise client.BadOptions("as far as it goes")

    monkeypatch.setattr(server_main, "start", start)
    monkeypatch.setattr(server_main, "Metrics", lambda: None)
    monkeypatch.setattr(server_main.logs, "write_to", lambda _: None)
    # Where there is no IPv6, there is nothing to be of its family.
    for host in ("127.0.0.1", *(("::1", "::") if socket.has_ipv6 and socket.has_dualstack_ipv6() else ())):
        settings = Settings(model=str(BASE), masks=tmp_path, host=host, metrics_port=free_port())
        with pytest.raises(client.BadOptions, match="as far as it goes"):
            asyncio.run(server_main.run(settings))


def test_memory_for_the_cache_that_no_sum_would_show_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    with pytest.raises(client.BadOptions, match="use --kv-cache-memory-bytes"):
        client.arguments(Settings(model=str(BASE), masks=tmp_path), BASE)


def test_a_base_whose_attention_multiplies_outside_of_its_layers_is_refused(tmp_path):
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "kv_lora_rank": 32}
    DeepseekV2Config(**small, architectures=["DeepseekV2ForCausalLM"]).save_pretrained(tmp_path)
    args = client.arguments(Settings(model=str(tmp_path), masks=tmp_path), tmp_path)
    with pytest.raises(client.BadOptions, match=r"latent attention \(MLA\).* does not work with masks yet"):
        client.configuration(args)


def test_a_model_that_cannot_be_compiled_is_not_compiled_by_force(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    command = [sys.executable, "-m", "server", "--model", str(BASE), "--masks", str(tmp_path)]
    done = subprocess.run([*command, "--no-enforce-eager"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--enforce-eager False does not work with masks yet: leave the option out" in done.stderr


@pytest.mark.parametrize(
    ("capability", "forced", "why_not"),
    [
        (True, "", None),
        (True, "triton", None),
        (True, "reference", "MASKLLM_BACKEND=reference"),
        (False, "", "the GPU is older than the kernels"),
    ],
)
def test_on_a_gpu_that_has_kernels_steps_are_captured(monkeypatch, capability, forced, why_not):
    gpu = SimpleNamespace(is_cpu=lambda: False, has_device_capability=lambda of: of == 80 and capability)
    monkeypatch.setattr(client, "current_platform", gpu)
    monkeypatch.setenv("MASKLLM_BACKEND", forced)
    assert client._why_eager() == why_not


@pytest.mark.parametrize(
    ("options", "mode", "rows", "eager"),
    [
        ([], "FULL_DECODE_ONLY", 64, False),
        (["--dtype", "float32"], "FULL_DECODE_ONLY", 64, True),
        (["--max-cudagraph-capture-size", "16"], "FULL_DECODE_ONLY", 16, False),
        (["--cudagraph-capture-sizes", "1", "2"], "FULL_DECODE_ONLY", None, False),
        (["--compilation-config", '{"max_cudagraph_capture_size": 8}'], None, None, False),
    ],
)
def test_on_a_gpu_decode_steps_are_captured_as_far_as_its_kernels_go_unless_told_otherwise(
    tmp_path, monkeypatch, options, mode, rows, eager
):
    gpu = {"is_cpu": lambda: False, "device_type": "cuda", "has_device_capability": lambda _: True}
    monkeypatch.setattr(client, "current_platform", SimpleNamespace(**gpu, ray_device_key="GPU"))
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "")  # and gone again after the test
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    args = client.arguments(Settings(model=str(BASE), masks=tmp_path, engine=options), BASE)
    captured = args.compilation_config.cudagraph_mode
    assert (captured and captured.name, args.max_cudagraph_capture_size) == (mode, rows)
    assert args.enforce_eager == eager
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_what_is_missing_is_named():
    done = subprocess.run([sys.executable, "-m", "server"], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-2:] == [
        "maskllm serve: --model: Field required",
        "maskllm serve: --masks: Field required",
    ]


def test_a_masks_folder_that_is_not_there_is_refused_before_anything_starts(tmp_path, monkeypatch):
    said = refusal(monkeypatch, "--model", "base", "--masks", str(tmp_path / "gone"))
    assert said.endswith("gone is not a folder")
