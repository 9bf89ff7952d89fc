"""What the server survives: too many requests, too many masks, its engine's death, and being told to stop.

It also has every switch on that is off by default. These tests need a server that nobody else uses. They run
in order, and the last one ends it.
"""

import gzip
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from running import BASE, MASKS, ROOT, SLOTS, Server, sent, serving
from serving import free_port
from test_api import metric
from test_logs import line
from transformers import AutoTokenizer

from maskllm.capacity import engine_threads
from maskllm.kernels.masked_linear import backend
from server.logs import BEING_STOPPED

LONG = {"prompt": "The Secretary shall", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "The Secretary shall", "max_tokens": 8, "temperature": 0}
PACKED = 3
"""Masks that host memory may hold: fewer than there are."""
BATCH = 3
"""Requests that run at once; twice as many may be in flight."""
METRICS_PORT = free_port()


@pytest.fixture(scope="module")
def traces() -> Iterator[tuple[str, list[Span]]]:
    """An OpenTelemetry collector: where it listens, and what it was sent."""
    spans: list[Span] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{collector.server_port}/v1/traces", spans
        finally:
            collector.shutdown()


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory, traces: tuple[str, list[Span]]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("masks")
    for file in MASKS.glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "masks.json").write_text('{"aliases": {"law": {"legal": 1}}, "pinned": ["legal"]}')
    log = tmp_path_factory.mktemp("log") / "server.log"
    numbers = {"--packed": PACKED, "--max-num-seqs": BATCH, "--metrics-port": METRICS_PORT}
    options = [str(word) for option in numbers.items() for word in option]
    options += ["--lenient", "--log-prompts", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    options += ["--otlp-traces-endpoint", traces[0], "--allowed-origins", '["https://app.example"]']
    environment = {"CXX": "no-compiler", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with serving(folder, log, *options, **environment) as server:
        yield server


def aside(server: Server) -> httpx.Client:
    """Of the port for metrics."""
    return httpx.Client(base_url=f"{server.url.rpartition(':')[0]}:{METRICS_PORT}", timeout=60)


def engine_of(server: Server) -> psutil.Process:
    return next(p for p in psutil.Process(server.process.pid).children() if "EngineCore" in p.name())


def in_flight(server: Server, **options) -> tuple[threading.Thread, list[httpx.Response]]:
    """A long request, sent from a thread; returns once it is being answered."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        with server.client() as client:
            answers.append(client.post("/v1/completions", params={"mask": "legal"}, json={**LONG, **options}))

    thread = threading.Thread(target=ask)
    thread.start()
    with server.client() as client:
        while not client.get("/v1/masks/legal").json()["in_flight"]:
            time.sleep(0.01)
    time.sleep(0.2)
    return thread, answers


def test_what_was_pinned_and_named_is_there_from_the_start(lone: Server):
    with lone.client() as api:
        assert api.get("/v1/masks/legal").json()["state"] == "resident"
        answer = api.post("/v1/completions", params={"mask": "law"}, json=SHORT)
        assert answer.headers["X-Mask"].startswith("legal@")


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available() or os.sched_getscheduler(0) != os.SCHED_OTHER,
    reason="SCHED_BATCH is Linux's, for engines on a CPU that nobody has given real time",
)
def test_the_engine_has_its_share_of_processors_and_interrupts_nobody(lone: Server):
    engine = engine_of(lone)
    assert os.sched_getscheduler(engine.pid) == os.SCHED_BATCH
    assert engine.nice() == psutil.Process(lone.process.pid).nice()
    assert os.sched_getscheduler(lone.process.pid) == os.SCHED_OTHER


@pytest.mark.skipif(
    torch.cuda.is_available() or backend(torch.device("cpu")) is None,
    reason="the log tells the threads of our kernels for CPUs, which do not run here",
)
def test_a_step_leaves_a_processor_to_the_api(lone: Server):
    assert f"threads: {engine_threads()};" in lone.log.read_text()


def test_requests_whose_bodies_do_not_come_on_take_no_room_from_others(lone: Server):
    body = json.dumps(SHORT).encode()
    with ExitStack() as stack:
        for id in range(2 * BATCH):  # as many as the server takes
            half = sent(lone, "POST", "/v1/completions", f"half-{id}", body[:-1], size=len(body))
            stack.enter_context(half)
        with lone.client() as api:
            assert api.post("/v1/completions", json=SHORT).status_code == 200


def test_without_a_compiler_logprobs_are_answered_like_anything_else(lone: Server):
    with lone.client() as api:
        answer = api.post("/v1/completions", params={"mask": "legal"}, json={**SHORT, "logprobs": 2})
        assert answer.status_code == 200
        assert len(answer.json()["choices"][0]["logprobs"]["top_logprobs"]) == 8
        assert api.get("/health").status_code == 200


def test_a_browser_of_an_origin_that_is_allowed_may_ask_whether_it_may_without_a_key(lone: Server):
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://app.example", "https://app.example"), ("https://else.example", None)):
        with httpx.Client(base_url=lone.url, headers={"Origin": origin}) as browser:
            may = browser.options("/v1/completions", headers=ask)
            refused = browser.post("/v1/completions", json=SHORT)
        assert (may.status_code == 200) == bool(allowed)
        assert refused.status_code == 401
        assert refused.headers["access-control-expose-headers"] == "X-Mask, X-Request-Id, Retry-After"
        assert may.headers.get("access-control-allow-origin") == allowed
        assert refused.headers.get("access-control-allow-origin") == allowed


def test_told_to_be_lenient_it_ignores_unknown_fields_and_converts_types(lone: Server):
    with lone.client() as api:
        answer = api.post("/v1/completions", json={**SHORT, "max_token": 8, "max_tokens": "8"})
        beams = api.post("/v1/completions", json={**SHORT, "use_beam_search": True})
    assert beams.status_code == 400
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 8


def test_what_nobody_reads_may_be_anything_where_it_is_let_pass(lone: Server):
    with lone.client() as api:
        for stray in (["x"], 5):
            answer = api.post("/v1/completions", json={**SHORT, "messages": stray})
            assert answer.status_code == 200


def test_told_to_log_prompts_it_writes_them_and_never_answers(lone: Server):
    parts = [{"role": "user", "content": [{"type": "text", "text": "glockenspiel"}]}]
    with lone.client() as api:
        asked = api.post("/v1/completions", json={**SHORT, "prompt": "xylophone"})
        chatted = api.post("/v1/chat/completions", json={"messages": parts, "max_tokens": 4})
    for answer, prompt in ((asked, "xylophone"), (chatted, parts)):
        assert answer.status_code == 200
        assert line(lone, answer.headers["x-request-id"])["prompt"] == prompt
    assert asked.json()["choices"][0]["text"] not in lone.log.read_text()


def test_with_a_parser_tools_are_called_as_a_mask_answers(lone: Server):
    """A strict tool's arguments are held to its schema, whatever the model would say."""
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "pet", "parameters": schema, "strict": True}}
    ask = {"model": "medical", "messages": [{"role": "user", "content": "Which pet?"}], "max_tokens": 60}
    with openai.OpenAI(base_url=f"{lone.url}/v1", api_key="boss", max_retries=0) as client:
        for choice in ("required", {"type": "function", "function": {"name": "pet"}}):
            answer = client.chat.completions.with_raw_response.create(**ask, tools=[tool], tool_choice=choice)
            assert answer.headers["X-Mask"].startswith("medical@")
            calls = answer.parse().choices[0].message.tool_calls
            assert {call.function.name for call in calls} == {"pet"}
            assert all(json.loads(call.function.arguments)["kind"] in ("cat", "dog") for call in calls)
            with client.chat.completions.create(
                **ask, tools=[tool], tool_choice=choice, stream=True
            ) as stream:
                deltas = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
            first = [delta.function for delta in deltas if delta.index == 0]
            assert [part.name for part in first if part.name] == ["pet"]
            assert json.loads("".join(part.arguments or "" for part in first))["kind"] in ("cat", "dog")
        free = client.chat.completions.create(**ask, tools=[tool], tool_choice="auto").choices[0]
        assert free.message.content  # the demo calls nothing of its own accord
        assert not free.message.tool_calls


