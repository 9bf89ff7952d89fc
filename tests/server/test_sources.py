"""Where a mask's file can come from, without an engine."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aiohttp import ClientTimeout
from running import ROOT

from server import sources
from server.errors import UnreachableSource, UnwritableFolder
from server.sources import landing

CONTENT = bytes(range(256)) * 1000
ENDLESS = 256 << 20


def test_a_folder_that_takes_no_file_for_whatever_reason_is_said_to_be_so(tmp_path: Path):
    with (
        pytest.raises(
            UnwritableFolder, match="No such file or directory: the masks folder cannot be written"
        ),
        landing(tmp_path / "gone", 10),
    ):
        pass


class Web(ThreadingHTTPServer):
    """A web server, and as much of Hugging Face's hub as its client asks for; the real one is out of reach.

    What is PUT here is in the hub from then on. `/hanging` stops halfway, `/endless` goes on and on.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {"org/masks": {"law/tax.safetensors": CONTENT}}
        self.sent = 0
        self.over = threading.Event()


class Answers(BaseHTTPRequestHandler):
    server: Web

    def do_PUT(self) -> None:
        owner, repository, file = self.path[1:].split("/", 2)
        content = self.rfile.read(int(self.headers["content-length"]))
        self.server.files.setdefault(f"{owner}/{repository}", {})[file] = content
        self.answer(b"")

    def do_GET(self) -> None:
        if self.path.endswith("/hanging"):
            self.answer(b"half", size=8)
            self.server.over.wait()
        elif self.path.endswith("/trickling"):
            self.answer(b"", 206, size=1 << 20)
            with suppress(ConnectionError):
                while not self.server.over.wait(0.05):
                    self.wfile.write(b"0")
        elif self.path.endswith("/endless"):
            self.answer(b"", 206, size=ENDLESS)
            with suppress(ConnectionError):
                while self.server.sent < ENDLESS:
                    self.server.sent += self.wfile.write(bytes(1 << 20))
        elif self.path.startswith("/api/models/"):
            owner, repository, *more = self.path.split("?")[0].split("/")[3:]
            files = self.server.files.get(f"{owner}/{repository}")
            if files is None:
                self.answer(b"", 404, error="RepoNotFound")
            elif more[:1] == ["tree"]:
                folder = "/".join(more[2:])
                sizes = {name: len(files[name]) for name in files if name.startswith(folder)}
                listed = [
                    {"type": "file", "path": name, "size": sizes[name], "oid": "0" * 40} for name in sizes
                ]
                self.answer(json.dumps(listed).encode())
            else:
                self.answer(json.dumps({"id": f"{owner}/{repository}", "sha": "0" * 40}).encode())
        else:
            repository, _, file = self.path[1:].partition("/resolve/main/")
            content = self.server.files.get(repository, {}).get(file)
            if content is None:
                self.answer(b"", 404, error="EntryNotFound")
            elif "range" in self.headers:
                begin, end = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
                self.answer(content[begin : end + 1], 206)
            else:
                self.answer(content)

    def answer(self, content: bytes, status: int = 200, size: int | None = None, error: str = "") -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("x-error-code", error)
        self.send_header("content-length", str(len(content) if size is None else size))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        try:
            yield there
        finally:
            there.over.set()
            there.shutdown()


