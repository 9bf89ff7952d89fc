"""The HTTP API: OpenAI's endpoints with a mask on each request, and the masks themselves."""

from collections.abc import AsyncIterator
from contextlib import ExitStack
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from server import errors
from server.engine.client import Engine
from server.engine.openai import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    answer,
    get_prometheus_registry,
    lifespan,
    status_of,
    text_of_tokens,
    tokens_of_text,
    validate_json_request,
    vllm_version,
)
from server.errors import ErrorBody, ServerError, UnknownMask
from server.masks import DENSE, SUFFIX, Masks
from server.metrics import Metrics
from server.strict import StrictRoute, refuse_loose

UNKNOWN = "unknown"
"""The mask label of requests whose mask does not exist: names that users invent are no labels."""


class MaskSource(BaseModel, extra="forbid"):
    """Where `PUT /v1/masks/{name}` finds the mask."""

    file: str | None = None
    """File under the masks folder (default: the mask's name with .safetensors)."""


async def _until_sent() -> AsyncIterator[ExitStack]:
    """FastAPI closes it when the answer is out to its last byte, or the client is gone."""
    with ExitStack() as stack:
        yield stack


MaskQuery = Annotated[str | None, Query(description='Mask to answer with, "none" for the dense base.')]
MaskHeader = Annotated[str | None, Header(alias="X-Mask", description="The same, as a header.")]
UntilSent = Annotated[ExitStack, Depends(_until_sent)]


STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


async def create_app(engine: Engine, masks: Masks, metrics: Metrics, *, lenient: bool = False) -> FastAPI:
    """The app of one engine and its masks."""
    app = FastAPI(
        title="maskllm",
        version=version("maskllm"),
        lifespan=lifespan,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
        # vLLM leaves empty tool calls out of an answer, which a schema of its own would call required.
        separate_input_output_schemas=False,
    )
    app.router.route_class = StrictRoute

    async def check(request: BaseModel, raw_request: Request) -> None:
        if not lenient:
            await refuse_loose(request, raw_request)

    async def respond(
        request: CompletionRequest | ChatCompletionRequest,
        raw_request: Request,
        query: str | None,
        header: str | None,
        until_sent: ExitStack,
    ) -> Response:
        """Resolve the mask, load it if this is its first request, let vLLM answer, say which it was."""
        name = UNKNOWN
        try:
            await check(request, raw_request)
            while mask := masks.resolve(request.model, query=query, body=request.mask, header=header):
                name = mask.name
                until_sent.enter_context(engine.using(mask))  # no await since `resolve`
                if await masks.ready(mask):
                    break
            name = mask.name if mask else DENSE
            request.model = mask.key if mask else masks.base_name
            response = await answer(request, raw_request)
        except Exception as error:
            status = error.status if isinstance(error, ServerError) else status_of(error)
            metrics.errors.labels(name, status).inc()
            raise
        if response is not None:  # None: the client has gone
            if response.status_code >= 400:
                metrics.errors.labels(name, response.status_code).inc()
            response.headers["X-Mask"] = mask.label if mask else DENSE
        return response

    body = [Depends(validate_json_request)]

    @app.post(
        "/v1/completions",
        dependencies=body,
        responses={200: {"model": CompletionResponse, "content": STREAM}},
    )
    async def completions(
        request: CompletionRequest,
        raw_request: Request,
        until_sent: UntilSent,
        mask: MaskQuery = None,
        x_mask: MaskHeader = None,
    ) -> Response:
        return await respond(request, raw_request, mask, x_mask, until_sent)

    @app.post(
        "/v1/chat/completions",
        dependencies=body,
        responses={200: {"model": ChatCompletionResponse, "content": STREAM}},
    )
    async def chat_completions(
        request: ChatCompletionRequest,
        raw_request: Request,
        until_sent: UntilSent,
        mask: MaskQuery = None,
        x_mask: MaskHeader = None,
    ) -> Response:
        return await respond(request, raw_request, mask, x_mask, until_sent)

    @app.post("/tokenize", dependencies=body, responses={200: {"model": TokenizeResponse}})
    async def tokenize(request: TokenizeRequest, raw_request: Request) -> Response:
        """Every mask has the base's tokenizer."""
        await check(request, raw_request)
        masks.resolve(request.model)
        request.model = masks.base_name
        response: Response = await tokens_of_text(request, raw_request)
        return response

    @app.post("/detokenize", dependencies=body, responses={200: {"model": DetokenizeResponse}})
    async def detokenize(request: DetokenizeRequest, raw_request: Request) -> Response:
        await check(request, raw_request)
        masks.resolve(request.model)
        request.model = masks.base_name
        response: Response = await text_of_tokens(request, raw_request)
        return response

    @app.get("/v1/models", responses={200: {"model": ModelList}})
    async def models(raw_request: Request) -> Any:
        """The base and every mask, which has the base as `parent`."""
        cards = await raw_request.app.state.openai_serving_models.registry.show_available_models()
        listed = cards.model_dump()
        base = listed["data"][0]
        listed["data"] += [
            {**base, "id": m.name, "root": m.path.name, "parent": base["id"]} for m in masks.known.values()
        ]
        return listed

    @app.get("/v1/masks")
    async def list_masks() -> Any:
        """Every mask, and why files of the folder were refused."""
        return {
            "object": "list",
            "data": [masks.describe(mask) for mask in masks.known.values()],
            "refused": masks.refused,
        }

    @app.get("/v1/masks/{name}")
    async def show_mask(name: str) -> Any:
        mask = masks.resolve(None, path=name)
        if mask is None:
            raise UnknownMask(f"{DENSE!r} is the dense base, not a mask")
        return masks.describe(mask)

    @app.put("/v1/masks/{name}", responses={201: {"description": "A mask of a new name"}})
    async def put_mask(name: str, source: MaskSource | None = None) -> Response:
        """Load a mask from a file under the masks folder, or replace the mask of that name."""
        file = source.file if source and source.file else f"{name}{SUFFIX}"
        mask, new = await masks.put(name, file)
        return JSONResponse(masks.describe(mask), 201 if new else 200)

    @app.delete("/v1/masks/{name}", status_code=204)
    async def delete_mask(name: str) -> None:
        """Forget a mask; answers when its last request has finished and its memory is free."""
        await masks.delete(name)

    @app.get("/version")
    async def show_version() -> Any:
        return {"version": version("maskllm"), "vllm": vllm_version}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        metrics.engine = await engine.stats()
        return Response(generate_latest(get_prometheus_registry()), media_type=CONTENT_TYPE_LATEST)

    await engine.mount(app)
    errors.register(app)
    return app
