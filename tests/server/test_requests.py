"""Requests that are refused at the door, and the one shape in which every error comes."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from prometheus_client import CollectorRegistry
from running import BASE, Server
from test_logs import line
from transformers import AutoTokenizer
from vllm.exceptions import GracefulHTTPError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError
from vllm.v1.worker.gpu.sample.logit_bias import (
    MAX_NUM_ALLOWED_TOKEN_IDS,
    MAX_NUM_LOGIT_BIAS_TOKENS,
    MAX_NUM_STOP_TOKEN_IDS,
)

from server import errors
from server.bounds import MOST
from server.engine.client import EngineGone, MaskedLLM, tokenize_short_prompts_at_once
from server.engine.openai import status_of
from server.errors import ServerError
from server.metrics import Metrics
from server.strict import ELSEWHERE, StrictRoute

ASK = {"prompt": "The Secretary shall", "max_tokens": 2, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture
def http(server: Server):
    with server.client() as client:
        yield client


def error_of(answer, status: int, kind: str = "invalid_request_error", param: str | None = None) -> str:
    """Check that the error has OpenAI's shape, whole; return its message."""
    assert answer.status_code == status
    error = answer.json()["error"]
    message = error.pop("message")
    assert error == {"type": kind, "param": param, "code": status}
    return message


@pytest.mark.parametrize(
    ("body", "field", "hint"),
    [
        ({"max_token": 3}, "max_token", "did you mean 'max_tokens'?"),
        ({"Mask": "legal"}, "Mask", "did you mean 'mask'?"),
        ({"zzz": 1}, "zzz", "it would change nothing"),
        ({"best_of": 2}, "best_of", "it was removed: use n"),
        ({"guided_json": {}}, "guided_json", 'use structured_outputs={"json": ...} or response_format'),
        (
            {"stream": True, "stream_options": {"include_usge": True}},
            "stream_options.include_usge",
            "did you mean 'stream_options.include_usage'?",
        ),
    ],
)
def test_a_field_that_nobody_reads_is_refused_by_name(http, body, field, hint):
    message = error_of(http.post("/v1/completions", json={**ASK, **body}), 400, param=field)
    assert message == f"unknown field {field!r}; {hint}"


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", ASK), ("/v1/chat/completions", CHAT)])
def test_a_field_of_old_is_refused_with_what_to_do_instead(http, path: str, body: dict):
    assert {"best_of", "guided_json", "guided_regex", "guided_choice", "guided_grammar"} < ELSEWHERE.keys()
    for field, instead in ELSEWHERE.items():
        message = error_of(http.post(path, json={**body, field: {}}), 400, param=field)
        assert message == f"unknown field {field!r}; {instead}"


def test_unknown_fields_of_tools_and_of_tokenize_are_refused_too(http):
    tool = {"type": "function", "function": {"name": "f", "parametres": {}}}
    answer = http.post("/v1/chat/completions", json={**CHAT, "tools": [tool], "tool_choice": "none"})
    assert "'tools.function.parameters'?" in error_of(answer, 400, param="tools.function.parametres")
    answer = http.post("/tokenize", json={"prompt": "a", "promt": "b"})
    assert "'prompt'?" in error_of(answer, 400, param="promt")


