"""vLLM's linear layer with our operator inside: raw weight, resident masks, and each row's slot."""

from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from maskllm.kernels import DENSE, cpu
from maskllm.kernels.masked_linear import bf16_on_cpu, multiply

NAME = "maskllm"
QUANTIZED, BF16 = "quantized", "bf16"
"""Buffers of the head: under `--head-dtype int8`, and where it is tied to embeddings of another dtype."""

row_slots: Tensor | None = None
"""The slot of every token row of the step about to run, (rows,) int32; None while nothing has a mask.

One value for the whole process, as one step runs at a time: the mask manager writes it between
steps, by `begin_step`, and every masked layer reads it.
"""
padded: Tensor | None = None
"""`row_slots` and more of its last slot, for steps that vLLM pads to a captured CUDA graph's rows."""
parts: list[tuple[int, int | None, list[int]]] | None = []
"""On a GPU, of the step's rows: from which to which, and the slots in them.

MANY rows of one slot, as a prompt has, are a part of their own, which the sparse tensor cores take however
many others there are. None while a CUDA graph is captured, which is to serve any slots.
"""
MANY = 256
_fixed: Tensor | None = None
"""Where captured CUDA graphs read every step's `row_slots`."""


def reserve(rows: int, device: torch.device) -> None:
    """Make room for the slots of so many rows on a GPU, before any graph is captured."""
    global _fixed
    _fixed = torch.full((rows,), DENSE, dtype=torch.int32, device=device)


def begin_step(slots: list[int] | None, device: torch.device, captured_rows: int = 0) -> None:
    """The slot of every token row of the step about to run; None where nothing has a mask.

    On a GPU they go where captured graphs find them, of which the largest has `captured_rows`.
    """
    global row_slots, padded, parts
    row_slots, parts = None, []
    if device.type == "cpu":
        row_slots = padded = None if slots is None else torch.tensor(slots, dtype=torch.int32)
        cpu.begin_step(row_slots)
    elif slots is not None:
        assert _fixed is not None, "reserve comes first"
        parts = _parts(slots)
        # Rows past the step's own repeat its last slot, or they would add one to what a kernel reads.
        more = slots + slots[-1:] * (captured_rows - len(slots))
        padded = _fixed[: len(more)]
        # From pinned memory, which torch keeps until it is copied, they come without a wait of the host's.
        padded.copy_(torch.tensor(more, dtype=torch.int32, pin_memory=True), non_blocking=True)
        row_slots = padded[: len(slots)]


def begin_capture(rows: int, device: torch.device) -> None:
    """A CUDA graph is about to be captured that serves any slots: its kernels are not chosen by which."""
    global parts
    begin_step([0] * rows, device)
    parts = None


def _parts(slots: list[int]) -> list[tuple[int, int | None, list[int]]]:
    """Runs of MANY rows of one slot, and what is between them. The last goes on to the end."""
    ends, at = [0], 0
    for _, run in groupby(slots):
        begin, at = at, at + len(list(run))
        if at - begin >= MANY:
            ends += [begin, at]
    found = pairwise([*ends, at])
    return [(a, b if b < at else None, sorted(set(slots[a:b]))) for a, b in found if a < b]


class MaskConfig(QuantizationConfig):
    """`quantization="maskllm"`: every linear layer keeps its raw weight and can be masked."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MaskConfig":  # noqa: ARG003
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:  # noqa: ARG002
        config = get_current_vllm_config().additional_config
        bf16 = config.get("weight_dtype") == "bfloat16"
        if isinstance(layer, LinearBase):
            return MaskedLinearMethod(bf16)
        if isinstance(layer, VocabParallelEmbedding) and current_platform.is_cpu():
            head = isinstance(layer, ParallelLMHead)
            if head and config.get("head_dtype") == "int8":
                return Int8HeadMethod(bf16)
            if bf16 or bf16_on_cpu():
                return DenseHeadMethod(bf16)
            return None if head else EmbeddingMethod()
        return None


class MaskedLinearMethod(UnquantizedLinearMethod):
    """An unquantized linear whose rows may each use another mask.

    The mask manager gives each layer its buffer `slots` once the model is loaded. A weight that is `bf16` in
    the checkpoint is held so in a model of any dtype: swaps and dense rows read half of what float32 is.
    """

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16

    def create_weights(self, layer: nn.Module, *sizes: Any, **attributes: Any) -> None:
        super().create_weights(layer, *sizes, **attributes)
        if self.bf16:
            _become_bf16(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keep the raw weight, which vLLM on CPU would replace by a packed copy.

        As torch's own parameter: each use of vLLM's, a subclass with `__torch_function__`, takes 3 us.
        """
        weight = layer.get_parameter("weight").data
        if weight.device.type == "cpu" and not cpu.why_not():
            weight = cpu.in_big_pages(weight)
        layer.weight = nn.Parameter(weight, requires_grad=False)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.maskllm.layer(x, layer.weight, layer.slots, bias)


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """An embedding, of which vLLM on CPU would make a packed copy that only a head multiplies by."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make none: a head that is tied to it makes its own."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The embedding is the head itself, as Gemma's is, and is packed now."""
        if not hasattr(layer, "cpu_linear"):
            super().process_weights_after_loading(layer)
        return super().apply(layer, x, bias)


