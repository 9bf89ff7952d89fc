"""A protocol measures what its name says, as the papers do where it is theirs."""

import copy
import math
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from maskllm.data import BadData, load_tokens, windows
from maskllm.evaluate.perplexity import perplexity
from maskllm.evaluate.protocols import UnknownProtocol, blocks, parse, read, wikitext2
from maskllm.models import BadLength, Loaded, load_base

# Lines as wiki.test.raw has them, and the rows that the dataset makes of them. U+2028 breaks no row.
LINES = " \n = The cat = \n \n the cat\u2028sees \n a dog . \n \n"
ROWS = ["", " = The cat = \n", "", " the cat\u2028sees \n", " a dog . \n", ""]


@pytest.fixture
def base(base_folder: Path) -> Loaded:
    return load_base(str(base_folder))


@pytest.fixture
def raw(tmp_path: Path) -> str:
    file = tmp_path / "wiki.test.raw"
    file.write_text(LINES)
    return str(file)


def test_wikitext2_is_the_rows_of_the_dataset_joined_by_two_line_breaks(raw: str) -> None:
    assert wikitext2([raw]) == "\n\n".join(ROWS)
    assert wikitext2([raw]).startswith("\n\n = The cat = \n\n\n\n\n the cat")


def test_wikitext2_without_a_file_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch, raw: str) -> None:
    def load_dataset(name: str, config: str, split: str) -> dict[str, list[str]]:
        assert (name, config, split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        return {"text": ROWS}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert wikitext2([]) == wikitext2([raw])


def test_wikitext2_is_one_local_file_and_says_so(tmp_path: Path, raw: str, base: Loaded) -> None:
    for sources in [raw, raw], ["hf:wikitext"]:
        with pytest.raises(BadData, match=r"one local wiki\.test\.raw"):
            wikitext2(sources)
    with pytest.raises(BadData, match="no such text"):
        wikitext2([str(tmp_path / "nope")])
    with pytest.raises(BadData, match="tokens are fewer than one window of 100"):
        read("wikitext2-100", base, [raw])


def test_blocks_share_nothing_and_begin_as_the_tokenizer_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    # the 3, cat 4, sees 8, a 2, dog 5, moon 7
    assert blocks(tokenizer, "the cat sees a dog \n\n moon the", 3).tolist() == [[3, 4, 8], [2, 5, 7]]
    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert blocks(begins, "the cat", 3).tolist() == [[1, 3, 4]]


def test_wikitext2_is_what_the_papers_compute(base: Loaded, text: Path) -> None:
    length = 64
    measured = read(f"wikitext2-{length}", base, [str(text)])

    # as in GPTQ's, SparseGPT's, Wanda's and MaskLLM's evaluation
    rows = [line if line.strip() else "" for line in text.read_text().split("\n")]
    rows = [row + "\n" if row and index < len(rows) - 1 else row for index, row in enumerate(rows)]
    tokens = base.tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    count = tokens.numel() // length
    nlls = []
    for i in range(count):
        batch = tokens[:, i * length : (i + 1) * length]
        logits = base.model(batch).logits[:, :-1]
        nlls.append(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item() * length)
    assert measured.windows.shape == (count, length)
    assert perplexity(base.model, measured.windows) == pytest.approx(
        math.exp(sum(nlls) / (count * length)), rel=1e-5
    )


def test_windows_are_those_of_the_data_whose_columns_are_asked_for(
    base: Loaded, text: Path, tmp_path: Path
) -> None:
    assert torch.equal(
        read("windows:32", base, [str(text)]).windows, windows(load_tokens(base.tokenizer, [str(text)]), 32)
    )
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"question": "the cat", "answer": "sees a"}\n')
    assert read("windows:4", base, [str(lines)], ["question", "answer"]).windows.tolist() == [[1, 3, 4, 8, 2]]


def test_the_line_says_what_makes_two_numbers_comparable(base: Loaded, text: Path) -> None:
    # forty documents of one <s> and fifty words are 2040 tokens; as one document with 39 separators, 2039
    assert read("windows:16", base, [str(text)]).protocol == (
        "windows:16: tokenizer tiny (22 tokens), 127 windows of 16, stride 16 (tail dropped), "
        "16 targets a window, <s> before each document, float32"
    )
    assert read("wikitext2-16", base, [str(text)]).protocol == (
        "wikitext2-16: tokenizer tiny (22 tokens), 127 windows of 16, stride 16 (tail dropped), "
        "15 targets a window, one document with the tokenizer's own special tokens, float32"
    )


def test_a_protocol_is_known_and_fits_the_base(base: Loaded, text: Path) -> None:
    assert parse("windows:512") == ("windows:", 512)
    assert parse("wikitext2-4096") == ("wikitext2-", 4096)
    for name in "windows", "windows:", "windows:-2", "wikitext2-1", "wikitext103-512":
        with pytest.raises(UnknownProtocol, match="known: windows:N and wikitext2-N"):
            read(name, base, [str(text)])
    for name in "windows:", "wikitext2-":
        with pytest.raises(BadLength, match=f"longer than the base's context: --protocol {name}512"):
            read(f"{name}513", base, [str(text)])


def test_the_real_wikitext2_has_the_rows_of_the_dataset() -> None:
    file = Path(__file__).parents[4] / "shared/data/wikitext-2-raw/wiki.test.raw"
    if not file.exists():
        pytest.skip("needs ../shared/data, which is not part of this repository")
    text = wikitext2([str(file)])
    # 4,358 rows; with GPT-2's tokenizer 287,644 tokens, as in public logs of its perplexity: (287644 > 1024)
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    rows = [line if line.strip() else "" for line in file.read_text().split("\n")[:-1]]
    assert len(rows) == 4358
    assert len(text) == sum(map(len, rows)) + sum(row != "" for row in rows) + 2 * 4357
