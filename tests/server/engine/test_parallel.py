"""A base and its masks divided among two processes answer as one does.

The last test kills one of them.
"""

import asyncio
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from running import BASE, MASKS, Server, random_mask, serving
from serving import running
from test_token_exact import NAMES, STARTS, ask_all, compare, models, requests
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from maskllm.core import maskset
from maskllm.core.base import Base, read_base
from maskllm.core.layers import apply_masks, maskable
from maskllm.core.patterns import best

__all__ = ["models"]

CORES = sorted(os.sched_getaffinity(0))
TWO = ["--tensor-parallel-size", "2", "--enforce-eager", "--kv-cache-memory-bytes", str(128 << 20)]
ENVIRONMENT = {"CXX": "no-compiler", "VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}"}
"""vLLM would give each process a NUMA node of its own."""


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("masks")
    for file in MASKS.glob("*.safetensors"):
        shutil.copy(file, folder)
    random_mask(base, folder / "late.safetensors", seed=3)
    with serving(folder, tmp_path_factory.mktemp("log") / "server.log", *TWO, **ENVIRONMENT) as server:
        yield server


def workers(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "Worker_TP" in child.name()]


def results(server: Server, bodies, models) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    choices = asyncio.run(ask_all(server.url, bodies))
    return [compare(models[b["mask"]], tokenizer, b, c) for b, c in zip(bodies, choices, strict=True)]


def body(mask: str, tokens: int, prompt: str = STARTS[0]) -> dict[str, object]:
    return {"mask": mask, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}


def test_requests_under_mixed_masks_equal_hugging_face(divided: Server, models):
    """Five masks and the dense base in one batch, on four slots."""
    assert len(workers(divided)) == 2
    compared = results(divided, requests(), models)
    assert [r for r in compared if r.startswith("differs")] == []
    assert compared.count("near tie") <= 1
    with divided.client() as api:
        assert [m["state"] for m in api.get("/v1/masks").json()["data"]].count("resident") == 4


def test_both_together_hold_what_one_process_would(divided: Server):
    """Rows of the demo are whole bytes in each half, or the sum would be more."""
    with divided.client() as api:
        masks = {mask["id"]: mask for mask in api.get("/v1/masks").json()["data"]}
        slot = api.get("/v1/capacity").json()["bytes"]["slot"]
        lines = dict(line.rsplit(" ", 1) for line in api.get("/metrics").text.splitlines())
    resident = next(name for name, mask in masks.items() if mask["state"] == "resident")
    assert float(lines[f'maskllm_packed_bytes{{mask="{resident}"}}']) == masks[resident]["packed_bytes"]
    assert float(lines[f'maskllm_resident_bytes{{mask="{resident}"}}']) == slot


def test_a_pinned_mask_keeps_its_slot_while_four_others_take_turns_on_three(divided: Server, models):
    with divided.client() as api:
        assert api.put("/v1/masks/legal/pin").status_code == 200
        others = [name for name in NAMES if name not in ("legal", "none")]
        assert {"equal", "near tie"} >= set(results(divided, [body(name, 60) for name in others], models))
        assert api.get("/v1/masks/legal").json()["state"] == "resident"
        assert "equal" in results(divided, [body("legal", 24)], models)


def test_a_new_mask_is_divided_when_it_is_put(divided: Server, base: Base, tmp_path: Path):
    file = random_mask(base, tmp_path / "new.safetensors", seed=4)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    apply_masks(model, maskset.load(file).masks())
    with divided.client() as api:
        binary = {"content-type": "application/octet-stream"}
        assert api.put("/v1/masks/new", content=file.read_bytes(), headers=binary).status_code == 201
        compared = results(divided, [body("new", 24, start) for start in STARTS], {"new": model})
        assert {"equal", "near tie"} >= set(compared)
        assert api.delete("/v1/masks/new").status_code == 204


def test_a_file_that_the_workers_refuse_is_a_409_until_it_is_back(divided: Server):
    file = divided.masks / "late.safetensors"
    content = file.read_bytes()
    file.unlink()
    with divided.client() as api:
        refused = api.post("/v1/completions", json=body("late", 4))
        assert refused.status_code == 409
        assert "no file 'late.safetensors'" in refused.json()["error"]["message"]
        file.write_bytes(content)
        assert api.post("/v1/completions", json=body("late", 4)).status_code == 200


def test_keys_and_values_that_both_have_are_masked_in_both(tmp_path: Path):
    """A random Llama with one key and value head, whose rows are divided within a byte in every layer."""
    torch.manual_seed(0)
    shapes = {"hidden_size": 96, "intermediate_size": 88, "num_hidden_layers": 2, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 256}
    config = LlamaConfig(**shapes, **heads, **tokens, initializer_range=0.3)
    folder, masks = tmp_path / "model", tmp_path / "masks"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for file in BASE.glob("token*"):
        shutil.copy(file, folder)
    base, models = read_base(folder), {}
    for name in ("one", "two", "none"):
        models[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if name != "none":
            layers = maskable(models[name])
            chosen = {layer: best(torch.rand_like(linear.weight)) for layer, linear in layers.items()}
            maskset.save(maskset.from_masks(chosen, base), masks / f"{name}.safetensors")
            apply_masks(models[name], chosen)
    command = [sys.executable, "-m", "server", "--model", folder, "--masks", masks, "--dtype", "float32"]
    with running([*command, *TWO], tmp_path / "log", **ENVIRONMENT) as server:
        bodies = [body(name, 16, start) for name in models for start in STARTS]
        compared = results(server, bodies, models)
    assert [r for r in compared if r.startswith("differs")] == []
    assert compared.count("equal") >= 10


def test_when_one_of_them_dies_requests_fail_and_another_two_have_the_same_masks(divided: Server, models):
    """After the test that pins a mask."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        with divided.client() as client:
            answers.append(client.post("/v1/completions", json={**body("legal", 400), "ignore_eos": True}))

    asking = threading.Thread(target=ask)
    asking.start()
    with divided.client() as api:
        while not api.get("/v1/masks/legal").json()["in_flight"]:
            time.sleep(0.01)
        old = workers(divided)
        old[1].kill()
        asking.join(30)
        assert answers[0].status_code == 503
        deadline = time.monotonic() + 300
        while api.get("/health").status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert not any(worker.is_running() for worker in old)
        assert api.get("/v1/masks/legal").json()["state"] == "resident"
    assert "differs" not in results(divided, [body("legal", 24)], models)[0]
