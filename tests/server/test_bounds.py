"""What no client can do to the server: too much in one request."""

import asyncio
import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import MAX_COMPLETION_TOKENS, Server
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send
from test_api import metric

from server.access import Caller, Key
from server.bounds import (
    MAX_HEADER_BYTES,
    MOST_LOGPROBS,
    MOST_PIPELINED,
    SMALL_BODY_BYTES,
    BodyLimit,
    check,
)
from server.engine.openai import CompletionRequest
from server.errors import TooMuch
from server.settings import Settings

MAX_BODY_BYTES = 4 << 20
ASK = {"prompt": "The Secretary shall", "max_tokens": 4}
JSON = {"content-type": "application/json"}


def talk(server: Server, *parts: bytes) -> tuple[int, bytes]:
    """Send raw bytes until the server answers; how many were sent by then, and the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    sent, answer = 0, b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                sent += len(part)
            while chunk := connection.recv(65536):
                answer += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass
    return sent, answer


def peak_bytes(server: Server) -> int:
    """The most memory that the API's process has had."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/PID/status is Linux's")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{}] * 200_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 20_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 200_000}]}),
        ("/v1/chat/completions", {"messages": [{}] * 16_000}),
        ("/v1/completions", {"prompt": [-1] * 200_000}),
        ("/v1/completions", {"prompt": "a", "stop": [1] * 200_000}),
        ("/tokenize", {"messages": [{}] * 200_000}),
    ],
)
def test_many_small_things_that_are_wrong_are_told_at_once_and_take_no_memory(server: Server, path, body):
    """pydantic makes up to a dozen errors of each: 4 MB of them took a minute and 20 GB."""
    with server.client() as http:
        http.get("/version")
        before, begin = peak_bytes(server), time.monotonic()
        answer = http.post(path, json=body)
        took = time.monotonic() - begin
    assert answer.status_code == 400
    assert len(answer.text) < 1000
    assert took < 5
    assert peak_bytes(server) - before < 300e6


@pytest.mark.parametrize("kind", ["text", "refusal", "thinking"])
def test_a_text_longer_than_any_prompt_is_refused_whatever_it_is_called(server: Server, kind: str):
    part = {"type": kind, kind: "a" * 1_000_000}
    with server.client() as http:
        answer = http.post("/tokenize", json={"messages": [{"role": "assistant", "content": [part]}]})
    assert answer.status_code == 400
    assert "are too many: this model's prompts have at most" in answer.json()["error"]["message"]


def test_more_tokens_than_any_prompt_has_are_not_made_text(server: Server):
    with server.client() as http:
        answer = http.post("/detokenize", json={"tokens": [5] * 1_000_000})
        fit = http.post("/detokenize", json={"tokens": [5] * 2000})
    assert (answer.status_code, fit.status_code) == (400, 200)
    assert answer.json()["error"]["param"] == "tokens"


@pytest.mark.parametrize("length", ["declared", "chunked"])
def test_a_body_that_is_too_large_is_a_413_and_is_not_read_to_its_end(server: Server, length: str):
    def body() -> Iterator[bytes]:
        for _ in range(5):
            yield b" " * (1 << 20)

    content = b" " * (MAX_BODY_BYTES + 1) if length == "declared" else body()
    with server.client() as http:
        answer = http.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.headers["connection"] == "close"
        padded = json.dumps(ASK).encode().ljust(MAX_BODY_BYTES)
        assert http.post("/v1/completions", content=padded, headers=JSON).status_code == 200


