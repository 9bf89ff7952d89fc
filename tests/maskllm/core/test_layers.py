"""Every linear layer of the decoder blocks is maskable, and a mask touches only what it drops."""

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from maskllm.core.layers import NoSuchLayer, apply_masks, maskable

SIZES = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
OF_LLAMA = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
OF_NEOX = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
OF_OPT = [*(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")), "fc1", "fc2"]


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=12))


@pytest.mark.parametrize(
    ("model", "blocks", "layers"),
    [
        (llama, "model.layers", OF_LLAMA),
        (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, intermediate_size=12)), "model.layers", OF_LLAMA),
        (
            lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=12)),
            "gpt_neox.layers",
            OF_NEOX,
        ),
        (lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=12)), "model.decoder.layers", OF_OPT),
    ],
    ids=["llama", "qwen2", "gpt-neox", "opt"],
)
def test_all_linear_layers_of_the_blocks_are_maskable_and_no_others(model, blocks, layers) -> None:
    found = maskable(model())
    assert set(found) == {f"{blocks}.{index}.{layer}" for index in (0, 1) for layer in layers}
    assert all(isinstance(layer, nn.Linear) for layer in found.values())


def test_layers_come_in_model_order() -> None:
    assert list(maskable(llama()))[:4] == [f"model.layers.0.{name}" for name in OF_LLAMA[:4]]


def test_rules_include_and_exclude_by_name() -> None:
    found = maskable(llama(), include=["*.mlp.*", "*.q_proj"], exclude=["model.layers.1.*"])
    assert set(found) == {f"model.layers.0.{name}" for name in ("self_attn.q_proj", *OF_LLAMA[4:])}


@pytest.mark.parametrize("rules", [{"include": ["*.mpl.*"]}, {"exclude": ["lm_head"]}])
def test_a_rule_that_matches_nothing_is_an_error(rules: dict[str, list[str]]) -> None:
    with pytest.raises(NoSuchLayer, match=r"matches no layer; layers look like model\.layers\.0"):
        maskable(llama(), **rules)


def test_a_mask_leaves_kept_weights_bit_identical_and_drops_to_plus_zero() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 2)})
    model["q"].weight.data = torch.tensor([[-1.5, 2.0, -0.0, -3.0], [float("inf"), -1.0, 1e-45, -2.0]])
    apply_masks(model, {"q": torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()})
    expected = torch.tensor([[-1.5, 0.0, -0.0, 0.0], [0.0, 0.0, 1e-45, -2.0]])
    assert torch.equal(
        model["q"].weight.data.view(torch.int32), expected.view(torch.int32)
    )  # the bits, signs too
