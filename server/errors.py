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
    headers = {"Retry-After": "1"}


class UnwritableFolder(ServerError):
    """The masks folder could not take a file: it is read-only, full, or not ours."""

    status = 507
    param = None


class TooLarge(ServerError):
    """More bytes than a request may bring."""

    status = 413
    param = None


class BadSource(ServerError):
    """A `PUT` that does not say where the mask is."""

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


def body(error: ServerError) -> dict[str, Any]:
    """OpenAI's error object; `code` is the status, as vLLM has it."""
    details = {"message": str(error), "type": type(error).__name__, "param": error.param}
    return {"error": {**details, "code": error.status}}


async def engine_died(request: Request, _: Exception) -> JSONResponse:
    """FastAPI's handler for whatever says that the engine died under a request."""
    return await handle(request, EngineDown())


async def handle(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for every ServerError."""
    assert isinstance(error, ServerError)
    return JSONResponse(body(error), error.status, error.headers)
