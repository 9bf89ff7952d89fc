"""A gate draws soft masks, learns which pattern is right, and never touches its weights."""

import copy
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskllm.core.layers import apply_masks
from maskllm.core.patterns import BadPattern, best, encode
from maskllm.learn.gates import Gate, Noise, soft_mask
from maskllm.learn.schedules import linear


def noise(scale: float = 100, tau: float = 4, seed: int = 0) -> Noise:
    return Noise(scale, tau, torch.Generator().manual_seed(seed))


def certain_of(codes: list[list[int]], patterns: int = 6) -> torch.Tensor:
    """Logits that leave no doubt: 10 for the code's pattern, 0 for the others; (patterns, out, groups)."""
    return 10 * F.one_hot(torch.tensor(codes), patterns).float().movedim(-1, 0)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 8)


def test_a_prior_raises_its_own_pattern_and_lowers_the_complement() -> None:
    gate = Gate(nn.Linear(4, 1), noise(), 2, 4)
    before = gate.logits.detach().clone()
    gate.start_from(torch.tensor([[1, 1, 0, 0]]).bool(), strength=3)
    # 1100 shares 2 weights with the prior, 0011 none, the others 1: by 3 standard deviations of 0.01
    expected = torch.tensor([0.03, 0, 0, 0, 0, -0.03])
    torch.testing.assert_close((gate.logits - before).flatten(), expected, atol=1e-7, rtol=0)
    assert gate.prior.tolist() == [[0]]


def test_a_prior_is_centred_for_patterns_that_keep_less_than_half() -> None:
    gate = Gate(nn.Linear(4, 1), noise(), 1, 4)
    before = gate.logits.detach().clone()
    gate.start_from(torch.tensor([[0, 0, 1, 0]]).bool(), strength=4)
    # the mean overlap of 1:4 is 1/4, so 1 - 1/4 for the prior's pattern and 0 - 1/4 for the three others
    expected = torch.tensor([-0.01, -0.01, 0.03, -0.01])
    torch.testing.assert_close((gate.logits - before).flatten(), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_a_soft_mask_keeps_n_of_every_group_in_sum(n: int, m: int) -> None:
    gate = Gate(nn.Linear(4 * m, 3), noise(), n, m)
    mask = soft_mask(gate.logits, gate.noise, n, m)
    assert mask.shape == (3, 4 * m)
    assert ((mask >= 0) & (mask <= 1)).all()
    torch.testing.assert_close(mask.view(3, 4, m).sum(-1), torch.full((3, 4), float(n)))


def test_a_soft_mask_without_doubt_is_the_pattern() -> None:
    mask = soft_mask(certain_of([[0, 4]]), noise(), 2, 4)
    torch.testing.assert_close(mask, torch.tensor([[1.0, 1, 0, 0, 0, 1, 0, 1]]))


def test_patterns_are_drawn_as_often_as_their_logits_say() -> None:
    # 1:2 has two patterns; logits log(3) and 0 at scale 1 are odds of 3 to 1
    logits = torch.tensor([log(3), 0.0]).view(2, 1, 1).expand(2, 1, 40_000)
    kept_left = soft_mask(logits, noise(scale=1), 1, 2).view(-1, 2).argmax(-1) == 0
    assert float(kept_left.float().mean()) == pytest.approx(0.75, abs=0.01)


def test_the_scale_multiplies_logits_but_not_the_noise() -> None:
    logits = torch.tensor([log(3) / 100, 0.0]).view(2, 1, 1).expand(2, 1, 40_000)
    kept_left = soft_mask(logits, noise(scale=100), 1, 2).view(-1, 2).argmax(-1) == 0
    assert float(kept_left.float().mean()) == pytest.approx(0.75, abs=0.01)


def test_every_forward_draws_anew_and_a_seed_draws_the_same(layer: nn.Linear) -> None:
    x = torch.randn(2, 16)
    gate, again = Gate(layer, noise(seed=1), 2, 4), Gate(layer, noise(seed=1), 2, 4)
    first, second = gate(x), gate(x)
    assert not torch.equal(first, second)
    assert torch.equal(again(x), first)
    assert torch.equal(again(x), second)


def test_in_evaluation_a_gate_is_exactly_the_hard_masked_layer(layer: nn.Linear) -> None:
    gate, x = Gate(copy.deepcopy(layer), noise(), 2, 4).eval(), torch.randn(5, 16)
    apply_masks(nn.ModuleDict({"up": layer}), {"up": gate.mask()})
    assert torch.equal(gate(x), layer(x))


def test_only_the_logits_learn(layer: nn.Linear) -> None:
    gate = Gate(layer, noise(), 2, 4)
    weight, bias = gate.weight.clone(), gate.bias.clone()
    assert [name for name, _ in gate.named_parameters()] == ["logits"]
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.1)
    gate(torch.randn(5, 16)).square().sum().backward()
    optimizer.step()
    assert torch.equal(gate.weight, weight)
    assert torch.equal(gate.bias, bias)


def test_kept_is_the_squared_norm_of_the_masked_weights() -> None:
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    gate = Gate(layer, noise(), 2, 4)
    gate.logits.data = certain_of([[5]])  # 0011
    gate(torch.ones(1, 4))
    assert float(gate.kept.detach()) == pytest.approx(3**2 + 4**2)


def test_confidence_is_the_likeliest_patterns_chance() -> None:
    gate = Gate(nn.Linear(4, 1), noise(scale=100), 2, 4)
    gate.logits.data.zero_()
    assert float(gate.confidence()) == pytest.approx(1 / 6)
    gate.logits.data[2] = log(5) / 100  # five to one against each of the five others
    assert float(gate.confidence()) == pytest.approx(1 / 2)


def test_a_width_that_is_no_multiple_of_m_is_refused() -> None:
    with pytest.raises(BadPattern, match="multiple of 4"):
        Gate(nn.Linear(6, 2), noise(), 2, 4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_the_mask_that_explains_the_data_is_learned(n: int, m: int) -> None:
    """Half the weights made the data and half are noise, too large for a choice by magnitude."""
    generator = torch.Generator().manual_seed(0)
    right = best(torch.rand(8, 16, generator=generator), n, m)
    weight = torch.randn(8, 16, generator=generator)
    layer = nn.Linear(16, 8, bias=False)
    layer.weight.data = torch.where(right, weight, 2 * torch.randn(8, 16, generator=generator))
    gate = Gate(layer, noise(), n, m)
    gate.start_from(best(layer.weight.abs(), n, m), strength=3)
    assert (gate.prior != encode(right, n, m)).float().mean() > 0.5

    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(300):
        gate.noise.tau, gate.noise.scale = linear(step, 300, 4, 0.05), linear(step, 300, 100, 500)
        x = torch.randn(64, 16, generator=generator)
        F.mse_loss(gate(x), x @ torch.where(right, weight, 0).T).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (gate.mask() == right).float().mean() > 0.97
