"""What a body may hold: JSON that every parser reads alike, fields that somebody reads, of their types."""

from collections.abc import Callable, Coroutine
from difflib import get_close_matches
from functools import cache
from itertools import repeat
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError, WrapValidator
from pydantic_core import from_json, to_json
from starlette.types import Receive, Scope, Send

from server.errors import BadField, in_shape

ELSEWHERE = {
    "best_of": "it was removed: use n",
    "guided_json": 'use structured_outputs={"json": ...} or response_format',
    "guided_regex": 'use structured_outputs={"regex": ...}',
    "guided_choice": 'use structured_outputs={"choice": ...}',
    "guided_grammar": 'use structured_outputs={"grammar": ...}',
    "guided_decoding_backend": "the server chooses it",
    "guided_whitespace_pattern": 'use structured_outputs={"whitespace_pattern": ...}',
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this server answers with text",
    "web_search_options": "this server does not search",
    "moderation": "this server does not moderate",
}
"""Fields of OpenAI's, or vLLM's of old, that would change the answer, and what to do instead."""

MOST_VALUES = 16 * 1024
"""Members of objects and elements of arrays in a body, other than token ids."""
IDS = ("prompt", "tokens")
"""Where token ids are."""
MOST_FAULTS = 100
UNUSED = {"include_obfuscation"}
"""Fields of OpenAI's inner objects that change no answer, and that vLLM's models lack."""


def _few_faults(data: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(data)
    except ValidationError as error:
        if error.error_count() > MOST_FAULTS:  # a second and a gigabyte for those of a long array
            raise ValueError(
                f"the body does not have the form of a request, in {error.error_count()} ways"
            ) from None
        raise


FewFaults = WrapValidator(_few_faults)
"""What a body is annotated with, so that FastAPI does not list faults without end."""


def refuse_other_types(request: Request) -> None:
    """Refuse a body that is not said to be JSON, which FastAPI would say less clearly."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(400, f"the body has to be application/json, and is {kind or 'nothing'}")


async def refuse_loose(body: BaseModel, raw_request: Request) -> None:
    """Refuse what vLLM's models let pass: fields that nobody reads, and values that are not of their type."""
    refuse_unknown(body)
    given = await raw_request.json()
    if "request_id" in given:
        raise BadField("a request's id is its header X-Request-Id", "request_id")
    for at, message in enumerate(given.get("messages") or []):
        for field in ("content", "tool_calls"):
            if isinstance(
                message.get(field), dict
            ):  # vLLM iterates over these, and so takes an object's keys
                raise BadField(
                    f"{field} of messages.{at} is an object, not an array", f"messages.{at}.{field}"
                )
    faults: list[dict[str, Any]] = []
    for name, value in given.items():
        if reader := strict_reader(type(body), name):
            try:
                reader.validate_json(to_json(value), strict=True)
            except ValidationError as error:
                if error.error_count() > MOST_FAULTS:
                    raise BadField(
                        f"{name} has not the form it should, in {error.error_count()} ways", name
                    ) from None
                faults += [{**fault, "loc": ("body", name, *fault["loc"])} for fault in error.errors()]
    if faults:
        raise RequestValidationError(faults)


@cache
def strict_reader(model: type[BaseModel], name: str) -> TypeAdapter[Any] | None:
    """What reads a field of a model; None where there is none, or JSON cannot be of its type.

    To read a body's few fields again takes 5 us, all of the model again 60.
    """
    field = model.model_fields.get(name)
    # JSON has no bytes: vLLM takes embeddings as text in base64.
    return TypeAdapter(field.rebuild_annotation()) if field and name != "prompt_embeds" else None


def refuse_unknown(body: BaseModel, at: str = "") -> None:
    """Raise BadField for a field that the body's model, or one within it, does not declare."""
    for name in body.model_extra or {}:
        if name not in UNUSED:
            fields = type(body).model_fields
            near = get_close_matches(name, [field.alias or key for key, field in fields.items()], n=1)
            instead = f"did you mean {at + near[0]!r}?" if near else "it would change nothing"
            hint = ELSEWHERE.get(at + name, instead)
            raise BadField(f"unknown field {at + name!r}; {hint}", at + name)
    for name in body.model_fields_set:
        value = getattr(body, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                refuse_unknown(inner, f"{at}{name}.")


class StrictRequest(Request):
    """Its JSON has no NaN, half surrogate pair, endless nesting or huge number: those fail further in."""

    _value: Any = None

    async def json(self) -> Any:
        """The body, parsed once, whoever asks."""
        if self._value is None:
            self._value = await self._parse()
        return self._value

    async def _parse(self) -> Any:
        try:
            value = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None
        if isinstance(value, dict | list):
            _refuse_huge(value)
        return value


def _refuse_huge(value: dict[str, Any] | list[Any], most: int = MOST_VALUES, ids: bool = False) -> int:
    """Refuse integers beyond 64 bits, which the engine cannot be sent, and more than `most` values.

    Of each value that is wrong pydantic makes up to a dozen errors of a kilobyte. Token ids in their place
    are not counted. Returns how many more values there may be.
    """
    if ids and isinstance(value, list) and _are_ids(value):
        return most
    most -= len(value)
    if most < 0:
        raise HTTPException(400, f"the body has more than {MOST_VALUES} values that are no token ids")
    for name, each in value.items() if isinstance(value, dict) else zip(repeat(None), value):
        if isinstance(each, dict | list):
            most = _refuse_huge(each, most, name in IDS or (name is None and ids))
        elif isinstance(each, int) and each.bit_length() > 63:
            raise HTTPException(400, "the body has an integer beyond 64 bits")
    return most


def _are_ids(value: list[Any]) -> bool:
    """A million take 20 ms so, and 80 one by one."""
    return {*map(type, value)} == {int} and 0 <= min(value) <= max(value) < 1 << 31


class StrictRoute(APIRoute):
    """Reads bodies strictly, and answers with errors in one shape whoever made them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return in_shape(await handle(StrictRequest(request.scope, request.receive)))

        return handle_strictly


class DirectRoute(StrictRoute):
    """Of an endpoint that takes one dependency, a body and the request; for FastAPI only its schema.

    FastAPI calls the same three, and takes 50 us for it, a fifth of what a request takes outside of vLLM's
    handlers.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        (dependency,) = self.dependant.dependencies
        assert dependency.call
        assert self.body_field
        self._enter, self._read = dependency.call, self.body_field.validate
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._respond(StrictRequest(scope, receive))
        await in_shape(response)(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        await request.body()  # before it enters: slow ones take no room
        entered = await self._enter(request)
        body, faults = self._read(await request.json(), loc=("body",))
        if faults:
            raise RequestValidationError(faults)
        answer: Response | None = await self.endpoint(entered, body, request)
        return answer or Response(status_code=400)  # which nobody reads: the client has gone