def test_a_length_that_is_too_large_is_refused_before_a_byte_of_the_body(server: Server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    _, answer = talk(server, head + b"Authorization: Bearer boss\r\nContent-Length: 9999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("key", [None, "one"])
def test_large_bodies_share_so_much_memory_and_small_ones_pass(monkeypatch: pytest.MonkeyPatch, key):
    """All together, or those of a key."""
    monkeypatch.setattr("server.bounds.LARGE_BODIES_A_KEY" if key else "server.bounds.LARGE_BODIES", 2)
    most, held = SMALL_BODY_BYTES + 1, asyncio.Event()
    callers = {id: Caller(Key(id=id, sha256="0" * 64, role="use")) for id in ("one", "two")}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/upload":
            scope["state"]["max_body_bytes"] = 2 * most
        content = await Request(scope, receive).body()
        await held.wait()
        await send({"type": "length", "of": len(content)})

    limit = BodyLimit(app, most)

    async def ask(size: int, path: str = "/", key: str | None = key) -> int:
        sent = []
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        scope |= {"caller": callers[key]} if key else {}

        async def receive() -> Message:
            return {"type": "http.request", "body": bytes(size), "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message["of"])

        await limit(scope, receive, send)
        return sent[0]

    async def all_at_once() -> None:
        holding = [asyncio.create_task(ask(most)) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(HTTPException) as refused:
            await ask(most)
        assert (refused.value.status_code, refused.value.headers) == (503, {"connection": "close"})
        small = [asyncio.create_task(ask(SMALL_BODY_BYTES)) for _ in range(9)]
        upload = asyncio.create_task(ask(2 * most, "/upload"))
        other = [asyncio.create_task(ask(most, key="two"))] if key else []
        await asyncio.sleep(0.01)
        assert limit._held.total() == (2 + len(other)) * most
        held.set()
        sizes = await asyncio.gather(*holding, *other, *small, upload)
        assert sizes == [most] * (2 + len(other)) + [SMALL_BODY_BYTES] * 9 + [2 * most]
        assert limit._held.total() == 0

    asyncio.run(all_at_once())


def test_requests_sent_at_once_are_answered_in_turn_unless_there_are_very_many(server: Server):
    """uvicorn would read thousands more with each that it answers."""
    one = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    last = one.replace(b"Host", b"Connection: close\r\nHost")
    _, answers = talk(server, one * (MOST_PIPELINED - 1) + last)
    assert answers.count(b"HTTP/1.1 200") == MOST_PIPELINED
    _, answers = talk(server, one * 1000)
    assert answers.count(b"HTTP/1.1") <= MOST_PIPELINED + 1


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is Linux's")
def test_a_small_answer_comes_in_one_piece(server: Server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for asked in (1, 2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            while not (piece := connection.recv(65536)).endswith(b"ok"):
                assert piece
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
            assert int.from_bytes(info[152:156], sys.byteorder) == asked  # tcpi_data_segs_in


@pytest.mark.parametrize(
    "flood",
    [
        b"".join(b"x-%d: a\r\n" % i for i in range(20_000)),
        b"x: " + b"a" * 300_000,
        b"x-" * 150_000,
    ],
    ids=["many", "long value", "long name"],
)
def test_headers_without_end_are_a_400(server: Server, flood: bytes):
    assert len(flood) > 2 * MAX_HEADER_BYTES
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    parts = [head, *(flood[at : at + 1000] for at in range(0, len(flood), 1000))]
    sent, answer = talk(server, *parts)
    assert answer.startswith(b"HTTP/1.1 400 ") or sent < len(flood)
    with server.client() as http:
        assert http.get("/health", headers={"x": "a" * 30_000}).status_code == 200


def test_headers_that_are_a_little_too_large_are_a_400(server: Server):
    long = b"GET /health HTTP/1.1\r\nHost: x\r\nx: " + b"a" * (MAX_HEADER_BYTES + 1) + b"\r\n\r\n"
    assert talk(server, long)[1].startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ',
        b"[1]",
        b"",
    ],
    ids=["deep list", "deep object", "not UTF-8", "half a surrogate", "cut off", "a list", "nothing"],
)
def test_a_body_that_cannot_be_read_is_a_400_in_openais_shape(server: Server, content: bytes):
    with server.client() as http:
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = http.post(path, content=content, headers=JSON)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"]
        assert http.post("/v1/completions", json=ASK).status_code == 200


def test_a_path_or_method_that_is_not_there_is_an_error_in_openais_shape(server: Server):
    with server.client() as http:
        missing, wrong = http.get("/v1/nothing"), http.get("/v1/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, 404)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"n": 17}, "n"),
        ("/v1/completions", {"prompt": ["a"] * 129}, "prompt"),
        ("/v1/completions", {"prompt": [[1]] * 129}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ("/v1/completions", {"max_tokens": MAX_COMPLETION_TOKENS + 1}, "max_tokens"),
        (
            "/v1/chat/completions",
            {"max_completion_tokens": MAX_COMPLETION_TOKENS + 1},
            "max_completion_tokens",
        ),
        ("/v1/chat/completions", {"n": 17}, "n"),
    ],
)
def test_what_is_more_than_one_request_may_have_is_refused_by_name(server: Server, path, fields, param):
    base = ASK if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    with server.client() as http:
        answer = http.post(path, json={**base, **fields})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert "are too many: this server gives at most" in answer.json()["error"]["message"]


@pytest.mark.parametrize("sent", [{"prompt": "a"}, {"prompt": "a", "max_tokens": None}])
def test_what_a_client_leaves_to_the_server_is_not_too_much(tmp_path: Path, sent: dict):
    """OpenAI's 16 tokens are more than this operator gives."""
    settings = Settings(model="base", masks=tmp_path, max_completion_tokens=8)
    check(CompletionRequest(**sent), sent, settings)
    with pytest.raises(TooMuch, match="16 tokens of an answer are too many: this server gives at most 8"):
        check(CompletionRequest(prompt="a", max_tokens=16), {"prompt": "a", "max_tokens": 16}, settings)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"n": 3}, "3 answers to a prompt are too many: this server gives at most 2"),
        ({"prompt": ["a"] * 4, "n": 2}, r"8 answers \(4 prompts times n=2\) .* at most 6"),
        ({"max_tokens": 9}, "9 tokens of an answer are too many: this server gives at most 8"),
    ],
)
def test_an_operators_own_limits_are_the_ones_that_hold(tmp_path: Path, fields: dict, told: str):
    own = Settings(model="base", masks=tmp_path, max_n=2, max_prompts=6, max_completion_tokens=8)
    sent = {"prompt": "a", "max_tokens": 8, "n": 2}
    check(CompletionRequest(**sent), sent, own)
    with pytest.raises(TooMuch, match=told):
        check(CompletionRequest(**sent | fields), sent | fields, own)


