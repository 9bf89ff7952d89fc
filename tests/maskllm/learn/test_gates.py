"""A gate draws soft masks, learns which pattern is right, and never touches its weights."""

import copy
from collections.abc import Callable
from functools import partial
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskllm.core.layers import apply_masks
from maskllm.core.patterns import BadPattern, best, encode
from maskllm.learn.config import ParameterisationName
from maskllm.learn.gates import Gate, Sampling, SoftMasked, install
from maskllm.learn.parameterisations import draw, parameterisation
from maskllm.learn.schedules import anneal, passed

HOWS: list[ParameterisationName] = ["categorical", "per-item"]
every_way = pytest.mark.parametrize("how", HOWS)


def sampling(scale: float = 100, tau: float = 4, seed: int = 0) -> Sampling:
    return Sampling(seed, scale, tau)


def gate_on(
    layer: nn.Linear,
    how: ParameterisationName = "categorical",
    n: int = 2,
    m: int = 4,
    now: Sampling | None = None,
    index: int = 0,
) -> Gate:
    return Gate(layer, now or sampling(), parameterisation(how, n, m), n, m, index)


def certain_of(codes: list[list[int]], patterns: int = 6) -> Tensor:
    """Logits that leave no doubt: 10 for the code's pattern, 0 for the others; (out, patterns, groups)."""
    return 10 * F.one_hot(torch.tensor(codes), patterns).float().mT


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 8)


def test_a_prior_raises_its_own_pattern_and_lowers_the_complement() -> None:
    gate = gate_on(nn.Linear(4, 1))
    before = gate.logits.detach().clone()
    gate.start_from(torch.tensor([[1, 1, 0, 0]]).bool(), strength=3)
    # 1100 shares 2 weights with the prior, 0011 none, the others 1: by 3 standard deviations of 0.01
    expected = torch.tensor([0.03, 0, 0, 0, 0, -0.03])
    torch.testing.assert_close((gate.logits - before).flatten(), expected, atol=1e-7, rtol=0)
    assert gate.prior.tolist() == [[0]]


def test_a_prior_is_centred_for_patterns_that_keep_less_than_half() -> None:
    gate = gate_on(nn.Linear(4, 1), n=1)
    before = gate.logits.detach().clone()
    gate.start_from(torch.tensor([[0, 0, 1, 0]]).bool(), strength=4)
    # the mean overlap of 1:4 is 1/4, so 1 - 1/4 for the prior's pattern and 0 - 1/4 for the three others
    expected = torch.tensor([-0.01, -0.01, 0.03, -0.01])
    torch.testing.assert_close((gate.logits - before).flatten(), expected, atol=1e-7, rtol=0)


def test_a_prior_raises_the_weights_it_keeps() -> None:
    gate = gate_on(nn.Linear(4, 1), "per-item")
    before = gate.logits.detach().clone()
    gate.start_from(torch.tensor([[1, 1, 0, 0]]).bool(), strength=2)
    expected = torch.tensor([0.01, 0.01, -0.01, -0.01])  # half a weight more or less than the mean
    torch.testing.assert_close((gate.logits - before).flatten(), expected, atol=1e-7, rtol=0)
    assert gate.prior.tolist() == [[0]]


def test_a_soft_mask_without_doubt_is_the_pattern() -> None:
    layer = nn.Linear(8, 1, bias=False)
    layer.weight.data = torch.arange(1.0, 9).view(1, 8)
    gate = gate_on(layer)
    gate.logits.data = certain_of([[0, 4]])  # 1100 and 0101
    torch.testing.assert_close(gate(torch.eye(8)).flatten(), torch.tensor([1.0, 2, 0, 0, 0, 6, 0, 8]))


@every_way
def test_a_draw_is_known_by_its_number_and_its_layer(layer: nn.Linear, how: ParameterisationName) -> None:
    now, x = sampling(), torch.randn(2, 16)
    gate, elsewhere = (gate_on(layer, how, now=now, index=index) for index in (0, 1))
    elsewhere.logits.data = gate.logits.data
    now.draw(1)
    first, other_layer = gate(x), elsewhere(x)
    now.draw(2)
    second = gate(x)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, other_layer)
    now.draw(1)
    assert torch.equal(gate(x), first)


