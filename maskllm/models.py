"""Loading a base model: the Hugging Face model, its tokenizer, and its identity, in one call."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from maskllm.core.base import BadBase, Base, read_base


class Loaded(NamedTuple):
    """A frozen base in evaluation mode, ready to be masked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: Base


def resolve(model: str) -> Path:
    """The local folder of a model: a folder as it is, a Hugging Face name from cache or hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError):
        raise BadBase(f"{model!r} is no folder here and cannot be had from the Hugging Face hub") from None


class BadLength(ValueError):
    """Windows longer than the base's context."""


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise BadLength where windows of `length` tokens do not fit the base's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", length)
    if length > context:
        raise BadLength(f"windows of {length} tokens are longer than the base's context: --length {context}")


def load_base(model: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Loaded:
    """Load a causal LM with every parameter frozen. Raises BadBase where there is none."""
    folder = resolve(model)
    base = read_base(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.nn.Module.to(loaded, device)  # transformers wraps `.to` in a type that mypy cannot follow
    loaded.requires_grad_(False)
    return Loaded(loaded, AutoTokenizer.from_pretrained(folder), base)