def test_every_field_of_the_openai_client_is_known_or_refused_for_a_reason(http):
    """What changes no answer here is taken."""
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    for params, model in ((completion, "CompletionRequest"), (chat, "ChatCompletionRequest")):
        fields = set(params.CompletionCreateParamsBase.__annotations__)
        assert fields - schemas[model]["properties"].keys() - ELSEWHERE.keys() == set()
    unused = {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"}
    stream = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert http.post("/v1/chat/completions", json={**CHAT, **unused, **stream}).status_code == 200


def test_values_of_another_type_are_refused_as_the_schema_says(http):
    for field, value in (("n", "1"), ("n", True), ("stream", 1), ("temperature", "0")):
        error_of(http.post("/v1/completions", json={**ASK, field: value}), 400, param=field)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": ', "the body is not JSON"),
        (b'{"prompt": "\\ud800"}', "the body is not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "the body is not JSON"),
        (b'{"prompt": "\xff"}', "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'{"prompt": "a", "stream_interval": 1180591620717411303424}', "beyond 64 bits"),
        (b'{"prompt": "a", "vllm_xargs": {"a": [1, 1180591620717411303424]}}', "beyond 64 bits"),
        (b'{"prompt": "a", "vllm_xargs": {"a": [1, "b", 1180591620717411303424]}}', "beyond 64 bits"),
        (b'{"prompt": "a", "vllm_xargs": {"a": [1, -1180591620717411303424]}}', "beyond 64 bits"),
    ],
)
def test_what_is_not_json_for_everybody_is_a_400(http, body, message):
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert message in error_of(answer, 400)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {**ASK, "logit_bias": {"1": 10**400}}, "logit_bias.1"),
        ("/v1/completions", {**ASK, "structured_outputs": "x"}, None),
        ("/v1/completions", {**ASK, "max_tokens": 100_000}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "tools": [{}], "tool_choice": {"function": {"name": "f"}}}, None),
        ("/v1/chat/completions", {**CHAT, "verbosity": "low"}, "verbosity"),
    ],
)
def test_what_trips_vllm_is_a_400(http, path, body, param):
    if "logit_bias" in body:
        body = json.dumps(body).replace(str(10**400), "1e999")
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
    else:
        answer = http.post(path, json=body)
    error_of(answer, 400, param=param)


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 25},
        {"stop_token_ids": [10**9]},
        {"logit_bias": {"1000000": 1}},
        {"structured_outputs": {"regex": "("}},
        {"prompt": [10**6]},
        {"prompt": [1] * 512},
        {"messages": CHAT["messages"], "logprobs": True, "top_logprobs": 25},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_what_vllm_refuses_is_a_400_before_a_stream_begins(http, server: Server, fields):
    path, base = ("/v1/chat/completions", CHAT) if "messages" in fields else ("/v1/completions", ASK)
    whole, stream = (http.post(path, json={**base, **fields, "stream": on}) for on in (False, True))
    assert (stream.status_code, stream.json()) == (400, whole.json())
    error_of(stream, 400, param=stream.json()["error"]["param"])
    assert line(server, stream.headers["x-request-id"])["status"] == 400
    assert "stream generator" not in server.log.read_text()  # vLLM's traceback, which quotes the client


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bad_words": ["ab " * 4096, "c" * 4097]}, "16385 characters, of all prompts, are too many"),
        ({"prompt": ["a"] * 5, "bad_words": ["b" * 4000]}, "20000 characters, of all prompts, are too many"),
        ({"bad_words": ["a b" * 500]}, "tokens, and may be 1024"),
        ({"n": 2, "temperature": 1, "bad_words": ["a b" * 500]}, "tokens, and may be 1024"),
        ({"allowed_token_ids": list(range(1025))}, "1025 entries of allowed_token_ids are too many"),
        ({"logit_bias": {str(id): 1 for id in range(1025)}}, "1025 entries of logit_bias are too many"),
        ({"stop_token_ids": list(range(121)), "min_tokens": 1}, "121 entries of stop_token_ids are too many"),
        ({"structured_outputs": {"regex": "a" * (1 << 18)}}, "bytes, of all prompts, are too many"),
        ({"request_id": "mine"}, "a request's id is its header X-Request-Id"),
        ({"priority": 1}, "this server answers in order"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_would_hold_up_others_or_change_nothing_is_refused_by_name(http, fields, message, stream):
    answer = http.post("/v1/completions", json={**ASK, **fields, "stream": stream})
    param = list(fields)[-1] if "min_tokens" not in fields else "stop_token_ids"
    assert message in error_of(answer, 400, param=param)


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
def test_what_is_for_servers_that_share_their_cache_is_refused_however_it_comes(http, name):
    for fields in ({name: {"do_remote_prefill": True}}, {"vllm_xargs": {name: "x"}}):
        answer = http.post("/v1/completions", json={**ASK, **fields})
        assert "this one does not" in error_of(answer, 400, param=name)


def test_what_vllm_takes_on_a_gpu_is_no_less_than_what_is_let_through():
    assert (
        MOST["allowed_token_ids"],
        MOST["logit_bias"],
    ) == (MAX_NUM_ALLOWED_TOKEN_IDS, MAX_NUM_LOGIT_BIAS_TOKENS)
    assert MOST["stop_token_ids"] < MAX_NUM_STOP_TOKEN_IDS  # with those that end any text


def test_a_text_longer_than_any_prompt_is_refused_before_it_is_tokenized(http):
    """Of 512 of the tokenizer's longest tokens."""
    longest = max(map(len, AutoTokenizer.from_pretrained(BASE).get_vocab()))
    text = "a" * (512 * longest + 1)
    parts = [{"type": "text", "text": text[:1000]}, {"type": "text", "text": text[1000:]}]
    for path, body, param in (
        ("/tokenize", {"prompt": text}, "prompt"),
        ("/v1/completions", {**ASK, "prompt": ["a", text], "truncate_prompt_tokens": 10}, "prompt"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": text}]}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": parts}]}, "messages"),
    ):
        message = error_of(http.post(path, json=body), 400, param=param)
        assert "this model's prompts have at most" in message


