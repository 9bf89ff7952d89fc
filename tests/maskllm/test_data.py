"""Text comes in as files, folders and datasets, and goes out as windows of tokens."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from maskllm.data import BadData, Stream, load_tokens, read_documents, sample, windows

# The tokenizer's first words: <unk> 0, <s> 1, a 2, the 3, cat 4, dog 5.


def test_a_line_separates_documents_and_each_is_stripped(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n the cat\n<|endoftext|>\n\n<|endoftext|>\na dog\n\nthe end\n")
    assert list(read_documents([str(file)])) == ["the cat", "a dog\n\nthe end"]


def test_a_folder_is_its_text_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name, content in {"b.txt": "dog", "a.txt": "cat", "c.md": "no"}.items():
        (tmp_path / name).write_text(content)
    assert list(read_documents([str(tmp_path)])) == ["cat", "dog"]


def json_lines(file: Path, *rows: object) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_line_of_json_is_a_document_of_its_columns(tmp_path: Path) -> None:
    rows = [{"question": "the cat ", "answer": "sees"}, {"question": " a", "answer": "dog", "id": 1}]
    file = json_lines(tmp_path / "a.jsonl", *rows)
    assert list(read_documents([file], ["question", "answer"])) == ["the cat \nsees", "a\ndog"]
    assert list(read_documents([file], ["answer"])) == ["sees", "dog"]
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert list(read_documents([str(packed)], ["answer"])) == ["sees", "dog"]


def test_a_folder_holds_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("dog<|endoftext|>sun")
    json_lines(tmp_path / "a.jsonl", {"text": "cat"})
    json_lines(tmp_path / "c.json", {"text": "no"})
    assert list(read_documents([str(tmp_path)])) == ["cat", "dog", "sun"]


def test_a_line_that_cannot_be_used_is_named_with_the_fields_it_has(tmp_path: Path) -> None:
    json_lines(tmp_path / "missing.jsonl", {"text": "the cat"}, {"body": "a", "id": 1})
    json_lines(tmp_path / "number.jsonl", {"text": 3})
    json_lines(tmp_path / "list.jsonl", ["the cat"])
    (tmp_path / "broken.jsonl").write_text('\n{"text": "the')
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "the cat"}')[:-9])
    for name, message in {
        "missing.jsonl": "missing.jsonl, line 2 has no text in field `text`; its fields: body, id",
        "number.jsonl": "number.jsonl, line 1 has no text in field `text`",
        "list.jsonl": "list.jsonl, line 1 is no JSON object but list",
        "broken.jsonl": "broken.jsonl, line 2 is not JSON",
        "broken.jsonl.gz": "broken.jsonl.gz is not a whole gzip file",
    }.items():
        with pytest.raises(BadData, match=message):
            list(read_documents([str(tmp_path / name)]))


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
        "folder": r"no \*\.txt or \*\.jsonl in folder",
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
    with pytest.raises(BadData, match=r"a row of hf:.* has no text in field `text`; its fields: body"):
        list(read_documents([f"hf:{other}"]))


def test_a_dataset_has_splits_and_configurations(tmp_path: Path) -> None:
    for name, word in {"en": "cat", "de": "Katze"}.items():
        (tmp_path / name).mkdir()
        json_lines(tmp_path / name / "test.jsonl", {"text": f"the {word}"})
    card = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    assert list(read_documents([f"hf:{tmp_path}:test:de"])) == ["the Katze"]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Documents of text, JSON lines and a dataset in two files: 18, 14 and 8 tokens, BOS included."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("the cat<|endoftext|><|endoftext|>a dog<|endoftext|>the red sun and moon")
    (text / "b.txt").write_text("a<|endoftext|>old tree .")
    rows = [{"text": words} for words in ("big house", "the", " ", "small stone and river", "then a cat")]
    lines = json_lines(tmp_path / "lines.jsonl", *rows)
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    json_lines(dataset / "train-0.jsonl", {"text": "sun"}, {"text": ""}, {"text": "moon likes sun"})
    json_lines(dataset / "train-1.jsonl", {"text": "dog"})
    return [str(text), lines, f"hf:{dataset}"]


def test_a_stream_is_the_row_of_tokens_cut_into_windows_and_begins_again_where_it_ends(
    sources: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    row = load_tokens(tokenizer, sources)
    assert len(row) == 18 + 14 + 8
    assert row.tolist()[:7] == [1, 3, 4, 1, 2, 5, 1]
    for length in 1, 4, 13, 100:
        count = 3 * 40 // length  # three epochs
        read = Stream(tokenizer, sources, length).next_windows(count)
        assert read.shape == (count, length)
        assert torch.equal(read.flatten(), row.repeat(3)[: count * length])


@pytest.mark.parametrize("length", [1, 4, 13, 60])
def test_a_stream_goes_on_after_any_window_as_if_it_had_never_stopped(
    sources: list[str], tokenizer: PreTrainedTokenizerFast, length: int
) -> None:
    count = 2 * 40 // length + 1
    whole = Stream(tokenizer, sources, length).next_windows(count + 3)
    for stop in range(count):
        first = Stream(tokenizer, sources, length)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state()))
        again = Stream(tokenizer, sources, length)
        again.restore(state)
        assert again.state() == state
        assert torch.equal(again.next_windows(3), whole[stop : stop + 3])
        assert torch.equal(first.next_windows(3), whole[stop : stop + 3])


def test_the_state_says_where_the_stream_is(sources: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    stream = Stream(tokenizer, sources[:2], 4)
    parts = ["text/a.txt", "text/b.txt"]
    next(stream)  # <s> the cat <s>, of `the cat` and `a dog`
    told = stream.state()
    assert [name.split("/", 1)[1] for name in told["sources"][2:]] == ["lines.jsonl"]
    assert told["sources"][:2] == parts
    told.pop("sources")
    assert told == {"epoch": 0, "source": 0, "documents": 2, "dataset": None, "left": [2, 5]}
    stream.next_windows(7)  # 32 tokens are all of the text and the lines
    assert {**stream.state(), "sources": 0} == {
        "sources": 0,
        "epoch": 0,
        "source": 2,
        "documents": 4,
        "dataset": None,
        "left": [],
    }
    next(stream)
    assert stream.state()["epoch"] == 1


def test_a_stream_does_not_go_on_with_other_sources(
    sources: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    state = Stream(tokenizer, sources, 4).state()
    with pytest.raises(
        BadData, match=r"a stream of text/a.txt, .* cannot go on with text/a.txt, text/b.txt$"
    ):
        Stream(tokenizer, sources[:1], 4).restore(state)


def test_a_stream_of_nothing_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "empty.txt").write_text(" <|endoftext|>\n")
    for sources in [str(tmp_path / "empty.txt")], []:
        with pytest.raises(BadData, match="no text in"):
            next(Stream(tokenizer, sources, 4))
