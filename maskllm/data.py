"""Text as the rest of the package wants it: one long row of tokens, cut into windows.

Documents of a text file are separated by a line `<|endoftext|>`; every document is stripped and
preceded by the tokenizer's BOS (its EOS where it has no BOS), and nothing else is added.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"


class BadData(ValueError):
    """Text that cannot be used: not there, empty, or shorter than one window."""


def read_documents(sources: Iterable[str]) -> Iterator[str]:
    """Documents of text files, folders of `*.txt`, or Hugging Face datasets (`hf:NAME[:SPLIT]`)."""
    for source in sources:
        if source.startswith("hf:"):
            yield from _read_dataset(source)
        else:
            yield from _read_files(Path(source))


def load_tokens(
    tokenizer: PreTrainedTokenizerBase, sources: Iterable[str], limit: int | None = None
) -> Tensor:
    """All documents of the sources as one row of token ids, (tokens,) int64; stops near `limit`."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise BadData(f"{type(tokenizer).__name__} has neither a BOS nor an EOS to separate documents")
    sources, ids, batch = list(sources), list[int](), list[str]()

    def flush() -> None:
        if batch:  # one call for many documents: the fast tokenizers use every core
            for row in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                ids.extend([start, *row])
            batch.clear()

    for document in read_documents(sources):
        batch.append(document)
        if len(batch) == 256:
            flush()
            if limit is not None and len(ids) >= limit:
                break
    flush()
    if not ids:
        raise BadData(f"no text in {', '.join(sources) or 'an empty list of sources'}")
    return torch.tensor(ids[:limit])


def windows(tokens: Tensor, length: int) -> Tensor:
    """Windows in which every token but the first is a target once, (count, length + 1).

    Each holds `length` tokens to read and, one place on, `length` to predict, so neighbours share a
    token; the tail that fills no window is dropped.
    """
    if len(tokens) <= length:
        raise BadData(f"{len(tokens)} tokens are fewer than one window of {length} + 1: give more text")
    return tokens.unfold(0, length + 1, length)


def source_names(sources: Iterable[str]) -> list[str]:
    """Sources without the machine's folders, as provenance has them: `legal-us/train.txt`, `hf:NAME`."""
    names = []
    for source in sources:
        kind, name = ("hf:", source[3:]) if source.startswith("hf:") else ("", source)
        names.append(kind + "/".join(Path(name).parts[-2:]))
    return names


def sample(tokens: Tensor, length: int, batch: int, generator: torch.Generator) -> Tensor:
    """A batch of windows that start anywhere, (batch, length)."""
    if len(tokens) < length:
        raise BadData(f"{len(tokens)} tokens are fewer than one window of {length}: give more text")
    starts = torch.randint(0, len(tokens) - length + 1, (batch, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def _read_files(path: Path) -> Iterator[str]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise BadData(f"no *.txt in folder {path}")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BadData(f"no such text: {file}") from None
        except UnicodeDecodeError as error:
            raise BadData(f"{file} is not UTF-8 text: {error}") from None
        yield from filter(None, (document.strip() for document in text.split(SEPARATOR)))


def _read_dataset(source: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadData(f"{source} needs the datasets library: pip install 'maskllm[hub]'") from None
    name, _, split = source.removeprefix("hf:").partition(":")
    try:
        rows = load_dataset(name, split=split or "train", streaming=True)
    except (ValueError, OSError) as error:  # no such dataset, split or file; no network
        raise BadData(f"{source} cannot be read: {error}") from None
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise BadData(f"{source} has no column `text`; its columns: {', '.join(row)}")
        if document := row["text"].strip():
            yield document
