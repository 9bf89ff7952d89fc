"""One-shot pruning: a mask from the weights and some calibration text, layer by layer.

magnitude   keeps the largest |w|
wanda       keeps the largest |w| * ||x||, x being the layer's input (Sun et al., arXiv 2306.11695)
sparsegpt   keeps what the layer's output would miss most, given that kept weights make good for
            dropped ones (Frantar and Alistarh, arXiv 2301.00774; `sparsegpt.py`)
reconstruct keeps what brings the layer's output nearest to the dense one with the weights as they are
            (ours; `reconstruct.py`)
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from maskllm.core.layers import decoder_blocks, maskable
from maskllm.core.patterns import BadPattern, best, check
from maskllm.data import BadData
from maskllm.prune import reconstruct, sparsegpt
from maskllm.prune.calibration import Walk

Method = Literal["magnitude", "wanda", "sparsegpt", "reconstruct"]


@torch.no_grad()
def prune(
    model: PreTrainedModel,
    calibration: Tensor | None,
    method: Method,
    n: int = 2,
    m: int = 4,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    update_weights: bool = False,
    batch: int = 8,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Masks (out, in) bool by layer name, for a model in evaluation mode, made on its device.

    `calibration` holds windows of token ids (count, length), or images for a classifier; magnitude needs
    none. Each layer's
    statistics come from what it reads once all before it are pruned. Afterwards the weights are bit
    for bit what they were; with `update_weights` they are SparseGPT's sparse ones instead.
    Raises BadPattern where a layer's width is no multiple of M; NoSuchLayer; BadData.
    """
    assert method == "sparsegpt" or not update_weights
    check(n, m)
    layers = maskable(model, include, exclude)
    for name, layer in layers.items():
        if layer.in_features % m:
            raise BadPattern(f"{name} has {layer.in_features} inputs, no multiple of {m}: exclude it")
    if method == "magnitude":
        return {name: best(layer.weight.abs(), n, m) for name, layer in layers.items()}
    if calibration is None:
        raise BadData(f"{method} needs calibration text")

    masks: dict[str, Tensor] = {}
    walk = Walk(model, calibration, batch)
    for block in tqdm(decoder_blocks(model), method, unit="block", disable=None if progress else True):
        here = {name: layer for name, layer in layers.items() if name.startswith(f"{block}.")}
        with nullcontext() if update_weights else _restored(here.values()):
            for group in walk.groups(here):
                readers = {name: here[name] for name in group}
                masks |= _prune_group(readers, walk.inputs(here[group[0]]), method, n, m, update_weights)
            for name in here.keys() - masks.keys():
                warnings.warn(f"no calibration token reaches {name}: pruned by magnitude", stacklevel=2)
                masks[name] = best(here[name].weight.abs(), n, m)
                here[name].weight.masked_fill_(~masks[name], 0)
            walk.carry()
    return {name: masks[name] for name in layers}


def _prune_group(
    layers: Mapping[str, nn.Linear],
    inputs: Iterable[Tensor],
    method: Method,
    n: int,
    m: int,
    update_weights: bool,
) -> dict[str, Tensor]:
    """Masks of layers that all read `inputs`, (tokens, in) each; their weights are left pruned."""
    masks = {}
    statistic = _input_norms(inputs) if method == "wanda" else sparsegpt.hessian(inputs)
    for name, layer in layers.items():
        weight, updated = layer.weight.float(), layer.weight
        if method == "wanda":
            masks[name] = best(weight.abs() * statistic, n, m)
        elif method == "reconstruct":
            masks[name] = reconstruct.solve(weight, statistic, n, m)
        else:
            masks[name], updated = sparsegpt.solve(weight, statistic, n, m)
        if update_weights:
            layer.weight.copy_(updated)
        else:
            layer.weight.masked_fill_(~masks[name], 0)
    return masks


def _input_norms(inputs: Iterable[Tensor]) -> Tensor:
    """Batches of inputs (tokens, in) -> the norm of each input over all tokens, (in,) float32."""
    return reduce(torch.add, (x.float().square().sum(0) for x in inputs)).sqrt()


@contextmanager
def _restored(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """Give the layers their weights back at the end, bit for bit."""
    layers = list(layers)
    originals = [layer.weight.clone() for layer in layers]
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.weight.copy_(original)
