"""Logits become masks: one logit a pattern or one a weight, with N kept of every group."""

from itertools import combinations
from math import log

import pytest
import torch
from torch import Tensor

from maskllm.core.patterns import BadPattern, best, encode, expand, patterns
from maskllm.learn import parameterisations
from maskllm.learn.config import ParameterisationName
from maskllm.learn.parameterisations import Categorical, PerItem, draw, inclusion, parameterisation, seed_of

HOWS: list[ParameterisationName] = ["categorical", "per-item"]
SHAPES = [(2, 4), (1, 4), (4, 8), (8, 16), (2, 8), (3, 5)]


def random(*shape: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def by_sets(scores: Tensor, n: int) -> Tensor:
    """`inclusion` as it is defined: every set of N by itself."""
    sets = list(combinations(range(scores.shape[1]), n))
    chances = torch.stack([scores[:, kept].sum(1) for kept in sets]).softmax(0)
    return torch.stack(
        [
            sum((p for p, kept in zip(chances, sets, strict=True) if item in kept), torch.zeros(()))
            for item in range(scores.shape[1])
        ],
        dim=1,
    )


@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("how", HOWS)
def test_a_soft_mask_keeps_n_of_every_group_in_sum(how: ParameterisationName, n: int, m: int) -> None:
    way = parameterisation(how, n, m)
    mask = way.soft(random(3, way.columns, 4), tau=1)
    assert mask.shape == (3, 4 * m)
    assert ((mask >= 0) & (mask <= 1 + 1e-6)).all()
    torch.testing.assert_close(mask.view(3, 4, m).sum(-1), torch.full((3, 4), float(n)), atol=1e-4, rtol=0)


def test_both_need_an_n_and_m_that_exist() -> None:
    for how in HOWS:
        with pytest.raises(BadPattern, match="no pattern 4:4"):
            parameterisation(how, 4, 4)


def test_logits_are_as_many_as_patterns_or_weights() -> None:
    assert parameterisation("categorical", 2, 4).columns == 6
    assert parameterisation("per-item", 2, 4).columns == 4
    assert parameterisation("per-item", 8, 16).columns == 16


def test_inclusion_of_one_in_two_is_the_softmax() -> None:
    chance = inclusion(torch.tensor([log(3), 0.0]).view(1, 2, 1), 1)
    torch.testing.assert_close(chance.flatten(), torch.tensor([0.75, 0.25]))


def test_inclusion_of_two_in_three_by_hand() -> None:
    # exp(scores) are 1, 2, 3: the sets {1,2}, {1,3}, {2,3} weigh 2, 3, 6 of 11
    chance = inclusion(torch.tensor([1.0, 2, 3]).log().view(1, 3, 1), 2)
    torch.testing.assert_close(chance.flatten(), torch.tensor([5 / 11, 8 / 11, 9 / 11]))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 8), (3, 5), (7, 8)])
def test_inclusion_and_its_gradient_are_those_of_all_sets_one_by_one(n: int, m: int) -> None:
    scores, of_chance = random(2, m, 3).requires_grad_(), random(2, m, 3)
    chance, expected = inclusion(scores, n), by_sets(scores, n)
    torch.testing.assert_close(chance, expected)
    torch.testing.assert_close(
        torch.autograd.grad(chance, scores, of_chance), torch.autograd.grad(expected, scores, of_chance)
    )


@pytest.mark.parametrize("spread", [1.0, 100.0, 10_000.0])
def test_inclusion_has_a_gradient_however_far_apart_the_scores_are(spread: float) -> None:
    """Scale 500 and temperature 0.05 put them thousands apart."""
    scores = random(4, 16, 8, spread=spread).requires_grad_()
    chance = inclusion(scores, 8)
    (gradient,) = torch.autograd.grad(chance, scores, random(4, 16, 8))
    assert gradient.isfinite().all()
    torch.testing.assert_close(chance.sum(1), torch.full((4, 8), 8.0))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 8), (3, 5)])
