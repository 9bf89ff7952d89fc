"""How large a request may be and how slow its client: its headers, its body, and what it asks for."""

from asyncio import AbstractEventLoop, TimerHandle
from collections import Counter
from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.access import ANYONE, Caller
from server.errors import TooMuch
from server.settings import Settings

if TYPE_CHECKING:
    from server.engine.openai import ChatCompletionRequest, CompletionRequest

MAX_HEADER_BYTES = 64 * 1024
SMALL_BODY_BYTES = 64 * 1024
LARGE_BODIES, LARGE_BODIES_A_KEY = 64, 16
"""How many bodies of the largest size are held at a time, of all and of each key; small ones do not count."""
MOST = {"allowed_token_ids": 1024, "logit_bias": 1024, "stop_token_ids": 120}
"""What vLLM's engine takes of them on a GPU, where it ends at one more."""
MAX_BAD_CHARACTERS = 16 * 1024
MAX_GRAMMAR_BYTES = 256 * 1024
"""vLLM reads bad words and grammars, once for each prompt, while every other request waits."""
MOST_LOGPROBS = 256 * 1024
"""Of the tokens of a request's prompts, in all answers: they are written while every other request waits."""
GRAMMARS = {"structured_outputs", "response_format", "tools"}
MEDIA = {
    "image_url",
    "input_audio",
    "audio_url",
    "video_url",
    "file",
    "image_embeds",
    "audio_embeds",
    "image_pil",
}
"""Members of a message's content whose texts are not the prompt's."""
SLOWEST = 1024
"""Bytes a second that a body brings at least, once PATIENCE_S have passed."""
PATIENCE_S = 30
"""Seconds that a client may take for its headers, between two pieces of its body, and to read on."""
MOST_PIPELINED = 16
"""Requests of a connection that wait behind the one that is being answered."""