def test_headers_of_vllms_that_are_not_for_everybody_change_nothing(http):
    for header in ("X-Vllm-Priority", "X-data-parallel-rank"):
        answer = http.post("/v1/completions", json=ASK, headers={header: str(2**70)})
        assert answer.status_code == 200
    answer = http.post("/v1/completions", json=ASK, headers={"endpoint-load-metrics-format": "json"})
    assert answer.status_code == 200
    assert "endpoint-load-metrics" not in answer.headers


def masked(
    monkeypatch: pytest.MonkeyPatch, generate: Callable[..., AsyncIterator[RequestOutput]]
) -> MaskedLLM:
    """An engine's client without an engine, whose requests go as `generate` does."""
    monkeypatch.setattr(AsyncLLM, "generate", generate)
    llm = object.__new__(MaskedLLM)
    llm.in_flight, llm.metrics = Counter(), Metrics(CollectorRegistry())
    return llm


def test_an_answer_that_the_engine_cuts_off_is_no_answer(monkeypatch):
    """As one does that is told to end, by who restarts a unit or looks for memory."""
    cut_off = CompletionOutput(0, "It was", [1, 2], None, None, finish_reason="abort")

    async def generate(*_: object, **__: object):
        yield RequestOutput("id", None, [1], None, [cut_off], finished=True)

    llm = masked(monkeypatch, generate)

    async def ask() -> list[RequestOutput]:
        return [output async for output in llm._generate("a", None, "id")]

    with pytest.raises(EngineGone) as gone:
        asyncio.run(ask())
    assert status_of(gone.value) == 503
    count = llm.metrics.registry.get_sample_value
    assert count("maskllm_requests_total", {"mask": "none", "reason": "abort"}) == 1
    assert count("maskllm_generation_tokens_total", {"mask": "none"}) == 2  # which the engine did make


def test_only_a_long_prompt_waits_for_a_thread_to_make_its_tokens():
    renderer = SimpleNamespace(_tokenize_prompt=lambda prompt, params: (prompt, params, "here"))

    async def in_thread(prompt: object, params: object) -> object:
        return prompt, params, "in a thread"

    renderer._tokenize_prompt_async = in_thread
    tokenize_short_prompts_at_once(renderer)
    for length, where in ((0, "here"), (512, "here"), (513, "in a thread")):
        prompt = {"prompt": "a" * length}
        assert asyncio.run(renderer._tokenize_prompt_async(prompt, 1)) == (prompt, 1, where)


