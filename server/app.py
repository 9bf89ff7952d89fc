"""The HTTP API: OpenAI's endpoints with a mask on each request, and the masks themselves."""

from collections.abc import AsyncIterator
from contextlib import ExitStack
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server import bounds, errors
from server.access import ADMIN, Access, Caller, Turn, User, named_masks, use
from server.engine.client import Engine
from server.engine.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    answer,
    get_prometheus_registry,
    health_router,
    lifespan,
    status_of,
    text_of_tokens,
    tokens_of_text,
    validate_json_request,
    vllm_version,
)
from server.errors import ServerError, UnknownMask
from server.logs import CURRENT, Entry, RequestLog
from server.masks import DENSE, SUFFIX, Masks
from server.metrics import Metrics
from server.settings import Settings

UNKNOWN = "unknown"
"""The mask label of requests whose mask does not exist: names that users invent are no labels."""


class MaskSource(BaseModel):
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


async def create_app(
    engine: Engine, masks: Masks, metrics: Metrics, access: Access, settings: Settings
) -> FastAPI:
    """The app of one engine and its masks. A route without User, Turn or ADMIN is open to everyone."""
    app = FastAPI(
        title="maskllm", version=version("maskllm"), lifespan=lifespan, docs_url=None, redoc_url=None
    )

    async def respond(
        request: CompletionRequest | ChatCompletionRequest,
        raw_request: Request,
        query: str | None,
        header: str | None,
        until_sent: ExitStack,
        caller: Caller,
    ) -> Response:
        """Check the request, resolve its mask, load it on first use, let vLLM answer, say which it was."""
        name, entry = UNKNOWN, CURRENT.get() or Entry("")
        if settings.log_prompts:
            entry.prompt = request.messages if isinstance(request, ChatCompletionRequest) else request.prompt
        try:
            bounds.check(request, settings)
            caller.check(*named_masks(masks.base_name, request.model, query, request.mask, header))
            while mask := masks.resolve(request.model, query=query, body=request.mask, header=header):
                name = mask.name
                until_sent.enter_context(engine.using(mask))  # no await since `resolve`
                if await masks.ready(mask):
                    break
            name = mask.name if mask else DENSE
            entry.mask = mask.label if mask else DENSE
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

    body = [Depends(use), Depends(validate_json_request)]

    @app.post("/v1/completions", dependencies=body)
    async def completions(
        request: CompletionRequest,
        raw_request: Request,
        until_sent: UntilSent,
        caller: Turn,
        mask: MaskQuery = None,
        x_mask: MaskHeader = None,
    ) -> Response:
        return await respond(request, raw_request, mask, x_mask, until_sent, caller)

    @app.post("/v1/chat/completions", dependencies=body)
    async def chat_completions(
        request: ChatCompletionRequest,
        raw_request: Request,
        until_sent: UntilSent,
        caller: Turn,
        mask: MaskQuery = None,
        x_mask: MaskHeader = None,
    ) -> Response:
        return await respond(request, raw_request, mask, x_mask, until_sent, caller)

    @app.post("/tokenize", dependencies=body)
    async def tokenize(request: TokenizeRequest, raw_request: Request, caller: Turn) -> Response:
        """Every mask has the base's tokenizer."""
        caller.check(*named_masks(masks.base_name, request.model))
        masks.resolve(request.model)
        request.model = masks.base_name
        response: Response = await tokens_of_text(request, raw_request)
        return response

    @app.post("/detokenize", dependencies=body)
    async def detokenize(request: DetokenizeRequest, raw_request: Request, caller: Turn) -> Response:
        caller.check(*named_masks(masks.base_name, request.model))
        masks.resolve(request.model)
        request.model = masks.base_name
        response: Response = await text_of_tokens(request, raw_request)
        return response

    @app.get("/v1/models")
    async def models(raw_request: Request, caller: User) -> Any:
        """The base and every mask that the caller may use, which has the base as `parent`."""
        cards = await raw_request.app.state.openai_serving_models.registry.show_available_models()
        listed = cards.model_dump()
        base = listed["data"][0]
        listed["data"] += [
            {**base, "id": m.name, "root": m.path.name, "parent": base["id"]} for m in masks.known.values()
        ]
        listed["data"] = [m for m in listed["data"] if caller.may_use(DENSE if m is base else m["id"])]
        return listed

    @app.get("/v1/masks")
    async def list_masks(caller: User) -> Any:
        """Every mask that the caller may use, and why files of the folder were refused."""
        return {
            "object": "list",
            "data": [masks.describe(m) for name, m in masks.known.items() if caller.may_use(name)],
            "refused": {name: why for name, why in masks.refused.items() if caller.may_use(name)},
        }

    @app.get("/v1/masks/{name}")
    async def show_mask(name: str, caller: User) -> Any:
        caller.check(name)
        mask = masks.resolve(None, path=name)
        if mask is None:
            raise UnknownMask(f"{DENSE!r} is the dense base, not a mask")
        return masks.describe(mask)

    @app.put("/v1/masks/{name}", dependencies=[ADMIN])
    async def put_mask(name: str, source: MaskSource | None = None) -> Response:
        """Load a mask from a file under the masks folder, or replace the mask of that name."""
        file = source.file if source and source.file else f"{name}{SUFFIX}"
        mask, new = await masks.put(name, file)
        return JSONResponse(masks.describe(mask), 201 if new else 200)

    @app.delete("/v1/masks/{name}", status_code=204, dependencies=[ADMIN])
    async def delete_mask(name: str) -> None:
        """Forget a mask; answers when its last request has finished and its memory is free."""
        await masks.delete(name)

    @app.get("/version", dependencies=[Depends(use)])
    async def show_version() -> Any:
        return {"version": version("maskllm"), "vllm": vllm_version}

    app.include_router(health_router)
    if not settings.metrics_port:
        _add_metrics(app, engine, metrics)

    app.state.access = access
    app.add_middleware(bounds.BodyLimit, most=settings.max_body_bytes)
    await engine.mount(app)
    app.add_middleware(RequestLog, metrics=metrics)  # last, and so around all
    app.add_exception_handler(ServerError, errors.handle)
    app.add_exception_handler(HTTPException, errors.handle_http)
    return app


def monitor(app: FastAPI, engine: Engine, metrics: Metrics) -> FastAPI:
    """An app beside the main one, for a port of its own: health and metrics."""
    aside = FastAPI(openapi_url=None)
    aside.state = app.state
    aside.include_router(health_router)
    _add_metrics(aside, engine, metrics)
    return aside


def _add_metrics(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/metrics")
    async def show_metrics() -> Response:
        metrics.engine = await engine.stats()
        return Response(generate_latest(get_prometheus_registry()), media_type=CONTENT_TYPE_LATEST)
