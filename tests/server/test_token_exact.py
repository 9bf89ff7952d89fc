"""The promise of the product: an answer under a mask is the masked model's own answer."""

import asyncio
import itertools
import shutil
from functools import cache

import httpx
import pytest
import torch
from running import BASE, MASKS, SLOTS, Server, bearer, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskllm.core import maskset
from maskllm.core.base import Base
from maskllm.core.layers import apply_masks
from maskllm.core.patterns import best

NAMES = ["legal", "medical", "code", "stories", "general", "none"]
STARTS = [
    "The Secretary of the Treasury shall",
    "Question: What are the symptoms of",
    "def forward(self, x):\n    return",
    "Once upon a time, there was a little",
]
# A prefix longer than a KV block (128 tokens on CPU), so that requests under different masks share
# cacheable prompt blocks and would read each other's if the cache did not know masks apart.
SHARED = "The court held that the rule applies to every person who files a claim under this title. " * 12
NEAR, FAR = 1e-3, 0.5
"""Logits that fp32 may take for equal; and logits that bfloat16 never does."""


def requests() -> list[dict[str, object]]:
    """32 requests: every mask and the dense base, prompts with and without a shared prefix."""
    names = itertools.islice(itertools.cycle(NAMES), 32)
    return [
        {
            "mask": name,
            "prompt": (SHARED if index % 3 == 0 else "") + STARTS[index // 6 % 4],
            "max_tokens": 8 + 5 * (index % 7),
            "temperature": 0,
            "return_token_ids": True,
        }
        for index, name in enumerate(names)
    ]


async def ask_all(url: str, bodies: list[dict[str, object]]) -> list[dict]:
    limits = httpx.Limits(max_connections=128)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, headers=bearer()) as client:
        answers = await asyncio.gather(*(client.post("/v1/completions", json=b) for b in bodies))
    for answer in answers:
        answer.raise_for_status()
    return [answer.json()["choices"][0] for answer in answers]


@pytest.fixture(scope="module")
def models():
    """The demo base with each mask applied, as plain Hugging Face models."""
    loaded = {}
    for name in NAMES:
        loaded[name] = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        if name != "none":
            apply_masks(loaded[name], maskset.load(MASKS / f"{name}.safetensors").masks())
    return loaded


@torch.no_grad()
def is_near_tie(model, ids: list[int]) -> bool:
    """Whether Hugging Face's own two best logits after `ids` are too close to call."""
    first, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values
    return bool(first - second <= NEAR)


