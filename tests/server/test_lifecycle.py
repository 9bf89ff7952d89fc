"""Masks as living things: where they come from, what state they are in, and what they take."""

import functools
import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client import CollectorRegistry
from running import MASKS, Server, random_mask
from test_api import metric
from test_masks import Engine

from maskllm.core import maskset
from maskllm.core.base import Base
from server.masks import Masks
from server.metrics import Metrics

ASK = {"prompt": "The Secretary shall", "max_tokens": 4, "temperature": 0}
BINARY = {"content-type": "application/octet-stream"}


@pytest.fixture
def api(server: Server):
    with server.client() as client:
        yield client


def state(api, name: str) -> dict:
    return api.get(f"/v1/masks/{name}").json()


def test_an_upload_is_a_mask_at_once_and_a_file_of_the_folder(api, server: Server):
    content = (MASKS / "legal.safetensors").read_bytes()
    made = api.put("/v1/masks/law@v1", content=content, headers=BINARY)
    assert made.status_code == 201
    assert made.json()["sha256"] == hashlib.sha256(content).hexdigest()
    assert (server.masks / "law@v1.safetensors").read_bytes() == content
    answer = api.post("/v1/completions", params={"mask": "law@v1"}, json=ASK)
    legal = api.post("/v1/completions", params={"mask": "legal"}, json=ASK)
    assert answer.json()["choices"] == legal.json()["choices"]
    assert answer.headers["X-Mask"] == f"law@v1@{made.json()['sha256'][:12]}"
    assert api.delete("/v1/masks/law@v1").status_code == 204


def at_the_next_start(server: Server, base: Base) -> Masks:
    """What another start would find in the masks folder."""
    metrics = Metrics(CollectorRegistry())
    found = Masks(server.masks, "base", base, Engine(), server.slots, room=1 << 30, place=1, metrics=metrics)
    found.scan()
    return found


def test_a_mask_put_from_anothers_file_has_its_content_at_the_next_start_and_whatever_becomes_of_that_file(
    api, server: Server, base: Base
):
    one, two = ((MASKS / f"{name}.safetensors").read_bytes() for name in ("legal", "medical"))
    assert api.put("/v1/masks/vat@v1", content=one, headers=BINARY).status_code == 201
    assert api.put("/v1/masks/vat@v2", json={"file": "vat@v1.safetensors"}).status_code == 201
    assert api.put("/v1/masks/vat@v1", content=two, headers=BINARY).status_code == 200
    with (server.masks / "vat@v1.safetensors").open("r+b") as file:
        file.write(b"damaged")
    assert (server.masks / "vat@v2.safetensors").read_bytes() == one
    assert state(api, "vat@v2")["file"] == "vat@v2.safetensors"

    assert api.put("/v1/masks/vat@v1", json={"file": "medical.safetensors"}).status_code == 200
    assert api.put("/v1/masks/vat@v1", json={"file": "vat@v1.safetensors"}).status_code == 200  # its own
    assert api.put("/v1/aliases/vat", json={"masks": {"vat@v1": 90, "vat@v2": 10}}).status_code == 201
    again = at_the_next_start(server, base)
    assert {again.names.resolve(None, query="vat").name for _ in range(200)} == {"vat@v1", "vat@v2"}
    assert again.known["vat@v1"].mask_set.sha256 == hashlib.sha256(two).hexdigest()
    assert again.known["vat@v2"].mask_set.sha256 == hashlib.sha256(one).hexdigest()
    assert api.delete("/v1/aliases/vat").status_code == 204
    for name in ("vat@v1", "vat@v2"):
        assert api.delete(f"/v1/masks/{name}").status_code == 204


