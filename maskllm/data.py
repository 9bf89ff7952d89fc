"""Text as the rest of the package wants it: one long row of tokens, cut into windows.

A source is a text file, a JSON lines file (`*.jsonl`, `*.jsonl.gz`, `*.json.gz`), a folder of these, or
a Hugging Face dataset read as a stream (`hf:NAME[:SPLIT[:CONFIG]]`). Documents of a text file are
separated by `<|endoftext|>`; elsewhere a document is a row's columns, joined by a line break. Every
document is stripped and preceded by the tokenizer's BOS (its EOS where it has no BOS), and nothing else
is added.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"
JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")
COLUMNS = ("text",)

T = TypeVar("T")


class BadData(ValueError):
    """Text that cannot be used: not there, empty, without a column asked for, or shorter than a window."""


def read_documents(sources: Iterable[str], columns: Sequence[str] = COLUMNS) -> Iterator[str]:
    """Documents of the sources in their order, stripped; empty ones are left out."""
    for source in sources:
        for part in _parts(source):
            yield from (document for document, _ in _read(part, columns))


def load_tokens(
    tokenizer: PreTrainedTokenizerBase,
    sources: Iterable[str],
    limit: int | None = None,
    columns: Sequence[str] = COLUMNS,
) -> Tensor:
    """All documents of the sources as one row of token ids, (tokens,) int64; stops at `limit`."""
    sources, ids = list(sources), list[int]()
    documents = ((document, None) for document in read_documents(sources, columns))
    for row, _ in _tokenised(tokenizer, documents):
        ids.extend(row)
        if limit is not None and len(ids) >= limit:
            break
    if not ids:
        raise _no_text(sources)
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


@dataclass(frozen=True)
class Position:
    """A place between two documents. `dataset` is the Hugging Face dataset's own state there."""

    epoch: int = 0
    source: int = 0
    documents: int = 0
    dataset: dict[str, Any] | None = None


