"""What a body may hold: JSON that every parser reads alike, and no field that nobody reads."""

from collections.abc import Callable, Coroutine
from difflib import get_close_matches
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import from_json

from server.errors import UnknownField, in_shape

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

UNUSED = {"include_obfuscation"}
"""Fields of OpenAI's inner objects that change no answer, and that vLLM's models lack."""


def refuse_unknown(body: BaseModel, at: str = "") -> None:
    """Raise UnknownField for a field that the body's model, or one within it, does not declare."""
    for name in body.model_extra or {}:
        if name not in UNUSED:
            fields = type(body).model_fields
            near = get_close_matches(name, [field.alias or key for key, field in fields.items()], n=1)
            instead = f"did you mean {at + near[0]!r}?" if near else "it would change nothing"
            hint = ELSEWHERE.get(at + name, instead)
            raise UnknownField(f"unknown field {at + name!r}; {hint}", at + name)
    for name, value in vars(body).items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                refuse_unknown(inner, f"{at}{name}.")


class StrictRequest(Request):
    """Its JSON has no NaN, no half of a surrogate pair, no endless nesting, which fail further in."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None


class StrictRoute(APIRoute):
    """Reads bodies strictly, and answers with errors in one shape whoever made them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return in_shape(await handle(StrictRequest(request.scope, request.receive)))

        return handle_strictly
