"""Programs that people measure servers with run against this one, with a mask as the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from running import BASE, MASKS, Server
from serving import BENCH
from test_api import metric
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskllm.core import maskset
from maskllm.core.layers import apply_masks

PAIRS = [
    ("The Secretary of the Treasury", " shall prescribe"),
    ("Once upon a time, there", " was a little girl"),
]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "boss")


@torch.no_grad()
def loglikelihood(model, tokenizer, context: str, continuation: str) -> float:
    prompt = len(tokenizer(context).input_ids)
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    logs = model(ids).logits.log_softmax(-1)[0, prompt - 1 : -1]
    return logs.gather(1, ids[0, prompt:, None]).sum().item()


def test_lm_evaluation_harness_sees_the_masked_model_through_http(server: Server):
    lm = get_model("local-completions")(
        base_url=f"{server.url}/v1/completions",
        model="legal",
        tokenizer=str(BASE),
        max_length=512,
        add_bos_token=True,
    )
    asks = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(PAIRS)]
    told = [likelihood for likelihood, _ in lm.loglikelihood(asks, disable_tqdm=True)]

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    dense = [loglikelihood(model, tokenizer, *pair) for pair in PAIRS]
    apply_masks(model, maskset.load(MASKS / "legal.safetensors").masks())
    assert told == pytest.approx([loglikelihood(model, tokenizer, *pair) for pair in PAIRS], abs=1e-2)
    assert told != pytest.approx(dense, abs=0.1)

    until = {"until": ["."], "max_gen_toks": 24, "temperature": 0}
    (text,) = lm.generate_until([Instance("generate_until", {}, (PAIRS[0][0], until), 0)], disable_tqdm=True)
    prompt = tokenizer(PAIRS[0][0], return_tensors="pt").input_ids
    greedy = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    whole = tokenizer.decode(greedy[0, prompt.shape[1] :], skip_special_tokens=True)
    assert text == whole.partition(".")[0]


def test_vllm_bench_serve_completes_over_three_masks(server: Server, tmp_path: Path):
    options = {
        "--base-url": server.url, "--model": "base", "--tokenizer": str(BASE), "--dataset-name": "random",
        "--random-input-len": "16", "--random-output-len": "4", "--num-prompts": "8",
        "--result-dir": str(tmp_path), "--result-filename": "result.json",
    }  # fmt: skip
    words = [word for option in options.items() for word in option]
    masks = ["--lora-modules", "legal", "medical", "code", "--ignore-eos", "--save-result"]
    command = [sys.executable, "-c", BENCH, *words, *masks]
    with server.client() as http:

        def answered() -> float:
            names = ("legal", "medical", "code")
            return sum(metric(http, "maskllm_requests_total", mask=name, reason="length") for name in names)

        before = answered()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert answered() >= before + 8
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (8, 0, 32)