@pytest.mark.parametrize(
    ("file", "status", "message"),
    [
        ("gone", 400, "no file 'gone.safetensors' in the masks folder"),
        ("foreign", 400, "foreign.safetensors was made for base 000000000000"),
        ("folder", 400, "folder.safetensors cannot be read: Is a directory"),
        ("huge", 413, "the file is larger than"),
    ],
)
def test_a_file_that_is_no_mask_leaves_the_previous_version_of_every_name_and_no_file(
    api, server: Server, file: str, status: int, message: str
):
    (server.masks / "folder.safetensors").mkdir(exist_ok=True)
    with (server.masks / "huge.safetensors").open("wb") as huge:
        huge.truncate(1 << 30)
    assert api.put("/v1/masks/kept", json={"file": "legal.safetensors"}).status_code in (200, 201)
    before = state(api, "kept")
    files = sorted(server.masks.iterdir())
    refused = api.put("/v1/masks/kept", json={"file": f"{file}.safetensors"})
    assert refused.status_code == status
    assert message in refused.json()["error"]["message"]
    assert state(api, "kept") == before
    assert sorted(server.masks.iterdir()) == files
    (server.masks / "folder.safetensors").rmdir()
    (server.masks / "huge.safetensors").unlink()


def test_a_file_that_cannot_have_the_masks_name_is_a_507_and_no_mask(api, server: Server):
    own = server.masks / "stuck.safetensors"
    own.mkdir()
    files = sorted(server.masks.iterdir())
    refused = api.put("/v1/masks/stuck", json={"file": "legal.safetensors"})
    assert refused.status_code == 507
    assert "the masks folder cannot be written" in refused.json()["error"]["message"]
    assert state(api, "stuck")["error"]["code"] == 404
    assert sorted(server.masks.iterdir()) == files
    own.rmdir()


