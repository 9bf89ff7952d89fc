"""Perplexity is what one computes by hand, and masks on trial leave no trace."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskllm.core.patterns import best
from maskllm.data import load_tokens, windows
from maskllm.evaluate.perplexity import masked, perplexity
from maskllm.models import Loaded, load_base


@pytest.fixture
def base(base_folder: Path) -> Loaded:
    return load_base(str(base_folder))


@pytest.fixture
def tokens(base: Loaded, text: Path) -> Tensor:
    return load_tokens(base.tokenizer, [str(text)])


def test_a_model_without_any_idea_is_as_perplexed_as_its_vocabulary_is_large(
    base: Loaded, tokens: Tensor
) -> None:
    base.model.lm_head.weight.zero_()  # every logit is 0
    vocabulary = base.model.config.vocab_size
    assert perplexity(base.model, windows(tokens, 16)) == pytest.approx(vocabulary, rel=1e-6)


def test_a_model_that_repeats_its_token_is_hardly_surprised_by_repetition(base: Loaded) -> None:
    embeddings = torch.eye(base.model.config.vocab_size, base.model.config.hidden_size)
    for name, parameter in base.model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.zero_()  # nothing but the embedding reaches the head
    base.model.model.embed_tokens.weight.copy_(embeddings)
    base.model.lm_head.weight.copy_(100 * embeddings)
    # the final norm makes a 1 among 16 numbers a 4: the right logit is 400, all others are 0
    assert perplexity(base.model, torch.full((3, 8), 5)) == pytest.approx(1)


def test_it_is_the_exponential_of_the_mean_loss_and_batches_do_not_matter(
    base: Loaded, tokens: Tensor
) -> None:
    text = windows(tokens, 16)[:7]
    losses = [base.model(x[None], labels=x[None]).loss.item() for x in text]
    for batch in 1, 3, 8:
        assert perplexity(base.model, text, batch) == pytest.approx(math.exp(sum(losses) / 7), rel=1e-6)


def test_a_mask_is_on_inside_and_gone_afterwards_even_after_a_failure(base: Loaded) -> None:
    name = "model.layers.0.mlp.down_proj"
    weight = base.model.get_parameter(f"{name}.weight")
    weight[0, 0] = -0.0
    before, mask = weight.clone(), best(weight.abs())

    def fail_inside() -> None:
        with masked(base.model, {name: mask}):
            assert torch.equal(weight, torch.where(mask, before, 0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


def test_the_perplexity_of_a_model_nobody_here_made() -> None:
    shared = Path(__file__).parents[4] / "shared/data"
    if not shared.is_dir():
        pytest.skip("needs ../shared/data, which is not part of this repository")
    base = load_base(str(shared / "models/stories260K-hf"))
    stories = load_tokens(base.tokenizer, [str(shared / "domains/tinystories/test.txt")])
    assert perplexity(base.model, windows(stories, 512)) == pytest.approx(4.153, abs=0.001)