@torch.no_grad()
def distance(model, prompt: list[int], tokens: list[int]) -> float:
    """How far the logit of a token is from the best one at most, each after those before it."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return float((logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]).max())


@cache
def generated(model, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """What Hugging Face answers, which does not change from one question to the next."""
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), max_new_tokens=tokens, **greedy)[0, len(prompt) :].tolist()


def compare(model, tokenizer, body, choice) -> str:
    prompt = tokenizer(body["prompt"]).input_ids
    expected, got = generated(model, tuple(prompt), body["max_tokens"]), choice["token_ids"]
    if got == expected:
        return "equal"
    at = next(i for i, (a, b) in enumerate(itertools.zip_longest(got, expected)) if a != b)
    return "near tie" if is_near_tie(model, prompt + expected[:at]) else f"differs at {at}"


def test_32_concurrent_requests_under_mixed_masks_equal_hugging_face(server: Server, models):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    bodies = requests()
    results = []
    for _ in ("cold", "with every prefix cached"):
        choices = asyncio.run(ask_all(server.url, bodies))
        results += [compare(models[b["mask"]], tokenizer, b, c) for b, c in zip(bodies, choices, strict=True)]
    assert [r for r in results if r.startswith("differs")] == []
    assert results.count("near tie") <= 0.02 * len(results)


def test_requests_that_stand_still_while_others_have_their_turn_go_on_exactly(server: Server, models):
    """Five masks on four slots, each for more than three turns."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    masks = [name for name in NAMES if name != "none"]
    body = {"max_tokens": 100, "temperature": 0, "return_token_ids": True}
    bodies = [{**body, "mask": name, "prompt": start} for start in STARTS[:2] for name in masks]
    choices = asyncio.run(ask_all(server.url, bodies))
    results = [compare(models[b["mask"]], tokenizer, b, c) for b, c in zip(bodies, choices, strict=True)]
    assert [r for r in results if r.startswith("differs")] == []
    assert results.count("equal") >= 8


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--enforce-eager"]], ids=["captured", "eager"])
def test_a_gpu_answers_with_tokens_that_the_masked_model_itself_likes_best_or_nearly(
    tmp_path, models, options
):
    """Its kernels have no fp32, and rounding to bfloat16 decides between logits that are near.

    Prompts of each mask alone, then requests for more masks than slots, then more at a time than CUDA graphs
    are captured for.
    """
    shutil.copytree(MASKS, tmp_path / "masks")
    options = ["--dtype", "bfloat16", "--gpu-memory-utilization", "0.2", *options]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    alone = [{**requests()[0], "mask": name, "prompt": SHARED + STARTS[0]} for name in NAMES]
    rounds = [*([body] for body in alone), requests(), requests() * 3]
    with serving(tmp_path / "masks", tmp_path / "server.log", *options) as server:
        choices = [choice for bodies in rounds for choice in asyncio.run(ask_all(server.url, bodies))]
        log = server.log.read_text()
    assert ("Graph capturing finished" in log) == ("--enforce-eager" not in options)
    assert "without kernels" not in log
    own, others = [], []
    for body, choice in zip(itertools.chain(*rounds), choices, strict=True):
        prompt = tokenizer(body["prompt"]).input_ids
        for name, model in models.items():
            far = distance(model, prompt, choice["token_ids"])
            (own if name == body["mask"] else others).append(far)
    print(f"furthest from the best logit: {max(own):.3f}, of another mask's model at least {min(others):.3f}")
    assert max(own) < FAR
    assert sum(far > FAR for far in others) > 0.75 * len(others)


def test_the_masks_are_really_different_models(server: Server):
    """Without this the test above could pass with every request answered by one mask."""
    body = {"max_tokens": 24, "temperature": 0, "return_token_ids": True}
    bodies = [{**body, "mask": name, "prompt": start} for name in NAMES for start in STARTS]
    ids = [tuple(choice["token_ids"]) for choice in asyncio.run(ask_all(server.url, bodies))]
    answers = {tuple(ids[at : at + len(STARTS)]) for at in range(0, len(ids), len(STARTS))}
    assert len(answers) == len(NAMES)


def test_a_mask_that_the_kernels_cannot_take_is_answered_exactly_beside_one_that_they_can(
    server: Server, base: Base
):
    """Last in the session: the layers that such a mask covers are the reference's from here on."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    noise = torch.Generator().manual_seed(0)
    legal = maskset.load(MASKS / "legal.safetensors")
    some = {n: s for n, s in legal.shapes.items() if n.endswith(("layers.0.self_attn.q_proj", "down_proj"))}
    odd = {
        "part-of-qkv": {name: best(torch.rand(shape, generator=noise)) for name, shape in some.items()},
        "four-of-eight": {name: best(torch.rand(s, generator=noise), 4, 8) for name, s in some.items()},
    }
    bodies = []
    for name in (*odd, "legal"):
        if name in odd:
            n, m = (4, 8) if name == "four-of-eight" else (2, 4)
            file = f"{name}.safetensors"
            maskset.save(maskset.from_masks(odd[name], base, n, m), server.masks / file)
            with server.client() as http:
                assert http.put(f"/v1/masks/{name}", json={"file": file}).status_code in (200, 201)
                http.post("/v1/completions", json={"mask": name, "prompt": STARTS[0]})  # one after the other
        body = {"mask": name, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
        bodies.append({**body, "prompt": STARTS[0]})
    choices = asyncio.run(ask_all(server.url, bodies))
    for body, choice in zip(bodies, choices, strict=True):
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        apply_masks(model, odd.get(str(body["mask"])) or legal.masks())
        assert compare(model, tokenizer, body, choice) in ("equal", "near tie")
    assert "is served without kernels from now on: mask part-of-qkv is 2:4 in 1 of its 3 parts" in (
        server.log.read_text()
    )


def test_more_masks_than_slots_were_in_use():
    assert len(NAMES) - 1 > SLOTS