class Stream:
    """Windows of `length` tokens in the order of the sources, over and over, without holding the text.

    Windows follow each other without gap or overlap, across documents, sources and epochs: what fills no
    window at the end of the sources begins the first window of the next epoch. Never ends; raises BadData
    where a source cannot be read or the sources hold no text.
    """

    _position: Position  # after the last document begun
    _left: Tensor  # that document's tokens which no window has had yet
    _rows: Iterator[tuple[list[int], Position]]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[str],
        length: int,
        columns: Sequence[str] = COLUMNS,
    ) -> None:
        self.tokenizer, self.sources, self.length, self.columns = tokenizer, list(sources), length, columns
        self._parts = [part for source in sources for part in _parts(source)]
        self._go_to(Position(), [])

    def __next__(self) -> Tensor:
        """The next window, (length,) int64."""
        while len(self._left) < self.length:
            row, self._position = next(self._rows)
            self._left = torch.cat([self._left, torch.tensor(row)])
        window, self._left = self._left[: self.length], self._left[self.length :]
        return window

    def next_windows(self, count: int) -> Tensor:
        """The next `count` windows, (count, length) int64."""
        return torch.stack([next(self) for _ in range(count)])

    def state(self) -> dict[str, Any]:
        """Where the stream is, for JSON: the position after the last document begun, and that document's
        tokens which no window has had yet. Documents read ahead to be tokenised together do not count."""
        at = self._position
        return {
            "sources": source_names(self._parts),
            "epoch": at.epoch,
            "source": at.source,  # folders count as their files
            "documents": at.documents,
            "dataset": at.dataset,
            "left": self._left.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream of the same sources was when it gave this state."""
        if state["sources"] != source_names(self._parts):
            there, here = (", ".join(names) for names in (state["sources"], source_names(self._parts)))
            raise BadData(f"a stream of {there} cannot go on with {here}")
        position = Position(state["epoch"], state["source"], state["documents"], state["dataset"])
        self._go_to(position, state["left"])

    def _go_to(self, position: Position, left: Sequence[int]) -> None:
        self._position = position
        self._left = torch.tensor(left, dtype=torch.int64)
        self._rows = self._rows_from(position)

    def _rows_from(self, at: Position) -> Iterator[tuple[list[int], Position]]:
        """Documents as tokens from a position on, without end, each with the position after it."""
        while True:
            end = at
            for row, end in _tokenised(self.tokenizer, self._epoch(at)):
                yield row, end
            if end == Position(at.epoch):
                raise _no_text(self.sources)
            at = Position(at.epoch + 1)

    def _epoch(self, at: Position) -> Iterator[tuple[str, Position]]:
        """Documents from a position to the end of the sources, each with the position after it."""
        for source in range(at.source, len(self._parts)):
            read = _read(self._parts[source], self.columns, at.documents, at.dataset)
            for count, (document, dataset) in enumerate(read, at.documents + 1):
                yield document, Position(at.epoch, source, count, dataset)
            at = Position(at.epoch, source + 1)


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[tuple[str, T]]
) -> Iterator[tuple[list[int], T]]:
    """Each document as its start token and its own, in order, beside whatever came with it."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise BadData(f"{type(tokenizer).__name__} has neither a BOS nor an EOS to separate documents")
    for batch in _batches(documents):  # one call for many documents: the fast tokenizers use every core
        texts = [document for document, _ in batch]
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for row, (_, beside) in zip(rows, batch, strict=True):
            yield [start, *row], beside


def _batches(
    documents: Iterable[tuple[str, T]], count: int = 256, characters: int = 1 << 20
) -> Iterator[list[tuple[str, T]]]:
    """Up to `count` documents at a time, fewer where they are so long that memory would notice."""
    batch, size = list[tuple[str, T]](), 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if len(batch) == count or size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(source: str) -> list[str]:
    """A source's own files, in order of their names, where it is a folder."""
    if source.startswith("hf:") or not Path(source).is_dir():
        return [source]
    files = sorted(str(file) for file in Path(source).iterdir() if file.name.endswith((".txt", *JSON_LINES)))
    if not files:
        raise BadData(f"no *.txt or *.jsonl in folder {source}")
    return files


def _read(
    part: str, columns: Sequence[str], skip: int = 0, dataset: dict[str, Any] | None = None
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Documents of a file or dataset from a position on; a dataset's own state after each beside it."""
    if part.startswith("hf:"):
        yield from _read_dataset(part, columns, dataset)
        return
    reader = _read_rows(part, columns) if part.endswith(JSON_LINES) else _read_text(part)
    for number, document in enumerate(filter(None, map(str.strip, reader))):
        if number >= skip:
            yield document, None


def _read_text(file: str) -> Iterator[str]:
    document = list[str]()  # the lines of one document are all that is held
    for line in _lines(file):
        first, *others = line.split(SEPARATOR)
        document.append(first)
        for other in others:
            yield "".join(document)
            document = [other]
    yield "".join(document)


def _read_rows(file: str, columns: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadData(f"{file}, line {number} is not JSON: {error}") from None
            yield _document(row, columns, f"{file}, line {number}")


def _lines(file: str) -> Iterator[str]:
    opened = gzip.open if file.endswith(".gz") else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            yield from lines
    except FileNotFoundError:
        raise BadData(f"no such text: {file}") from None
    except UnicodeDecodeError as error:
        raise BadData(f"{file} is not UTF-8 text: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadData(f"{file} is not a whole gzip file: {error}") from None


def _read_dataset(
    source: str, columns: Sequence[str], state: dict[str, Any] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadData(f"{source} needs the datasets library: pip install 'maskllm[hub]'") from None
    name, split, config = (*source.removeprefix("hf:").split(":", 2), "", "")[:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
    except (ValueError, OSError) as error:  # no such dataset, config, split or file; no network
        raise BadData(f"{source} cannot be read: {error}") from None
    if state is not None:
        rows.load_state_dict(state)
    for row in rows:
        if document := _document(row, columns, f"a row of {source}").strip():
            yield document, rows.state_dict()


def _document(row: object, columns: Sequence[str], where: str) -> str:
    if not isinstance(row, Mapping):
        raise BadData(f"{where} is no JSON object but {type(row).__name__}")
    for column in columns:
        if not isinstance(row.get(column), str):
            raise BadData(f"{where} has no text in field `{column}`; its fields: {', '.join(row)}")
    return "\n".join(row[column] for column in columns)


def _no_text(sources: Sequence[str]) -> BadData:
    return BadData(f"no text in {', '.join(sources) or 'an empty list of sources'}")
