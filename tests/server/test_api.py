"""What clients see: OpenAI's API with a mask on each request, and the masks themselves."""

import re
import shutil
import threading
import time

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from running import MASKS, Server, random_mask

from maskllm.core import maskset
from maskllm.kernels import cpu

ASK = {"prompt": "The Secretary shall", "max_tokens": 12, "temperature": 0}


@pytest.fixture
def http(server: Server):
    with server.client() as client:
        yield client


@pytest.fixture
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="boss", max_retries=0) as client:
        yield client


def label(name: str) -> str:
    return f"{name}@{maskset.load(MASKS / f'{name}.safetensors').sha256[:12]}"


def metric(http, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0


# One mask, many ways to name it.


@pytest.mark.parametrize(
    "how",
    [
        {"params": {"mask": "legal"}},
        {"headers": {"X-Mask": "legal"}},
        {"json": {"mask": "legal"}},
        {"json": {"model": "legal"}},
        {"json": {"model": "base:legal"}},
        {"json": {"model": "base", "mask": "legal"}, "params": {"mask": "legal"}},
    ],
)
def test_every_way_to_name_a_mask_gives_the_same_answer(http, how):
    expected = http.post("/v1/completions", params={"mask": "legal"}, json=ASK).json()["choices"]
    answer = http.post("/v1/completions", **{**how, "json": {**ASK, **how.get("json", {})}})
    assert answer.status_code == 200
    assert answer.headers["X-Mask"] == label("legal")
    assert answer.json()["model"] == "legal"
    assert answer.json()["choices"] == expected


def test_no_mask_and_none_are_the_dense_base(http):
    unnamed = http.post("/v1/completions", json=ASK)
    none = http.post("/v1/completions", params={"mask": "none"}, json=ASK)
    assert unnamed.headers["X-Mask"] == none.headers["X-Mask"] == "none"
    assert unnamed.json()["model"] == "base"
    assert unnamed.json()["choices"] == none.json()["choices"]


def test_a_mask_can_be_pinned_to_its_content(http):
    assert http.post("/v1/completions", params={"mask": label("legal")}, json=ASK).status_code == 200
    both = {"params": {"mask": "legal"}, "headers": {"X-Mask": label("legal")}}
    assert http.post("/v1/completions", json={**ASK, "model": label("legal")}, **both).status_code == 200
    stale = http.post("/v1/completions", params={"mask": "legal@000000000000"}, json=ASK)
    assert stale.status_code == 404
    assert label("legal") in stale.json()["error"]["message"]


def test_a_mask_that_is_called_as_a_kind_of_content_answers_only_who_names_it(http):
    parts = [{"type": "text", "text": "What causes Glaucoma ?"}]
    chat = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12, "temperature": 0}
    dense = http.post("/v1/chat/completions", json=chat).json()["choices"]
    assert http.put("/v1/masks/text", json={"file": "stories.safetensors"}).status_code == 201
    try:
        assert http.post("/v1/chat/completions", json={**chat, "mask": "text"}).json()["choices"] != dense
        unnamed = http.post("/v1/chat/completions", json=chat)
        assert (unnamed.headers["X-Mask"], unnamed.json()["model"]) == ("none", "base")
        assert unnamed.json()["choices"] == dense
    finally:
        assert http.delete("/v1/masks/text").status_code == 204


def test_an_unknown_mask_is_a_404_that_names_the_known_ones(http):
    answer = http.post("/v1/completions", params={"mask": "nope"}, json=ASK)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("mask", 404)
    for name in ("general", "legal", "medical", "code", "stories", "none"):
        assert name in error["message"]


@pytest.mark.parametrize("model", ["gpt-4", "other:legal", "base:nope"])
def test_an_unknown_model_is_a_404(http, model):
    assert http.post("/v1/completions", json={**ASK, "model": model}).status_code == 404


def test_two_masks_in_one_request_are_a_400_that_says_which(http):
    answer = http.post("/v1/completions", params={"mask": "legal"}, json={**ASK, "model": "base:code"})
    assert answer.status_code == 400
    assert "'legal'" in answer.json()["error"]["message"]
    assert "'code'" in answer.json()["error"]["message"]


# The official client.


