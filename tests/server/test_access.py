"""Who may do what: keys, roles, limits, and the routes that there are."""

import asyncio
import json
import re
import threading
import time
from contextlib import ExitStack
from hashlib import sha256

import httpx
import openai
import pytest
from fastapi import Request, Response
from running import KEYS, Server, bearer, sent
from test_api import metric

from maskllm import cli
from server.access import Access, BadKeys, Bucket, Caller, Gate, Key, admin, read_keys
from server.errors import InvalidKey, NotAllowed, Overloaded, RateLimited

ASK = {"prompt": "The Secretary shall", "max_tokens": 4, "temperature": 0, "ignore_eos": True}

ROUTES = {
    ("GET", "/"): "open",
    ("GET", "/health"): "open",
    ("GET", "/metrics"): "admin",  # or use, of all masks
    ("GET", "/openapi.json"): "open",
    ("HEAD", "/openapi.json"): "open",
    ("GET", "/version"): "use",
    ("GET", "/v1/models"): "use",
    ("GET", "/v1/masks"): "use",
    ("GET", "/v1/masks/{name}"): "use",
    ("POST", "/v1/completions"): "use",
    ("POST", "/v1/chat/completions"): "use",
    ("POST", "/tokenize"): "use",
    ("POST", "/detokenize"): "use",
    ("PUT", "/v1/masks/{name}"): "admin",
    ("DELETE", "/v1/masks/{name}"): "admin",
    ("POST", "/v1/masks/{name}/load"): "admin",
    ("PUT", "/v1/masks/{name}/pin"): "admin",
    ("DELETE", "/v1/masks/{name}/pin"): "admin",
    ("GET", "/v1/aliases"): "use",
    ("PUT", "/v1/aliases/{name}"): "admin",
    ("DELETE", "/v1/aliases/{name}"): "admin",
    ("GET", "/v1/capacity"): "admin",
}
"""Every route of the server, and the role that it needs. A new one is entered here by hand."""


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def key(**fields: object) -> Key:
    return Key.model_validate({"id": "k", "sha256": sha256(b"secret").hexdigest(), "role": "use", **fields})


@pytest.mark.parametrize("given", ["first", "last", "none of them", None])
def test_every_key_is_compared_in_constant_time_whichever_is_given(monkeypatch, given):
    hashes = {id: sha256(id.encode()).hexdigest() for id in ("first", "second", "last")}
    access = Access([key(id=id, sha256=digest) for id, digest in hashes.items()], max_waiting=1)
    compared = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    if given in hashes:
        assert access.who(given).key.id == given
    else:
        with pytest.raises(InvalidKey):
            access.who(given)
    asked = sha256((given or "").encode()).hexdigest()
    assert compared == [(digest, asked) for digest in hashes.values()]


# Routes.


def test_the_server_has_these_routes_and_no_other(server: Server):
    logged = re.search("routes: (.*)", server.log.read_text())
    assert logged
    assert {tuple(route.split(" ")) for route in logged[1].split(", ")} == set(ROUTES)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc", "/pause", "/sleep",
        "/server_info", "/reset_prefix_cache", "/update_weights", "/invocations", "/ping", "/load",
        "/v1/responses", "/v1/embeddings", "/score", "/metrics/", "/docs", "/redoc",
    ],
)  # fmt: skip
def test_what_else_vllms_own_server_has_is_not_there(server: Server, path: str):
    with server.client() as http:
        assert {http.request(method, path, json={}).status_code for method in ("GET", "POST")} <= {
            404,
            307,
            405,
        }
        assert http.get(path, follow_redirects=True).status_code == (200 if path == "/metrics/" else 404)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_each_route_asks_for_the_role_of_the_list(server: Server, method: str, path: str):
    role, url = ROUTES[method, path], path.format(name="legal")
    body = {"json": {}} if method == "POST" else {}
    with server.client("stranger") as stranger, server.client("acme") as user:
        for headers in ({}, {"Authorization": ""}):
            refused = stranger.request(method, url, headers=headers, **body)
            assert (refused.status_code == 401) == (role != "open")
        assert (user.request(method, url, **body).status_code == 403) == (role == "admin")
    if role != "open":
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["type"] == "authentication_error"


# Keys.


def test_the_openai_client_raises_its_own_errors_for_keys_and_limits(server: Server):
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    with client("stranger") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with client("acme") as acme, pytest.raises(openai.PermissionDeniedError, match="it may use: legal"):
        acme.completions.create(model="medical", prompt="The")


def test_metrics_are_for_keys_of_all_masks_and_polling_them_is_not_logged(server: Server):
    with server.client("hasty") as all_, server.client("acme") as some:
        seen = all_.get("/metrics", headers={"X-Request-Id": "scrape"})
        refused = some.get("/metrics", headers={"X-Request-Id": "peek"})
    assert (seen.status_code, refused.status_code) == (200, 403)
    assert "/metrics names all of them" in refused.json()["error"]["message"]
    assert '"scrape"' not in server.log.read_text()