def run(web: Web, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What comes of `code`, in a process whose hub this is from the start."""
    begin = f"""
import asyncio, hashlib, pathlib, urllib.request
from server.sources import landing

async def fetch(url, content, name):
    with landing(pathlib.Path({str(folder)!r}), 1 << 20) as landed:
        await landed.fetch(url, hashlib.sha256(content).hexdigest())
        landed.path.rename(landed.path.with_name(name))

def push(file, content):
    urllib.request.urlopen(urllib.request.Request(f"{web.url}/{{file}}", content, method="PUT"))
"""
    hubs = {"HF_ENDPOINT": web.url, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", begin + code],
        cwd=ROOT,
        env=os.environ | hubs,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_mask_can_come_from_a_hugging_face_repository(web: Web, tmp_path: Path):
    code = "asyncio.run(fetch('hf://org/{}/law/tax.safetensors', bytes(range(256)) * 1000, 'tax'))"
    done = run(web, tmp_path, code.format("masks"))
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["tax"]
    assert (tmp_path / "tax").read_bytes() == CONTENT
    gone = run(web, tmp_path, code.format("other"))
    assert "UnreachableSource: hf://org/other/law/tax.safetensors cannot be read" in gone.stderr


def test_what_was_pushed_since_the_last_fetch_is_there(web: Web, tmp_path: Path):
    code = """
def outcome(file, content):
    try:
        asyncio.run(fetch(f"hf://{file}", content, "it"))
    except Exception as error:
        return type(error).__name__
    return "fetched"

print(outcome("org/masks/law/tax.safetensors", bytes(range(256)) * 1000))
for file in "org/masks/law/new.safetensors", "org/masks/law/tax.safetensors", "org/later/tax.safetensors":
    content = bytes(range(256)) * 1001
    before = {outcome(file, content) for _ in range(10)}  # in whichever thread
    push(file, content)
    print(*before, "then", outcome(file, content))
"""
    done = run(web, tmp_path, code)
    assert done.stdout.splitlines() == [
        "fetched",
        "UnreachableSource then fetched",  # a file beside it
        "RefusedMask then fetched",  # a longer one in its place
        "UnreachableSource then fetched",  # in a repository that was not there
    ], done.stderr


@pytest.mark.parametrize("source", ["{}/endless", "hf://org/masks/endless"])
def test_a_source_is_left_as_soon_as_it_sends_more_than_a_mask_can_be(web: Web, tmp_path: Path, source: str):
    web.files["org/masks"]["endless"] = bytes(8)
    done = run(web, tmp_path, f"asyncio.run(fetch({source.format(web.url)!r}, b'', 'it'))")
    assert "TooLarge: the file is larger than 1048576 bytes" in done.stderr
    assert web.sent < ENDLESS / 4  # 1 MiB, and what the sockets hold


def test_a_source_that_stops_halfway_is_given_up(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "PATIENCE", ClientTimeout(sock_read=0.2))
    with (
        landing(tmp_path, 10) as landed,
        pytest.raises(UnreachableSource, match=r"/hanging cannot be read: .*Timeout on reading data"),
    ):
        asyncio.run(asyncio.wait_for(landed.fetch(f"{web.url}/hanging", "0" * 64), 10))


@pytest.mark.parametrize("source", ["{}/trickling", "hf://org/masks/trickling"])
def test_a_source_that_trickles_is_given_up(web: Web, tmp_path: Path, source: str):
    web.files["org/masks"]["trickling"] = bytes(8)
    url = source.format(web.url)
    code = f"import server.sources; server.sources.MOST_S = 2; asyncio.run(fetch({url!r}, b'', 'it'))"
    assert f"{url} cannot be read: it had not come after 2 s" in run(web, tmp_path, code).stderr


@pytest.mark.parametrize("source", ["{}/hanging", "hf://org/masks/hanging"])
def test_a_process_ends_although_a_source_hangs(web: Web, tmp_path: Path, source: str):
    web.files["org/masks"]["hanging"] = bytes(8)
    code = f"""
import time
try:
    asyncio.run(asyncio.wait_for(fetch({source.format(web.url)!r}, b"", "it"), 2))
except TimeoutError:
    print(time.time())
"""
    done = run(web, tmp_path, code)
    assert time.time() - float(done.stdout) < 5, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "/etc/passwd", "memory://a", "simplecache::https://a/b"]
)
def test_no_url_names_a_file_of_this_machine(url: str, tmp_path: Path):
    with (
        landing(tmp_path, 10) as landed,
        pytest.raises(UnreachableSource, match="must start with hf://, https://"),
    ):
        asyncio.run(landed.fetch(url, "0" * 64))
