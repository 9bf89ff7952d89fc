"""The HTTP API: OpenAI's endpoints with a mask on each request, and the masks themselves."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, params
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from server import admin, bounds, errors, page
from server.access import COMPUTING, Access, Caller, Gate, Look, Turn, User, UserTurn, use
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
    vllm_version,
)
from server.errors import ContradictingMasks, EngineDown, ErrorBody
from server.logs import CURRENT, Entry, RequestLog
from server.masks import Masks
from server.metrics import Metrics
from server.names import DENSE
from server.settings import Settings
from server.strict import DirectRoute, FewFaults, StrictRoute, refuse_loose

UNKNOWN = "unknown"
"""The mask label of requests whose mask does not exist: names that users invent are no labels."""
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
JSON_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}}
    for status in ("4XX", "5XX")
}
"""For routes whose answers are text, which FastAPI would say of their errors, too."""


MASK_PARAMETERS = {
    "parameters": [
        {"name": name, "in": where, "schema": {"type": "string"}, "description": text}
        for name, where, text in (
            ("mask", "query", 'Mask to answer with, "none" for the dense base.'),
            ("X-Mask", "header", "The same, as a header."),
        )
    ]
}
"""For the schema; read from the request itself, as FastAPI takes 0.1 ms for two parameters."""


async def create_app(
    engine: Engine, masks: Masks, metrics: Metrics, access: Access, settings: Settings
) -> FastAPI:
    """The app of one engine and its masks. Every path but `access.OPEN` needs a key, where there are any."""
    app = FastAPI(
        title="maskllm",
        version=version("maskllm"),
        lifespan=lifespan,
        docs_url=None,  # pages that load their scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
        # vLLM leaves empty tool calls out of an answer, which a schema of its own would call required.
        separate_input_output_schemas=False,
    )
    app.router.route_class = StrictRoute
    computing = APIRouter(route_class=DirectRoute)

    async def check(request: BaseModel, raw_request: Request) -> None:
        if not settings.lenient:
            await refuse_loose(request, raw_request)
        bounds.check_texts(await raw_request.json(), engine.most_characters)

    async def respond(
        request: CompletionRequest | ChatCompletionRequest,
        raw_request: Request,
        turn: Turn,
    ) -> Response:
        """Check the request, resolve its mask, load it on first use, let vLLM answer, say which it was."""
        name, entry = UNKNOWN, CURRENT.get() or Entry("")

        def count(status: int) -> None:
            metrics.errors.labels(name, status).inc()

        entry.count_error = count
        sent = await raw_request.json()  # as it came: of content in parts the model has iterators
        if settings.log_prompts:
            entry.prompt = sent.get("messages" if isinstance(request, ChatCompletionRequest) else "prompt")
        try:
            await check(request, raw_request)
            bounds.check(request, sent, settings)
            ways = {
                "query": _only("query", raw_request.query_params.getlist("mask")),
                "body": request.mask,
                "header": _only("header", raw_request.headers.getlist("x-mask")),
            }
            turn.caller.check(*masks.names.named(request.model, **ways).values())
            if not engine.up:
                raise EngineDown
            while mask := masks.names.resolve(request.model, may_use=turn.caller.may_use, **ways):
                name = mask.name
                if await masks.ready(mask):  # from there on nothing else runs until it is in use
                    turn.held.enter_context(masks.using(mask))
                    break
                name = UNKNOWN  # replaced or removed meanwhile, and forgotten in the metrics
            name = mask.name if mask else DENSE
            entry.mask = mask.label if mask else DENSE
            request.model = mask.key if mask else None  # vLLM looks a base's name up among its names
            response = await answer(request, raw_request)
        except Exception as error:
            count(status_of(error))
            raise
        if response is not None:  # None: the client has gone
            if response.status_code >= 400:
                count(response.status_code)
            response.headers["X-Mask"] = mask.label if mask else DENSE
        return response

    @computing.post(
        "/v1/completions",
        responses={200: {"model": CompletionResponse, "content": STREAM}},
        openapi_extra=MASK_PARAMETERS,
    )
    async def completions(
        turn: UserTurn, request: Annotated[CompletionRequest, FewFaults], raw_request: Request
    ) -> Response:
        return await respond(request, raw_request, turn)

    @computing.post(
        "/v1/chat/completions",
        responses={200: {"model": ChatCompletionResponse, "content": STREAM}},
        openapi_extra=MASK_PARAMETERS,
    )
    async def chat_completions(
        turn: UserTurn, request: Annotated[ChatCompletionRequest, FewFaults], raw_request: Request
    ) -> Response:
        return await respond(request, raw_request, turn)

    async def as_base(
        request: TokenizeRequest | DetokenizeRequest, raw_request: Request, caller: Caller
    ) -> None:
        """Every mask has the base's tokenizer."""
        await check(request, raw_request)
        caller.check(*masks.names.named(request.model).values())
        if not engine.healthy:  # vLLM closes its tokenizer's threads with it
            raise EngineDown
        masks.names.resolve(request.model, may_use=caller.may_use)
        request.model = masks.base_name

    @computing.post("/tokenize", responses={200: {"model": TokenizeResponse}})
    async def tokenize(
        turn: UserTurn, request: Annotated[TokenizeRequest, FewFaults], raw_request: Request
    ) -> Response:
        await as_base(request, raw_request, turn.caller)
        response: Response = await tokens_of_text(request, raw_request)
        return response

    @computing.post("/detokenize", responses={200: {"model": DetokenizeResponse}})
    async def detokenize(
        turn: UserTurn, request: Annotated[DetokenizeRequest, FewFaults], raw_request: Request
    ) -> Response:
        await as_base(request, raw_request, turn.caller)
        response: Response = await text_of_tokens(request, raw_request)
        return response

    @app.get("/v1/models", responses={200: {"model": ModelList}})
    async def models(raw_request: Request, caller: User) -> Any:
        """The base, and every mask and alias that the caller may use, which have the base as `parent`."""
        cards = await raw_request.app.state.openai_serving_models.registry.show_available_models()
        listed = cards.model_dump()
        base = listed["data"][0]
        named = {name: mask.path.name for name, mask in masks.known.items()}
        named |= {alias: alias for alias in masks.names.aliases}
        listed["data"] = [base] if caller.may_use(DENSE) else []
        listed["data"] += [
            {**base, "id": name, "root": root, "parent": base["id"]}
            for name, root in named.items()
            if caller.may_use(name)
        ]
        return listed

    @app.get("/version", dependencies=[Depends(use)])
    async def show_version() -> Any:
        return {"version": version("maskllm"), "vllm": vllm_version}

    app.include_router(computing)
    app.include_router(admin.routes(masks, engine.capacity, engine.gpu))
    app.include_router(page.routes(engine, masks, metrics, access))
    _add_health(app, engine)
    if not settings.metrics_port:
        _add_metrics(app, engine, metrics, [] if settings.open_metrics else [Depends(Look())])
    app.state.access = access
    app.add_middleware(bounds.BodyLimit, most=settings.max_body_bytes)
    app.add_middleware(Gate, access=access)
    await engine.mount(app)  # vLLM's middleware, too: browsers ask without a key whether they may (CORS)
    app.add_middleware(RequestLog, metrics=metrics, paths=COMPUTING)  # last, and so around all
    errors.register(app)
    for death in (EngineDeadError, EngineGone):
        app.add_exception_handler(death, errors.handle_death)
    return app