def test_a_key_for_some_masks_uses_and_sees_only_these(server: Server):
    with server.client("acme") as http:
        assert http.post("/v1/completions", params={"mask": "legal"}, json=ASK).status_code == 200
        for how in (
            {"params": {"mask": "medical"}},
            {"headers": {"X-Mask": "medical"}},
            {"json": {**ASK, "mask": "medical"}},
            {"json": {**ASK, "model": "base:medical"}},
            {"json": {**ASK, "model": "medical@0123456789ab"}},
            {"params": {"mask": "not-there"}},
            {"params": {"mask": "none"}},
            {"json": {**ASK, "model": "base"}},
        ):
            answer = http.post("/v1/completions", **{"json": ASK, **how})
            assert answer.status_code == 403, how
            assert "it may use: legal" in answer.json()["error"]["message"]
        assert http.post("/tokenize", json={"model": "medical", "prompt": "a"}).status_code == 403
        assert http.get("/v1/masks/medical").status_code == 403
        masks = http.get("/v1/masks").json()
        assert [mask["id"] for mask in masks["data"]] == ["legal"]
        assert masks["refused"] == {}
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["legal"]


def test_a_key_of_the_command_line_opens_the_server_that_has_its_entry(capsys, tmp_path):
    cli.main(["key", "alice", "--masks", "legal", "medical", "--concurrency", "2", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["key"] not in json.dumps(made["entry"])
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([made["entry"]]))
    for source in (str(file), file.read_text()):  # by --keys FILE, and by MASKLLM_KEYS
        caller = Access(read_keys(source), 1).who(made["key"])
        assert (caller.key.id, caller.key.masks, caller.key.concurrency) == ("alice", ["legal", "medical"], 2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "the list is empty"),
        ([{"id": "a", "sha256": "0" * 64}], "--keys 0 role: Field required"),
        ([{"id": "a", "sha256": "0" * 63, "role": "use"}], "--keys 0 sha256: String should match"),
        ([{"id": "a", "sha256": "0" * 64, "role": "use", "mask": "x"}], "--keys 0 mask: Extra inputs"),
        ([{"id": "a", "sha256": c * 64, "role": "use"} for c in "01"], "two entries have the same id"),
        ([{"id": c, "sha256": "0" * 64, "role": "use"} for c in "ab"], "two entries have the same sha256"),
    ],
)
def test_keys_that_cannot_be_meant_are_refused_at_start(entries, message):
    with pytest.raises(BadKeys, match=message):
        read_keys(json.dumps(entries))


def test_without_keys_everyone_is_a_user_and_nobody_an_admin():
    anyone = Access([], 1).who(None)
    anyone.check("legal", "none", "whatever")
    with pytest.raises(NotAllowed, match="maskllm key ID --role admin"):
        asyncio.run(admin(anyone))


def test_a_key_is_known_by_its_hash_alone():
    access = Access([key(), key(id="other", sha256=sha256(b"hidden").hexdigest())], 1)
    assert access.who("hidden").key.id == "other"
    for wrong in (None, "", "Secret", sha256(b"secret").hexdigest()):
        with pytest.raises(InvalidKey):
            access.who(wrong)


# Limits.


def test_a_bucket_starts_full_refills_evenly_and_says_truly_how_long_to_wait():
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.wait_s() == 1  # 60 a minute: one a second
    clock.now = 0.75
    assert bucket.wait_s() == 0.25
    clock.now = 1
    assert bucket.wait_s() == 0
    bucket.take(31)  # overdrawn by 30, and a whole one is wanted
    assert bucket.wait_s() == 31
    clock.now = 1000  # no more than full
    assert bucket.wait_s() == 0
    bucket.take(60)
    assert bucket.wait_s() == 1


def test_tokens_are_charged_when_a_request_has_ended_and_then_keep_the_next_one_out():
    clock = Clock()
    caller = Caller(key(tokens_per_minute=30), clock)
    with caller.turn():
        caller.charge(42)  # 12 more than there were
    with pytest.raises(RateLimited, match="try again in 26 s") as refused:  # 13 at two seconds each
        caller.turn().__enter__()
    assert "tokens a minute" in str(refused.value)
    assert refused.value.headers == {"Retry-After": "26"}
    clock.now = 26
    with caller.turn():
        pass


def test_a_request_that_was_refused_is_not_counted():
    clock = Clock()
    caller = Caller(key(requests_per_minute=1), clock)
    with caller.turn():
        pass
    for _ in range(5):
        with pytest.raises(RateLimited, match="try again in 60 s"):
            caller.turn().__enter__()
    clock.now = 60
    with caller.turn():
        pass


def test_one_request_more_than_the_server_takes_is_refused_and_the_next_is_not():
    access = Access([key()], max_waiting=1)
    with access.room():
        with pytest.raises(Overloaded) as refused:
            access.room().__enter__()
        assert refused.value.status == 503
    with access.room():
        pass


async def unread():
    raise AssertionError("the body was read")
    yield b""


def ask_the_door(door, path: str, key: str = "", **content) -> httpx.Response:
    async def holding(scope, receive, send) -> None:
        with ExitStack() as held:
            await door({**scope, "held": held}, receive, send)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(holding)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=bearer(key)) as http:
            return await http.post(path, **content)

    return asyncio.run(ask())


