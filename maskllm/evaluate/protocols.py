"""Named protocols: which windows of which text a perplexity is of. Two numbers compare under one name.

`windows:N` is our own, for any text: documents begin with BOS, and windows of N share a token with the
next, so that each has N targets. `wikitext2-N` is that of the papers (GPTQ, SparseGPT, Wanda, MaskLLM): the
raw test text of WikiText-2 as one document, in windows of N that share nothing, so that each has N - 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maskllm.data import COLUMNS, BadData, load_tokens, windows
from maskllm.evaluate.perplexity import protocol
from maskllm.models import Loaded, check_length

WIKITEXT2 = "Salesforce/wikitext", "wikitext-2-raw-v1"


class Text(NamedTuple):
    """What `perplexity` is asked about: windows (count, targets + 1), and the line to print beside it."""

    windows: Tensor
    protocol: str


class UnknownProtocol(ValueError):
    """A name that is no protocol's."""


def read(name: str, base: Loaded, sources: Sequence[str], columns: Sequence[str] = COLUMNS) -> Text:
    """The text of a protocol, as this base reads it.

    `wikitext2-N` wants the path of a `wiki.test.raw` as its only source, or none: then it asks the hub.
    Raises UnknownProtocol, BadLength (windows longer than the base's context) and BadData.
    """
    kind, length = parse(name)
    check_length(base.model, length, f"--protocol {kind}")
    if kind == "windows:":
        text = windows(load_tokens(base.tokenizer, sources, columns=columns), length)
        return Text(text, protocol(base.model, base.tokenizer, text))
    text = blocks(base.tokenizer, wikitext2(sources), length)
    return Text(text, protocol(base.model, base.tokenizer, text, name))


def parse(name: str) -> tuple[str, int]:
    """`windows:512` -> (`windows:`, 512). Raises UnknownProtocol."""
    for kind in "windows:", "wikitext2-":
        length = name.removeprefix(kind)
        if length != name and length.isdecimal() and int(length) >= 2:
            return kind, int(length)
    raise UnknownProtocol(f"no protocol {name!r}; known: windows:N and wikitext2-N, N at least 2")


def blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tensor:
    """A text as one document, with the tokenizer's own special tokens, in windows that share nothing,
    (count, length); the tail that fills no window is dropped."""
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if len(tokens) < length:
        raise BadData(f"{len(tokens)} tokens are fewer than one window of {length}: give more text")
    return tokens.unfold(0, length, length)


def wikitext2(sources: Sequence[str]) -> str:
    """The raw test text: rows joined by two line breaks, where a row is a line with its own, or nothing.

    Character for character what the papers' code joins:
    `"\\n\\n".join(load_dataset("wikitext", "wikitext-2-raw-v1", split="test")["text"])`.
    """
    if not sources:
        return "\n\n".join(_from_hub())
    if len(sources) > 1 or sources[0].startswith("hf:"):
        raise BadData(f"wikitext2 is one local wiki.test.raw, or the hub's without --data; not {sources}")
    file = Path(sources[0])
    try:
        with file.open(encoding="utf-8") as lines:  # not splitlines(): the text has breaks of other kinds
            return "\n\n".join(line if line.strip() else "" for line in lines)
    except FileNotFoundError:
        raise BadData(f"no such text: {file}") from None
    except UnicodeDecodeError as error:
        raise BadData(f"{file} is not UTF-8 text: {error}") from None


def _from_hub() -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadData("wikitext2 from the hub needs datasets: pip install 'maskllm[hub]'") from None
    try:
        return list(load_dataset(*WIKITEXT2, split="test")["text"])
    except (ValueError, OSError) as error:  # no network
        raise BadData(f"{'/'.join(WIKITEXT2)} cannot be read, give a wiki.test.raw: {error}") from None