def test_the_table_and_the_recursion_agree(monkeypatch: pytest.MonkeyPatch, n: int, m: int) -> None:
    scores, of_mask = random(3, m, 4).requires_grad_(), random(3, 4 * m)
    table = PerItem(n, m).soft(scores, tau=2)
    monkeypatch.setattr(parameterisations, "FEW_PATTERNS", 0)
    recursion = PerItem(n, m).soft(scores, tau=2)
    torch.testing.assert_close(recursion, table)
    torch.testing.assert_close(
        torch.autograd.grad(recursion, scores, of_mask), torch.autograd.grad(table, scores, of_mask)
    )


def test_equal_scores_share_n_equally() -> None:
    for n, m in SHAPES:
        mask = PerItem(n, m).soft(torch.zeros(1, m, 1), tau=1)
        torch.testing.assert_close(mask, torch.full((1, m), n / m))


@pytest.mark.parametrize("how", HOWS)
def test_one_of_two_is_drawn_as_often_as_the_logits_say(how: ParameterisationName) -> None:
    # 1:2 has two patterns and two weights: logits log(3) and 0 are odds of 3 to 1 either way
    logits = torch.tensor([log(3), 0.0]).view(1, 2, 1).expand(1, 2, 40_000)
    mask = draw(parameterisation(how, 1, 2), logits, scale=1, tau=4, seed=0)
    assert float((mask.view(-1, 2).argmax(-1) == 0).float().mean()) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("how", HOWS)
def test_the_scale_multiplies_logits_but_not_the_noise(how: ParameterisationName) -> None:
    logits = torch.tensor([log(3) / 100, 0.0]).view(1, 2, 1).expand(1, 2, 40_000)
    mask = draw(parameterisation(how, 1, 2), logits, scale=100, tau=4, seed=0)
    assert float((mask.view(-1, 2).argmax(-1) == 0).float().mean()) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("how", HOWS)
def test_a_seed_draws_one_mask_and_another_seed_another(how: ParameterisationName) -> None:
    way = parameterisation(how, 2, 4)
    logits = random(3, way.columns, 4)
    first, again, other = (draw(way, logits, 1, 1, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_seeds_of_different_numbers_differ() -> None:
    numbers = [(0, 0), (0, 1), (1, 0), (0,), (0, 0, 1), (0, 1, 0)]
    assert len({seed_of(*some) for some in numbers}) == len(numbers)


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_when_cold_the_n_largest_are_kept(n: int, m: int) -> None:
    scores = random(3, m, 4)
    mask = PerItem(n, m).soft(scores, tau=1e-4)
    torch.testing.assert_close(mask, best(scores.mT.flatten(1), n, m).float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 8), (3, 5)])
def test_a_pattern_that_scores_the_sum_of_its_weights_is_chosen_by_both(n: int, m: int) -> None:
    items = random(3, m, 4)
    sums = patterns(n, m).float() @ items
    codes = PerItem(n, m).codes(items)
    assert torch.equal(codes, Categorical(n, m).codes(sums))
    assert torch.equal(expand(codes, n, m), best(items.mT.flatten(1), n, m))
    # and with the same scores their soft masks are the same
    torch.testing.assert_close(PerItem(n, m).soft(items, 2), Categorical(n, m).soft(sums, 2))


def test_the_n_largest_logits_of_8_of_16_are_kept() -> None:
    logits = torch.arange(16.0).view(1, 16, 1)
    assert expand(PerItem(8, 16).codes(logits), 8, 16).tolist() == [[False] * 8 + [True] * 8]


def test_a_prior_is_nearest_to_its_own_pattern() -> None:
    prior = torch.tensor([[True, True, False, False]])
    assert Categorical(2, 4).nearness(prior).flatten().tolist() == [1, 0, 0, 0, 0, -1]
    assert PerItem(2, 4).nearness(prior).flatten().tolist() == [0.5, 0.5, -0.5, -0.5]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 8), (3, 5)])
def test_nearness_means_the_same_to_both(n: int, m: int) -> None:
    prior = best(random(3, 4 * m), n, m)
    pattern, weight = Categorical(n, m).nearness(prior), PerItem(n, m).nearness(prior)
    torch.testing.assert_close(patterns(n, m).float() @ weight, pattern)
    for nearness in pattern, weight:
        torch.testing.assert_close(nearness.mean(1), torch.zeros(3, 4))
    for way, nearness in (Categorical(n, m), pattern), (PerItem(n, m), weight):
        assert torch.equal(way.codes(nearness), encode(prior, n, m))
