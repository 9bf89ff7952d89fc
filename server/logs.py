"""The request log: one JSON line for each request that ended."""

import asyncio
import atexit
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from logging.handlers import WatchedFileHandler
from pathlib import Path
from secrets import token_hex
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import body, error_response
from server.metrics import Finished, Metrics

logger = logging.getLogger("maskllm.requests")

ID = re.compile(rb"[\x21-\x7e]{1,128}")
WRITE_S = 0.1
"""How long a line may wait for others. Requests of one batch end together, and the next ones come first."""
TOGETHER = 8
"""Lines that are one record, which takes as long as one of a line; more would not go into a pipe whole."""
MOST_LINES = 1000
REPLACED = (b"x-request-id", b"x-vllm-priority", b"x-data-parallel-rank", b"endpoint-load-metrics-format")
"""Headers that vLLM reads and fails at where they are not its own; a priority is the body's to give, and an
answer with metrics in its headers would collect all of them, for whoever asks."""
CLIENT_GONE = 499
"""The status in the log of an answer that its client did not wait for; nginx's."""
SERVER_FAULT = 500, "the server failed at this request; its log has more"
BEING_STOPPED = 503, "the server is being stopped, and did not finish this request"


@dataclass
class Entry:
    """What is known of a request so far."""

    id: str
    key: str | None = None
    mask: str | None = None
    status: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    e2e_s: float = 0.0
    prompt: Any = None
    charge: Callable[[int], None] = field(default=lambda _: None, repr=False)
    count_error: Callable[[int], None] = field(default=lambda _: None, repr=False)
    prompt_logprobs: int = 0
    """How many its answers will have."""
    parts: int = 0
    """How many of its parts are under way: the exchange itself, and each prompt in the engine."""
    write: Callable[["Entry"], None] = field(default=lambda _: None, repr=False)

    @contextmanager
    def part(self) -> Iterator[None]:
        """One part of the request. The last to end writes the line: an abort comes after the client left."""
        self.parts += 1
        try:
            yield
        finally:
            self.parts -= 1
            if not self.parts:
                self.write(self)

    def fail(self, status: int) -> None:
        """The answer has failed in its midst: its headers said 200, and this is what it came to."""
        self.status = status
        self.count_error(status)

    def finish(self, part: Finished) -> None:
        """Add what the engine did for one prompt of the request."""
        self.prompt_tokens += part.prompt_tokens
        self.completion_tokens += part.generation_tokens
        if part.ttft_s is not None:
            self.ttft_s = min(part.ttft_s, self.ttft_s or part.ttft_s)
        self.charge(part.prompt_tokens + part.generation_tokens)


CURRENT: ContextVar[Entry | None] = ContextVar("current request", default=None)
"""The request that a task works for."""


def write_to(file: Path | None) -> None:
    """Send the log to a file, which may be rotated, or to stderr."""
    handler = WatchedFileHandler(file) if file else logging.StreamHandler()
    logger.handlers, logger.propagate = [handler], False
    atexit.register(LINES.write)


class Lines:
    """Lines that are written some at a time."""

    def __init__(self) -> None:
        self.waiting: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        """Have a line written soon."""
        if not self.waiting:
            asyncio.get_running_loop().call_later(WRITE_S, self.write)
        self.waiting.append(line)
        if len(self.waiting) >= MOST_LINES:
            self.write()

    def write(self) -> None:
        """Write all, and keep none: what a rotated file that cannot be opened again does not take is lost."""
        lines, self.waiting = self.waiting, []
        lost, why = 0, ""
        for at in range(0, len(lines), TOGETHER):
            some = lines[at : at + TOGETHER]
            try:
                logger.info("\n".join(map(json.dumps, some)))
            except OSError as error:
                lost, why = lost + len(some), str(error)
        if lost:
            logging.getLogger("maskllm").error("%d lines of the request log are lost: %s", lost, why)


LINES = Lines()


class RequestLog:
    """ASGI middleware, as a request that cannot even be parsed has an id and a line, too.

    What a request holds is entered on its scope's `held`, and given up when it has ended. Routes that need
    no key, which are polled, are logged only where they fail.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        """`paths` are the routes that compute, whose answers are counted by path."""
        self.app = app
        self.metrics = metrics
        self.paths = paths
        for path in paths:
            for status in (200, 500, 503):
                metrics.responses.labels(path, status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        id = given.decode() if ID.fullmatch(given) else token_hex(16)
        entry = Entry(id, write=partial(self._end, scope))
        others = [header for header in scope["headers"] if header[0] not in REPLACED]
        # vLLM names the request after this header, in the answer's id and in its own log and traces.
        held = ExitStack()
        scope = {**scope, "held": held, "headers": [*others, (b"x-request-id", entry.id.encode())]}
        begin, sent, streams = time.monotonic(), False, False

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not sent:
                entry.status = CLIENT_GONE
            return message

        async def answer(message: Message) -> None:
            nonlocal sent, streams
            if message["type"] == "http.response.start":
                entry.status = entry.status or message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = entry.id
                streams = headers.get("content-type", "").startswith("text/event-stream")
            sent = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        token = CURRENT.set(entry)
        with entry.part():
            try:
                with held:
                    await self.app(scope, watched, answer)
            except BaseException as error:
                status, why = SERVER_FAULT if isinstance(error, Exception) else BEING_STOPPED
                if entry.status is None:  # what answers it further out would not say the id
                    await error_response(status, why, None, {})(scope, receive, answer)
                elif entry.status < 400 and not sent:
                    entry.fail(status)
                    if streams:
                        event = f"data: {json.dumps(body(status, why, None))}\n\ndata: [DONE]\n\n"
                        await answer({"type": "http.response.body", "body": event.encode()})
                raise
            finally:
                CURRENT.reset(token)
                entry.e2e_s = time.monotonic() - begin

    def _end(self, scope: Scope, entry: Entry) -> None:
        status = entry.status or 500
        if entry.key is None and status < 400:
            return
        path = scope["path"] if scope["path"] in self.paths else None
        self.metrics.answer(path, entry.key or "", status, entry.prompt_tokens + entry.completion_tokens)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": entry.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "key": entry.key,
            "mask": entry.mask,
            "prompt_tokens": entry.prompt_tokens,
            "completion_tokens": entry.completion_tokens,
            "ttft_s": None if entry.ttft_s is None else round(entry.ttft_s, 4),
            "e2e_s": round(entry.e2e_s, 4),
        }
        if entry.prompt is not None:
            line["prompt"] = entry.prompt
        LINES.add(line)
