"""Which layers of a model are maskable, and putting a mask on them."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


class NoSuchLayer(ValueError):
    """A rule that names no layer, or a model without decoder blocks."""


def maskable(
    model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> dict[str, nn.Linear]:
    """Every `nn.Linear` of the decoder blocks by name, in model order; embeddings and head are not.

    `include` and `exclude` are globs on the full name ("*.mlp.*", "model.layers.0.*"); a layer
    stays if some include matches (or there is none) and no exclude does. Raises NoSuchLayer on a
    rule that matches nothing, which is a misspelling more often than a wish.
    """
    layers = {
        f"{block_name}.{name}": layer
        for block_name, block in decoder_blocks(model).items()
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    include, exclude = list(include), list(exclude)
    for rule in [*include, *exclude]:
        if not any(fnmatchcase(name, rule) for name in layers):
            raise NoSuchLayer(f"rule {rule!r} matches no layer; layers look like {next(iter(layers))}")
    return {
        name: layer
        for name, layer in layers.items()
        if (not include or any(fnmatchcase(name, rule) for rule in include))
        and not any(fnmatchcase(name, rule) for rule in exclude)
    }


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks of a Hugging Face causal LM by name, first to last.

    They are the children of the one `nn.ModuleList` as long as the config's `num_hidden_layers`.
    """
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    raise NoSuchLayer(f"{type(model).__name__} has no list of {count} decoder blocks")


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero what the masks drop, in place. Kept weights are the base's own bits."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.masked_fill_(~mask.to(weight.device), 0)
