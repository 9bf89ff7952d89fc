"""Loading a base model: the Hugging Face model, its tokenizer, and its identity, in one call."""

from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from maskllm.core.base import Base, find, read_base


class Loaded(NamedTuple):
    """A frozen base in evaluation mode, ready to be masked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: Base


class BadLength(ValueError):
    """Windows longer than the base's context."""


class BadDevice(ValueError):
    """A device that this machine does not have."""


def choose_device(asked: str | None) -> str:
    """The device asked for, or a GPU if there is one. Raises BadDevice."""
    gpu = torch.cuda.is_available()
    if not gpu and asked not in (None, "cpu"):
        raise BadDevice(f"there is no {asked} here: leave --device out, or say cpu")
    return asked or ("cuda" if gpu else "cpu")


def check_length(model: PreTrainedModel, length: int, option: str = "--length ") -> None:
    """Raise BadLength where windows of `length` tokens do not fit the base's context; `option` sets them."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", length)
    if length > context:
        raise BadLength(f"windows of {length} tokens are longer than the base's context: {option}{context}")


def load_base(model: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Loaded:
    """Load a causal LM with every parameter frozen. Raises BadBase where there is none."""
    folder = find(model)
    base = read_base(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.nn.Module.to(loaded, device)  # transformers wraps `.to` in a type that mypy cannot follow
    loaded.requires_grad_(False)
    return Loaded(loaded, AutoTokenizer.from_pretrained(folder), base)
