"""Two processes learn the mask that one learns. This file is also what the two processes run.

What is exact, and why: draws and examples are numbered over all processes, so that two processes with a
micro-batch each see what one sees with two. The one sums g0/2 + g1/2; the two average g0 and g1. Halving
is exact and a sum of two does not depend on its order, so the gradients are equal bit for bit, and with ddp
all that follows from them. With fsdp the norm that clips a step is summed shard by shard, whose order may
move its last bit: there logits are equal within rounding, and masks entirely.
"""

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor

from maskllm.cli import main
from maskllm.data import BadData
from maskllm.learn import checkpoint, gates, trainer
from maskllm.learn.checkpoint import Position
from maskllm.learn.gates import whole

STEPS, STOP = 6, 3

ONE_EACH = ["--batch", "4", "--micro-batch", "2"]
TWO_EACH = ["--batch", "4", "--micro-batch", "1"]
"""Micro-batches of two processes."""
EVERYTHING = ["--gradient-checkpointing", "--distill", "0.5", "--weight-reg", "1"]
BF16 = ["--parameterisation", "per-item", "--dtype", "bfloat16"]
RUNS = {
    "ddp": ONE_EACH,
    "ddp-everything": [*ONE_EACH, *EVERYTHING],
    "ddp-bf16": [*ONE_EACH, *BF16],
    "ddp-accumulates": TWO_EACH,
    "fsdp": ONE_EACH,
    "fsdp-everything": [*ONE_EACH, *EVERYTHING],
    "fsdp-bf16": [*ONE_EACH, *BF16],
    "fsdp-accumulates": TWO_EACH,
    "ddp-unequal": ["--batch", "6", "--micro-batch", "2"],
    "ddp-stopped": ONE_EACH,
    "fsdp-stopped": ONE_EACH,
}
"""By name, which says how the processes share the run."""


def arguments(base: Path, text: Path, folder: Path, name: str) -> list[str]:
    """The command line of a run, as one types it."""
    return (
        f"learn {base} --data {text} --heldout {text} --heldout-windows 4 --eval-every 4 --steps {STEPS} "
        f"--length 16 --lr 1e-2 --prior magnitude --device cpu --out {folder / name}.safetensors "
        f"--parallel {name.split('-')[0]}"
    ).split() + RUNS[name.removesuffix("-resumed")]


def watched(args: list[str], stop: bool = False) -> dict[str, Any]:
    """Run a command, and tell what it printed and learned; `stop` presses Ctrl-C in this process."""
    seen: dict[str, Any] = {"draws": [], "shards": {}, "logits": {}}
    learn, draw, save = trainer.learn, gates.draw, checkpoint.save

    def watched_learn(*args: Any) -> Any:
        learned = learn(*args)
        for name, gate in learned[0].items():
            seen["logits"][name] = whole(gate.logits.detach())
            if isinstance(gate.logits, DTensor):
                seen["shards"][name] = [
                    (tuple(tensor.shape), tuple(tensor.to_local().shape))
                    for tensor in (gate.logits, gate.weight)
                ]
        return learned

    def watched_draw(*args: Any, **settings: Any) -> torch.Tensor:
        mask = draw(*args, **settings)
        seen["draws"].append(settings["seed"])
        return mask

    def watched_save(path: Path, identity: Any, position: Position, *rest: Any) -> None:
        save(path, identity, position, *rest)
        if position.step == STOP:
            signal.raise_signal(signal.SIGINT)

    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(trainer, "learn", watched_learn),
        patch.object(gates, "draw", watched_draw),
        patch.object(checkpoint, "save", watched_save if stop else save),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            seen["code"] = main(args)
        except SystemExit as end:
            seen["code"] = end.code
    return seen | {"out": out.getvalue(), "err": err.getvalue()}


