"""A tiny base made here: two decoder blocks of random weights, and a tokenizer of words."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = "a the cat dog sun moon sees likes eats old red big small and then . tree house river stone"
WORDS = VOCABULARY.split()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `<unk>` 0, `<s>` 1, then WORDS from 2."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The base as a Hugging Face checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of fifty random words."""
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=50)) for _ in range(40)]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n<|endoftext|>\n".join(documents))
    return file