def test_the_openai_client_completes_chats_streams_and_lists(client):
    done = client.completions.create(model="legal", **ASK)
    assert done.usage.completion_tokens == 12
    chunks = client.completions.create(model="base", stream=True, extra_query={"mask": "legal"}, **ASK)
    assert "".join(c.choices[0].text for c in chunks) == done.choices[0].text

    messages = [{"role": "user", "content": "What causes Glaucoma ?"}]
    chat = {"model": "base:medical", "messages": messages, "max_tokens": 12, "temperature": 0}
    reply = client.chat.completions.create(**chat)
    assert reply.model == "medical"
    deltas = client.chat.completions.create(stream=True, **chat)
    text = "".join(d.choices[0].delta.content or "" for d in deltas)
    assert text == reply.choices[0].message.content

    models = {model.id: model for model in client.models.list()}
    assert models["base"].parent is None
    assert models["legal"].parent == "base"


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="no mask 'nope'"):
        client.completions.create(model="base:nope", **ASK)
    with pytest.raises(openai.BadRequestError, match="different masks"):
        client.completions.create(model="legal", extra_body={"mask": "code"}, **ASK)


def test_the_chat_template_is_the_question_and_answer_form_of_the_base(http):
    chat = {"messages": [{"role": "user", "content": "What causes Glaucoma ?"}]}
    tokens = http.post("/tokenize", json=chat).json()["tokens"]
    text = "<|endoftext|>Question: What causes Glaucoma ?\nAnswer:"
    assert (
        tokens == http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    )


def test_tokenize_takes_every_model_that_is_listed(http):
    for model in ("base", "legal", "base:legal"):
        assert http.post("/tokenize", json={"model": model, "prompt": "a"}).status_code == 200
    assert http.post("/tokenize", json={"model": "nope", "prompt": "a"}).status_code == 404


def test_health_and_version_answer(http):
    assert http.get("/health").status_code == 200
    assert http.get("/version").json()["vllm"] == "0.32.0"


# The masks' life.


def test_masks_are_listed_with_what_is_known_of_them_and_refusals_with_their_reason(http):
    listed = http.get("/v1/masks").json()
    masks = {mask["id"]: mask for mask in listed["data"]}
    assert masks["legal"]["sha256"][:12] == label("legal").split("@")[1]
    assert (masks["legal"]["n"], masks["legal"]["m"]) == (2, 4)
    assert "ends" in listed["refused"]["broken"] or "of" in listed["refused"]["broken"]
    assert "made for base 000000000000" in listed["refused"]["foreign"]


