"""The layer's operator: what its C++ does by itself is what its Python, which does everything, answers."""

from dataclasses import replace

import psutil
import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from maskllm.core.patterns import pack
from maskllm.kernels import DENSE, cpu
from maskllm.kernels.masked_linear import allocate, fill
from server.engine import linear
from server.engine.linear import MaskConfig, begin_step

CPU = torch.device("cpu")
OUTS, COLUMNS = 12, 140

pytestmark = [
    pytest.mark.skipif(bool(cpu.why_not()), reason=str(cpu.why_not())),
    pytest.mark.skipif(
        not current_platform.is_cpu(), reason="needs vLLM's build for CPU, and this is another"
    ),
]


@pytest.fixture(autouse=True)
def step():
    """No rows are left to other tests."""
    yield
    begin_step(None, CPU)


def arguments(dtype: torch.dtype, mask_dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, a weight, and two masks of it in slots."""
    weight = torch.randn(OUTS, COLUMNS).bfloat16()
    slots = allocate(weight, 2, mask_dtype)
    for slot in range(2):
        fill(slots, slot, weight, pack(torch.randint(6, (OUTS, COLUMNS // 4))))
    return torch.randn(rows, COLUMNS, dtype=dtype), weight, slots


def both(x: Tensor, weight: Tensor, slots: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """What the operator answers, what its Python answers, and whether the operator called it, too."""
    with torch.no_grad(), profile() as profiled:
        ours = torch.ops.maskllm.layer(x, weight, slots, bias)
    called = any(event.name == "maskllm::any_layer" for event in profiled.events())
    return ours, torch.ops.maskllm.any_layer(x, weight, slots, bias), called


def test_more_rows_than_the_kernels_are_best_for_are_left_to_python():
    x, weight, slots = arguments(torch.float32, torch.bfloat16, 9)
    costs = cpu.costs()
    cpu.set_costs(replace(costs, sparse_rows=8))
    try:
        begin_step([0] * 9, CPU)
        ours, theirs, called = both(x, weight, slots, None)
    finally:
        cpu.set_costs(costs)
    assert called
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [[0], [1, 0, 1, 1], [0] * 40, [DENSE], [0, DENSE, DENSE, 1]])
def test_masked_rows_are_multiplied_without_python(rows, dtype, mask_dtype):
    x, weight, slots = arguments(dtype, mask_dtype, len(rows))
    begin_step(rows, CPU)
    ours, theirs, called = both(x, weight, slots, None)
    assert ours.shape == (len(rows), OUTS)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    assert not called


@pytest.mark.parametrize(
    "bias", [torch.randn(OUTS), torch.randn(OUTS).bfloat16(), torch.randn(2 * OUTS)[::2]]
)
def test_a_bias_is_added_without_python_and_nothing_is_kept_of_a_call(bias):
    x, weight, slots = arguments(torch.bfloat16, torch.bfloat16, 3)
    begin_step([1, 0, 1], CPU)
    kept = [each._use_count() for each in (x, weight, slots, bias)]
    ours, theirs, called = both(x, weight, slots, bias)
    alone, _, _ = both(x, weight, slots, None)
    assert [each._use_count() for each in (x, weight, slots, bias)] == kept
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours.float(), alone.float() + bias.float(), rtol=2e-2, atol=2e-2)
    assert called == (not bias.is_contiguous())


@pytest.mark.parametrize(
    ("what", "rows"),
    {
        "dense rows that torch does better": [DENSE] * 40,
        "some of each": [DENSE, 1] * 40,
        "dense rows of another weight": [DENSE] * 4,
        "more rows than the step has": [0, 1],
        "other rows than the step's": [0] * 9,
        "a step without masks": None,
        "three dimensions": [0] * 6,
        "columns that are apart": [0] * 4,
        "a bias of float16": [0] * 4,
        "float16": [0] * 4,
        "any mask": [0] * 4,
    }.items(),
)
def test_python_does_the_rest(what, rows):
    x, weight, slots = arguments(torch.float32, torch.bfloat16, len(rows or [0]))
    bias = None
    match what:
        case "more rows than the step has":
            x = torch.randn(5, COLUMNS)
        case "other rows than the step's":
            x = torch.randn(4, COLUMNS)
        case "three dimensions":
            x = x.view(2, 3, COLUMNS)
        case "columns that are apart":
            x = torch.randn(4, 2 * COLUMNS)[:, ::2]
        case "a bias of float16":
            bias = torch.randn(OUTS).half()
        case "float16":
            x = x.half()
        case "dense rows of another weight":
            weight = weight.float()
        case "any mask":
            slots = torch.rand(2, *weight.shape) < 0.5
    begin_step(rows, CPU)
    ours, theirs, called = both(x, weight, slots, bias)
    assert ours.shape == (*x.shape[:-1], OUTS)
    assert torch.equal(ours, theirs)
    assert called


def test_inputs_need_not_follow_each_other():
    """As where a layer takes a part of what another gave."""
    wide, weight, slots = arguments(torch.bfloat16, torch.bfloat16, 3)
    wide = torch.cat([wide, wide], 1)
    begin_step([1, 0, 1], CPU)
    ours, _, called = both(wide[:, :COLUMNS], weight, slots, None)
    alone, _, _ = both(wide[:, :COLUMNS].contiguous(), weight, slots, None)
    assert torch.equal(ours, alone)
    assert not called


def test_a_step_answers_by_its_own_slots():
    """The operator keeps nothing of the step before."""
    x, weight, slots = arguments(torch.bfloat16, torch.bfloat16, 1)
    answers = []
    for slot in (0, 1, DENSE):
        begin_step([slot], CPU)
        answers.append(both(x, weight, slots, None)[0])
    kept = [torch.equal(a, b) for a, b in zip(answers, answers[1:] + answers[:1], strict=True)]
    assert kept == [False] * 3
    torch.testing.assert_close(answers[2], x @ weight.T, rtol=2e-2, atol=0.2)


def test_an_embedding_has_no_copy_and_is_a_head_as_well():
    with set_current_vllm_config(VllmConfig()):
        embedding = VocabParallelEmbedding(16384, 1024, quant_config=MaskConfig(), disable_tp=True)
    weight = embedding.get_parameter("weight").data.zero_()  # 64 MB
    weight[3, 5] = 2
    before = psutil.Process().memory_info().rss
    embedding.quant_method.process_weights_after_loading(embedding)
    assert psutil.Process().memory_info().rss - before < weight.nbytes / 4
    assert embedding(torch.tensor([3]))[0, 5] == 2
    logits = embedding.quant_method.apply(embedding, torch.full((1, 1024), 10.0))  # as of Gemma's
    assert logits.nonzero().tolist() == [[0, 3]]
    assert logits[0, 3] == 20


def test_a_bfloat16_checkpoint_is_held_so_in_a_model_of_float32(monkeypatch):
    """Linear layers, and a head of its own; embeddings, and a head tied to them, multiply by a copy."""
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)  # there is no group of ranks
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    config = VllmConfig(additional_config={"weight_dtype": "bfloat16"})
    with set_current_vllm_config(config):
        layer = ReplicatedLinear(64, 32, bias=False, quant_config=MaskConfig(), disable_tp=True)
        embedding = VocabParallelEmbedding(64, 32, quant_config=MaskConfig(), disable_tp=True)
        head, tied = (ParallelLMHead(64, 32, quant_config=MaskConfig(), disable_tp=True) for _ in range(2))
    tied.tie_weights(embedding)
    assert layer.weight.dtype == head.weight.dtype == torch.bfloat16
    assert embedding.weight.dtype == torch.float32
    embedding.weight.data.zero_()[3, 5] = 2
    head.weight.data.copy_(embedding.weight)
    layer.weight.data.zero_()[1, 4] = 3
    for each in (layer, embedding, head, tied):
        each.quant_method.process_weights_after_loading(each)
    layer.register_buffer("slots", allocate(layer.weight, 1))
    assert layer.weight.dtype == torch.bfloat16
    assert [hasattr(each, "bf16") for each in (embedding, head, tied)] == [False, False, True]
    assert embedding(torch.tensor([3])).dtype == torch.float32
    for each in (head, tied, embedding):
        logits = each.quant_method.apply(each, torch.full((1, 32), 1 + 2**-20))
        assert logits.nonzero().tolist() == [[0, 3]]
        assert logits[0, 3] == 2 + 2**-19  # of the inputs nothing is rounded
    for rows in ([DENSE, DENSE], None):
        begin_step(rows, CPU)
        out = layer(torch.full((2, 64), 1 + 2**-20))[0]
        assert out.nonzero().tolist() == [[0, 1], [1, 1]]
        assert out[0, 1] == 3 * (1 + 2**-20)
    assert layer(torch.ones(1, 2, 64))[0].shape == (1, 2, 32)


def test_captured_graphs_find_each_step_s_slots_in_one_place_and_no_step_waits(monkeypatch):
    """Graphs of up to 4 rows; a step that is padded to one's rows repeats its last slot."""
    done, tensor = [], torch.tensor

    class Pinned:
        def __init__(self, slots, **how):
            done.append(how)
            self.slots = tensor(slots, dtype=torch.int32)

    def copy(self, source, non_blocking):
        done.append(non_blocking)
        self.data.add_(source.slots - self)

    linear.reserve(8, CPU)
    monkeypatch.setattr(torch, "tensor", Pinned)
    monkeypatch.setattr(Tensor, "copy_", copy)
    for slots, padded in (([1, DENSE], [1, DENSE, DENSE, DENSE]), ([0, 1, 1, 0, 2], [0, 1, 1, 0, 2])):
        begin_step(slots, torch.device("cuda"), captured_rows=4)
        assert (linear.row_slots.tolist(), linear.padded.tolist()) == (slots, padded)
        assert linear.parts == [(0, None, sorted(set(slots)))]
        assert linear.row_slots.data_ptr() == linear.padded.data_ptr() == linear._fixed.data_ptr()
    assert done == [{"dtype": torch.int32, "pin_memory": True}, True] * 2
    linear.begin_capture(2, torch.device("cuda"))
    assert (linear.row_slots.tolist(), linear.parts) == ([0, 0], None)
    begin_step(None, torch.device("cuda"))
    assert linear.row_slots is None


@pytest.mark.parametrize(
    ("slots", "parts"),
    [
        ([2] * 255, [(0, None, [2])]),
        ([2] * 256, [(0, None, [2])]),
        ([0, 1, DENSE] * 100, [(0, None, [DENSE, 0, 1])]),
        ([0, 1, 1] + [2] * 256, [(0, 3, [0, 1]), (3, None, [2])]),
        ([DENSE] * 256 + [2] * 300 + [0], [(0, 256, [DENSE]), (256, 556, [2]), (556, None, [0])]),
        ([2] * 255 + [0] + [2] * 255, [(0, None, [0, 2])]),
    ],
)
def test_a_prompt_is_multiplied_by_itself_however_many_others_there_are(slots, parts):
    assert linear._parts(slots) == parts


def test_a_layer_is_the_same_in_parts_and_the_last_part_goes_on(monkeypatch):
    """Of 3 rows in parts, and a fourth that vLLM pads them with."""
    x, weight, slots = arguments(torch.bfloat16, torch.bfloat16, 4)
    begin_step([0, 1, 1], CPU)
    expected = torch.ops.maskllm.any_layer(x, weight, slots, None)
    assert not torch.equal(expected[0], expected[1])
    for parts in ([(0, 1, [0]), (1, None, [1])], [(0, 2, [0, 1]), (2, None, [1])]):
        monkeypatch.setattr(linear, "parts", parts)
        torch.testing.assert_close(torch.ops.maskllm.any_layer(x, weight, slots, None), expected)


def test_rows_that_a_graph_is_padded_with_use_the_slots_that_follow(monkeypatch):
    x, weight, slots = arguments(torch.bfloat16, torch.bfloat16, 3)
    begin_step([0, 1, 1], CPU)
    expected = torch.ops.maskllm.any_layer(x, weight, slots, None)
    padded = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    monkeypatch.setattr(linear, "padded", padded)
    monkeypatch.setattr(linear, "row_slots", padded[:1])
    assert torch.equal(torch.ops.maskllm.any_layer(x, weight, slots, None), expected)


def test_a_layer_without_kernels_is_dense_in_a_captured_graph(monkeypatch):
    """The reference asks which slots there are, and a capture has none to name; no mask has such a layer."""
    x, weight, slots = torch.ones(1, 6), torch.ones(2, 6), torch.zeros(1, 2, 6, dtype=torch.bool)
    begin_step([0], CPU)
    assert torch.ops.maskllm.any_layer(x, weight, slots, None).tolist() == [[0, 0]]
    monkeypatch.setattr(linear, "parts", None)
    assert torch.ops.maskllm.any_layer(x, weight, slots, None).tolist() == [[6, 6]]


def test_a_slot_that_is_not_there_is_an_error():
    x, weight, slots = arguments(torch.bfloat16, torch.bfloat16, 1)
    begin_step([2], CPU)
    with pytest.raises(RuntimeError, match=r"rows use slots \[2\], and there are 2"):
        torch.ops.maskllm.layer(x, weight, slots, None)