def test_another_seed_draws_other_masks(layer: nn.Linear) -> None:
    one, other = (gate_on(layer, now=sampling(seed=seed)) for seed in (1, 2))
    other.logits.data = one.logits.data
    x = torch.randn(2, 16)
    assert not torch.allclose(one(x), other(x))


@every_way
def test_hard_a_gate_is_exactly_the_masked_layer(layer: nn.Linear, how: ParameterisationName) -> None:
    gate, x = gate_on(copy.deepcopy(layer), how), torch.randn(5, 16)
    gate.sampling.mode = "hard"
    apply_masks(nn.ModuleDict({"up": layer}), {"up": gate.mask()})
    assert torch.equal(gate(x), layer(x))


def test_dense_a_gate_is_exactly_the_layer(layer: nn.Linear) -> None:
    gate, x = gate_on(layer), torch.randn(5, 16)
    gate.sampling.mode = "dense"
    assert torch.equal(gate(x), layer(x))


def test_only_the_logits_learn(layer: nn.Linear) -> None:
    gate = gate_on(layer)
    assert gate.bias is not None
    weight, bias = gate.weight.clone(), gate.bias.clone()
    assert [name for name, value in gate.named_parameters() if value.requires_grad] == ["logits"]
    optimizer = torch.optim.AdamW([gate.logits], lr=0.1)
    gate(torch.randn(5, 16)).square().sum().backward()
    optimizer.step()
    assert torch.equal(gate.weight, weight)
    assert torch.equal(gate.bias, bias)


def test_kept_is_the_squared_norm_of_the_masked_weights() -> None:
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    gate = gate_on(layer)
    gate.logits.data = certain_of([[5]])  # 0011
    gate(torch.ones(1, 4))
    assert float(gate.sampling.kept[0].detach()) == pytest.approx(3**2 + 4**2)


def test_confidence_is_the_chance_that_a_kept_weight_is_drawn() -> None:
    gate = gate_on(nn.Linear(4, 1))
    gate.logits.data.zero_()
    assert float(gate.confidence()) == pytest.approx(1 / 2)  # of six patterns, three keep a given weight
    # ten to one for 1001 against each of the five others; of these, two keep a given one of its weights
    gate.logits.data[0, 2] = log(10) / 100
    assert float(gate.confidence()) == pytest.approx((10 + 2) / 15)
    one_of_two = gate_on(nn.Linear(2, 1), "per-item", 1, 2)
    one_of_two.logits.data = torch.tensor([log(3) / 100, 0.0]).view(1, 2, 1)
    assert float(one_of_two.confidence()) == pytest.approx(3 / 4)


def test_a_width_that_is_no_multiple_of_m_is_refused() -> None:
    with pytest.raises(BadPattern, match="multiple of 4"):
        gate_on(nn.Linear(6, 2))


def test_gates_take_the_place_of_their_layers_and_draw_each_their_own(layer: nn.Linear) -> None:
    model = nn.ModuleDict({"up": copy.deepcopy(layer), "down": layer})
    gates = install(model, {"up": model["up"], "down": layer}, sampling(), "per-item", 2, 4)  # type: ignore[dict-item]
    assert model["up"] is gates["up"]
    assert model["down"] is gates["down"]
    assert not torch.equal(gates["up"].logits, gates["down"].logits)


@every_way
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8)])
def test_the_gradients_are_those_of_small_differences(how: ParameterisationName, n: int, m: int) -> None:
    x, weight, logits, mask = double(how, n, m)
    assert torch.autograd.gradcheck(lambda *a: SoftMasked.apply(a[0], weight, a[1], mask), (x, logits))


def test_the_gradients_of_8_of_16_are_those_of_small_differences() -> None:
    x, weight, logits, mask = double("per-item", 8, 16)
    assert torch.autograd.gradcheck(lambda *a: SoftMasked.apply(a[0], weight, a[1], mask), (x, logits))