class BodyLimit:
    """ASGI middleware: a body that is too large is not read to its end, whether it tells its length or not.

    A route that takes more, and does not hold it, sets `request.state.max_body_bytes` before it reads. Where
    all large bodies together are too many bytes, the next to bring more is refused with a 503.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app = app
        self.most = most
        self._held = Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["max_body_bytes"] = self.most
        size = int(Headers(scope=scope).get("content-length", 0))
        read = held = 0
        caller: Caller | None = scope.get("caller")
        key, keyed = (caller.key.id, caller.key is not ANYONE) if caller else ("", False)

        async def bounded() -> Message:
            nonlocal read, held
            most = state["max_body_bytes"]
            message: Message = {} if size > most else await receive()
            read += len(message.get("body", b""))
            if max(size, read) > most:
                text = f"a body may have {most} bytes, and this one has more"
                raise HTTPException(413, text, {"connection": "close"})  # the rest stays unread
            if message.get("body") and read > SMALL_BODY_BYTES and most == self.most:
                self._held[key] += read - held
                held = read
                of_all, of_key = self._held.total(), self._held[key] if keyed else 0
                if of_all > LARGE_BODIES * most or of_key > LARGE_BODIES_A_KEY * most:
                    text = f"{max(of_all, of_key)} bytes of bodies are being answered, and no more are taken"
                    raise HTTPException(503, text, {"connection": "close"})
            return message

        try:
            await self.app(scope, bounded, send)
        finally:
            self._held[key] -= held


class JoinedWrites:
    """A transport that sends the head of an answer with what follows it, if that follows at once.

    uvloop sends each piece by itself, and a client on this machine wakes for each: 25 us.
    """

    def __init__(self, transport: Any, loop: AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if data:  # older OpenSSL fails at nothing
            self._pieces.append(data)
        if bytes(data[:7]) == b"HTTP/1.":
            self._loop.call_soon(self._send)
        else:
            self._send()

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces and not self._transport.is_closing():
            self._transport.writelines(pieces)


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's faster parser, which sets no bound to what comes before a body, nor to waiting, with both.

    Beyond the first the answer is a 400, and the connection is closed. One whose request does not come on is
    closed, too, and one whose client does not read is cut off: its request would hold a mask, a place among
    those in flight and the memory of its answer for as long as the client likes. So is one with more than
    MOST_PIPELINED requests: uvicorn would read thousands at a time, for each that it answers.
    """

    patience_s: float = PATIENCE_S
    _due = inf
    """When the next piece of a request must be here, which is not to its end."""
    _reading: TimerHandle | None = None
    """Looks whether it is; one for all pieces, as each timer takes microseconds."""
    _writing: TimerHandle | None = None
    """Runs out while the client reads nothing, and has enough to read."""
    _began = 0.0
    """When the connection was made, or its present request began."""
    _headers = 0
    """Bytes of the request's headers, and of the trailers after its body."""
    _body = 0
    _pending = 0
    """Bytes received since the parser last made anything of them."""
    _running: RequestResponseCycle | None = None
    """The request that is being answered; uvicorn's `cycle` is the last that came."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(JoinedWrites(transport, self.loop))  # type: ignore[arg-type]
        self._began = self.loop.time()
        self._await_more()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reading:
            self._reading.cancel()
        self.resume_writing()
        super().connection_lost(exc)
        if self._running and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._writing:
            self._writing.cancel()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self._pending > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"Headers may have {MAX_HEADER_BYTES} bytes.")

    def on_message_begin(self) -> None:
        self._headers = self._body = 0
        self._began = self.loop.time()
        self._await_more()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._pending = 0
        self._headers += len(name) + len(value)
        if self._headers > MAX_HEADER_BYTES:
            raise ValueError("headers too large")  # which the parser makes a 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._pending = 0
        self._await_more()
        if len(self.pipeline) >= MOST_PIPELINED:
            self.transport.abort()  # a 400 would be taken for the answer to another
            raise ValueError("too many requests at a time")
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        self._body += len(body)
        self._await_more()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending = 0
        self._due = inf
        super().on_message_complete()

    def _await_more(self) -> None:
        self._due = min(self._began + self._body / SLOWEST, self.loop.time()) + self.patience_s
        self._reading = self._reading or self.loop.call_at(self._due, self._look)

    def _look(self) -> None:
        self._reading, now = None, self.loop.time()
        if self._due == inf:
            return
        if self.flow.read_paused:  # it is we who do not read
            self._began = now
            self._await_more()
        elif now >= self._due:
            self.transport.close()
        else:
            self._reading = self.loop.call_at(self._due, self._look)


def check(
    request: "CompletionRequest | ChatCompletionRequest", sent: dict[str, Any], settings: Settings
) -> None:
    """Raise TooMuch where a request, of the JSON that was sent, asks for more than the server gives one."""
    # Only what it says: pydantic takes long over attributes that a model does not have.
    given = {name: value for name in request.model_fields_set if (value := getattr(request, name))}
    if sent.get("max_tokens") is None:  # vLLM's model says 16 then, and its handler keeps to the limit
        given.pop("max_tokens", None)
    prompt = given.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    answers, tokens = "answers to a prompt", "tokens of an answer"
    asked = [
        ("n", given.get("n"), settings.max_n, answers),
        ("max_tokens", given.get("max_tokens"), settings.max_completion_tokens, tokens),
        ("max_completion_tokens", given.get("max_completion_tokens"), settings.max_completion_tokens, tokens),
    ]
    n = given.get("n", 1)
    asked.append(("prompt", prompts * n, settings.max_prompts, f"answers ({prompts} prompts times n={n})"))
    for param in given.keys() & MOST.keys():
        asked.append((param, len(given[param]), MOST[param], f"entries of {param}"))
    if bad_words := given.get("bad_words"):
        characters = prompts * sum(map(len, bad_words))
        asked.append(("bad_words", characters, MAX_BAD_CHARACTERS, "characters, of all prompts,"))
    for param in given.keys() & GRAMMARS:
        size = prompts * len(to_json(given[param]))
        asked.append((param, size, MAX_GRAMMAR_BYTES, "bytes, of all prompts,"))
    for param, number, limit, what in asked:
        if isinstance(number, int) and limit and number > limit:
            raise TooMuch(f"{number} {what} are too many: this server gives at most {limit}", param)


def check_texts(body: dict[str, Any], most: int) -> None:
    """Raise TooMuch where a text of a JSON body is longer than any prompt, before all of it is tokenized."""
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    messages = body.get("messages")  # which may be anything where fields that nobody reads are let pass
    tokens = body.get("tokens")
    sizes = {
        "prompt": max((len(text) for text in prompts if isinstance(text, str)), default=0),
        "messages": sum(map(len, _texts(messages if isinstance(messages, list) else []))),
        "tokens": len(tokens) if isinstance(tokens, list) else 0,  # each is a character at least, or none
    }
    for param, size in sizes.items():
        if size > most:
            what = "tokens" if param == "tokens" else "characters"
            raise TooMuch(f"{size} {what} are too many: this model's prompts have at most {most}", param)


def _texts(value: Any) -> Iterator[str]:
    """All texts in messages, but those of pictures and sounds: whichever they are, they end in the prompt."""
    if isinstance(value, str):
        yield value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        if name not in MEDIA:
            yield from _texts(each)
