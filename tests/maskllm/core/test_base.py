"""A base is its tensors, however they are stored."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maskllm.core.base import BadBase, is_bf16, read_base


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_the_fingerprint_does_not_depend_on_the_shards(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="2KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert read_base(tmp_path / "one") == read_base(tmp_path / "many")


def test_the_fingerprint_does_not_depend_on_the_order_of_the_index(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    before, index = read_base(tmp_path), tmp_path / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"] = dict(reversed(entries["weight_map"].items()))
    index.write_text(json.dumps(entries))
    assert read_base(tmp_path) == before


def test_one_changed_weight_is_another_base(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "b")
    a, b = read_base(tmp_path / "a"), read_base(tmp_path / "b")
    assert a.fingerprint != b.fingerprint
    assert a.shapes == b.shapes


def test_another_dtype_is_another_base(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(tmp_path / "a")
    model.bfloat16().save_pretrained(tmp_path / "b")
    assert read_base(tmp_path / "a").fingerprint != read_base(tmp_path / "b").fingerprint


def test_shapes_are_listed_by_hugging_face_name(tmp_path: Path, model: LlamaForCausalLM) -> None:
    model.save_pretrained(tmp_path)
    assert read_base(tmp_path).shapes["model.layers.1.mlp.down_proj.weight"] == (8, 12)


def test_a_folder_without_a_checkpoint_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(BadBase, match=r"no model\.safetensors"):
        read_base(tmp_path)
    (tmp_path / "model.safetensors").write_text("not tensors at all")
    with pytest.raises(BadBase, match="not a safetensors file"):
        read_base(tmp_path)


def test_a_base_is_bfloat16_if_all_its_matrices_are_whatever_its_config_says(tmp_path, model):
    model.bfloat16()
    model.model.norm.float()  # as some checkpoints have it
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"bfloat16"', '"float32"'))
    assert is_bf16(tmp_path)
    model.model.layers[1].mlp.up_proj.float()
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert not is_bf16(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert "bfloat16" in config.read_text()  # of the model's first tensor
    assert is_bf16(tmp_path)
