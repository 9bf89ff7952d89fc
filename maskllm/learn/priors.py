"""The mask that learning starts from: one-shot, learned earlier, or none."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast, get_args

from torch import Tensor
from transformers import PreTrainedModel

from maskllm.core import maskset
from maskllm.core.base import Base
from maskllm.core.layers import maskable
from maskllm.prune.oneshot import Method, prune

NAMES = (*get_args(Method), "none")


class NoPrior(ValueError):
    """A prior that is neither a method nor a mask file, or a file that lacks a layer."""


def identify(prior: str) -> str:
    """A prior's name as a mask's provenance has it: a file is `name@sha12`. Raises NoPrior."""
    if prior in NAMES:
        return prior
    if not Path(prior).is_file():
        raise NoPrior(f"no prior {prior!r}: give {', '.join(NAMES)}, or a mask file of this base")
    return f"{Path(prior).name}@{hashlib.sha256(Path(prior).read_bytes()).hexdigest()[:12]}"


def make(
    prior: str,
    model: PreTrainedModel,
    base: Base,
    calibration: Callable[[], Tensor],
    n: int,
    m: int,
    include: Iterable[str],
    exclude: Iterable[str],
) -> dict[str, Tensor]:
    """The prior's masks (out, in) bool by layer; "none" has none. Raises NoPrior or MaskError."""
    if prior == "none":
        return {}
    if prior in NAMES:
        return prune(model, calibration(), cast(Method, prior), n, m, include, exclude)
    mask_set = maskset.load(Path(prior), base)
    maskset.verify(mask_set, base, prior, (n, m))
    layers = maskable(model, include, exclude)
    if missing := [layer for layer in layers if layer not in mask_set.shapes]:
        raise NoPrior(f"{prior} has no mask for {missing[0]}: leave it dense with --exclude {missing[0]}")
    return {layer: mask_set.mask(layer) for layer in layers}