class DenseHeadMethod(UnquantizedEmbeddingMethod):
    """The head, which no mask covers, by our kernel: vLLM keeps a packed copy and is slower at a few rows.

    And embeddings, as one may be the head itself. They keep the model's dtype, which some models ask them
    for: a `bf16` head that is tied to them, or one of them, is multiplied by a copy.
    """

    def __init__(self, bf16: bool) -> None:
        self.bf16 = bf16

    def create_weights(self, layer: nn.Module, *sizes: Any, **attributes: Any) -> None:
        super().create_weights(layer, *sizes, **attributes)
        if self.bf16 and isinstance(layer, ParallelLMHead):
            _become_bf16(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make no packed copy. An embedding that is the head itself, as Gemma's, shows so when it is used."""
        if isinstance(layer, ParallelLMHead):
            self._multiplied(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return cpu.dense(x, self._multiplied(layer), bias)

    def _multiplied(self, layer: nn.Module) -> Tensor:
        weight: Tensor = layer.get_parameter("weight")
        if not self.bf16 or weight.dtype == torch.bfloat16:
            return weight
        if not hasattr(layer, BF16):
            layer.register_buffer(BF16, weight.bfloat16(), persistent=False)
        return layer.get_buffer(BF16)


class Int8HeadMethod(DenseHeadMethod):
    """The head by a copy of it in 8 bits; the weight itself stays, as embeddings may be tied to it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.register_buffer(QUANTIZED, cpu.quantize(layer.get_parameter("weight")), persistent=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return cpu.dense_int8(x, layer.get_parameter("weight"), layer.get_buffer(QUANTIZED), bias)


def _become_bf16(layer: nn.Module) -> None:
    """Make the weight, before it is loaded, one of bfloat16."""
    weight = layer.get_parameter("weight")
    weight.data = torch.empty_like(weight.data, dtype=torch.bfloat16)


def _layer(x: Tensor, weight: Tensor, slots: Tensor, bias: Tensor | None) -> Tensor:
    """One layer of a step: `masked_linear` for every row's slot, or plain where all rows are dense.

    An operator of its own, as a compiled graph sees nothing of `row_slots`, which it would freeze.
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    # Captured are the kernels. A layer that has none is in no mask then: the manager refuses those.
    without = slots.dtype == torch.bool and parts is None
    if row_slots is None or rows.shape[0] < row_slots.shape[0] or without:  # or these are not the tokens
        if x.dtype == weight.dtype or x.is_cuda:
            return functional.linear(x, weight, bias)
        out = cpu.dense(rows, weight, bias)
    else:
        assert padded is not None
        of_rows = padded[: rows.shape[0]]
        if padding := rows.shape[0] - of_rows.shape[0]:
            of_rows = torch.cat([of_rows, of_rows[-1:].expand(padding)])
        if parts and len(parts) > 1:
            out = x.new_empty(rows.shape[0], weight.shape[0])
            for begin, end, present in parts:
                part = slice(begin, end)
                out[part] = multiply(rows[part], weight, slots, of_rows[part], bias, present)
        else:
            out = multiply(rows, weight, slots, of_rows, bias, parts[0][2] if parts else None)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)


def _shape(x: Tensor, weight: Tensor, slots: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# Not torch.library.custom_op, whose dispatch costs more than a small layer. On CPU C++ does the usual case of
# `layer`, where a call from Python is a third of the price: 3 us instead of 11.
_library: Any = torch.library.Library("maskllm", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op("any_layer", _layer, fake_impl=_shape, target_lib=_library)
_library.define("layer(Tensor x, Tensor weight, Tensor slots, Tensor? bias) -> Tensor")
torch.library.register_fake("maskllm::layer", _shape, lib=_library)
if not (current_platform.is_cpu() and cpu.register("layer")):
    _library.impl("layer", _layer, dispatch_key=current_platform.dispatch_key)
