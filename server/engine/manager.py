"""Masks in the engine: packed in host memory, resident in slots, and the slot of every row.

A `MaskManager` takes the place of vLLM's LoRA manager and answers to the same calls, so that vLLM
schedules, batches and caches masks as it does adapters. It runs in the worker, between steps, on
one thread. Loading (file to host memory) happens on `add_adapter`, from a file that another thread has
read meanwhile (`read`); a swap (host memory to slot) happens in `set_active_adapters` when a step needs a
mask that is not resident.
"""

import ctypes
import time
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import LinearBase

from maskllm.core import maskset
from maskllm.core.maskset import MaskError, MaskSet
from maskllm.kernels import DENSE, cpu
from maskllm.kernels.masked_linear import allocate, fill_layers
from server.engine import linear
from server.engine.plugin import leave_interrupts_to_parent
from server.engine.shards import Shard, shard, shards
from server.metrics import SWAP_SECONDS

logger = init_logger(f"vllm.{__name__}")  # of others, vLLM's process shows no INFO

MASK_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What `--mask-dtype` means to the kernels."""


class MaskManager:
    """Owns the packed masks and the slots of one worker: of its rank's shards, where there are several."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, embedding_modules: object) -> None:  # noqa: ARG002
        leave_interrupts_to_parent()  # a worker may be a process of its own
        self.device = device
        self.slots = vllm_config.lora_config.max_loras
        graphs = vllm_config.compilation_config
        self.captures = device.type != "cpu" and graphs.cudagraph_mode != CUDAGraphMode.NONE
        self.captured_rows = graphs.max_cudagraph_capture_size or 0
        if device.type != "cpu":
            linear.reserve(vllm_config.scheduler_config.max_num_batched_tokens + self.captured_rows, device)
        self.mask_dtype = MASK_DTYPES[vllm_config.additional_config.get("mask_dtype", "auto")]
        self.names: dict[int, str] = {}
        self.packed: dict[int, MaskSet] = {}
        self.reader = ThreadPoolExecutor(thread_name_prefix="read-mask")
        self.reads: dict[int, Future[tuple[MaskSet, float]]] = {}  # with the seconds it took
        self.resident: OrderedDict[int, int] = OrderedDict()  # mask id -> slot, least recent first
        self.layers: dict[str, nn.Module] = {}
        self.parts: dict[str, dict[str, Shard]] = {}  # engine layer -> mask layers, what of them is here
        self.pinned: set[int] = set()
        self.dummies: set[int] = set()
        self.base_bytes = 0
        # A GPU's swaps that were not done when last looked: the mask, and events before and after.
        self.under_way: deque[tuple[str, list[torch.cuda.Event]]] = deque()
        # By source: how many swaps fell into each bucket of SWAP_SECONDS, and the seconds of them all.
        self.swaps: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(SWAP_SECONDS) + 1))
        self.swap_seconds: defaultdict[str, float] = defaultdict(float)
        # By source, then by mask, which may be packed anew many times: a mask's are kept until `forget`.
        self.swapped: dict[str, Counter[str]] = {"disk": Counter(), "host": Counter()}

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> nn.Module:  # noqa: ARG002
        """Called once, after the weights are there: give every linear layer its slots."""
        heads = (
            each for name, each in model.named_buffers() if name.endswith((linear.QUANTIZED, linear.BF16))
        )
        self.base_bytes = sum({p.data_ptr(): p.nbytes for p in (*model.parameters(), *heads)}.values())
        # vLLM's copy of a head, of which it makes none in bf16 without instructions for it.
        packed = (layer.get_parameter("weight") for layer in model.modules() if hasattr(layer, "cpu_linear"))
        self.base_bytes += sum(weight.nbytes for weight in packed if weight.dtype == torch.float32)
        fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        for name, layer in model.named_modules():
            if isinstance(layer, LinearBase) and isinstance(layer.quant_method, linear.MaskedLinearMethod):
                prefix, _, leaf = name.rpartition(".")
                weight = layer.get_parameter("weight")
                parts = shards(layer, [f"{prefix}.{part}" for part in fused.get(leaf, [leaf])])
                self.layers[name], self.parts[name] = layer, parts
                # 2:4 takes whole groups; a layer that has none is never masked by it.
                dtype = torch.bool if weight.shape[1] % 4 else self.mask_dtype
                layer.register_buffer("slots", allocate(weight, self.slots, dtype), persistent=False)
        fast = [each for each in self.layers.values() if each.get_buffer("slots").dtype != torch.bool]
        if self.device.type == "cpu" and fast:
            how = "measured" if cpu.calibrate() else "assumed, as the machine is busy"
            logger.info("%s: %s", how, cpu.choices())
        slow = len(self.layers) - len(fast)
        if slow:
            logger.warning(
                "%d of %d layers are masked without kernels: there are none here, or bfloat16 does not hold "
                "the weights exactly (--mask-dtype bfloat16 rounds them)",
                *(slow, len(self.layers)),
            )
        return model

    def read(self, mask_id: int, path: str) -> str | None:
        """Have another thread read a mask file; None while it does, then why it is refused, or nothing.

        What was read waits for `add_adapter`. A refusal changes nothing, and the next call reads again.
        """
        if mask_id in self.packed:
            return ""
        if mask_id not in self.reads:
            self.reads[mask_id] = self.reader.submit(self._read, path)
        if not self.reads[mask_id].done():
            return None
        if (error := self.reads[mask_id].exception()) is None:
            return ""
        del self.reads[mask_id]
        return _refusal(error, Path(path.rpartition("#")[0]).name)

    def add_adapter(self, request: LoRARequest) -> bool:
        """Load a mask into host memory, at once if it has been read. A refusal is logged and False.

        vLLM's engine loop must not see an exception here.
        """
        mask_id, name = request.lora_int_id, request.lora_name
        if mask_id in self.packed:
            return True
        refusal = self.read(mask_id, request.lora_path)
        if refusal is None:
            wait([self.reads[mask_id]])
            refusal = self.read(mask_id, request.lora_path)
        if refusal:
            logger.warning("mask %s is refused: %s", name, refusal)
            return False
        self.packed[mask_id], seconds = self.reads.pop(mask_id).result()
        self.names[mask_id] = name
        self._count("disk", name, seconds)
        return True

    def remove_adapter(self, mask_id: int) -> bool:
        """Free a mask's host memory and its slot."""
        self.pinned.discard(mask_id)
        self.reads.pop(mask_id, None)
        self.resident.pop(mask_id, None)
        self.names.pop(mask_id, None)
        had = self.packed.pop(mask_id, None) is not None
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            self.reader.submit(trim, 0)  # or glibc keeps what was freed between others; beside the steps
        return had

    def remove_all_adapters(self) -> None:
        self.dummies.clear()
        for mask_id in list(self.packed):
            self.remove_adapter(mask_id)

    def list_adapters(self) -> set[int]:
        return set(self.packed)

    @torch.inference_mode()  # as steps are: slots that were made in one are written in no other mode
    def pin(self, mask_id: int, pinned: bool) -> None:
        """Bring a mask into a slot and let no other take it, or let them."""
        if not pinned:
            self.pinned.discard(mask_id)
            return
        self.pinned.add(mask_id)
        if mask_id not in self.resident:
            self._swap_in(mask_id, keep=[])

    def set_active_adapters(self, requests: Iterable[LoRARequest], mapping: LoRAMapping) -> None:  # noqa: ARG002
        """Before each step: make its masks resident and tell every layer each row's slot.

        `mapping.index_mapping` is the mask id of every token row, 0 for dense.
        """
        on_gpu = self.device.type != "cpu"
        if on_gpu and self.dummies and not self.dummies.isdisjoint(mapping.index_mapping):
            linear.begin_capture(len(mapping.index_mapping), self.device)
            return
        wanted = [i for i in dict.fromkeys(mapping.index_mapping) if i and i not in self.dummies]
        assert all(i in self.packed for i in wanted), "the API loads a mask before its first request"
        for mask_id in wanted:
            if mask_id in self.resident:
                self.resident.move_to_end(mask_id)
        for mask_id in wanted:
            if mask_id not in self.resident:
                self._swap_in(mask_id, keep=wanted)
        if wanted or not on_gpu:  # where the kernels beat torch on a few dense rows, too
            slots = [self.resident.get(mask_id, DENSE) for mask_id in mapping.index_mapping]
            linear.begin_step(slots, self.device, self.captured_rows)
        else:
            linear.begin_step(None, self.device)

    def stats(self) -> dict[str, Any]:
        """What the metrics show of this worker; bytes by mask, swaps by source."""
        self._count_done()
        slot_bytes = sum(layer.get_buffer("slots")[0].nbytes for layer in self.layers.values())
        resident, packed = Counter[str](), Counter[str]()
        for mask_id, mask_set in self.packed.items():
            packed[self.names[mask_id]] += sum(t.nbytes for t in mask_set.packed.values())
            resident[self.names[mask_id]] += slot_bytes * (mask_id in self.resident)
        return {
            "base_bytes": self.base_bytes,
            "slot_bytes": slot_bytes,
            "slots_total": self.slots,
            "slots_used": len(self.resident),
            "slots": {int(mask_id): slot for mask_id, slot in self.resident.items()},  # from numpy
            "resident_bytes": dict(resident),
            "packed_bytes": dict(packed),
            "swaps": {source: (counts, self.swap_seconds[source]) for source, counts in self.swaps.items()},
            "swapped": {source: dict(counts) for source, counts in self.swapped.items()},
        }

    def forget(self, name: str) -> None:
        """Drop the counts of a mask that is no more."""
        if self.under_way:  # or they would be counted later
            self.under_way[-1][1][-1].synchronize()
            self._count_done()
        for counts in self.swapped.values():
            counts.pop(name, None)

    # What vLLM's warm-up asks of an adapter manager; there is nothing to warm.

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:  # noqa: ARG002
        self.dummies.add(request.lora_int_id)
        return True

    def supports_tower_connector_lora(self) -> bool:
        return False

    def _read(self, path: str) -> tuple[MaskSet, float]:
        """Runs beside the steps: nothing here lets torch take their threads."""
        begin = time.perf_counter()
        file, _, sha256 = path.rpartition("#")
        parts = {name: part for parts in self.parts.values() for name, part in parts.items()}
        most = maskset.most_bytes(part.whole for part in parts.values())
        mask_set = maskset.reload(Path(file), sha256, most)
        for layer, shape in mask_set.shapes.items():
            if layer not in parts or parts[layer].whole != shape:
                has = parts[layer].whole if layer in parts else None
                raise MaskError(f"layer {layer} is {shape}, but {has} in the engine's model")
        self._check_kernels(mask_set)
        mask_set = shard(mask_set, parts)
        if self.device.type == "cuda":
            # From pinned memory a swap takes a ninth. Layer by layer: whoever pins keeps all others from the
            # GPU, for half a millisecond a megabyte.
            packed = {layer: each.pin_memory() for layer, each in mask_set.packed.items()}
            mask_set = replace(mask_set, packed=packed)
        return mask_set, time.perf_counter() - begin

    def _check_kernels(self, mask_set: MaskSet) -> None:
        """Raise MaskError for a mask that kernels do not take, where only they will do.

        Captured CUDA graphs have the kernels, or nothing, in each layer, and read slots that are never
        replaced. And slots of int8 are smaller than the reference's, which nobody has made room for.
        """
        if not self.captures and self.mask_dtype != torch.int8:
            return
        option = "--enforce-eager" if self.captures else "--mask-dtype auto"
        for name, parts in self.parts.items():
            if self.layers[name].get_buffer("slots").dtype == torch.bool:
                none = not self.captures or parts.keys().isdisjoint(mask_set.shapes)
                why_not = "" if none else "has no kernels here"
            elif (mask_set.n, mask_set.m) != (2, 4):
                why_not = f"would be masked {mask_set.n}:{mask_set.m}"
            else:
                why_not = "" if parts.keys() <= mask_set.shapes.keys() else "is left out, or a part of it"
            if why_not:
                raise MaskError(f"layer {name} {why_not}, which needs the server's option {option}")

    def _swap_in(self, mask_id: int, keep: list[int]) -> None:
        """Fill a free slot, or that of the least recently used mask which this step does not use.

        Pinned masks come last: a step with more other masks than the pins leave slots for must run, too.
        """
        begin = time.perf_counter()
        events = self._event()
        taken = set(self.resident.values())
        slot = next((s for s in range(self.slots) if s not in taken), None)
        if slot is None:
            others = [i for i in self.resident if i not in keep]
            slot = self.resident.pop(min(others, key=lambda i: i in self.pinned))
        self._fill(self.layers, slot, mask_id)
        self.resident[mask_id] = slot
        events += self._event()
        if events:
            self.under_way.append((self.names[mask_id], events))
            self._count_done()
        else:
            self._count("host", self.names[mask_id], time.perf_counter() - begin)

    def _count_done(self) -> None:
        """Count the swaps that the GPU has done by now."""
        while self.under_way and self.under_way[0][1][-1].query():  # type: ignore[no-untyped-call]
            name, (begin, end) = self.under_way.popleft()
            self._count("host", name, begin.elapsed_time(end) / 1e3)

    def _event(self) -> list[torch.cuda.Event]:
        """This moment of a GPU's work, which is told what to do before it does it."""
        if self.device.type != "cuda":
            return []
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return [event]

    def _fill(self, names: Iterable[str], slot: int, mask_id: int) -> None:
        """Write a mask into a slot of these layers, each put together from its parts.

        Kernels take 2:4 masks of whole layers.
        """
        mask_set = self.packed[mask_id]
        fast: list[str] = []
        others: list[str] = []
        for name in names:
            whole = self.parts[name].keys() <= mask_set.shapes.keys()
            (fast if whole and (mask_set.n, mask_set.m) == (2, 4) else others).append(name)

        def layer(name: str) -> tuple[Tensor, Tensor, Tensor]:
            on_device = (
                mask_set.packed[part].to(self.device, non_blocking=True) for part in self.parts[name]
            )
            of = self.layers[name]
            return of.get_buffer("slots"), of.get_parameter("weight"), torch.cat([*on_device])

        fill_layers(slot, map(layer, fast))
        for name in others:
            self._fill_without_kernels(name, slot, mask_id)

    def _fill_without_kernels(self, name: str, slot: int, mask_id: int) -> None:
        """Write any mask into a slot; a part that it leaves out keeps all.

        The first such mask turns the layer's slots into the reference's, for good.
        """
        layer, parts, mask_set = self.layers[name], self.parts[name], self.packed[mask_id]
        if layer.get_buffer("slots").dtype != torch.bool:
            logger.warning(
                "layer %s is served without kernels from now on: mask %s is %d:%d in %d of its %d parts",
                *(name, self.names[mask_id], mask_set.n, mask_set.m),
                *(len(parts.keys() & mask_set.shapes.keys()), len(parts)),
            )
            layer.slots = allocate(layer.get_parameter("weight"), self.slots, torch.bool)
            for resident, its_slot in self.resident.items():
                self._fill([name], its_slot, resident)
        masks = [
            mask_set.mask(part) if part in mask_set.shapes else torch.ones(own.shape, dtype=torch.bool)
            for part, own in parts.items()
        ]
        layer.get_buffer("slots")[slot].copy_(torch.cat(masks))

    def _count(self, source: str, name: str, seconds: float) -> None:
        self.swaps[source][bisect_left(SWAP_SECONDS, seconds)] += 1
        self.swap_seconds[source] += seconds
        self.swapped[source][name] += 1


