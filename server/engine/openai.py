"""vLLM's OpenAI handlers and request types, with the one field that we add."""

from fastapi import Request
from fastapi.responses import Response
from vllm.entrypoints.launchers.utils.server_utils import lifespan
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as VLLMChatRequest
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest as VLLMCompletionRequest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.instrumentator.health import router as health_router
from vllm.entrypoints.serve.tokenize.api_router import detokenize as text_of_tokens
from vllm.entrypoints.serve.tokenize.api_router import tokenize as tokens_of_text
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.version import __version__ as vllm_version

__all__ = [
    "ChatCompletionRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "TokenizeRequest",
    "answer",
    "get_prometheus_registry",
    "health_router",
    "lifespan",
    "status_of",
    "text_of_tokens",
    "tokens_of_text",
    "validate_json_request",
    "vllm_version",
]


class CompletionRequest(VLLMCompletionRequest):
    """OpenAI's and vLLM's fields, and a mask."""

    mask: str | None = None
    """Mask to answer with, "none" for the dense base."""


class ChatCompletionRequest(VLLMChatRequest):
    """OpenAI's and vLLM's fields, and a mask."""

    mask: str | None = None
    """Mask to answer with, "none" for the dense base."""


def status_of(error: Exception) -> int:
    """The HTTP status that vLLM's handlers give an error."""
    return int(create_error_response(error).error.code)


async def answer(request: CompletionRequest | ChatCompletionRequest, raw_request: Request) -> Response:
    """Run a request, whose `model` is by now the base's name or a loaded mask's key."""
    handler = create_completion if isinstance(request, CompletionRequest) else create_chat_completion
    response: Response = await handler(request, raw_request)
    return response
