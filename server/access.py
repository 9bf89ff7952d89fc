"""Who may do what: API keys, their roles and masks, and how much each may ask for."""

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
from fastapi.security.base import SecurityBase
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import BaseModel, Field, PositiveInt, TypeAdapter, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import InvalidKey, NotAllowed, Overloaded, RateLimited, ServerError, handle
from server.logs import CURRENT
from server.strict import refuse_other_types

Clock = Callable[[], float]


class BadKeys(ValueError):
    """Keys that cannot be read."""


class Key(BaseModel, extra="forbid", frozen=True):
    """One entry of the keys file, as `maskllm key` prints it."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    role: Literal["use", "admin"]
    masks: list[str] | None = None
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    concurrency: PositiveInt | None = None


OPEN = frozenset({"/", "/health", "/openapi.json", "/metrics"})
"""Paths that need no key, or look at it by themselves, and take no body."""
COMPUTING = frozenset({"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"})
"""Paths whose requests count against the limits of keys and server."""
ANYONE = Key(id="anyone", sha256="0" * 64, role="use")
"""Who asks a server that has no keys."""


def read_keys(source: str) -> list[Key]:
    """Keys from a file, or from JSON itself where `source` is a list. Raises BadKeys, and prints no hash."""
    try:
        text = source if source.lstrip().startswith("[") else Path(source).read_text()
        keys = TypeAdapter(list[Key]).validate_json(text)
    except OSError as error:
        raise BadKeys(f"--keys {source}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = " ".join(["--keys", *map(str, first["loc"])])
        raise BadKeys(f"{where}: {first['msg']}") from None
    for field in ("id", "sha256"):
        if len({getattr(key, field) for key in keys}) < len(keys):
            raise BadKeys(f"--keys: two entries have the same {field}")
    if not keys:
        raise BadKeys("--keys: the list is empty, so nobody could use the server")
    return keys


class Bucket:
    """So many units a minute: starts full, refills evenly, and can be overdrawn by what was let in before."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._at = float(per_minute), clock()

    def wait_s(self) -> float:
        """Seconds until there is a whole unit; 0 where there is one."""
        now = self._clock()
        refill = (now - self._at) * self.per_minute / 60
        self._level, self._at = min(self._level + refill, self.per_minute), now
        return max(0.0, (1 - self._level) * 60 / self.per_minute)

    def take(self, units: int) -> None:
        self._level -= units