class MaskWorker:
    """vLLM adds this to its worker class: what the API asks of a worker beyond what vLLM asks."""

    def read_mask(self, mask_id: int, path: str) -> str | None:
        manager: MaskManager = self.model_runner.lora_manager  # type: ignore[attr-defined]
        return manager.read(mask_id, path)

    def pin_mask(self, mask_id: int, pinned: bool) -> None:
        self.model_runner.lora_manager.pin(mask_id, pinned)  # type: ignore[attr-defined]

    def forget_mask(self, name: str) -> None:
        self.model_runner.lora_manager.forget(name)  # type: ignore[attr-defined]

    def mask_stats(self) -> dict[str, Any]:
        runner = self.model_runner  # type: ignore[attr-defined]
        manager: MaskManager = runner.lora_manager
        return manager.stats() | {"kv_bytes": sum(cache.nbytes for cache in runner.kv_caches)}


def _refusal(error: BaseException, file: str) -> str:
    """What the client may know of a file that could not be read."""
    if isinstance(error, FileNotFoundError):
        return f"no file {file!r} in the masks folder"
    if isinstance(error, OSError):
        return f"{file} cannot be read: {error.strerror}"
    if isinstance(error, MaskError):
        return str(error)
    logger.error("%s cannot be read", file, exc_info=error)
    return f"{file} cannot be read: {type(error).__name__}"