def test_a_strangers_body_is_not_read():
    async def app(scope, receive, send) -> None:
        await Response(await Request(scope, receive).body())(scope, receive, send)

    door = Gate(app, Access([key()], max_waiting=1))
    for path in ("/v1/aliases/law", "/v1/nothing"):
        assert ask_the_door(door, path, "other", content=unread()).status_code == 401
    refused = ask_the_door(door, "/v1/completions", "other", content=unread())
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert ask_the_door(door, "/v1/completions", "secret", content=b"hi").text == "hi"


def test_where_no_more_is_taken_a_request_that_computes_is_refused_unread_and_others_pass():
    access, reached = Access([], max_waiting=1), []

    async def app(scope, receive, send) -> None:
        reached.append(scope["path"])
        await Response()(scope, receive, send)

    def ask(path: str, **content) -> httpx.Response:
        return ask_the_door(Gate(app, access), path, **content)

    with access.room():
        refused = ask("/v1/completions", content=unread())
        assert ask("/v1/masks").status_code == 200
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["type"] == "server_error"
    assert ask("/v1/completions").status_code == 200
    assert reached == ["/v1/masks", "/v1/completions"]


def test_a_key_at_its_limit_is_refused_unread_and_its_request_under_way_counts_from_its_headers_on():
    door, clock = asyncio.Event(), Clock()

    async def app(scope, receive, send) -> None:
        await door.wait()  # as for a body that comes slowly
        await Response()(scope, receive, send)

    gate = Gate(app, Access([key(concurrency=1, requests_per_minute=2)], max_waiting=9, clock=clock))

    async def ask(http: httpx.AsyncClient, content: object) -> httpx.Response:
        return await http.post("/v1/completions", content=content)

    async def three() -> list[httpx.Response]:
        async def holding(scope, receive, send) -> None:
            with ExitStack() as held:
                await gate({**scope, "held": held}, receive, send)

        transport = httpx.ASGITransport(holding)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", headers=bearer("secret")
        ) as http:
            slow = asyncio.create_task(ask(http, b"not yet JSON"))
            await asyncio.sleep(0.01)
            beside = await ask(http, unread())
            door.set()
            return [beside, await slow, await ask(http, b"{"), await ask(http, unread())]

    beside, slow, next_one, third = asyncio.run(three())
    assert "1 requests in flight" in beside.json()["error"]["message"]
    assert "2 requests a minute" in third.json()["error"]["message"]  # whatever was in them
    assert [a.status_code for a in (beside, slow, next_one, third)] == [429, 200, 200, 429]


def test_the_third_of_two_requests_a_minute_is_a_429_that_says_when_to_come_back(server: Server):
    with server.client("hasty") as http:
        statuses = [http.post("/v1/completions", json=ASK).status_code for _ in range(2)]
        refused = http.post("/v1/completions", json=ASK)
    assert statuses == [200, 200]
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "2 requests a minute" in refused.json()["error"]["message"]


def test_tokens_of_a_stream_are_charged_too(server: Server):
    with server.client("wordy") as http:
        assert "[DONE]" in http.post("/v1/completions", json={**ASK, "max_tokens": 60, "stream": True}).text
        refused = http.post("/v1/completions", json=ASK)
    assert refused.status_code == 429
    assert "30 tokens a minute" in refused.json()["error"]["message"]


def test_tokens_of_an_answer_that_its_client_did_not_wait_for_are_charged_too(server: Server):
    with server.client("hurried") as http:
        long = {**ASK, "max_tokens": 450}
        before = metric(http, "vllm:generation_tokens_total")
        with sent(server, "POST", "/v1/completions", "hurried", json.dumps(long).encode(), key="hurried"):
            while metric(http, "vllm:generation_tokens_total") == before:
                time.sleep(0.01)
        for _ in range(200):
            if metric(http, "maskllm_key_requests_total", key="hurried", status="499"):
                break
            time.sleep(0.05)
        refused = http.post("/v1/completions", json=ASK)
    assert refused.status_code == 429
    assert "10 tokens a minute" in refused.json()["error"]["message"]


def test_a_key_for_one_request_at_a_time_gets_its_next_when_the_first_has_ended(server: Server):
    long = {**ASK, "max_tokens": 300, "stream": True}
    with server.client("single") as http, server.client("single") as other:
        for leave in (False, True):  # read to the end, or hang up
            with http.stream("POST", "/v1/completions", json=long) as stream:
                next(lines := stream.iter_lines())
                refused = other.post("/v1/completions", json=ASK)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                if not leave:
                    assert list(lines)[-2:] == ["data: [DONE]", ""]
            done = threading.Event()
            for _ in range(100):
                if other.post("/v1/completions", json=ASK).status_code == 200:
                    break
                done.wait(0.05)
            else:
                pytest.fail("the first request is still in flight")


def test_every_key_of_the_tests_is_known(server: Server):
    for name in KEYS:
        with server.client(name) as http:
            assert http.get("/version", headers=bearer(name)).status_code == 200