def test_every_answer_counts_not_every_prompt(server: Server):
    with server.client() as http:
        answer = http.post("/v1/completions", json={**ASK, "prompt": ["a"] * 65, "n": 2})
    message = answer.json()["error"]["message"]
    assert message == "130 answers (65 prompts times n=2) are too many: this server gives at most 128"


@pytest.mark.parametrize(
    "fields",
    [{"prompt_logprobs": 20}, {"echo": True, "logprobs": 20}, {"echo": True, "logprobs": 20, "stream": True}],
)
def test_more_logprobs_of_prompts_than_are_written_at_a_time_are_refused_before_any_is_made(
    server: Server, fields
):
    """32 times 400 tokens, of each 21 in answers to it; the next prompt is one too many."""
    most, each = 256 * 1024, 400 * 21
    assert most == MOST_LOGPROBS
    assert 31 * each < most < 32 * each
    with server.client() as http:
        body = {**ASK, "prompt": [[1] * 400] * 128, "max_tokens": 1, **fields}
        begun = metric(http, "vllm:prompt_tokens_total")
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt_logprobs"
        assert f"asks for {32 * each} logprobs of its prompts' tokens" in answer.json()["error"]["message"]
        assert metric(http, "vllm:prompt_tokens_total") == begun
        several = http.post(
            "/v1/completions", json={**body, "prompt": [[1] * 400] * 3, "n": 11, "stream": False}
        )
        assert several.json()["error"]["param"] == "prompt_logprobs"  # each answer has them


def test_as_much_as_one_request_may_have_is_answered(server: Server):
    with server.client() as http:
        for fields in (
            {"n": 16, "max_tokens": 1},
            {"prompt": ["a"] * 64, "n": 2, "max_tokens": 1},
            {"prompt": [1] * 200},
            {"max_tokens": MAX_COMPLETION_TOKENS},
        ):
            body = {**ASK, "stop": ["e"], **fields}
            assert http.post("/v1/completions", json=body).status_code == 200