@every_way
def test_outputs_and_gradients_are_those_of_the_plain_formula(how: ParameterisationName) -> None:
    x, weight, logits, mask = double(how, 2, 4)

    def plain(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        masked = weight * mask(logits)
        return F.linear(x, masked), masked.square().sum()

    def gradients(y: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.square().sum() + 3 * kept, (x, logits))

    ours, theirs = SoftMasked.apply(x, weight, logits, mask), plain(x, logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(*ours), gradients(*theirs))
    # of each output alone, as where there is no weight regularisation
    for index in 0, 1:
        ours, theirs = SoftMasked.apply(x, weight, logits, mask), plain(x, logits)
        torch.testing.assert_close(
            *(torch.autograd.grad(both[index].sum(), logits) for both in (ours, theirs))
        )


def test_the_backward_pass_draws_the_mask_of_the_forward_pass() -> None:
    x, weight, logits, mask = double("categorical", 2, 4)

    def gradients(*masks: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        draws = iter(masks)
        y, _ = SoftMasked.apply(x, weight, logits, lambda given: next(draws)(given))
        return torch.autograd.grad(y.square().sum(), (x, logits))

    right, again = gradients(mask, mask), gradients(mask, mask)
    wrong = gradients(mask, partial(mask, seed=2))
    for one, other, third in zip(right, again, wrong, strict=True):
        assert torch.equal(one, other)
        assert not torch.allclose(one, third)


@every_way
def test_for_the_backward_pass_a_gate_holds_its_inputs_and_no_more(
    layer: nn.Linear, how: ParameterisationName
) -> None:
    gate, x = gate_on(layer, how), torch.randn(5, 16, requires_grad=True)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: held.append(saved) or saved, lambda t: t):
        gate(x)
    known = {tensor.data_ptr() for tensor in (x, gate.weight, gate.logits)}
    assert {tensor.data_ptr() for tensor in held} == known


def test_a_block_that_is_computed_again_leaves_nothing_behind(layer: nn.Linear) -> None:
    gate, then = gate_on(layer), nn.Linear(8, 8)
    gate.sampling.draw(1)
    y = checkpoint(lambda x: then(gate(x)).tanh(), torch.randn(5, 16), use_reentrant=False)
    kept = gate.sampling.kept[0]
    y.sum().backward()
    assert gate.sampling.kept[0] is kept  # a second one would hold what `then` and tanh saved


@every_way
def test_a_bfloat16_base_learns_in_float32(layer: nn.Linear, how: ParameterisationName) -> None:
    gate = gate_on(layer.bfloat16(), how)
    y = gate(torch.randn(5, 16, dtype=torch.bfloat16))
    (y.square().sum() + gate.sampling.kept[0]).backward()
    assert gate.logits.grad is not None
    assert (y.dtype, gate.logits.dtype, gate.logits.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


@pytest.mark.parametrize(
    ("how", "n", "m"),
    [
        ("categorical", 2, 4),
        ("categorical", 4, 8),
        ("per-item", 2, 4),
        ("per-item", 4, 8),
        ("per-item", 8, 16),
        ("per-item", 2, 8),
    ],
)
def test_the_mask_that_explains_the_data_is_learned(how: ParameterisationName, n: int, m: int) -> None:
    """The right weights made the data and the others are noise, too large for a choice by magnitude."""
    generator = torch.Generator().manual_seed(0)
    right = best(torch.rand(8, 16, generator=generator), n, m)
    weight = torch.randn(8, 16, generator=generator)
    layer = nn.Linear(16, 8, bias=False)
    layer.weight.data = torch.where(right, weight, 2 * torch.randn(8, 16, generator=generator))
    gate = gate_on(layer, how, n, m)
    gate.start_from(best(layer.weight.abs(), n, m), strength=3)
    assert (gate.prior != encode(right, n, m)).float().mean() > 0.5

    optimizer = torch.optim.AdamW([gate.logits], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(300):
        share = passed(step, 300)
        gate.sampling.tau = anneal("linear", share, 4, 0.05)
        gate.sampling.scale = anneal("linear", share, 100, 500)
        gate.sampling.draw(step)
        x = torch.randn(64, 16, generator=generator)
        F.mse_loss(gate(x), x @ torch.where(right, weight, 0).T).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (gate.mask() == right).float().mean() > 0.97


def double(how: ParameterisationName, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Callable[..., Tensor]]:
    """In float64, x (3, 2m), weight (2, 2m) and logits of a tiny layer, and a draw of soft masks."""
    way, generator = parameterisation(how, n, m), torch.Generator().manual_seed(0)
    x, weight, logits = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(3, 2 * m), (2, 2 * m), (2, way.columns, 2)]
    )
    mask = partial(draw, way, scale=1, tau=2, seed=1)
    return x.requires_grad_(), weight, logits.requires_grad_(), mask
