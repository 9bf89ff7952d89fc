"""What a base and its masks take in memory, how many masks fit where, and how many threads compute."""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from maskllm.core.layers import maskable
from maskllm.core.patterns import row_bytes
from maskllm.kernels import cpu, gpu
from maskllm.kernels.masked_linear import bf16_on_cpu, holds_bf16

PROGRAMS_BYTES = 1_500_000_000
"""Of the server's two processes without any weight, as measured on CPU (issue 5)."""
WORKER_BYTES = 750_000_000
"""Of each process more, where the layers are divided among several, as measured on CPU."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Capacity:
    """Bytes of each thing that is held; a packed mask is a 2:4 one of every layer."""

    base: int
    slot: int
    packed: int
    kv: int
    free: int
    """Before any of it is there."""
    programs: int = PROGRAMS_BYTES

    def needs(self, slots: int, packed: int) -> int:
        """With so many slots, and so many masks in host memory."""
        return self.base + slots * self.slot + packed * self.packed + self.kv + self.programs

    def most_slots(self) -> int:
        """If every mask in host memory had a slot."""
        return max(0, (self.free - self.needs(0, 0)) // (self.slot + self.packed))

    def most_packed(self, slots: int) -> int:
        """Masks in host memory, beside so many slots."""
        return self.room(slots) // self.packed

    def room(self, slots: int) -> int:
        """Bytes that so many slots leave for masks in host memory."""
        return max(0, self.free - self.needs(slots, 0))

    def sum(self, slots: int, packed: int) -> str:
        """What `needs` adds up, spelled out."""
        return (
            f"base {_size(self.base)} + {slots} slots of {_size(self.slot)} + {packed} packed masks of "
            f"{_size(self.packed)} + KV {_size(self.kv)} + programs {_size(self.programs)} = "
            f"{_size(self.needs(slots, packed))}, and {_size(self.free)} are free"
        )


def measure(
    folder: Path,
    dtype: torch.dtype | None = None,
    int8: bool = False,
    kv: int = 1 << 30,
    ranks: int = 1,
    int8_head: bool = False,
) -> Capacity:
    """Capacity of a checkpoint on this machine's CPU, without reading its weights.

    `dtype` is the one that the base is computed in, None the checkpoint's own; `int8` that of slots. Linear
    layers of a bfloat16 checkpoint stay so. The base has the copy of the head that multiplies: in 8 bits
    under `int8_head`, else in bfloat16 where embeddings of another dtype are the head, or vLLM's own where no
    kernel of ours reads the head. Among `ranks` processes base and masks are divided (what each has of norms,
    and copies of key and value heads, are not counted), and each has a KV cache of `kv` bytes.
    """
    bf16 = holds_bf16(folder)
    base, shapes, head = _base(folder, dtype, bf16)
    slot_dtype = torch.int8 if int8 else torch.bfloat16
    if int8_head:
        copy = cpu.quantized_bytes(*head.shape)
    elif bf16:
        copy = 0 if head.dtype == torch.bfloat16 else 2 * head.numel()
    else:
        packs = head.dtype == torch.float32 and not bf16_on_cpu()  # bf16 with instructions for it only
        copy = head.nbytes if packs else 0
    return Capacity(
        base=base + copy,
        slot=sum(cpu.slot_bytes(rows, columns, slot_dtype) for rows, columns in shapes),
        packed=sum(rows * row_bytes(columns // 4) for rows, columns in shapes),
        kv=kv * ranks,
        free=free_bytes(),
        programs=PROGRAMS_BYTES + (WORKER_BYTES * ranks if ranks > 1 else 0),
    )


def measure_gpu(
    folder: Path, free: int, dtype: torch.dtype | None = None, kv: int = 0, ranks: int = 1
) -> Capacity:
    """Capacity of each of `ranks` GPUs that has `free` bytes for it: packed masks are in the host's memory.

    What a step's own tensors take is not counted.
    """
    base, shapes, _ = _base(folder, dtype, bf16=False)
    slot = sum(gpu.slot_bytes(rows, columns) for rows, columns in shapes)
    return Capacity(base // ranks, slot // ranks, packed=0, kv=kv, free=free, programs=0)


def memory(host: Capacity, gpu: Capacity | None, slots: int, packed: int) -> str:
    """What so many slots and packed masks take, with all else, of the host's memory and of a GPU's."""
    return host.sum(slots, packed) + (f"; GPU: {gpu.sum(slots, 0)}" if gpu else "")


def _base(folder: Path, dtype: torch.dtype | None, bf16: bool) -> tuple[int, list[tuple[int, int]], Tensor]:
    """Bytes of a checkpoint's weights, the shapes of those that a mask covers, and the head, on no device.

    Under `bf16` linear layers are, whose weight is not an embedding's, too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)  # type: ignore[no-untyped-call]
    shapes = [(layer.out_features, layer.in_features) for layer in maskable(model).values()]
    if bf16:
        embeddings = model.get_input_embeddings().weight
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.weight is not embeddings:
                layer.weight.data = layer.weight.data.bfloat16()
    head = model.get_output_embeddings()
    return sum(parameter.nbytes for parameter in model.parameters()), shapes, head.weight


def free_bytes() -> int:
    """Memory that a program could still have: the machine's, or what a container leaves of it.

    What a container uses counts files that were read, such as the checkpoint, which make way for programs.
    """
    free = psutil.virtual_memory().available
    limit, used, parts = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in parts.read_text().splitlines())
        files = int(stat["active_file"]) + int(stat["inactive_file"])
        free = min(free, int(most) - int(used.read_text()) + files)
    return int(free)


def engine_threads() -> int:
    """How many threads a server's engine computes with on a CPU: `OMP_NUM_THREADS`, or all cores but one.

    Cores are torch's count, or as many as a container may use (a quota of cgroups v2). The last is the API's:
    all threads of a step wait for one that it has displaced (LOG.md, 2026-11-28).
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdecimal() and int(given):
        return int(given)
    cores, limit = torch.get_num_threads(), CGROUP / "cpu.max"
    if limit.exists():
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    return max(cores - 1, 1)


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