def test_a_tool_that_a_model_calls_by_itself_is_called_and_what_it_gave_is_read_in_the_next_turn(
    lone: Server, server: Server
):
    """The model is made to write the call, and nothing to make it one. The other server is strict."""
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    call = '<tool_call>{"name": "look_up", "arguments": {"word": "lien"}}</tool_call>'
    messages = [{"role": "user", "content": "What is a lien?"}]
    forced = {"structured_outputs": {"choice": [call]}}
    ask = {"model": "legal", "messages": messages, "tools": [tool], "max_tokens": 100, "extra_body": forced}
    with openai.OpenAI(base_url=f"{lone.url}/v1", api_key="boss", max_retries=0) as client:
        answer = client.chat.completions.create(**ask, tool_choice="auto").choices[0]
        (made,) = answer.message.tool_calls
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        assert (made.function.name, json.loads(made.function.arguments)) == ("look_up", {"word": "lien"})
        with client.chat.completions.create(**ask, stream=True) as stream:
            parts = [chunk.choices[0] for chunk in stream]
        deltas = [each.function for part in parts for each in part.delta.tool_calls or []]
        assert [delta.name for delta in deltas if delta.name] == ["look_up"]
        assert json.loads("".join(delta.arguments or "" for delta in deltas)) == {"word": "lien"}
        assert [part.finish_reason for part in parts if part.finish_reason] == ["tool_calls"]
    messages += [answer.message, {"role": "tool", "tool_call_id": made.id, "content": "A claim on goods."}]
    ask = {"model": "legal", "messages": messages, "max_tokens": 8, "extra_body": {"return_token_ids": True}}
    for each in (lone, server):
        with openai.OpenAI(base_url=f"{each.url}/v1", api_key="boss", max_retries=0) as client:
            turn = client.chat.completions.create(**ask)
        assert turn.choices[0].message.content
        read = AutoTokenizer.from_pretrained(BASE).decode(turn.prompt_token_ids, skip_special_tokens=True)
        assert read == "Question: What is a lien?\nAnswer: \nA claim on goods.\nAnswer:"