@pytest.mark.parametrize("damage", ["cut off", "garbage", "another base", "too large"])
def test_an_upload_that_is_no_mask_leaves_the_previous_version_and_no_file(
    api, server: Server, base: Base, tmp_path: Path, damage: str
):
    good = (MASKS / "legal.safetensors").read_bytes()
    foreign = random_mask(base, tmp_path / "foreign.safetensors", seed=1, fingerprint="1" * 64)
    bad = {
        "cut off": good[:1000],
        "garbage": b"\0" * 5000,
        "another base": foreign.read_bytes(),
        "too large": bytes(16 << 20),
    }[damage]
    assert api.put("/v1/masks/kept", content=good, headers=BINARY).status_code in (200, 201)
    before = state(api, "kept")
    files = sorted(server.masks.iterdir())
    refused = api.put("/v1/masks/kept", content=bad, headers=BINARY)
    assert refused.status_code == (413 if damage == "too large" else 400)
    assert str(server.masks) not in refused.text
    assert state(api, "kept") == before
    assert sorted(server.masks.iterdir()) == files
    assert (server.masks / "kept.safetensors").read_bytes() == good


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server of a folder that holds one mask."""
    (tmp_path / "far.safetensors").write_bytes((MASKS / "medical.safetensors").read_bytes())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{there.server_port}"
        there.shutdown()


def test_a_url_brings_a_mask_only_with_its_right_sha256(api, web: str):
    sha = hashlib.sha256((MASKS / "medical.safetensors").read_bytes()).hexdigest()
    there = f"{web}/far.safetensors"
    for body, message in (
        ({"url": there}, "needs both"),
        ({"url": there, "sha256": "0" * 64}, f"has sha256 {sha}"),
        ({"url": f"{web}/nothing", "sha256": sha}, "cannot be read"),
        ({"url": "file:///etc/passwd", "sha256": sha}, "must start with hf://"),
        ({"url": f"simplecache::{there}", "sha256": sha}, "must start with hf://"),
    ):
        refused = api.put("/v1/masks/far", json=body)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
        assert state(api, "far")["error"]["code"] == 404
    assert api.put("/v1/masks/far", json={"url": there, "sha256": sha}).status_code == 201
    assert state(api, "far")["sha256"] == sha
    assert api.delete("/v1/masks/far").status_code == 204


def test_a_mask_is_packed_then_resident(api, server: Server, base: Base):
    random_mask(base, server.masks / "stages.safetensors", seed=7)
    assert api.put("/v1/masks/stages").json()["state"] == "packed"
    packed = state(api, "stages")
    assert (packed["requests"], packed["resident_bytes"], packed["slot"]) == (0, 0, None)
    api.post("/v1/completions", params={"mask": "stages"}, json=ASK)
    seen = state(api, "stages")
    assert (seen["state"], seen["requests"], seen["in_flight"]) == ("resident", 1, 0)
    assert seen["slot"] in range(server.slots)
    assert seen["resident_bytes"] == api.get("/v1/capacity").json()["bytes"]["slot"]
    assert seen["last_used"] > 1.7e9
    assert api.delete("/v1/masks/stages").status_code == 204


def test_the_mask_that_leaves_its_slot_is_the_one_used_longest_ago(api, server: Server):
    first, second, *others, extra = [f"turn{number}" for number in range(server.slots + 1)]
    for name in (first, second, *others, extra):
        assert api.put(f"/v1/masks/{name}", json={"file": "code.safetensors"}).status_code == 201
    for name in (first, second, *others, first, extra):
        assert api.post("/v1/completions", params={"mask": name}, json=ASK).status_code == 200
    assert (state(api, first)["state"], state(api, second)["state"]) == ("resident", "packed")
    for name in (first, second, *others, extra):
        assert api.delete(f"/v1/masks/{name}").status_code == 204


def test_a_mask_says_how_it_was_made_and_what_it_reached(api):
    card, mask_set = state(api, "legal"), maskset.load(MASKS / "legal.safetensors")
    assert card["provenance"]["method"].startswith("maskllm")
    assert (card["provenance"], card["scores"]) == (mask_set.provenance, mask_set.scores)


def test_a_loaded_mask_needs_its_file_no_more(api, server: Server):
    file, crowd = server.masks / "orphan.safetensors", [f"guest{number}" for number in range(server.slots)]
    shutil.copy(MASKS / "legal.safetensors", file)
    assert api.put("/v1/masks/orphan").status_code == 201
    before = api.post("/v1/completions", params={"mask": "orphan"}, json=ASK).json()["choices"]
    file.unlink()
    for name in crowd:
        assert api.put(f"/v1/masks/{name}", json={"file": "code.safetensors"}).status_code == 201
        api.post("/v1/completions", params={"mask": name}, json=ASK)
    assert state(api, "orphan")["state"] == "packed"
    assert api.post("/v1/completions", params={"mask": "orphan"}, json=ASK).json()["choices"] == before
    for name in ("orphan", *crowd):
        assert api.delete(f"/v1/masks/{name}").status_code == 204


def test_a_pinned_mask_that_is_deleted_gives_its_slot_and_its_pin_back(api, server: Server):
    names = ["legal", "medical", "code", "novels", "stories"][: server.slots - 1]
    assert api.put("/v1/masks/fixed", json={"file": "legal.safetensors"}).status_code == 201
    assert api.put("/v1/masks/fixed/pin").json()["state"] == "resident"
    used = metric(api, "maskllm_slots_used")
    assert api.delete("/v1/masks/fixed").status_code == 204
    assert metric(api, "maskllm_slots_used") == used - 1
    for name in names:  # all that may be pinned at a time
        assert api.put(f"/v1/masks/{name}/pin").status_code == 200
    asked = api.post("/v1/completions", params={"mask": "general"}, json=ASK, timeout=20)
    assert asked.status_code == 200  # in the slot that is left
    for name in names:
        assert api.delete(f"/v1/masks/{name}/pin").status_code == 200
    again = api.put("/v1/masks/fixed", json={"file": "legal.safetensors"}).json()
    assert (again["pinned"], again["state"]) == (False, "packed")
    assert api.delete("/v1/masks/fixed").status_code == 204


def test_a_pinned_mask_stays_in_its_slot_whoever_comes(api, server: Server, base: Base):
    for number in range(server.slots):
        random_mask(base, server.masks / f"crowd{number}.safetensors", seed=20 + number)
        assert api.put(f"/v1/masks/crowd{number}").status_code == 201
    pinned = api.put("/v1/masks/legal/pin").json()
    assert (pinned["state"], pinned["pinned"]) == ("resident", True)
    for number in range(server.slots):
        api.post("/v1/completions", params={"mask": f"crowd{number}"}, json=ASK)
    assert state(api, "legal")["slot"] == pinned["slot"]
    assert api.delete("/v1/masks/legal/pin").json()["pinned"] is False
    api.post("/v1/completions", params={"mask": "crowd0"}, json=ASK)
    assert state(api, "legal")["state"] == "packed"
    for number in range(server.slots):
        assert api.delete(f"/v1/masks/crowd{number}").status_code == 204


def test_pins_leave_a_slot_for_the_others(api, server: Server):
    names = ["legal", "medical", "code", "novels", "stories"][: server.slots - 1]
    for name in names:
        assert api.put(f"/v1/masks/{name}/pin").status_code == 200
    refused = api.put("/v1/masks/general/pin")
    assert refused.status_code == 503
    assert (
        f"{server.slots - 1} masks are pinned in {server.slots} slots" in refused.json()["error"]["message"]
    )
    assert state(api, "general")["pinned"] is False
    assert api.post("/v1/completions", params={"mask": "general"}, json=ASK).status_code == 200
    for name in names:
        assert api.delete(f"/v1/masks/{name}/pin").status_code == 200


def test_an_alias_answers_says_who_it_was_and_protects_its_masks(api):
    for version, file in (("v1", "legal"), ("v2", "medical")):
        api.put(f"/v1/masks/court@{version}", json={"file": f"{file}.safetensors"})
    weights = {"court@v1": 90, "court@v2": 10}
    assert api.put("/v1/aliases/court", json={"masks": weights}).status_code == 201
    assert api.get("/v1/aliases").json()["data"] == [{"id": "court", "object": "alias", "masks": weights}]
    assert "court" in [model["id"] for model in api.get("/v1/models").json()["data"]]
    answer = api.post("/v1/completions", json={**ASK, "model": "court"})
    answering = answer.headers["X-Mask"].rpartition("@")[0]
    assert answering in weights
    assert {name: metric(api, "maskllm_requests_total", mask=name) for name in ("court", *weights)} == {
        "court": 0, **{name: name == answering for name in weights}
    }  # fmt: skip
    assert api.delete("/v1/masks/court@v2").status_code == 409
    assert api.put("/v1/masks/court", json={"file": "legal.safetensors"}).status_code == 400
    assert api.put("/v1/aliases/court", json={"masks": {"court@v1": 1}}).status_code == 200
    assert api.delete("/v1/masks/court@v2").status_code == 204
    assert api.delete("/v1/aliases/court").status_code == 204
    assert api.delete("/v1/masks/court@v1").status_code == 204


def test_what_answers_requests_without_a_mask_can_be_chosen(api):
    assert api.put("/v1/aliases/default", json={"masks": {"legal": 1}}).status_code == 201
    assert api.post("/v1/completions", json=ASK).headers["X-Mask"].startswith("legal@")
    assert api.post("/v1/completions", params={"mask": "none"}, json=ASK).headers["X-Mask"] == "none"
    assert api.delete("/v1/aliases/default").status_code == 204
    assert api.post("/v1/completions", json=ASK).headers["X-Mask"] == "none"


def test_deleting_masks_gives_the_engine_its_memory_back(api, server: Server, base: Base):
    def engine_bytes() -> int:
        return sum(p.memory_info().rss for p in psutil.Process(server.process.pid).children(recursive=True))

    random_mask(base, server.masks / "heavy.safetensors", seed=9)
    names = [f"heavy{number}" for number in range(60)]
    weight = len(names) * state(api, "legal")["packed_bytes"]
    empty = engine_bytes()
    for name in names:
        assert api.put(f"/v1/masks/{name}", json={"file": "heavy.safetensors"}).status_code == 201
    full = engine_bytes()
    assert full - empty > 0.8 * weight
    for name in names:
        assert api.delete(f"/v1/masks/{name}").status_code == 204
    assert full - engine_bytes() > 0.8 * weight


def test_capacity_adds_up(api):
    capacity = api.get("/v1/capacity").json()
    each = capacity["bytes"]
    mask = state(api, "legal")
    assert each["packed"] == mask["packed_bytes"]
    assert each["slot"] >= mask["weights"] * 9 / 8 or each["slot"] == mask["weights"]
    spare = each["free"] - each["base"] - each["kv"] - 1_500_000_000
    assert capacity["slots"]["most"] == spare // (each["slot"] + each["packed"])
    assert (
        capacity["packed"]["limit"] == (spare - capacity["slots"]["total"] * each["slot"]) // each["packed"]
    )
    assert capacity["packed"]["known"] == len(api.get("/v1/masks").json()["data"])
