"""Everything the server can be told, by flag or by environment."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    CliToggleFlag,
    CliUnknownArgs,
    SettingsConfigDict,
)


class Settings(
    BaseSettings,
    use_attribute_docstrings=True,
    cli_prog_name="maskllm serve",
    cli_kebab_case=True,
    cli_ignore_unknown_args=True,
    cli_hide_none_type=True,
    cli_avoid_json=True,
):
    """Serve one base model under many masks behind an OpenAI-compatible endpoint.

    Example: maskllm serve --model examples/demo/base --masks examples/demo/masks --port 8000

    Each option can also be set by environment, as MASKLLM_PORT=9000. Every other option goes to
    vLLM by its own name, as --max-model-len 4096 (see `vllm serve --help`).
    """

    model_config = SettingsConfigDict(env_prefix="MASKLLM_")

    model: str
    """Base model: a folder or a Hugging Face name."""

    masks: Path
    """Folder of mask files; every *.safetensors in it is a mask under its file name."""

    name: str = ""
    """Name of the base in the API (default: the last part of --model)."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every one that the machine has."""

    port: PositiveInt = 8000
    """Port to listen on."""

    slots: PositiveInt = 8
    """How many masks can be resident, and so be used in one batch, at a time."""

    packed: PositiveInt | None = None
    """How many 2:4 masks host memory may hold, and fewer where some are larger, as 4:8 ones; the least
    recently used goes (default: as many as fit)."""

    grace_s: PositiveInt = 30
    """Seconds that requests in flight get to finish when the server is told to stop."""

    turn_steps: PositiveInt = 32
    """For how many steps at least a mask keeps its slot while others wait for one; a swap costs 1 to 3."""

    mask_dtype: Literal["auto", "bfloat16", "int8"] = "auto"
    """How a resident mask holds its kept weights. auto: bfloat16 where that is exact, else without kernels.
    int8: smaller and faster, and rounds masked weights and their inputs to 8 bits."""

    head_dtype: Literal["auto", "int8"] = "auto"
    """How the output layer, which no mask covers, is multiplied. auto: as it is. int8: by a copy of it in
    8 bits, which is faster and rounds logits; on CPU."""

    lenient: CliImplicitFlag[bool] = False
    """Ignore a request's unknown fields and read "1" as 1, as vLLM does; they are refused otherwise."""

    keys: str = ""
    """File of API keys, a JSON list of the entries that `maskllm key` prints; by environment, that list
    itself. Without keys everyone may use every mask, and nobody may change them."""

    max_body_bytes: PositiveInt = 4 << 20
    """Largest body of a request."""

    max_n: PositiveInt = 16
    """Most answers to one prompt (n)."""

    max_prompts: Annotated[int, Field(ge=1, le=1024)] = 128
    """Most answers in one request, prompts times n."""

    max_completion_tokens: PositiveInt | None = None
    """Most tokens that an answer may be asked for; without it, what the model's context leaves."""

    max_waiting: PositiveInt | None = None
    """Most requests in flight, waiting or running, in all; one more is a 503 (default: twice as many as run
    at once, vLLM's --max-num-seqs, so that nobody waits longer than others are answered)."""

    metrics_port: PositiveInt | None = None
    """Port of its own for /metrics, which then is not on the other; /health is on both."""

    open_metrics: CliImplicitFlag[bool] = False
    """Let /metrics be read without a key beside the API, too. It names masks and keys."""

    log_requests: Path | None = None
    """File for the request log, JSON lines; stderr without it."""

    log_prompts: CliToggleFlag[bool] = False
    """Write prompts, too, into the request log. Answers are never written."""

    engine: CliUnknownArgs = []
    """Options that go to vLLM unchanged."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.name = self.name or Path(self.model).name
        for option in self.engine:
            if option.startswith("--") and "lora" in option.partition("=")[0]:
                raise ValueError(f"{option}: LoRA adapters and masks cannot be used together yet")
        if not self.masks.is_dir():
            raise ValueError(f"--masks {self.masks} is not a folder")
        return self
