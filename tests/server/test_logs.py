"""What the server writes of each request, and what it does not."""

import asyncio
import json
import logging.handlers
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from uuid import uuid4

import pytest
from prometheus_client import CollectorRegistry
from running import Server, sent
from starlette.types import Message, Receive, Scope, Send
from test_api import label, metric

from server import logs
from server.logs import CURRENT, MOST_LINES, WRITE_S, Lines, RequestLog
from server.metrics import Metrics

ASK = {"prompt": "xylophone", "max_tokens": 4, "ignore_eos": True}


def line(server: Server, request_id: str) -> dict:
    """The one line of a request; it is written after the answer."""
    for _ in range(100):
        lines = [json.loads(text) for text in server.log.read_text().splitlines() if text.startswith("{")]
        if found := [line for line in lines if line["request_id"] == request_id]:
            assert len(found) == 1
            return found[0]
        time.sleep(0.05)
    pytest.fail(f"no line for {request_id}")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line_of_json_without_its_text(server: Server, stream: bool):
    name = f"test-{stream}"
    with server.client("acme") as http, server.client() as boss:
        before = metric(boss, "maskllm_key_tokens_total", key="acme")
        body = {**ASK, "prompt": ["xylophone"] * 2, "mask": "legal", "stream": stream}
        answer = http.post("/v1/completions", json=body, headers={"X-Request-Id": name})
        prompt = len(http.post("/tokenize", json={"model": "legal", "prompt": "xylophone"}).json()["tokens"])
        logged = line(server, name)
        assert metric(boss, "maskllm_key_tokens_total", key="acme") == before + 2 * prompt + 8
    assert answer.headers["x-request-id"] == name
    assert logged.pop("time").endswith("+00:00")
    assert 0 < logged.pop("ttft_s") < logged.pop("e2e_s") < 60
    assert logged == {
        "request_id": name, "method": "POST", "path": "/v1/completions", "status": 200, "key": "acme",
        "mask": label("legal"), "prompt_tokens": 2 * prompt, "completion_tokens": 8,
    }  # fmt: skip
    assert "xylophone" not in server.log.read_text()


def test_refusals_are_logged_with_their_status_and_an_id_that_the_client_gets(server: Server):
    with server.client("stranger") as http:
        answer = http.post("/v1/completions", json=ASK, headers={"X-Request-Id": "no spaces\tor tabs"})
    made = answer.headers["x-request-id"]
    assert len(made) == 32
    logged = line(server, made)
    assert (logged["status"], logged["key"], logged["mask"]) == (401, None, None)


@pytest.mark.parametrize(
    ("stream", "n", "more"),
    [(True, 1, b""), (True, 3, b""), (False, 1, b""), (False, 3, b""), (True, 1, b"GET / HTTP/1.1\r\n\r\n")],
    ids=["stream", "streams", "whole", "wholes", "another request sent behind it"],
)
def test_a_client_that_hangs_up_is_logged_as_499_with_what_it_cost(
    server: Server, stream: bool, n: int, more: bytes
):
    id = uuid4().hex
    long = {**ASK, "max_tokens": 400, "n": n, "temperature": 1.0, "ignore_eos": True, "stream": stream}
    with server.client() as http:
        prompt = len(http.post("/tokenize", json={"prompt": ASK["prompt"]}).json()["tokens"])
        http.post("/v1/completions", json={**long, "max_tokens": 2})  # compiles what a batch of n needs
        before = metric(http, "vllm:generation_tokens_total")
        with sent(server, "POST", "/v1/completions", id, json.dumps(long).encode()) as connection:
            connection.sendall(more)
            while metric(http, "vllm:generation_tokens_total") == before:
                time.sleep(0.01)
    logged = line(server, id)
    assert logged["status"] == 499
    assert 1 <= logged["completion_tokens"] < 400 * n
    assert logged["prompt_tokens"] == prompt


@pytest.mark.parametrize("path", ["/v1/masks/cut-off", "/v1/completions"])
def test_a_client_that_leaves_in_the_middle_of_its_body_is_a_499_and_leaves_nothing(
    server: Server, path: str
):
    id, tracebacks = uuid4().hex, server.log.read_text().count("Traceback")
    method = "PUT" if "masks" in path else "POST"
    with sent(server, method, path, id, b'{"prompt"', size=1000):
        time.sleep(0.3)
        assert len(list(server.masks.glob(".*.partial"))) == (method == "PUT")
    assert line(server, id)["status"] == 499
    assert not list(server.masks.glob(".*.partial"))
    with server.client() as http:
        assert http.get("/version").status_code == 200  # by now uvicorn has said what it would
    assert server.log.read_text().count("Traceback") == tracebacks


@pytest.mark.parametrize(
    ("body", "status"), [(b"{", 400), (b" " * (5 << 20), 413)], ids=["no JSON", "too large"]
)
def test_a_body_that_is_refused_is_logged_with_its_key(server: Server, body: bytes, status: int):
    with server.client("acme") as http:
        headers = {"content-type": "application/json"}
        answer = http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == status
    logged = line(server, answer.headers["x-request-id"])
    assert (logged["status"], logged["key"]) == (status, "acme")


