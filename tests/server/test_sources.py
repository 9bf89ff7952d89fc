"""Where a mask's file can come from, without an engine."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from running import ROOT

from server.errors import UnreachableSource, UnwritableFolder
from server.sources import landing

CONTENT = bytes(range(256)) * 1000


def test_a_folder_that_takes_no_file_for_whatever_reason_is_said_to_be_so(tmp_path: Path):
    with (
        pytest.raises(
            UnwritableFolder, match="No such file or directory: the masks folder cannot be written"
        ),
        landing(tmp_path / "gone", 10),
    ):
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """Hugging Face's hub, as far as its client asks it for a file; the real one is out of reach."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/org/masks/resolve/main/"):
                begin, end = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
                self.answer(CONTENT[begin : end + 1], 206)
            elif self.path.startswith("/api/models/org/masks/tree/main"):
                file = {"type": "file", "path": "law/tax.safetensors", "size": len(CONTENT), "oid": "0" * 40}
                self.answer(json.dumps([file]).encode())
            elif self.path.startswith("/api/models/org/masks"):
                self.answer(json.dumps({"id": "org/masks", "sha": "0" * 40}).encode())
            else:
                self.send_error(404)

        def answer(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{there.server_port}"
        finally:
            there.shutdown()


def fetched(hub: str, url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What comes of a URL, in a process whose hub this is from the start."""
    code = f"""
import asyncio, pathlib
from server.sources import landing
with landing(pathlib.Path({str(folder)!r}), {len(CONTENT)}) as landed:
    asyncio.run(landed.fetch({url!r}, {sha256(CONTENT).hexdigest()!r}))
    landed.path.rename(landed.path.with_name("tax.safetensors"))
"""
    hubs = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | hubs,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_mask_can_come_from_a_hugging_face_repository(hub: str, tmp_path: Path):
    done = fetched(hub, "hf://org/masks/law/tax.safetensors", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["tax.safetensors"]
    assert (tmp_path / "tax.safetensors").read_bytes() == CONTENT
    gone = fetched(hub, "hf://org/other/tax.safetensors", tmp_path)
    assert "UnreachableSource: hf://org/other/tax.safetensors cannot be read" in gone.stderr


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "/etc/passwd", "memory://a", "simplecache::https://a/b"]
)
def test_no_url_names_a_file_of_this_machine(url: str, tmp_path: Path):
    with (
        landing(tmp_path, 10) as landed,
        pytest.raises(UnreachableSource, match="must start with hf://, https://"),
    ):
        asyncio.run(landed.fetch(url, "0" * 64))
