"""A frozen linear layer under a mask that learns (MaskLLM, arXiv 2409.17481, 3.2).

A soft mask is a function of the logits and a seed. It is drawn in the forward pass, dropped, and drawn
again in the backward pass, so that between the two a layer holds its logits and nothing of their size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from maskllm.core import patterns
from maskllm.learn.config import ParameterisationName
from maskllm.learn.parameterisations import Parameterisation, draw, generator, parameterisation, seed_of

LOGITS_STD = 0.01
"""Spread of fresh logits; at the paper's first scale, 100, it is about that of the Gumbel noise."""


@dataclass
class Sampling:
    """What all gates of a model do at this moment; the trainer sets it, the gates read it."""

    seed: int
    scale: float
    tau: float
    number: int = 0
    """Of the draw of soft masks, counted over the whole run; with the seed it decides the noise."""
    mode: Literal["soft", "hard", "dense"] = "soft"
    """Soft masks to learn, hard ones to measure, none for the dense teacher."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """By layer, the squared norm of the weights as masked in this draw."""

    def draw(self, number: int) -> None:
        """Soft masks from here on, those of this number."""
        self.mode, self.number, self.kept = "soft", number, {}


def install(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    sampling: Sampling,
    how: ParameterisationName,
    n: int,
    m: int,
) -> dict[str, "Gate"]:
    """Put a gate in the place of each layer, and return the gates by layer name."""
    asked = parameterisation(how, n, m)
    gates = {
        name: Gate(layer, sampling, asked, n, m, index) for index, (name, layer) in enumerate(layers.items())
    }
    for name, gate in gates.items():
        model.set_submodule(name, gate)
    return gates


class Gate(nn.Module):
    """A linear layer whose weights and bias are frozen and whose mask learns."""

    bias: nn.Parameter | None
    prior: Tensor
    """Codes of the mask that learning started from, (out, in/m)."""
    seen: Tensor
    """Codes of the hard mask when it was last measured; of the prior before that."""

    def __init__(
        self, linear: nn.Linear, sampling: Sampling, how: Parameterisation, n: int, m: int, index: int
    ) -> None:
        super().__init__()
        linear.requires_grad_(False)
        rows, groups, _ = patterns.split(linear.weight, n, m).shape
        self.in_features, self.out_features, self.n, self.m = linear.in_features, linear.out_features, n, m
        self.sampling, self.how, self.index = sampling, how, index
        self.weight = linear.weight
        self.bias = linear.bias
        device = linear.weight.device
        logits = torch.empty(rows, how.columns, groups, device=device)
        logits.normal_(0, LOGITS_STD, generator=generator(seed_of(sampling.seed, index), device))
        self.logits = nn.Parameter(logits)
        self.register_buffer("prior", how.codes(logits))
        self.register_buffer("seen", self.prior)

    @torch.no_grad()
    def start_from(self, prior: Tensor, strength: float) -> None:
        """Favour the patterns near a prior mask (out, in) bool by `strength` standard deviations."""
        self.prior = self.seen = patterns.encode(prior, self.n, self.m)
        self.logits.add_(self.how.nearness(prior), alpha=strength * LOGITS_STD)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        now = self.sampling
        if now.mode == "dense":
            return F.linear(x, self.weight, self.bias)
        if now.mode == "hard":
            return F.linear(x, torch.where(self.mask(), self.weight, 0), self.bias)
        seed = seed_of(now.seed, self.index, now.number)
        mask = partial(draw, self.how, scale=now.scale, tau=now.tau, seed=seed)
        y: Tensor
        y, kept = SoftMasked.apply(x, self.weight, self.logits, mask)  # type: ignore[no-untyped-call]
        # The first stays: one of a block that is computed again would keep all of that block in memory.
        now.kept.setdefault(self.index, kept)
        return y if self.bias is None else y + self.bias

    def codes(self) -> Tensor:
        """The likeliest pattern of each group, (out, in/m)."""
        return self.how.codes(whole(self.logits.detach()))

    def mask(self) -> Tensor:
        """The hard mask, (out, in) bool."""
        return patterns.expand(self.codes(), self.n, self.m)

    @torch.no_grad()
    def confidence(self) -> Tensor:
        """The chance that a weight which the hard mask keeps is drawn at the present scale; mean, ().

        From N/M where nothing is learned to 1 where nothing is left to chance.
        """
        soft = self.how.soft(whole(self.logits) * self.sampling.scale, tau=1)
        return soft[self.mask()].mean()


class SoftMasked(torch.autograd.Function):
    """x @ (weight * mask(logits))^T, and the squared norm of the masked weight, with the mask recomputed.

    x (..., in), weight (out, in) frozen, `mask` a differentiable function from logits to (out, in) that
    gives the same values whenever it is called. Saved for the backward pass are references to the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, logits: Tensor, mask: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, logits)
        ctx.mask = mask
        masked = weight * mask(logits).to(weight.dtype)
        return F.linear(x, masked), torch.linalg.vector_norm(masked, dtype=logits.dtype).square()

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, of_kept: Tensor) -> tuple[Tensor | None, None, Tensor, None]:
        x, weight, logits = ctx.saved_tensors
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            mask = ctx.mask(logits)
        masked = weight * mask.detach().to(weight.dtype)
        of_x = of_y @ masked if ctx.needs_input_grad[0] else None
        of_masked = of_y.flatten(0, -2).mT @ x.flatten(0, -2)
        of_mask = torch.addcmul(of_masked.to(mask.dtype), masked.to(mask.dtype), 2 * of_kept).mul_(weight)
        (of_logits,) = torch.autograd.grad(mask, logits, of_mask)
        return of_x, None, of_logits, None


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes gathered on each of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
