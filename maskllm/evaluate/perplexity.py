"""Perplexity of windows of text, and the protocol without which the number means nothing."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskllm.core.layers import apply_masks


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, batch: int = 8) -> float:
    """exp of the mean cross-entropy (nats) over windows (count, targets + 1): all but a first are targets.

    The model is in evaluation mode and is asked on its own device; losses are float32, their sum float64.
    """
    total = torch.zeros((), dtype=torch.float64)
    for x in torch.split(windows.to(model.device), batch):
        logits = model(x[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().cpu()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def protocol(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, name: str | None = None
) -> str:
    """How `perplexity` comes to its number, in one line to print beside it.

    Without a name the windows are those of `maskllm.data`; a name is one of `maskllm.evaluate.protocols`
    whose windows (count, length) share nothing.
    """
    count, targets = windows.shape[0], windows.shape[1] - 1
    length = targets if name is None else targets + 1
    begins = f"{tokenizer.bos_token or tokenizer.eos_token} before each document"
    if name is not None:
        begins = "one document with the tokenizer's own special tokens"
    return (
        f"{name or f'windows:{length}'}: tokenizer {Path(tokenizer.name_or_path).name} "
        f"({len(tokenizer)} tokens), {count} windows of {length}, stride {length} (tail dropped), "
        f"{targets} targets a window, {begins}, {str(model.dtype).removeprefix('torch.')}"
    )


@contextmanager
def masked(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with masks on, by layer name; afterwards its weights are bit for bit what they were."""
    weights = {name: model.get_parameter(f"{name}.weight") for name in masks}
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    apply_masks(model, masks)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(originals[name])
