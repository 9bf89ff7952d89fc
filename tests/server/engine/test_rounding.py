"""What `--mask-dtype int8` and `--head-dtype int8` round, an answer stays near."""

from collections.abc import Iterator

import pytest
import torch
from running import BASE, MASKS, Server, serving
from test_token_exact import SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from maskllm.capacity import measure
from maskllm.core import maskset
from maskllm.core.layers import apply_masks
from maskllm.kernels import cpu

pytestmark = pytest.mark.skipif(bool(cpu.why_not()), reason=str(cpu.why_not()))


@pytest.fixture(scope="module")
def rounding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--mask-dtype", "int8", "--head-dtype", "int8", "--enforce-eager"]
    with serving(MASKS, tmp_path_factory.mktemp("log") / "server.log", *options) as server:
        yield server


@pytest.fixture
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@pytest.mark.parametrize("mask", ["legal", "none"])
def test_logits_are_rounded_and_near(rounding: Server, model: PreTrainedModel, mask: str):
    """Under a mask layers and head are rounded, of the base the head alone."""
    body = {"prompt": SHARED, "mask": mask, "max_tokens": 1, "echo": True, "logprobs": 0}
    with rounding.client() as api:
        logprobs = api.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
    if mask != "none":
        apply_masks(model, maskset.load(MASKS / f"{mask}.safetensors").masks())
    ids = AutoTokenizer.from_pretrained(BASE)(SHARED, return_tensors="pt").input_ids
    with torch.no_grad():
        exact = model(ids).logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]
    off = (torch.tensor(logprobs[1 : ids.shape[1]]) - exact).abs().mean()
    assert 1e-3 < off < 0.1  # exact ones differ by less than 1e-4


def test_a_copy_of_the_head_counts_as_the_base_s_where_there_is_one(server: Server):
    with server.client() as api:
        base = api.get("/v1/capacity").json()["bytes"]["base"]
        lines = dict(line.rsplit(" ", 1) for line in api.get("/metrics").text.splitlines())
    assert base == measure(BASE, torch.float32).base
    assert base <= float(lines['maskllm_engine_memory_bytes{part="base"}']) <= base * 1.05


def test_the_copy_of_the_head_counts_as_the_base_s(rounding: Server, model: PreTrainedModel):
    rows, columns = model.get_output_embeddings().weight.shape
    copy = rows * columns + 4 * rows  # a byte a weight, and a scale a row
    # Of the checkpoint's bfloat16 what a mask covers stays so.
    masked = maskset.load(MASKS / "legal.safetensors").weights
    weights = sum(p.nbytes for p in model.parameters()) - 2 * masked
    assert measure(BASE, torch.float32, int8_head=True).base == weights + copy
    with rounding.client() as api:
        assert api.get("/v1/capacity").json()["bytes"]["base"] == weights + copy
        lines = dict(line.rsplit(" ", 1) for line in api.get("/metrics").text.splitlines())
    held = float(lines['maskllm_engine_memory_bytes{part="base"}'])
    assert copy <= held - weights <= copy * 1.05  # vLLM fuses, and pads
