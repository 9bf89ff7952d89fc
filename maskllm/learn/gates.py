"""A frozen linear layer under a mask that learns: MaskLLM's categorical gate (arXiv 2409.17481, 3.2).

Every group of M weights has C(M,N) logits, one a pattern. They are kept pattern by pattern,
(patterns, out, in/m), so that the softmax over patterns runs along memory: on CPU twice as fast in
all as with the patterns innermost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm.core import patterns

LOGITS_STD = 0.01
"""Spread of fresh logits; at the first scale, 100, it is about that of the Gumbel noise."""


@dataclass
class Noise:
    """How random the soft masks of all gates are at this step, and the generator they draw from."""

    scale: float
    tau: float
    generator: torch.Generator


def install(
    model: nn.Module, layers: Mapping[str, nn.Linear], noise: Noise, n: int, m: int
) -> dict[str, "Gate"]:
    """Put a gate in the place of each layer, and return the gates by layer name."""
    gates = {name: Gate(layer, noise, n, m) for name, layer in layers.items()}
    for name, gate in gates.items():
        model.set_submodule(name, gate)
    return gates


class Gate(nn.Module):
    """A linear layer whose weights and bias are frozen and whose mask learns.

    In training mode each forward draws a fresh soft mask, and leaves the squared norm of the weights
    as masked in `kept`. In evaluation mode the mask is the hard one: each group's likeliest pattern.
    """

    weight: Tensor
    bias: Tensor | None
    prior: Tensor
    """Codes of the mask that learning started from, (out, in/m)."""
    kept: Tensor

    def __init__(self, linear: nn.Linear, noise: Noise, n: int, m: int) -> None:
        super().__init__()
        rows, groups, _ = patterns.split(linear.weight, n, m).shape
        self.in_features, self.out_features, self.n, self.m = linear.in_features, linear.out_features, n, m
        self.noise = noise
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        logits = torch.empty(comb(m, n), rows, groups, device=linear.weight.device)
        self.logits = nn.Parameter(logits.normal_(0, LOGITS_STD, generator=noise.generator))
        self.register_buffer("prior", self.codes())

    @torch.no_grad()
    def start_from(self, prior: Tensor, strength: float) -> None:
        """Favour the patterns near a prior mask (out, in) bool by `strength` standard deviations."""
        self.prior = patterns.encode(prior, self.n, self.m)
        self.logits.add_(nearness(prior, self.n, self.m), alpha=strength * LOGITS_STD)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.training:
            return F.linear(x, torch.where(self.mask(), self.weight, 0), self.bias)
        weight = self.weight * soft_mask(self.logits, self.noise, self.n, self.m)
        self.kept = torch.linalg.vector_norm(weight).square()
        return F.linear(x, weight, self.bias)

    def codes(self) -> Tensor:
        """The likeliest pattern of each group, (out, in/m)."""
        return self.logits.argmax(0).to(patterns.code_dtype(self.n, self.m))

    def mask(self) -> Tensor:
        """The hard mask, (out, in) bool."""
        return patterns.expand(self.codes(), self.n, self.m)

    @torch.no_grad()
    def confidence(self) -> Tensor:
        """How likely each group is to draw its likeliest pattern at the present scale, (out, in/m)."""
        return (self.logits * self.noise.scale).softmax(0).amax(0)


def nearness(prior: Tensor, n: int, m: int) -> Tensor:
    """How many weights each pattern shares with a prior mask (out, in), beyond the mean overlap N^2/M.

    (patterns, out, in/m) fp32: for 2:4, +1 the prior's own pattern, -1 its complement, 0 the others.
    Equation 9 of the paper prints N/2 for the centre, which is the mean where M = 2N.
    """
    table = patterns.patterns(n, m).to(prior.device).float()
    return torch.einsum("pj,ogj->pog", table, patterns.split(prior, n, m).float()) - n * n / m


def soft_mask(logits: Tensor, noise: Noise, n: int, m: int) -> Tensor:
    """The mean of a group's patterns under Gumbel-softmax weights; (patterns, out, in/m) -> (out, in).

    Equation 6: softmax((scale * logits + g) / tau). Gumbel noise is -log(-log(u)) of a uniform u, which
    takes a third of the time of `exponential_` on CPU; a u of exactly 0 only rules its pattern out.
    """
    g = torch.rand(logits.shape, generator=noise.generator, device=logits.device)
    g = g.log_().neg_().log_().neg_()
    weights = g.add_(logits, alpha=noise.scale).div_(noise.tau).softmax(0)
    table = patterns.patterns(n, m).to(logits)
    return (table.T @ weights.flatten(1)).T.reshape(logits.shape[1], -1)