def test_a_refused_file_is_no_mask_and_harms_nobody(http, server):
    for name in ("broken", "foreign"):
        assert http.post("/v1/completions", params={"mask": name}, json=ASK).status_code == 404
        answer = http.put(f"/v1/masks/{name}")
        assert answer.status_code == 400
        assert str(server.masks) not in answer.text
    assert http.post("/v1/completions", params={"mask": "legal"}, json=ASK).status_code == 200


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("ghost", None, "no file 'ghost.safetensors'"),
        ("none", {"file": "legal.safetensors"}, "cannot name a mask"),
        ("base", {"file": "legal.safetensors"}, "cannot name a mask"),
        ("a b", {"file": "legal.safetensors"}, "cannot name a mask"),
        ("up", {"file": "../legal.safetensors"}, "under the masks folder"),
        ("root", {"file": "/etc/passwd"}, "under the masks folder"),
    ],
)
def test_a_put_that_cannot_work_is_a_400_and_changes_nothing(http, name, body, message):
    before = http.get("/v1/masks").json()
    answer = http.put(f"/v1/masks/{name}", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert http.get("/v1/masks").json() == before


def test_a_mask_is_really_loaded_by_put_and_really_freed_by_delete(http, server, base):
    random_mask(base, server.masks / "added.safetensors", seed=3)
    loaded = metric(http, "maskllm_packed_bytes", mask="added")
    assert loaded == 0
    assert http.put("/v1/masks/added").status_code == 201
    packed = sum(t.nbytes for t in maskset.load(server.masks / "added.safetensors").packed.values())
    assert metric(http, "maskllm_packed_bytes", mask="added") == packed
    assert http.post("/v1/completions", params={"mask": "added"}, json=ASK).status_code == 200
    weights = maskset.load(server.masks / "added.safetensors").weights
    bits = 8 if cpu.why_not() else 9  # a bool each, or 16 bits for half of them and a bit each
    assert metric(http, "maskllm_resident_bytes", mask="added") == weights * bits / 8
    assert http.put("/v1/masks/added").status_code == 200  # the same content again: nothing to do

    assert http.delete("/v1/masks/added").status_code == 204
    assert metric(http, "maskllm_packed_bytes", mask="added") == 0
    assert metric(http, "maskllm_resident_bytes", mask="added") == 0
    assert http.post("/v1/completions", params={"mask": "added"}, json=ASK).status_code == 404
    assert http.delete("/v1/masks/added").status_code == 404
    assert (server.masks / "added.safetensors").is_file()


@pytest.mark.parametrize("how", ["copied", "rewritten in place"])
def test_a_republished_mask_answers_with_its_new_content_and_no_old_cache(http, server: Server, how: str):
    prompt = {**ASK, "prompt": "No person shall be held to answer for any offence. " * 20}
    answers = {
        name: http.post("/v1/completions", params={"mask": name}, json=prompt).json()["choices"]
        for name in ("legal", "medical")
    }
    assert answers["legal"] != answers["medical"]
    for name in ("legal", "medical", "legal"):
        if how == "copied":
            put = http.put("/v1/masks/moving", json={"file": f"{name}.safetensors"})
        else:  # the same name and the same path for the engine: only the content tells old blocks from new
            shutil.copyfile(MASKS / f"{name}.safetensors", server.masks / "moving.safetensors")
            put = http.put("/v1/masks/moving")
        assert put.status_code in (200, 201)
        answer = http.post("/v1/completions", params={"mask": "moving"}, json=prompt)
        assert answer.json()["choices"] == answers[name]
        assert answer.headers["X-Mask"].startswith("moving@")
        hits = metric(http, "vllm:prefix_cache_hits_total")
        again = http.post("/v1/completions", params={"mask": "moving"}, json=prompt)
        assert again.json()["choices"] == answers[name]
        assert metric(http, "vllm:prefix_cache_hits_total") > hits  # so there are blocks that could be met
    assert http.delete("/v1/masks/moving").status_code == 204


@pytest.mark.parametrize("how", ["DELETE", "PUT"])
def test_a_request_in_flight_finishes_on_the_mask_it_began_with(http, client, server, how):
    http.put("/v1/masks/flying", json={"file": "legal.safetensors"})
    long = {**ASK, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    expected = client.completions.create(model="flying", **long).choices[0].text

    stream = client.completions.create(model="flying", stream=True, **long)
    text = next(stream).choices[0].text
    body = {"json": {"file": "medical.safetensors"}} if how == "PUT" else {}
    change = threading.Thread(target=http.request, args=[how, "/v1/masks/flying"], kwargs=body)
    change.start()
    text += "".join(chunk.choices[0].text for chunk in stream)
    change.join(60)
    assert not change.is_alive()
    assert text == expected
    with server.client() as other:
        after = other.post("/v1/completions", params={"mask": "flying"}, json=ASK)
        if how == "DELETE":
            assert after.status_code == 404
        else:
            assert after.headers["X-Mask"] == label("medical").replace("medical", "flying")
            assert other.delete("/v1/masks/flying").status_code == 204
        assert metric(other, "maskllm_packed_bytes", mask="flying") == 0


def test_a_mask_put_again_while_its_old_self_drains_still_answers(http, client, server):
    file = {"json": {"file": "legal.safetensors"}}
    http.put("/v1/masks/again", **file)
    long = {**ASK, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model="again", stream=True, **long)
    next(stream)
    drain = threading.Thread(target=http.delete, args=["/v1/masks/again"])
    drain.start()
    with server.client() as other:
        while other.get("/v1/masks/again").status_code == 200:
            pass
        assert other.put("/v1/masks/again", **file).status_code == 201
        for _ in stream:
            pass
        drain.join(60)
        assert not drain.is_alive()
        answer = other.post("/v1/completions", params={"mask": "again"}, json=ASK)
        assert answer.status_code == 200
        assert other.delete("/v1/masks/again").status_code == 204


def test_a_client_that_leaves_in_the_middle_harms_nobody(http, client):
    http.put("/v1/masks/left", json={"file": "legal.safetensors"})
    long = {**ASK, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    for _ in range(3):
        with client.completions.create(model="left", stream=True, **long) as stream:
            next(stream)
    assert http.delete("/v1/masks/left").status_code == 204
    assert http.post("/v1/completions", json=ASK).status_code == 200


def test_a_cold_load_that_fails_in_the_engine_is_a_409_and_the_server_lives_on(http, server, client):
    """`victim` was registered at start, and is loaded only by its first request."""
    copy = server.masks / "victim.copy"
    (server.masks / "victim.safetensors").rename(copy)
    answer = http.post("/v1/completions", params={"mask": "victim"}, json=ASK)
    assert answer.status_code == 409
    assert "no file 'victim.safetensors'" in answer.json()["error"]["message"]
    with pytest.raises(openai.ConflictError):
        client.completions.create(model="victim", **ASK)
    assert http.get("/health").status_code == 200
    assert http.post("/v1/completions", params={"mask": "legal"}, json=ASK).status_code == 200

    copy.rename(server.masks / "victim.safetensors")
    assert http.post("/v1/completions", params={"mask": "victim"}, json=ASK).status_code == 200


# Metrics.


def test_metrics_count_each_mask_by_itself(http):
    before = {
        mask: metric(http, "maskllm_generation_tokens_total", mask=mask) for mask in ("medical", "none")
    }
    http.post("/v1/completions", params={"mask": "medical"}, json={**ASK, "ignore_eos": True})
    assert metric(http, "maskllm_generation_tokens_total", mask="medical") == before["medical"] + 12
    assert metric(http, "maskllm_generation_tokens_total", mask="none") == before["none"]


def test_every_family_of_the_design_is_exported_by_mask_beside_vllms_own(http):
    http.post("/v1/completions", params={"mask": "legal"}, json=ASK)
    http.post("/v1/completions", params={"mask": "nope"}, json=ASK)
    text = http.get("/metrics").text
    for family in (
        "requests_total", "errors_total", "prompt_tokens_total", "generation_tokens_total",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket", "queue_time_seconds_bucket",
        "resident_bytes", "packed_bytes",
    ):  # fmt: skip
        assert re.search(rf'^maskllm_{family}{{.*mask="', text, re.M), family
    for source in ("disk", "host"):
        everything = rf'^maskllm_swap_seconds_(?:bucket{{le="\+Inf",|count{{)source="{source}"}} (.*)$'
        slower_than_nothing, count = re.findall(everything, text, re.M)
        assert slower_than_nothing == count != "0.0"
    assert re.search(r"^maskllm_slots_total 4.0$", text, re.M)
    assert re.search(r"^maskllm_slots_used \d", text, re.M)
    assert "vllm:time_to_first_token_seconds" in text


def test_a_mask_that_is_a_link_to_elsewhere_is_put_as_it_is_served_at_the_start(http, server, tmp_path):
    elsewhere = shutil.copy(server.masks / "legal.safetensors", tmp_path)
    link = server.masks / "linked.safetensors"
    link.symlink_to(elsewhere)
    try:
        for body in ({}, {"json": {"file": link.name}}):
            answer = http.put("/v1/masks/linked", **body)
            assert answer.status_code in (200, 201), answer.text
            assert answer.json()["file"] == link.name
        refused = http.put("/v1/masks/other", json={"file": link.name})
        assert refused.status_code == 400  # nobody names a file outside of the folder
    finally:
        http.delete("/v1/masks/linked")
        link.unlink()


def test_which_masks_run_is_one_series_however_many_ran_before(http):
    for mask in ("legal", "medical", "code"):
        http.post("/v1/completions", params={"mask": mask}, json=ASK)
    long, begun = {**ASK, "max_tokens": 400, "ignore_eos": True, "stream": True}, time.time()
    with http.stream("POST", "/v1/completions", params={"mask": "legal"}, json=long) as answer:
        lines = answer.iter_lines()
        next(lines)
        series = re.findall(r"^vllm:lora_requests_info({.*}) (.*)$", http.get("/metrics").text, re.M)
    assert len(series) == 1
    labels, at = series[0]
    assert 'running_lora_adapters="legal"' in labels
    assert 'waiting_lora_adapters=""' in labels
    assert float(at) >= begun  # the newest is the one that counts


def test_a_prompt_that_is_too_long_is_a_400_and_counted(http):
    before = metric(http, "maskllm_errors_total", mask="legal", status="400")
    answer = http.post("/v1/completions", params={"mask": "legal"}, json={**ASK, "prompt": "law " * 2000})
    assert answer.status_code == 400
    assert metric(http, "maskllm_errors_total", mask="legal", status="400") == before + 1


def test_names_that_clients_invent_never_become_labels(http):
    http.post("/v1/completions", params={"mask": "invented"}, json=ASK)
    text = http.get("/metrics").text
    assert "invented" not in text
    assert metric(http, "maskllm_errors_total", mask="unknown", status="404") >= 1
