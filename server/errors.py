"""What can go wrong with a request's mask, each with its status, in OpenAI's error shape."""

from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse


class ServerError(Exception):
    """An error a client sees. Subclasses give the status; `param` names the field at fault."""

    status: ClassVar[int] = 400
    param: ClassVar[str | None] = "mask"
    headers: ClassVar[dict[str, str]] = {}


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


def body(error: ServerError) -> dict[str, Any]:
    """OpenAI's error object; `code` is the status, as vLLM has it."""
    details = {"message": str(error), "type": type(error).__name__, "param": error.param}
    return {"error": {**details, "code": error.status}}


async def handle(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for every ServerError."""
    assert isinstance(error, ServerError)
    return JSONResponse(body(error), error.status, error.headers)