def _only(way: str, names: list[str]) -> str | None:
    """The name that one part of a request gives, however often. Raises ContradictingMasks for two."""
    different = list(dict.fromkeys(names))
    if len(different) > 1:
        raise ContradictingMasks(f"the {way} names more than one mask: {', '.join(map(repr, different))}")
    return different[0] if different else None


def monitor(engine: Engine, metrics: Metrics) -> FastAPI:
    """An app beside the main one, for a port of its own: health and metrics."""
    app = FastAPI(openapi_url=None)
    _add_health(app, engine)
    _add_metrics(app, engine, metrics)
    errors.register(app)
    return app


def _add_health(app: FastAPI, engine: Engine) -> None:
    @app.get("/health", response_class=PlainTextResponse, responses=JSON_ERRORS)
    async def health() -> str:
        """200 while requests can be answered."""
        if not engine.healthy:
            raise EngineDown
        return "ok"


def _add_metrics(
    app: FastAPI, engine: Engine, metrics: Metrics, dependencies: Sequence[params.Depends] = ()
) -> None:
    @app.get("/metrics", response_class=PlainTextResponse, dependencies=dependencies, responses=JSON_ERRORS)
    async def show_metrics() -> Response:
        metrics.engine = await engine.stats()
        return Response(generate_latest(get_prometheus_registry()), media_type=CONTENT_TYPE_LATEST)
