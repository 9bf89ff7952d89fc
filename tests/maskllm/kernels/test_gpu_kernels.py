"""The GPU's kernels: what they compute (interpreted), what they compile to, and on a GPU both at once."""

import re
import subprocess
import sys

import pytest
import torch

from maskllm.core.patterns import best, encode, pack
from maskllm.kernels import DENSE, gpu, masked_linear

if sys.platform != "linux":
    pytest.skip("triton has builds for Linux only", allow_module_level=True)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maskllm.kernels import triton_kernels as kernels


@pytest.fixture(autouse=True)
def fusion(monkeypatch):
    """Triton 3.9 warns where this is not set."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def test_the_kernels_keep_their_promises_under_the_interpreter(interpreted):
    process, out = interpreted
    assert process.wait() == 0, out.read_text()


SLOT = {"slots": "*i32", "slot": "i32", "groups": "i32", "slot_words": "i32", "indices_at": "i32"}
ROW = SLOT | {
    "x": "*bf16", "weight": "*bf16", "row_slots": "*i32", "bias": "*bf16", "out": "*bf16", "PAIRS": gpu.PAIRS,
}  # fmt: skip
LINEAR = SLOT | {
    "x": "*bf16", "weight": "*bf16", "row_slots": "*i32", "bias": "*bf16", "out": "*bf16", "partial": "*fp32",
    "arrived": "*i32", "rows": "i32", "outs": "i32", "x_stride": "i32", "SPLITS": 4,
}  # fmt: skip
ROWS_OF_SLOT = {
    "x": "*bf16", "weight": "*bf16", "row_slots": "*i32", "slot": "i32", "bias": "*bf16", "out": "*bf16",
    "rows": "i32", "outs": "i32", "ins": "i32", "x_stride": "i32",
}  # fmt: skip
FILL = SLOT | {"layers": "*i64", "row_bytes": "i32", "GROUPS": 1024}
EXPAND = SLOT | {"used": "*u1", "out": "*bf16", "GROUPS": 1024}
METADATA = SLOT | {"layers": "*i64", "outs": "i32", "UNITS": 512}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("kernel", "arguments", "options"),
    [
        ("row_kernel", ROW, {"num_warps": 1}),
        *[
            ("linear_kernel", LINEAR | tile | {"WHOLE": whole}, options)
            for tile, options, _ in gpu.FEW_TILES
            for whole in (True, False)
        ],
        ("rows_of_slot_kernel", ROWS_OF_SLOT | gpu.MANY_TILE, gpu.MANY_OPTIONS),
        ("fill_kernel", FILL, {"num_warps": 8}),
        ("expand_kernel", EXPAND, {}),
        ("metadata_kernel", METADATA, {}),
    ],
)
def test_each_kernel_compiles_for_each_gpu_and_no_loop_spills(
    dtype, capability, kernel, arguments, options, tmp_path
):
    """As it is launched for a weight of LLaMA-2 7B; those that multiply use the tensor cores."""
    arguments = {name: f"*{dtype}" if kind == "*bf16" else kind for name, kind in arguments.items()}
    compiled = compile_for(capability, getattr(kernels, kernel), arguments, options)
    cubin = tmp_path / "cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    print(f"{kernel} sm_{capability}: {report.split('Function ')[-1]}")
    # The largest tile keeps a few registers in memory before or after its loops.
    assert int(re.search(r"STACK:(\d+)", report)[1]) <= (64 if arguments.get("ROWS") == 32 else 0)
    inner = "\n".join(loops(cubin))
    assert not re.search(r"\b(LDL|STL)\b", inner)
    assert "LOCAL:0" in report
    assert compiled.metadata.shared <= 99 * 1024
    multiplies = re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", compiled.asm["ptx"])
    assert bool(multiplies) == (kernel in ("linear_kernel", "rows_of_slot_kernel"))
    if kernel == "row_kernel":  # whole groups of weights and inputs, and nothing to wait for
        assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])
        assert "bar.sync" not in compiled.asm["ptx"]
    if kernel == "linear_kernel":  # loads run ahead of the products
        assert "MMA" in inner
        assert "cp.async" in compiled.asm["ptx"]
    if kernel == "fill_kernel":  # whole groups, two at a time; no single weights
        assert re.search(r"ld\.global\S*\.v2\.b64", compiled.asm["ptx"])
        assert not re.search(r"ld\.global\S*\.b16", compiled.asm["ptx"])


def loops(cubin):
    """The machine code within loops: between a label and a branch back to it."""
    lines = subprocess.run(
        [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    at = {line[:-1]: number for number, line in enumerate(lines) if line.startswith(".L_x_")}
    for number, line in enumerate(lines):
        if (to := re.search(r"BRA\b.*`\((\.L_x_\d+)\)", line)) and at.get(to[1], number) < number:
            yield from lines[at[to[1]] : number]


def compile_for(capability, kernel, arguments, options):
    """Compile a kernel; every pointer and size is a multiple of 16 but those not specialized on it."""
    names = kernel.arg_names
    constants = {(names.index(n),): v for n, v in arguments.items() if not isinstance(v, str)}
    signature = {n: arguments[n] if isinstance(arguments[n], str) else "constexpr" for n in names}
    free = {"rows", "slot", "used", "row_slots", "row_bytes"}
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if (i,) not in constants and n not in free
    }
    source = ASTSource(kernel, signature, constants, multiples)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def test_without_a_gpu_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.why_not() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert gpu.why_not() == "Tesla T4 has compute capability 7.5; 8.0 (A100) or newer is needed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert gpu.why_not() is None
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    assert gpu.why_not() == "triton is not installed"


# On a GPU.


def layer(outs, ins, dtype, count=4):
    """A weight, `count` masks and their slots, on the GPU."""
    weight = torch.randn(outs, ins, dtype=dtype, device="cuda")
    masks = torch.stack([best(torch.rand(outs, ins)) for _ in range(count)])
    slots = gpu.allocate(weight, count, dtype)
    for slot, mask in enumerate(masks):
        gpu.fill_layers(slot, [(slots, weight, pack(encode(mask)).pin_memory())])
    return weight, masks.cuda(), slots


def check(got, x, weight, masks, row_slots, bias=None):
    """Within the rounding of the result of the reference in float64."""
    bias = None if bias is None else bias.double()
    expected = masked_linear.masked_linear(x.double(), weight.double(), masks, row_slots, bias)
    rtol = 2**-7 if x.dtype == torch.bfloat16 else 2**-10
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outs", "ins"), [(512, 172), (40, 512), (1024, 2048)])
def test_a_gpu_gives_what_the_reference_gives(outs, ins, dtype):
    weight, masks, slots = layer(outs, ins, dtype)
    bias = torch.randn(outs, dtype=dtype, device="cuda")
    for rows in (1, 2, 15, 16, 17, 33, 64, 65, 128, 511, 1024, 2049):
        x = torch.randn(rows, ins, dtype=dtype, device="cuda")
        for low, high in ((-1, 4), (0, 4), (0, 2), (2, 3)):
            row_slots = torch.randint(low, high, (rows,), dtype=torch.int32, device="cuda")
            check(gpu.linear(x, weight, slots, row_slots, bias), x, weight, masks, row_slots, bias)
        for slot in (DENSE, 3):
            row_slots = torch.full((rows,), slot, dtype=torch.int32, device="cuda")
            got = gpu.linear(x, weight, slots, row_slots, bias, present=(slot,))
            check(got, x, weight, masks, row_slots, bias)


@pytest.mark.gpu
def test_layers_of_one_shape_that_a_gpu_writes_together_have_each_its_own_mask():
    layers = [layer(512, 1024, torch.bfloat16, count=2) for _ in range(3)]
    for _, masks, _ in layers:
        masks[1] = best(torch.rand(512, 1024, device="cuda"))
    gpu.fill_layers(1, ((slots, weight, pack(encode(masks[1].cpu()))) for weight, masks, slots in layers))
    for weight, masks, slots in layers:
        for rows in (1, 16, 100):  # the last from the metadata
            x = torch.randn(rows, 1024, dtype=torch.bfloat16, device="cuda")
            row_slots = torch.full((rows,), 1, dtype=torch.int32, device="cuda")
            check(gpu.linear(x, weight, slots, row_slots, present=(1,)), x, weight, masks, row_slots)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 40, 100])
def test_a_captured_graph_stays_right_when_masks_and_rows_change(rows):
    weight, masks, slots = layer(512, 1024, torch.bfloat16)
    x = torch.randn(rows, 1024, dtype=torch.bfloat16, device="cuda")
    row_slots = torch.zeros(rows, dtype=torch.int32, device="cuda")
    gpu.linear(x, weight, slots, row_slots)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gpu.linear(x, weight, slots, row_slots)
    for step in range(6):
        masks[step % 4] = best(torch.rand(512, 1024, device="cuda"))
        gpu.fill_layers(step % 4, [(slots, weight, pack(encode(masks[step % 4])))])
        row_slots.copy_(torch.randint(-1, 1 + step % 4, (rows,), dtype=torch.int32))
        x.normal_()
        graph.replay()
        check(out, x, weight, masks, row_slots)