def test_a_request_at_which_the_engine_fails_is_a_500_that_quotes_nobody(monkeypatch, caplog):
    """No request is known at which a real one fails."""

    async def fail(*_: object, **__: object):
        raise EngineGenerateError from OverflowError("my secret prompt")
        yield

    llm = masked(monkeypatch, fail)

    async def ask() -> None:
        async for _ in llm._generate("a", None, "id"):
            pass

    with pytest.raises(GracefulHTTPError, match="the engine failed at this request") as failed:
        asyncio.run(ask())
    assert status_of(failed.value) == 500
    assert "the engine failed at a request: OverflowError" in caplog.text
    assert "secret" not in caplog.text
    assert not llm.in_flight


def test_a_request_that_cannot_be_sent_to_the_engine_is_forgotten(monkeypatch):
    async def fail(*_: object) -> None:
        raise OverflowError

    async def abort(id: str, internal: bool) -> None:
        aborted.append((id, internal))

    aborted: list[tuple[str, bool]] = []
    monkeypatch.setattr(AsyncLLM, "_add_request", fail)
    llm = object.__new__(MaskedLLM)
    llm.abort = abort
    with pytest.raises(OverflowError):
        asyncio.run(llm._add_request(SimpleNamespace(request_id="id")))
    assert aborted == [("id", True)]


def test_beam_search_is_refused_by_name(http):
    for path, body in (("/v1/completions", ASK), ("/v1/chat/completions", CHAT)):
        answer = http.post(path, json={**body, "use_beam_search": True, "n": 2})
        message = error_of(answer, 400, param="use_beam_search")
        assert message == "use_beam_search: Input should be False"


@pytest.mark.parametrize("way", ["query", "header"])
def test_two_masks_in_one_place_contradict_each_other_as_those_in_two_do(http, way):
    def ask(*masks: str):
        given = {"params": {"mask": masks}} if way == "query" else {"headers": [("X-Mask", m) for m in masks]}
        return http.post("/v1/completions", json=ASK, **given)

    message = error_of(ask("legal", "medical"), 400, param="mask")
    assert message == f"the {way} names more than one mask: 'legal', 'medical'"
    assert ask("legal", "legal").headers["X-Mask"].startswith("legal@")


def test_what_the_framework_refuses_has_the_same_shape(http):
    assert error_of(http.get("/nope"), 404, "not_found_error") == "Not Found: GET /nope"
    answer = http.post("/v1/masks/legal")
    assert "POST /v1/masks/legal" in error_of(answer, 405)
    assert answer.headers["allow"] == "DELETE, GET, PUT"
    answer = http.post("/v1/completions", content="prompt=a", headers={"content-type": "text/plain"})
    assert "application/json" in error_of(answer, 400)
    error_of(http.put("/v1/masks/legal", json={"fil": "a"}), 400, param="fil")


# In process, where no server can be made to fail so.


class Broke(ServerError):
    status = 429
    param = None


def test_types_follow_the_status_and_429_and_503_say_when_to_come_back():
    app = FastAPI()
    app.router.route_class = StrictRoute

    @app.get("/{status}")
    def fail(status: int) -> None:
        raise type("Failure", (Broke,), {"status": status})("broke")

    errors.register(app)
    client = TestClient(app)
    for status, kind in {
        400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
        404: "not_found_error", 409: "invalid_request_error", 413: "invalid_request_error",
        429: "rate_limit_error", 500: "server_error", 503: "server_error",
    }.items():  # fmt: skip
        answer = client.get(f"/{status}")
        assert error_of(answer, status, kind) == "broke"
        assert ("retry-after" in answer.headers) == (status in (429, 503))


def test_the_openai_client_raises_what_it_would_for_openai(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="boss", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(model="base", **ASK, extra_body={"max_token": 3})
        assert raised.value.param == "max_token"
        assert raised.value.type == "invalid_request_error"