def be_one_of_two(rank: int, base: Path, text: Path, folder: Path, ports: list[int]) -> None:
    """What each of the two processes does: all runs, one after the other."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, port in zip([*RUNS, "fsdp-stopped-resumed"], ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        args = arguments(base, text, folder, name)
        if name.endswith("-stopped"):
            args += ["--checkpoint-every", str(STOP)]
        if name.endswith("-resumed"):  # what the processes stopped with ddp, they end with fsdp
            args[args.index("--out") + 1] = str(folder / "ddp-stopped.safetensors")
            args += ["--resume"]
        seen = watched(args, stop=name.endswith("-stopped") and rank == 1)
        torch.save(seen, folder / f"{name}.{rank}")


class Two:
    """What two processes made of RUNS, and what one makes of the same."""

    def __init__(self, base: Path, text: Path, folder: Path) -> None:
        self.folder, self._given, self._ones = folder, (base, text), dict[str, dict[str, Any]]()
        with free_ports(len(RUNS) + 1) as ports:
            given = [str(base), str(text), str(folder), *map(str, ports)]
        command = [sys.executable, __file__]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*command, rank, *given], env=environment, stderr=subprocess.PIPE, text=True)
            for rank in "01"
        ]
        try:
            errors = [process.communicate(timeout=300)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)

    def saw(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """By process."""
        first, second = (torch.load(self.folder / f"{name}.{rank}") for rank in "01")
        return first, second

    def mask(self, name: str) -> bytes:
        return (self.folder / f"{name}.safetensors").read_bytes()

    def one(self, name: str) -> tuple[dict[str, Any], bytes]:
        """What one process sees of the same run, and its mask."""
        alone = self.folder / "alone"
        if name not in self._ones:
            self._ones[name] = watched(arguments(*self._given, alone, name))
        return self._ones[name], (alone / f"{name}.safetensors").read_bytes()

    def resumed_by_one(self, name: str) -> bytes:
        args = [*arguments(*self._given, self.folder, name), "--resume"]
        assert watched(args)["code"] == 0
        return self.mask(name)


@contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    try:
        yield [server.getsockname()[1] for server in sockets]
    finally:
        for server in sockets:
            server.close()


@pytest.fixture(scope="module")
def two(base_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(base_folder, text, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", ["ddp", "ddp-everything", "ddp-bf16"])
def test_two_processes_learn_bit_for_bit_what_one_does(two: Two, name: str) -> None:
    (first, second), (one, mask) = two.saw(name), two.one(name)
    assert two.mask(name) == mask
    for layer, logits in one["logits"].items():
        assert torch.equal(first["logits"][layer], logits)
        assert torch.equal(second["logits"][layer], logits)


@pytest.mark.parametrize("name", ["fsdp", "fsdp-everything", "fsdp-bf16"])
def test_two_processes_that_shard_learn_the_same_mask(two: Two, name: str) -> None:
    (first, _), (one, mask) = two.saw(name), two.one(name)
    assert two.mask(name) == mask
    for layer, logits in one["logits"].items():
        torch.testing.assert_close(first["logits"][layer], logits)


@pytest.mark.parametrize("name", ["ddp-accumulates", "fsdp-accumulates"])
def test_two_micro_batches_in_each_process_are_four_in_one(two: Two, name: str) -> None:
    """A sum of four does depend on its order, and Adam makes a step of any gradient, however small."""
    (first, _), (one, mask) = two.saw(name), two.one(name)
    assert two.mask(name) == mask
    for layer, logits in one["logits"].items():
        torch.testing.assert_close(first["logits"][layer], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_every_process_has_its_own_noise_and_together_they_have_that_of_one(two: Two, name: str) -> None:
    first, second = (set(seen["draws"]) for seen in two.saw(name))
    assert len(first) == len(second) == STEPS * 14  # layers
    assert not first & second
    assert first | second == set(two.one(name)[0]["draws"])


def test_each_process_holds_half_of_the_rows_of_logits_and_of_weights(two: Two) -> None:
    for seen in two.saw("fsdp-bf16"):
        assert len(seen["shards"]) == 14
        assert seen["shards"]["model.layers.0.mlp.up_proj"] == [
            ((24, 4, 4), (12, 4, 4)),
            ((24, 16), (12, 16)),
        ]
        for whole_shape, shard in (pair for pairs in seen["shards"].values() for pair in pairs):
            assert shard == (whole_shape[0] // 2, *whole_shape[1:])


def test_a_batch_that_cannot_be_shared_equally_is_met_at_the_door(two: Two) -> None:
    assert sorted(seen["code"] for seen in two.saw("ddp-unequal")) == [0, 1]
    assert "".join(seen["err"] for seen in two.saw("ddp-unequal")) == (
        "maskllm learn: a batch of 6 in micro-batches of 2 cannot be shared equally by 2 processes: "
        "say --batch 8\n"
    )


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_shows_what_two_do(two: Two, name: str) -> None:
    first, second = two.saw(name)
    assert (first["code"], second["code"]) == (0, 0)
    assert "sha256" in first["out"]
    assert "step 4: hard" in first["err"]
    assert second["out"] + second["err"] == ""


@pytest.mark.parametrize("name", ["ddp-stopped", "fsdp-stopped"])
def test_ctrl_c_in_one_process_stops_both_after_the_step(two: Two, name: str) -> None:
    assert sorted(seen["code"] for seen in two.saw(name)) == [0, 130]
    said = "".join(seen["err"] for seen in two.saw(name))
    assert said.count(f"stopped after step {STOP + 1}; {two.folder / name}.checkpoint has it") == 1


def test_a_run_stopped_with_two_processes_goes_on_with_one(two: Two) -> None:
    assert two.resumed_by_one("fsdp-stopped") == two.one("fsdp")[1]


def test_a_run_stopped_with_ddp_goes_on_with_fsdp(two: Two) -> None:
    assert [seen["code"] for seen in two.saw("fsdp-stopped-resumed")] == [0, 0]
    assert two.mask("ddp-stopped") == two.one("ddp")[1]
    assert not (two.folder / "ddp-stopped.checkpoint").exists()


def test_trouble_in_one_process_ends_torchrun_with_one_message(
    base_folder: Path, text: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, __file__, *arguments(base_folder, text, tmp_path, "ddp")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("maskllm learn: no more text") == 1
    assert "Connection closed" not in ended.stderr
    assert not (tmp_path / "ddp.safetensors").exists()


def run_out_of_text_in_one_of_two(args: list[str]) -> int:
    """What torchrun's processes do: the second is in trouble while the first waits for it."""
    parts = trainer._parts

    def no_more(*given: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise BadData("no more text")
        return parts(*given)

    with patch.object(trainer, "_parts", no_more):
        return main(args)


if __name__ == "__main__":
    if sys.argv[1] == "learn":
        sys.exit(run_out_of_text_in_one_of_two(sys.argv[1:]))
    rank, base, text, folder, *ports = sys.argv[1:]
    be_one_of_two(int(rank), Path(base), Path(text), Path(folder), [int(port) for port in ports])