def test_told_where_to_send_traces_it_continues_the_callers_and_names_the_request(
    lone: Server, traces: tuple[str, list[Span]]
):
    caller = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{caller}-b7ad6b7169203331-01", "X-Request-Id": "traced"}
    with lone.client() as api:
        api.post("/v1/completions", params={"mask": "legal"}, json=SHORT, headers=headers)
    for _ in range(200):
        if mine := [span for span in traces[1] if span.trace_id.hex() == caller]:
            break
        time.sleep(0.1)
    (span,) = mine
    attributes = {each.key: each.value for each in span.attributes}
    assert "traced" in attributes["gen_ai.request.id"].string_value
    assert attributes["gen_ai.usage.completion_tokens"].int_value == SHORT["max_tokens"]


def test_metrics_have_the_port_they_were_given_and_no_other(lone: Server):
    with aside(lone) as watch, lone.client() as api:
        assert metric(watch, "maskllm_slots_total") == SLOTS
        assert watch.get("/health").text == "ok"
        assert watch.get("/v1/masks").status_code == 404
        assert api.get("/metrics").status_code == 404


def test_twice_as_many_requests_are_taken_as_run_at_once_and_the_rest_is_told_to_come_again(lone: Server):
    def ask(_: int) -> httpx.Response:
        with lone.client() as api:
            body, origin = {**LONG, "max_tokens": 100}, {"Origin": "https://app.example"}
            return api.post("/v1/completions", json=body, headers=origin)

    with ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(ask, range(10)))
    assert Counter(answer.status_code for answer in answers) == {200: 6, 503: 4}
    for answer in answers:
        assert "access-control-allow-origin" in answer.headers  # or a browser shows its page no refusal
        assert answer.status_code == 200 or int(answer.headers["Retry-After"]) > 0
    with lone.client() as api:
        assert api.post("/v1/completions", json=SHORT).status_code == 200


def test_host_memory_holds_no_more_masks_than_it_may_and_frees_the_least_recently_used(lone: Server):
    with lone.client() as api:
        for name in ("medical", "code", "medical", "novels"):
            assert api.post("/v1/completions", params={"mask": name}, json=SHORT).status_code == 200
        states = {mask["id"]: mask["state"] for mask in api.get("/v1/masks").json()["data"]}
        here = {name for name, state in states.items() if state != "known"}
        assert here == {"legal", "medical", "novels"}  # pinned, and the last two
        assert api.post("/v1/completions", params={"mask": "code"}, json=SHORT).status_code == 200