@pytest.mark.parametrize(
    ("failure", "status"), [(OSError("of a secret"), 500), (asyncio.CancelledError(), 503)]
)
def test_a_request_that_the_server_fails_at_or_does_not_finish_has_an_id_too(failure, status):
    sent: list[Message] = []

    async def app(*_: object) -> None:
        raise failure

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    log = RequestLog(app, Metrics(CollectorRegistry()), paths=[])
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", b"mine")]}
    with pytest.raises(type(failure)):
        asyncio.run(log(scope, receive, send))
    start, body = sent
    headers = dict(start["headers"])
    assert (start["status"], headers[b"x-request-id"]) == (status, b"mine")
    assert headers.get(b"retry-after") == (b"1" if status == 503 else None)
    error = json.loads(body["body"])["error"]
    assert (error["code"], error["type"]) == (status, "server_error")
    assert "secret" not in error["message"]


LINES = """
import asyncio, logging, sys, uvicorn
from pathlib import Path
from server import logs

file, wait_s = Path(sys.argv[1]), float(sys.argv[2])
logging.basicConfig(level=logging.INFO)
logs.write_to(file)
uvicorn.Config("app")

async def main():
    for number in range(3):
        logs.LINES.add({"line": number})
    assert not file.read_text()
    await asyncio.sleep(wait_s)
    print(file.read_text())

asyncio.run(main())
"""


@pytest.mark.parametrize("wait_s", [0.0, 2 * WRITE_S])
def test_lines_are_written_together_soon_or_when_the_server_ends(tmp_path: Path, wait_s: float):
    file = tmp_path / "requests.log"
    command = [sys.executable, "-c", LINES, str(file), str(wait_s)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    written = file.read_text()
    assert [json.loads(line) for line in written.splitlines()] == [{"line": number} for number in range(3)]
    assert printed.strip() == (written.strip() if wait_s else "")


def test_a_log_that_cannot_be_written_for_a_while_goes_on_later_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As one is whose file was rotated to where the server may not write."""
    target, fails = logging.handlers.WatchedFileHandler(tmp_path / "log"), True
    reopen = target.reopenIfNeeded

    def reopen_or_fail() -> None:
        if fails:
            raise PermissionError(13, "Permission denied")
        reopen()

    target.reopenIfNeeded = reopen_or_fail
    monkeypatch.setattr(logs.logger, "handlers", [target])
    caplog.set_level(logging.INFO, logs.logger.name)
    lines = Lines()

    async def log() -> None:
        nonlocal fails
        for number in (*range(MOST_LINES + 1), -1):
            fails = number >= 0
            lines.add({"line": number})
            if number == MOST_LINES - 1:
                assert not lines.waiting
            if number in (MOST_LINES, -1):
                await asyncio.sleep(2 * WRITE_S)
                assert not lines.waiting

    asyncio.run(log())
    target.close()
    assert (tmp_path / "log").read_text() == '{"line": -1}\n'
    told = [record.message for record in caplog.records if record.name == "maskllm"]
    why = "lines of the request log are lost: [Errno 13] Permission denied"
    assert told == [f"{MOST_LINES} {why}", f"1 {why}"]


@pytest.mark.parametrize(
    ("failure", "status"), [(OSError("of a secret"), 500), (asyncio.CancelledError(), 503)]
)
def test_a_stream_that_the_server_cuts_off_says_so_and_counts_as_failed(failure, status):
    sent: list[Message] = []
    ended: list[int] = []

    async def app(_: Scope, __: Receive, send: Send) -> None:
        CURRENT.get().count_error = ended.append
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise failure

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    metrics = Metrics(CollectorRegistry())
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    with pytest.raises(type(failure)):
        asyncio.run(RequestLog(app, metrics, paths=["/"])(scope, receive, send))
    *_, event = sent
    data, done = event["body"].decode().strip().split("\n\n")
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == status
    assert (done, event.get("more_body", False)) == ("data: [DONE]", False)
    assert ended == [status]
    assert metrics.responses.labels("/", status)._value.get() == 1


def test_health_checks_are_not_logged(server: Server):
    probe = uuid4().hex
    with server.client() as http:
        assert http.get("/health", headers={"X-Request-Id": probe}).headers["x-request-id"] == probe
        http.get("/version", headers={"X-Request-Id": "after"})
    assert line(server, "after")["key"] == "boss"
    assert probe not in server.log.read_text()
    assert '"GET /health HTTP/1.1" 200' not in server.log.read_text()


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_request_holds_is_given_up_when_it_has_ended_and_not_before(fails: bool):
    happened, kept = [], []

    async def app(scope: Scope, _: Receive, send: Send) -> None:
        scope["held"].callback(happened.append, "given up")
        kept.append(scope["held"])  # or Python would give it up by itself
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})
        if fails:
            raise OSError("after the answer")

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        happened.append(message["type"])

    log = RequestLog(app, Metrics(CollectorRegistry()), paths=[])
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(OSError, match="after the answer") if fails else nullcontext():
        asyncio.run(log(scope, receive, send))
    assert happened == ["http.response.start", "http.response.body", "given up"]
