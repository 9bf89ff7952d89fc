"""The calibration examples' way through a model, one decoder block at a time.

The model calls its own blocks, so each gets the attention masks, positions and whatever else its
architecture hands out. Blocks already passed return what they are given, and the block at hand is fed
the hidden states carried so far: these, and one block's statistics, are all that is held in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskllm.core.layers import decoder_blocks


class Walk:
    """Windows of tokens (count, length), or images, on their way through a model in evaluation mode.

    They stand before the first block; `groups` and `inputs` look into the block at hand, and `carry`
    takes them through it, as its weights then are, to the next.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, batch: int) -> None:
        self._model = model
        self._batches = torch.split(windows.to(model.device), batch)
        self._blocks = list(decoder_blocks(model).values())
        self._at = 0
        self._hidden: list[Tensor] = []  # what this block reads, (batch, length, hidden); none for the first
        self._in_tuple = False  # Falcon, Bloom and GPT-J return (hidden states, attention), most the former

    def groups(self, layers: Mapping[str, nn.Linear]) -> list[list[str]]:
        """This block's layers in the order of their calls; those that read the same tensor are a group.

        A layer that no window reaches, such as an expert nobody is routed to, is in none.
        """
        read: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(_note(read, name)))
            for index in range(len(self._batches)):
                if len(read) < len(layers):
                    self._run(index)
        return [list(names) for _, names in groupby(read, key=lambda name: id(read[name]))]

    def inputs(self, layer: nn.Linear) -> Iterator[Tensor]:
        """What the layer reads, (tokens, in), batch by batch; its block is run no further than that."""
        for index in range(len(self._batches)):
            with layer.register_forward_pre_hook(_stop_at_input):
                reached = self._run(index)
            if reached.module is layer:
                yield reached.tensor.flatten(0, -2)

    def carry(self) -> None:
        """Take the windows through the block at hand."""
        self._hidden = [self._run(index).tensor for index in range(len(self._batches))]
        self._at += 1

    @torch.no_grad()
    def _run(self, index: int) -> "_Reached":
        """Run one batch to the end of the block at hand, or to a hook that stops it earlier."""
        passed, block = self._blocks[: self._at], self._blocks[self._at]
        for earlier in passed:
            earlier.forward = self._hand_on
        try:
            with (
                block.register_forward_pre_hook(self._feed(index), with_kwargs=True),
                block.register_forward_hook(self._stop_at_output),
            ):
                inputs = self._batches[index]
                if inputs.is_floating_point():
                    self._model(pixel_values=inputs)
                else:
                    self._model(input_ids=inputs, use_cache=False)
        except _Reached as reached:
            return reached
        finally:
            for earlier in passed:
                del earlier.forward  # uncovers the class's own
        raise AssertionError(f"{type(self._model).__name__} does not call its decoder blocks")

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block that the windows have passed."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None) if self._in_tuple else hidden

    def _feed(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._hidden:  # the first block reads the embeddings
                return args, kwargs
            if args:
                return (self._hidden[index], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._hidden[index]}

        return feed

    def _stop_at_output(self, module: nn.Module, _: Any, output: Any) -> None:
        self._in_tuple = isinstance(output, tuple)
        raise _Reached(module, output[0] if self._in_tuple else output)


class _Reached(Exception):
    """Ends a run early with what it was for: a layer's input or a block's output."""

    def __init__(self, module: nn.Module, tensor: Tensor) -> None:
        self.module = module
        self.tensor = tensor


def _note(read: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.setdefault(name, args[0])

    return note


def _stop_at_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(module, args[0])