def test_masks_that_push_each_other_out_of_host_memory_are_all_answered(lone: Server):
    """A request must not hold what it waits for: its mask may be on the way out when it comes."""
    names = [file.stem for file in MASKS.glob("*.safetensors") if file.stem != "legal"]
    assert len(names) > PACKED - 1

    def ask(number: int) -> int:
        with lone.client() as api:
            body = {**SHORT, "mask": names[number % len(names)], "max_tokens": 1 + number % 8}
            return api.post("/v1/completions", json=body, timeout=30).status_code

    with ThreadPoolExecutor(2 * BATCH) as clients:
        counts = Counter(clients.map(ask, range(200)))
    assert counts.keys() <= {200, 503}, counts  # 503: all that host memory may hold were in use for 5 s
    assert counts[200] > 190


def test_a_folder_that_cannot_be_written_refuses_uploads_and_serves_on(lone: Server):
    if os.geteuid() == 0:
        lone.masks.joinpath("blocked.safetensors").mkdir()  # root may write everywhere, but over no folder
    else:
        lone.masks.chmod(0o500)
    content, binary = (MASKS / "legal.safetensors").read_bytes(), {"content-type": "application/octet-stream"}
    with lone.client() as api:
        refused = api.put("/v1/masks/blocked", content=content, headers=binary)
        assert refused.status_code == 507
        assert "the masks folder cannot be written" in refused.json()["error"]["message"]
        assert api.get("/v1/masks/blocked").status_code == 404
        assert api.post("/v1/completions", params={"mask": "legal"}, json=SHORT).status_code == 200
    lone.masks.chmod(0o700)
    assert not list(lone.masks.glob("*.partial"))


def test_when_the_engine_dies_requests_fail_at_once_and_another_engine_has_the_same_masks(lone: Server):
    def failed() -> float:
        return metric(watch, "maskllm_errors_total", mask="legal", status="503")

    with lone.client() as api, aside(lone) as watch:
        before = api.post("/v1/completions", params={"mask": "legal"}, json=SHORT).json()["choices"]
        states = {mask["id"]: mask["state"] for mask in api.get("/v1/masks").json()["data"]}
        failed_before = failed()
        whole, answers = in_flight(lone)
        stream, chunks = in_flight(lone, stream=True)
        engine_of(lone).kill()
        killed = time.monotonic()
        assert api.get("/v1/masks", timeout=5).status_code == 200  # asks an engine that will not answer
        whole.join(5)
        stream.join(5)
        assert time.monotonic() - killed < 5
        assert answers[0].status_code == 503
        assert int(answers[0].headers["Retry-After"]) > 0
        (event,) = [text for text in chunks[0].text.splitlines() if '"error"' in text]
        assert json.loads(event.removeprefix("data: ")) == answers[0].json()
        assert answers[0].json()["error"]["type"] == "server_error"
        assert line(lone, chunks[0].headers["x-request-id"])["status"] == 503
        assert failed() == failed_before + 2

        time.sleep(max(0, killed + 2 - time.monotonic()))
        assert api.get("/health").status_code == 503
        assert metric(watch, "maskllm_engine_up") == 0
        assert (
            "vllm:num_requests_running" not in watch.get("/metrics").text
        )  # nothing runs, as a gauge would say
        assert api.post("/v1/completions", params={"mask": "legal"}, json=SHORT).status_code == 503
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            refused = api.post(path, json=body)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
        assert api.get("/v1/masks").status_code == 200
        while api.get("/health").status_code == 503:
            assert time.monotonic() - killed < 240
            time.sleep(0.5)
        assert metric(watch, "maskllm_engine_up") == metric(watch, "maskllm_engine_restarts_total") == 1
        assert "vllm:num_requests_running" in watch.get("/metrics").text
        after = api.post("/v1/completions", params={"mask": "legal"}, json=SHORT)
        assert after.json()["choices"] == before
        again = {mask["id"]: mask["state"] for mask in api.get("/v1/masks").json()["data"]}
        assert again["legal"] == "resident"
        assert {n for n, state in again.items() if state == "known"} == {
            n for n, state in states.items() if state == "known"
        }


def test_told_to_stop_it_refuses_new_requests_finishes_those_in_flight_and_exits_with_0(lone: Server):
    running = [in_flight(lone), in_flight(lone, stream=True)]
    engine_of(lone).send_signal(signal.SIGINT)  # as Ctrl-C does in a terminal
    lone.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{lone.url}/health")
    for thread, answers in running:
        thread.join(60)
        assert answers[0].status_code == 200
    assert running[0][1][0].json()["usage"]["completion_tokens"] == 400
    assert running[1][1][0].text.endswith("data: [DONE]\n\n")
    assert lone.process.wait(60) == 0


