"""What can go wrong with a request, each with its status, in OpenAI's error shape."""

import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's types; other statuses are the request's fault below 500, and the server's from there on."""

RETRY_AFTER_S = 1
"""What 429 and 503 say where nobody knows better."""

REPORTED = 3
"""How many of a body's faults a message lists: one per element of an array can be very many."""


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: int
    """The HTTP status, as vLLM has it."""


class ErrorBody(BaseModel):
    """What every error of the API looks like."""

    error: ErrorDetails


class ServerError(Exception):
    """An error a client sees. Subclasses give the status; `param` names the field at fault."""

    status: ClassVar[int] = 400
    param: str | None = "mask"
    headers: Mapping[str, str] = {}


class ContradictingMasks(ServerError):
    """Two ways of naming a mask, two masks."""


class UnknownMask(ServerError):
    status = 404


class UnknownModel(ServerError):
    status = 404
    param = "model"


class BadMaskName(ServerError):
    """A name or file that cannot be a mask's."""


class MaskInUse(ServerError):
    """A mask that something else still needs."""

    status = 409
    headers = {"x-should-retry": "false"}  # the openai client would repeat a 409


class BadAlias(ServerError):
    """An alias that cannot be had, or that points to nothing."""

    param = "alias"


class UnknownAlias(ServerError):
    status = 404
    param = "alias"


class NoRoom(ServerError):
    """No slot or memory for a mask now."""

    status = 503


class UnwritableFolder(ServerError):
    """The masks folder could not take a file: it is read-only, full, or not ours."""

    status = 507
    param = None


@contextmanager
def writing() -> Iterator[None]:
    """While the block runs, what the system will not do is the masks folder's: raises UnwritableFolder."""
    try:
        yield
    except OSError as error:
        raise UnwritableFolder(f"{error.strerror}: the masks folder cannot be written") from None


class TooLarge(ServerError):
    """More bytes than a request may bring."""

    status = 413
    param = None


class UnreachableSource(ServerError):
    """A URL from which no mask could be had."""

    param = "url"


class EngineDown(ServerError):
    """The engine has died, and another is starting."""

    status = 503
    param = None
    headers = {"Retry-After": "10"}

    def __init__(self) -> None:
        super().__init__("the engine has died, and another is starting: try again in a while")


class RefusedMask(ServerError):
    """A mask file that is broken or belongs to another base."""


class UnavailableMask(ServerError):
    """A registered mask whose file the engine could not load."""

    status = 409
    headers = {"x-should-retry": "false"}  # the openai client would repeat a 409


class BadField(ServerError):
    """A field of a body that nobody reads, or that has another form."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class BadSource(BadField):
    """A `PUT` that does not say where the mask is."""


class InvalidKey(ServerError):
    """No API key, or one that the server does not know."""

    status = 401
    param = None
    headers = {"www-authenticate": "Bearer"}


class NotAllowed(ServerError):
    """Something that the caller's key does not give."""

    status = 403
    param = None


class TooMuch(BadField):
    """A field that asks for more than the server gives."""


class RateLimited(ServerError):
    """A key's limit is reached."""

    status = 429
    param = None

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(f"{message}; try again in {retry_after_s} s")
        self.headers = {"Retry-After": str(retry_after_s)}


class Overloaded(ServerError):
    """More requests than the server takes at a time."""

    status = 503
    param = None


def body(status: int, message: str, param: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


async def handle_death(request: Request, _: Exception) -> JSONResponse:
    """FastAPI's handler for whatever says that the engine died under a request."""
    return await handle(request, EngineDown())


async def handle(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for every ServerError."""
    assert isinstance(error, ServerError)
    return error_response(error.status, str(error), error.param, error.headers)


def register(app: FastAPI) -> None:
    """Every exception in one shape: ours, the framework's, and what vLLM's handlers make of theirs."""
    for kind, theirs in list(app.exception_handlers.items()):
        app.exception_handlers[kind] = _reshaped(theirs)
        if isinstance(kind, type) and issubclass(kind, HTTPException):
            del app.exception_handlers[kind]  # vLLM's forgets what a 405 allows
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ServerError, handle)
    app.add_exception_handler(ClientDisconnect, _gone)


def in_shape(response: Response) -> Response:
    """An error that vLLM wrote, with OpenAI's type; any other response as it is."""
    if response.status_code < 400 or not isinstance(response, JSONResponse):
        return response
    error = json.loads(bytes(response.body))["error"]
    shaped = error_response(response.status_code, error["message"], error["param"], dict(response.headers))
    shaped.background = response.background
    return shaped


def _reshaped(theirs: Callable[..., Any]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def reshaped(request: Request, error: Exception) -> Response:
        return in_shape(await theirs(request, error))

    return reshaped


async def _http(request: Request, error: Exception) -> Response:
    """No such route, no such method, or a body that cannot be read."""
    assert isinstance(error, HTTPException)
    where = f": {request.method} {request.url.path}" if error.status_code in (404, 405) else ""
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the router knows only its first route of that path
        partial = [route for route in request.app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
        headers["Allow"] = ", ".join(sorted({method for route in partial for method in route.methods}))
    return error_response(error.status_code, f"{error.detail}{where}", None, headers)


async def _invalid(_: Request, error: Exception) -> Response:
    """A body, query or header that does not fit its model, which FastAPI makes a 422."""
    assert isinstance(error, RequestValidationError)
    faults = list(dict.fromkeys(_fault(fault) for fault in error.errors()))
    told = [f"{where}: {what}" if where else what for where, what in faults[:REPORTED]]
    more = [f"and {len(faults) - REPORTED} more"] if len(faults) > REPORTED else []
    return error_response(400, "; ".join(told + more), faults[0][0] or None, {})


async def _gone(_: Request, __: Exception) -> Response:
    """The client left while it sent its body: nobody reads this, and the request log says 499."""
    return Response(status_code=400)


def _fault(fault: Mapping[str, Any]) -> tuple[str, str]:
    """Which field, without body or query before it and pydantic's branches within, and what is wrong."""
    field = [str(part) for part in fault["loc"][1:] if not re.search(r"[\[({]", str(part))]
    return ".".join(field), fault["msg"].removeprefix("Value error, ")


def error_response(status: int, message: str, param: str | None, headers: Mapping[str, str]) -> JSONResponse:
    """An error in OpenAI's shape, which says when to come back where that helps."""
    kept = {name: value for name, value in headers.items() if not name.startswith("content-")}
    if status in (429, 503) and not {"retry-after", "Retry-After"} & headers.keys():
        kept["Retry-After"] = str(RETRY_AFTER_S)
    return JSONResponse(body(status, message, param), status, kept)
