"""How logits become masks: two parameterisations behind one interface.

categorical   C(M,N) logits a group, one a pattern, of which Gumbel-softmax draws one
              (MaskLLM, arXiv 2409.17481, 3.2)
per-item      M logits a group, one a weight, of which N are drawn without replacement: the N largest
              after Gumbel noise (Kool et al., arXiv 1903.06059), made soft as inclusion probabilities.
              Any N:M costs one logit a weight.

Logits are kept (out, columns, in/m): rows shard as the weight's do, and the softmax over columns runs
along memory, on CPU twice as fast in all as with the columns innermost.
"""

import hashlib
from math import comb
from typing import Protocol

import torch
from torch import Tensor

from maskllm.core import patterns
from maskllm.learn.config import ParameterisationName


class Parameterisation(Protocol):
    """What a gate asks of its logits."""

    columns: int
    """Logits a group."""

    def soft(self, scores: Tensor, tau: float) -> Tensor:
        """Perturbed logits (out, columns, in/m) -> soft mask (out, in), N a group in sum."""

    def codes(self, logits: Tensor) -> Tensor:
        """The likeliest pattern of each group, (out, in/m)."""

    def nearness(self, prior: Tensor) -> Tensor:
        """How much a prior mask (out, in) bool favours each logit, (out, columns, in/m), mean 0."""


def parameterisation(name: ParameterisationName, n: int, m: int) -> Parameterisation:
    """By name. Raises BadPattern where N:M does not exist."""
    patterns.check(n, m)
    return Categorical(n, m) if name == "categorical" else PerItem(n, m)


class Categorical:
    """One logit a pattern."""

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m, self.columns = n, m, comb(m, n)

    def soft(self, scores: Tensor, tau: float) -> Tensor:
        """The mean of a group's patterns under softmax(scores / tau), the paper's equations 6 and 7."""
        weights = (scores / tau).softmax(1)
        table = patterns.patterns(self.n, self.m).to(scores)
        return (table.T @ weights).mT.flatten(1)

    def codes(self, logits: Tensor) -> Tensor:
        """The pattern with the largest logit."""
        return logits.argmax(1).to(patterns.code_dtype(self.n, self.m))

    def nearness(self, prior: Tensor) -> Tensor:
        """How many weights each pattern shares with the prior, beyond the mean overlap N^2/M.

        For 2:4, +1 the prior's own pattern, -1 its complement, 0 the others. Equation 9 of the paper
        prints N/2 for the centre, which is the mean where M = 2N.
        """
        table = patterns.patterns(self.n, self.m).to(prior.device).float()
        overlap = torch.einsum("pj,ogj->opg", table, patterns.split(prior, self.n, self.m).float())
        return overlap - self.n**2 / self.m


class PerItem:
    """One logit a weight."""

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m, self.columns = n, m, m

    def soft(self, scores: Tensor, tau: float) -> Tensor:
        """How likely each weight is among the N, if a set S of N is as likely as exp(sum of S / tau)."""
        if comb(self.m, self.n) > FEW_PATTERNS:
            return inclusion(scores / tau, self.n).mT.flatten(1)
        table = patterns.patterns(self.n, self.m).to(scores)
        weights = (table @ scores / tau).softmax(1)
        return (table.T @ weights).mT.flatten(1)

    def codes(self, logits: Tensor) -> Tensor:
        """The pattern that keeps the N largest logits."""
        return patterns.encode(patterns.best(logits.mT.flatten(1), self.n, self.m), self.n, self.m)

    def nearness(self, prior: Tensor) -> Tensor:
        """What each weight is kept beyond the mean N/M.

        For 2:4, +1/2 where kept and -1/2 where not, so that a pattern's sum is what it is in `Categorical`.
        """
        kept = patterns.split(prior, self.n, self.m).float()
        return (kept - self.n / self.m).mT


FEW_PATTERNS = 100
"""Up to this many (2:4 has 6, 4:8 has 70) their table is quicker than the recursion."""


def inclusion(scores: Tensor, n: int) -> Tensor:
    """The chance of each item to be among N, where a set S of N is as likely as exp(sum of S).

    (out, m, groups) -> the same, in m * n steps there and back however many sets there are. On the way
    there log e_k, elementary symmetric polynomials of exp(scores), weigh the sets of k items so far; on the
    way back `left` is the chance that k are still to be taken. The gradient of log e_n is the same
    chance, but torch.logaddexp, differentiated twice, is NaN where its terms are far apart.
    """
    none, one = torch.zeros_like(scores[:, 0]), torch.ones_like(scores[:, 0])
    log_e, log_odds = [none] + [torch.full_like(none, -1e30)] * n, []
    for item in scores.unbind(1):
        with_item = [fewer + item for fewer in log_e[:-1]]
        log_odds.append([taken - passed for taken, passed in zip(with_item, log_e[1:], strict=True)])
        log_e[1:] = map(torch.logaddexp, log_e[1:], with_item)
    left, chances = [none] * (n - 1) + [one], []
    for odds in reversed(log_odds):
        taken = [chance * odd.sigmoid() for chance, odd in zip(left, odds, strict=True)]
        chances.append(sum(taken, none))
        left = [old - out + new for old, out, new in zip(left, taken, [*taken[1:], none], strict=True)]
    return torch.stack(chances[::-1], 1)


TINY = 1e-20
"""Stands for a u of exactly 0, which happens, and whose noise would be infinite."""


def draw(how: Parameterisation, logits: Tensor, scale: float, tau: float, seed: int) -> Tensor:
    """The soft mask (out, in) that a seed draws from logits (out, columns, in/m).

    Gumbel noise is -log(-log(u)) of a uniform u, which takes a third of the time of `exponential_` on
    CPU.
    """
    g = torch.rand(logits.shape, generator=generator(seed, logits.device), device=logits.device)
    g = g.clamp_(min=TINY).log_().neg_().log_().neg_()
    return how.soft(torch.add(g, logits, alpha=scale), tau)


def seed_of(*numbers: int) -> int:
    """One seed for a tuple of numbers, such as run, draw and layer; other tuples give unrelated ones.

    numpy's SeedSequence would not do: to it (1, 2) and (1, 2, 0) are the same.
    """
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8]) >> 1


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator."""
    return torch.Generator(device).manual_seed(seed)
