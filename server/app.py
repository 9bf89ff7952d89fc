"""The HTTP API: OpenAI's endpoints with a mask on each request, and the masks themselves."""

from collections.abc import AsyncIterator
from contextlib import ExitStack
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from server import admin, errors
from server.engine.client import Engine, EngineGone
from server.engine.openai import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    EngineDeadError,
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
from server.errors import EngineDown, ErrorBody, ServerError
from server.masks import Masks
from server.metrics import Metrics
from server.names import DENSE
from server.strict import StrictRoute, refuse_loose

UNKNOWN = "unknown"
"""The mask label of requests whose mask does not exist: names that users invent are no labels."""


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
            if not engine.up:
                raise EngineDown
            while mask := masks.names.resolve(request.model, query=query, body=request.mask, header=header):
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
        masks.names.resolve(request.model)
        request.model = masks.base_name
        response: Response = await tokens_of_text(request, raw_request)
        return response

    @app.post("/detokenize", dependencies=body, responses={200: {"model": DetokenizeResponse}})
    async def detokenize(request: DetokenizeRequest, raw_request: Request) -> Response:
        await check(request, raw_request)
        masks.names.resolve(request.model)
        request.model = masks.base_name
        response: Response = await text_of_tokens(request, raw_request)
        return response

    @app.get("/v1/models", responses={200: {"model": ModelList}})
    async def models(raw_request: Request) -> Any:
        """The base, and every mask and alias, which have the base as `parent`."""
        cards = await raw_request.app.state.openai_serving_models.registry.show_available_models()
        listed = cards.model_dump()
        base = listed["data"][0]
        listed["data"] += [
            {**base, "id": name, "root": root, "parent": base["id"]}
            for name, root in [
                *((mask.name, mask.path.name) for mask in masks.known.values()),
                *((alias, ", ".join(weights)) for alias, weights in masks.names.aliases.items()),
            ]
        ]
        return listed

    @app.get("/health")
    async def health() -> Response:
        """200 while requests can be answered."""
        if not engine.up or engine.llm.errored:
            raise EngineDown()
        return Response()

    @app.get("/version")
    async def show_version() -> Any:
        return {"version": version("maskllm"), "vllm": vllm_version}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        metrics.engine = await engine.stats()
        return Response(generate_latest(get_prometheus_registry()), media_type=CONTENT_TYPE_LATEST)

    app.include_router(admin.routes(masks, engine.capacity))
    await engine.mount(app)
    errors.register(app)
    for death in (EngineDeadError, EngineGone):
        app.add_exception_handler(death, errors.engine_died)
    return app
