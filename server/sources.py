"""Where a mask's file can come from besides the folder: an upload, or a URL."""

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO

import fsspec
from aiohttp import ClientTimeout, request

from server.errors import RefusedMask, TooLarge, UnreachableSource, UnwritableFolder, writing
from server.names import PARTIAL

SCHEMES = ("hf", "https", "http", "s3", "gs", "abfs")
"""What a URL may start with; none of them can name a file of this machine."""
CHUNK = 1 << 20
PATIENCE = ClientTimeout(sock_connect=10, sock_read=30)
"""Seconds for a web server to take a connection, and between two reads; a large file may take longer."""
MOST_S = 3600
"""Seconds for the whole file of a URL."""


@contextmanager
def landing(folder: Path, most: int) -> Iterator["Landing"]:
    """A file in the folder that takes up to `most` bytes, and is gone afterwards unless it was renamed."""
    with writing():
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=PARTIAL, delete=False)  # noqa: SIM115
    path = Path(file.name)
    try:
        path.chmod(0o644)
        yield Landing(file, path, most)
    finally:
        with suppress(OSError):  # a full disk has been told of
            file.close()
        path.unlink(missing_ok=True)


class Landing:
    """A file on its way in."""

    def __init__(self, file: IO[bytes], path: Path, most: int) -> None:
        self.path = path
        self._file = file
        self._most = most
        self._sha = hashlib.sha256()
        self._size = 0

    async def receive(self, body: AsyncIterable[bytes]) -> None:
        """Take what comes in. Raises TooLarge or UnwritableFolder."""
        async for chunk in body:
            await asyncio.to_thread(self._write, chunk)
        self._flush()

    async def fetch(self, url: str, sha256: str) -> None:
        """Take what a URL holds, if it is what was announced.

        Raises UnreachableSource, RefusedMask where its sha256 is another, TooLarge or UnwritableFolder.
        """
        scheme, colon, _ = url.partition("://")
        if not colon or scheme not in SCHEMES or "::" in url:
            raise UnreachableSource(f"url {url!r} must start with {', '.join(f'{s}://' for s in SCHEMES)}")
        try:
            async with asyncio.timeout(MOST_S) as whole:
                if scheme in ("http", "https"):
                    async with request("GET", url, timeout=PATIENCE, raise_for_status=True) as answer:
                        await self.receive(answer.content.iter_chunked(CHUNK))
                else:
                    await apart(lambda: self._copy(url))
        except (TooLarge, UnwritableFolder):
            raise
        except Exception as error:  # each protocol's library has errors of its own
            late = f"it had not come after {MOST_S} s"
            why = late if whole.expired() else f"{type(error).__name__}: {error}"
            raise UnreachableSource(f"{url} cannot be read: {why}") from None
        if self._sha.hexdigest() != sha256.lower():
            raise RefusedMask(f"{url} has sha256 {self._sha.hexdigest()}, not {sha256}")

    def _copy(self, url: str) -> None:
        # A kept file system answers from what it once listed, and does not see what was pushed since.
        files, path = fsspec.url_to_fs(url, skip_instance_cache=True)
        # 0 is a stream. The hub's ranges would be held whole, whatever their size; other protocols have no 0.
        with files.open(path, "rb", block_size=0 if url.startswith("hf://") else None) as source:
            while chunk := source.read(CHUNK):
                self._write(chunk)
        self._flush()

    def _write(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > self._most:
            raise TooLarge(f"the file is larger than {self._most} bytes, which no mask of this base is")
        self._sha.update(chunk)
        with writing():
            self._file.write(chunk)

    def _flush(self) -> None:
        with writing():
            self._file.flush()


async def apart(work: Callable[[], None]) -> None:
    """Do it in a thread that holds up neither other work nor the end of the process, as a pool's would."""
    done = Future[None]()
    done.set_running_or_notify_cancel()  # so that a wait which is cancelled leaves it alone

    def run() -> None:
        try:
            work()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    Thread(target=run, name="fetch", daemon=True).start()
    await asyncio.wrap_future(done)
