"""What can go wrong with a request, each with its status, in OpenAI's error shape."""

from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class ServerError(Exception):
    """An error a client sees. Subclasses give the status; `param` names the field at fault."""

    status: ClassVar[int] = 400
    param: str | None = "mask"
    type: str | None = None
    code: ClassVar[str | None] = None
    headers: Mapping[str, str] | None = None


class ContradictingMasks(ServerError):
    """Two ways of naming a mask, two masks."""


class UnknownMask(ServerError):
    status = 404


class UnknownModel(ServerError):
    status = 404
    param = "model"


class BadMaskName(ServerError):
    """A name or file that cannot be a mask's."""


class RefusedMask(ServerError):
    """A mask file that is broken or belongs to another base."""

    status = 422


class UnavailableMask(ServerError):
    """A registered mask whose file the engine could not load."""

    status = 409
    headers = {"x-should-retry": "false"}  # the openai client would repeat a 409


class InvalidKey(ServerError):
    """No API key, or one that the server does not know."""

    status = 401
    param = None
    type = "invalid_request_error"
    code = "invalid_api_key"
    headers = {"www-authenticate": "Bearer"}


class NotAllowed(ServerError):
    """Something that the caller's key does not give."""

    status = 403
    param = None
    type = "invalid_request_error"
    code = "missing_scope"


class TooMuch(ServerError):
    """A field that asks for more than the server gives."""

    type = "invalid_request_error"

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class RateLimited(ServerError):
    """A key's limit is reached; `unit` is what of, requests or tokens."""

    status = 429
    param = None
    code = "rate_limit_exceeded"

    def __init__(self, message: str, unit: str, retry_after_s: int) -> None:
        super().__init__(f"{message}; try again in {retry_after_s} s")
        self.type = unit
        self.headers = {"retry-after": str(retry_after_s)}


class Overloaded(ServerError):
    """More requests than the server takes at a time."""

    status = 503
    param = None
    type = "server_error"
    headers = {"retry-after": "1"}


def body(error: ServerError) -> dict[str, Any]:
    """OpenAI's error object; `code` is the status, as vLLM has it, where OpenAI has no word for it."""
    details = {"message": str(error), "type": error.type or type(error).__name__, "param": error.param}
    return {"error": {**details, "code": error.code or error.status}}


async def handle(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for every ServerError."""
    assert isinstance(error, ServerError)
    return JSONResponse(body(error), error.status, error.headers)


async def handle_http(_: Request, error: Exception) -> JSONResponse:
    """The same for what fails before a route runs: no such path or method, a body that cannot be parsed."""
    assert isinstance(error, HTTPException)
    details = {"message": error.detail, "type": "invalid_request_error", "param": None}
    return JSONResponse({"error": {**details, "code": error.status_code}}, error.status_code, error.headers)
