"""vLLM's OpenAI handlers and request types, with the field that we add and those of OpenAI's it lacks."""

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Literal, Self

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from vllm.entrypoints.launchers.utils.server_utils import lifespan
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as VLLMChatRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest as VLLMCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.serve.engine.protocol import ModelList
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.tokenize.api_router import detokenize as text_of_tokens
from vllm.entrypoints.serve.tokenize.api_router import tokenize as tokens_of_text
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from vllm.exceptions import VLLMError
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.version import __version__ as vllm_version

from server.errors import EngineDown, ServerError, body
from server.logs import CURRENT

__all__ = [
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "CompletionRequest",
    "CompletionResponse",
    "DetokenizeRequest",
    "DetokenizeResponse",
    "EngineDeadError",
    "ModelList",
    "TokenizeRequest",
    "TokenizeResponse",
    "answer",
    "get_prometheus_registry",
    "lifespan",
    "status_of",
    "streamed_error",
    "text_of_tokens",
    "tokens_of_text",
    "vllm_version",
]


class Masked(BaseModel):
    """What is ours in both requests."""

    model_config = ConfigDict(allow_inf_nan=False, json_schema_extra={"additionalProperties": False})

    mask: str | None = None
    """Mask to answer with, "none" for the dense base."""
    use_beam_search: Literal[False] = False
    """Each beam would be charged and counted as a request at each of its steps."""

    @model_validator(mode="wrap")
    @classmethod
    def _fails_as_a_bad_request(cls, data: Any, handler: Callable[[Any], Self]) -> Self:
        """vLLM's validators read bodies before they are checked, and trip over what they do not expect."""
        try:
            return handler(data)
        except (ValidationError, VLLMError):
            raise
        except Exception as error:
            raise ValueError(f"the body does not have the form of a request: {error!r}") from error


class CompletionRequest(Masked, VLLMCompletionRequest):
    """OpenAI's and vLLM's fields, and a mask."""


class ChatCompletionRequest(Masked, VLLMChatRequest):
    """OpenAI's and vLLM's fields, and a mask. Those that follow are taken, and change nothing here."""

    metadata: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: Literal["medium"] | None = None


def status_of(error: Exception) -> int:
    """The HTTP status that a client gets for an error, ours or vLLM's."""
    match error:
        case ServerError():
            return error.status
        case RequestValidationError():
            return 400
        case EngineDeadError():
            return EngineDown.status
    return int(create_error_response(error).error.code)


def streamed_error(
    message: str | Exception, err_type: str = "", status_code: int = 400, param: str | None = None
) -> str:
    """vLLM's `create_streaming_error_response` in OpenAI's shape; the request counts as failed, too."""
    error = create_error_response(message, err_type, HTTPStatus(status_code), param).error
    if entry := CURRENT.get():
        entry.fail(error.code)
    return json.dumps(body(error.code, error.message, error.param))


async def answer(request: CompletionRequest | ChatCompletionRequest, raw_request: Request) -> Response:
    """Run a request, whose `model` is by now a loaded mask's key, or None for the base."""
    handler = create_completion if isinstance(request, CompletionRequest) else create_chat_completion
    response: Response = await handler(request, raw_request)
    return response