def test_told_to_stop_it_ends_after_the_grace_what_would_go_on_and_says_so(tmp_path: Path):
    many = {"prompt": [LONG["prompt"]] * 4, "n": 16, "temperature": 1.0}  # 25,600 tokens: seconds
    with serving(MASKS, tmp_path / "server.log", "--grace-s", "1", CXX="no-compiler") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        whole, answers = in_flight(server, **many)
        stream, chunks = in_flight(server, **many, stream=True)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert time.monotonic() - told > 1
        assert psutil.wait_procs(children, timeout=5)[1] == []
        whole.join(5)
        stream.join(5)
        error = answers[0].json()["error"]
        assert answers[0].status_code == 503
        assert (error["code"], error["message"]) == BEING_STOPPED
        assert int(answers[0].headers["Retry-After"]) > 0
        *_, event, done, _ = chunks[0].text.split("\n\n")
        assert (json.loads(event.removeprefix("data: "))["error"], done) == (error, "data: [DONE]")
        for answer in (answers[0], chunks[0]):
            assert line(server, answer.headers["x-request-id"])["status"] == 503


def test_an_engine_that_hangs_is_replaced_and_told_to_stop_meanwhile_it_does_not_wait_for_that(
    tmp_path: Path,
):
    options = {"CXX": "no-compiler", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "4"}
    with serving(MASKS, tmp_path / "server.log", **options) as server:
        request, answers = in_flight(server)
        engine_of(server).suspend()
        request.join(30)
        assert answers[0].status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert "the engine has not answered for 4 s" in server.log.read_text()
        while "Initializing a V1 LLM engine" not in server.log.read_text().partition("starting another")[2]:
            time.sleep(0.05)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert psutil.wait_procs(children, timeout=5)[1] == []
        assert "init engine (" not in server.log.read_text().partition("starting another")[2]  # its end


def sign_for_this_machine(key: Path, certificate: Path) -> None:
    """A key and a certificate of it for 127.0.0.1, by itself and for a day."""
    secret, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(secret.public_key())
    made = made.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    made = made.serial_number(x509.random_serial_number()).add_extension(address, critical=False)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    key.write_bytes(secret.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    certificate.write_bytes(made.sign(secret, hashes.SHA256()).public_bytes(pem))


def test_with_a_certificate_it_speaks_tls_and_nothing_else(tmp_path: Path):
    key, certificate, port = tmp_path / "key.pem", tmp_path / "certificate.pem", free_port()
    sign_for_this_machine(key, certificate)
    command = [sys.executable, "-m", "server", "--model", BASE, "--masks", MASKS, "--port", str(port)]
    command += ["--ssl-keyfile", key, "--ssl-certfile", certificate, "--enforce-eager"]
    known = ssl.create_default_context(cafile=certificate)
    log = (tmp_path / "server.log").open("wb")
    with log, subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT) as server:
        try:
            with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=known, timeout=60) as api:
                deadline = time.monotonic() + 180
                while server.poll() is None and time.monotonic() < deadline:
                    with suppress(httpx.ConnectError):
                        if api.get("/health").status_code == 200:
                            break
                    time.sleep(0.2)
                answer = api.post("/v1/completions", params={"mask": "legal"}, json=SHORT)
            assert answer.headers["X-Mask"].startswith("legal@")
            with pytest.raises(httpx.RemoteProtocolError):
                httpx.get(f"http://127.0.0.1:{port}/health")
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()


def test_an_api_that_is_killed_takes_its_engine_along(tmp_path: Path):
    with serving(MASKS, tmp_path / "server.log", CXX="no-compiler") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert any("EngineCore" in child.name() for child in children)
        server.process.kill()
        assert psutil.wait_procs(children, timeout=10)[1] == []


def test_told_to_stop_before_it_is_up_it_ends_with_all_that_it_started(tmp_path: Path):
    log = tmp_path / "server.log"
    command = [sys.executable, "-m", "server", "--model", BASE, "--masks", MASKS, "--port", str(free_port())]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT) as server:
        while "Initializing a V1 LLM engine" not in log.read_text():
            time.sleep(0.05)
        children = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert children
    assert psutil.wait_procs(children, timeout=5)[1] == []
