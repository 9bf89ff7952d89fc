"""Text comes in as files, folders and datasets, and goes out as windows of tokens."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from maskllm.data import BadData, load_tokens, read_documents, sample, windows

# The tokenizer's first words: <unk> 0, <s> 1, a 2, the 3, cat 4, dog 5.


def test_a_line_separates_documents_and_each_is_stripped(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n the cat\n<|endoftext|>\n\n<|endoftext|>\na dog\n\nthe end\n")
    assert list(read_documents([str(file)])) == ["the cat", "a dog\n\nthe end"]


def test_a_folder_is_its_text_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name, content in {"b.txt": "dog", "a.txt": "cat", "c.md": "no"}.items():
        (tmp_path / name).write_text(content)
    assert list(read_documents([str(tmp_path)])) == ["cat", "dog"]


def test_every_document_begins_with_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the cat<|endoftext|>a dog")
    assert load_tokens(tokenizer, [str(file), str(file)]).tolist() == [1, 3, 4, 1, 2, 5, 1, 3, 4, 1, 2, 5]
    assert load_tokens(tokenizer, [str(file)], limit=4).tolist() == [1, 3, 4, 1]


def test_a_tokenizer_without_bos_begins_documents_with_eos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = tokenizer.backend_tokenizer
    file = tmp_path / "a.txt"
    file.write_text("the cat")
    with_eos = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="dog")
    assert load_tokens(with_eos, [str(file)]).tolist() == [5, 3, 4]
    with pytest.raises(BadData, match="neither a BOS nor an EOS"):
        load_tokens(PreTrainedTokenizerFast(tokenizer_object=words), [str(file)])


def test_in_windows_every_token_but_the_first_is_a_target_once_and_the_tail_is_dropped() -> None:
    assert windows(torch.arange(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    with pytest.raises(BadData, match=r"8 tokens are fewer than one window of 8 \+ 1"):
        windows(torch.arange(8), 8)


def test_samples_are_pieces_of_the_text_drawn_by_seed() -> None:
    text = torch.arange(20)
    batch = sample(text, 5, 100, torch.Generator().manual_seed(0))
    assert batch.shape == (100, 5)
    assert torch.equal(batch - batch[:, :1], torch.arange(5).expand(100, 5))
    assert set(batch[:, 0].tolist()) == set(range(16))  # from the very first to the very last window
    assert torch.equal(batch, sample(text, 5, 100, torch.Generator().manual_seed(0)))
    assert sample(torch.arange(5), 5, 1, torch.Generator()).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(BadData, match="4 tokens are fewer"):
        sample(torch.arange(4), 5, 1, torch.Generator())


def test_text_that_cannot_be_used_says_why(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "nope.txt": "no such text: .*nope.txt",
        "latin.txt": "latin.txt is not UTF-8",
        "empty.txt": "no text in .*empty.txt",
        "folder": r"no \*\.txt in folder",
    }.items():
        with pytest.raises(BadData, match=message):
            load_tokens(tokenizer, [str(tmp_path / name)])


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A Hugging Face dataset of JSON lines in a local folder, two splits."""
    for split, texts in {"train": ["the cat", "  ", "a dog "], "test": ["the dog"]}.items():
        rows = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
        (tmp_path / f"{split}.jsonl").write_text(rows)
    return f"hf:{tmp_path}"


def test_a_hugging_face_dataset_is_its_column_text(dataset: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert load_tokens(tokenizer, [dataset]).tolist() == [1, 3, 4, 1, 2, 5]
    assert load_tokens(tokenizer, [f"{dataset}:test"]).tolist() == [1, 3, 5]


def test_a_dataset_that_cannot_be_used_says_why(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="valid"):
        list(read_documents([f"{dataset}:valid"]))
    with pytest.raises(BadData, match=r"hf:.*nowhere"):
        list(read_documents([f"hf:{tmp_path}/nowhere"]))
    other = tmp_path / "other"
    other.mkdir()
    (other / "train.jsonl").write_text('{"body": "the cat"}\n')
    with pytest.raises(BadData, match=r"has no column `text`; its columns: body"):
        list(read_documents([f"hf:{other}"]))