class Caller:
    """A key and its limits as they stand."""

    def __init__(self, key: Key, clock: Clock = time.monotonic) -> None:
        self.key = key
        self.in_flight = 0
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        self.buckets = {unit: Bucket(limit, clock) for unit, limit in limits.items() if limit}

    def may_use(self, mask: str) -> bool:
        """Whether the key may use a mask, given as a name, an alias, or one of these with @version."""
        masks = self.key.masks
        names = {mask, mask.partition("@")[0], mask.rpartition("@")[0]}
        return self.key.role == "admin" or masks is None or not names.isdisjoint(masks)

    def check(self, *masks: str) -> None:
        """Raise NotAllowed unless the key may use every one of these masks.

        It does not matter whether there is such a mask, so that nobody learns the names of others' masks.
        """
        for mask in masks:
            if not self.may_use(mask):
                allowed = ", ".join(self.key.masks or ["no mask"])
                raise NotAllowed(f"key {self.key.id!r} may not use {mask!r}; it may use: {allowed}")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One request, in flight while the block runs. Raises RateLimited where that is one too many."""
        for unit, bucket in self.buckets.items():
            if wait_s := bucket.wait_s():
                message = f"key {self.key.id!r} has used up its {bucket.per_minute} {unit} a minute"
                raise RateLimited(message, math.ceil(wait_s))
        if self.key.concurrency and self.in_flight >= self.key.concurrency:
            message = f"key {self.key.id!r} may have {self.in_flight} requests in flight, and has"
            raise RateLimited(message, 1)
        if "requests" in self.buckets:
            self.buckets["requests"].take(1)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def charge(self, tokens: int) -> None:
        """Take the tokens of a request that has ended: what it used, not what it might have."""
        if "tokens" in self.buckets:
            self.buckets["tokens"].take(tokens)


class Access:
    """Every key, and how many requests are in flight in all."""

    def __init__(self, keys: Sequence[Key], max_waiting: int, clock: Clock = time.monotonic) -> None:
        self.callers = [Caller(key, clock) for key in keys]
        self.anyone = None if keys else Caller(ANYONE, clock)
        self.max_waiting = max_waiting
        self.waiting = 0

    def who(self, key: str | None) -> Caller:
        """Who has this key. Every hash is compared in constant time, and no search stops early."""
        if self.anyone:
            return self.anyone
        digest = hashlib.sha256((key or "").encode()).hexdigest()
        found = [caller for caller in self.callers if hmac.compare_digest(caller.key.sha256, digest)]
        if key is None:
            raise InvalidKey("this server needs an API key: send the header `Authorization: Bearer KEY`")
        if not found:
            raise InvalidKey("this API key is not one of the server's")
        return found[0]

    def admit(self, scope: Scope) -> None:
        """Enter a request's caller on its scope and log line, and take a turn of its key's where it computes.

        Raises InvalidKey, RateLimited or Overloaded.
        """
        if scope["path"] in OPEN:
            return
        scope["caller"] = caller = self.who(key_of(Request(scope)))
        if entry := CURRENT.get():
            entry.key, entry.charge = caller.key.id, caller.charge
        if scope["path"] in COMPUTING:
            self.check_room()
            scope["held"].enter_context(caller.turn())

    def check_room(self) -> None:
        """Raise Overloaded where no more requests are taken."""
        if self.waiting >= self.max_waiting:
            raise Overloaded(f"the server has {self.waiting} requests in flight and takes no more at a time")

    @contextmanager
    def room(self) -> Iterator[None]:
        """One request whose body is here: slow ones take no room. Raises Overloaded where there is none."""
        self.check_room()
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1


class Gate:
    """ASGI middleware: who is not admitted is told so, and the body stays unread.

    To read and check ten requests that are then refused would take the time of the one that is answered, and
    strangers' bodies are nothing to keep.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.access.admit(scope)
            except ServerError as error:
                refusal = await handle(Request(scope), error)
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def key_of(request: Request) -> str | None:
    """The API key that a request brings, known or not."""
    scheme, key = get_authorization_scheme_param(request.headers.get("authorization"))
    return key if key and scheme.lower() == "bearer" else None


class Bearer(SecurityBase):
    """The scheme that the schema shows, and a dependency in one: FastAPI takes 20 us for each."""

    model = HTTPBearerModel(description="A key made by `maskllm key`; none where none is set up.")
    scheme_name = "HTTPBearer"


class Use(Bearer):
    async def __call__(self, request: Request) -> Caller:
        """The route's caller, who has a key if the server has any."""
        caller: Caller = request.scope["caller"]
        return caller


use = Use()


class Look(Bearer):
    async def __call__(self, request: Request) -> None:
        """Lets pass who may see every mask's name. What is polled is nobody's request: it has no log line."""
        access: Access = request.app.state.access
        key = access.who(key_of(request)).key
        if key.role != "admin" and key.masks is not None:
            raise NotAllowed(f"key {key.id!r} is for some masks only, and /metrics names all of them")


async def admin(caller: Annotated[Caller, Depends(use)]) -> None:
    """Lets only admins pass."""
    if caller.key is ANYONE:
        raise NotAllowed(
            "this needs the role admin, and the server has no keys: make one with "
            "`maskllm key ID --role admin`, and start the server with --keys FILE"
        )
    if caller.key.role != "admin":
        raise NotAllowed(f"this needs the role admin, and key {caller.key.id!r} has the role use")


class Turn:
    """A caller's request, and what it holds until all of its answer is out, or the client gone."""

    def __init__(self, caller: Caller, held: ExitStack) -> None:
        self.caller = caller
        self.held = held


class TakeTurn(Bearer):
    async def __call__(self, request: Request) -> Turn:
        """The turn of a route that computes, from JSON. Raises Overloaded."""
        refuse_other_types(request)
        access: Access = request.app.state.access
        held: ExitStack = request.scope["held"]
        held.enter_context(access.room())
        return Turn(request.scope["caller"], held)


User = Annotated[Caller, Depends(use)]
UserTurn = Annotated[Turn, Depends(TakeTurn())]
ADMIN = Depends(admin)
