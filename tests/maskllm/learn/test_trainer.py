"""A whole run: what it saves is what it measured, and stopping it changes nothing."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from maskllm.core import maskset
from maskllm.core.layers import NoSuchLayer, apply_masks, maskable
from maskllm.core.patterns import best
from maskllm.data import load_tokens, windows
from maskllm.evaluate.perplexity import perplexity
from maskllm.learn import distributed, tasks
from maskllm.learn.checkpoint import CannotResume
from maskllm.learn.config import LearnConfig
from maskllm.learn.gates import Sampling
from maskllm.learn.priors import NAMES, NoPrior
from maskllm.learn.progress import Measured
from maskllm.learn.trainer import CannotLearn, Report, _settled, learn, run
from maskllm.models import BadDevice, BadLength, load_base

needs_bitsandbytes = pytest.mark.skipif(
    not find_spec("bitsandbytes"),
    reason="needs bitsandbytes, which has no wheel for every machine: the extra 8bit",
)

SHARED = Path(__file__).parents[4] / "shared"


class World(NamedTuple):
    """A tiny base, and text it can read."""

    base: str
    text: str
    other_text: str


@pytest.fixture
def world(base_folder: Path, text: Path, tmp_path: Path) -> World:
    other_text = tmp_path / "other.txt"
    other_text.write_text(" ".join(reversed(text.read_text().split())))
    return World(str(base_folder), str(text), str(other_text))


def config(world: World, out: Path, **settings: Any) -> LearnConfig:
    small = {"steps": 6, "batch": 4, "micro_batch": 2, "length": 16, "lr": 1e-2, "prior": "magnitude"}
    known = {"out": out, "data": [world.text], "heldout": [world.other_text], "device": "cpu"}
    return LearnConfig(**known | small | settings)


@pytest.fixture
def wide(world: World, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> World:
    """A base of one block whose layers are 256 x 256."""
    settings = {"vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 256}
    llama = LlamaConfig(**settings, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.1)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return world._replace(base=str(tmp_path / "wide"))


def scalars(log_dir: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows under a name, by step."""
    return [(event.step, event.value) for event in EventAccumulator(str(log_dir)).Reload().Scalars(name)]


def press_ctrl_c_once_there_is(path: Path) -> threading.Thread:
    """As someone would who watches the folder."""

    def watch() -> None:
        while not path.exists():
            time.sleep(1e-3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def stop_early(world: World, out: Path, **settings: Any) -> LearnConfig:
    """Start a run and stop it with Ctrl-C after some of its steps."""
    settings = {"steps": 40, "checkpoint_every": 1} | settings
    watcher = press_ctrl_c_once_there_is(out.with_suffix(".checkpoint"))
    with pytest.raises(KeyboardInterrupt, match="stopped after step"):
        run(world.base, config(world, out, **settings))
    watcher.join()
    assert not out.exists()
    return config(world, out, **settings | {"resume": True})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"parameterisation": "per-item", "schedule": "exponential", "anneal_share": 0.5, "distill": 0.5},
        {"stream": True},
        {"gradient_checkpointing": True},
        pytest.param({"optimizer": "adamw8bit"}, marks=needs_bitsandbytes),
    ],
    ids=lambda settings: ", ".join(settings) or "as it is",
)
def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_file(
    world: World, tmp_path: Path, settings: dict[str, Any]
) -> None:
    resume = stop_early(world, tmp_path / "a.safetensors", **settings)
    resumed = run(world.base, resume.model_copy(update={"log_dir": tmp_path / "a"}))
    at_once = run(
        world.base,
        config(world, tmp_path / "b.safetensors", steps=40, log_dir=tmp_path / "b", **settings),
    )
    assert resumed.changed > 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert resumed.sha256 == at_once.sha256
    assert not (tmp_path / "a.checkpoint").exists()
    # since the measurement before, which the stopped run made, and not since the checkpoint
    assert scalars(tmp_path / "a", "hard/flipped")[-1] == scalars(tmp_path / "b", "hard/flipped")[-1]


@needs_bitsandbytes
def test_a_run_with_moments_in_8_bits_resumes_too(wide: World, tmp_path: Path) -> None:
    eight = {"steps": 12, "optimizer": "adamw8bit", "parameterisation": "per-item"}
    run(wide.base, stop_early(wide, tmp_path / "a.safetensors", **eight))
    run(wide.base, config(wide, tmp_path / "b.safetensors", **eight))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_run_that_was_killed_resumes_from_its_last_checkpoint(world: World, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "a.safetensors", steps=40)
    options = settings.model_dump(mode="json", exclude_unset=True)
    options |= {"data": world.text, "heldout": world.other_text, "checkpoint_every": 1}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "maskllm.cli", "learn", world.base, *given]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "a.checkpoint").exists():
        assert killed.poll() is None
        time.sleep(1e-3)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "a.safetensors").exists()

    run(world.base, settings.model_copy(update={"resume": True}))
    run(world.base, config(world, tmp_path / "b.safetensors", steps=40))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_gradient_checkpointing_changes_no_byte(world: World, tmp_path: Path) -> None:
    run(world.base, config(world, tmp_path / "a.safetensors", gradient_checkpointing=True))
    run(world.base, config(world, tmp_path / "b.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_nothing_is_dropped_out_of_a_base_that_could(
    world: World, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings = {"vocab_size": len(tokenizer), "hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16}
    opt = OPTConfig(**settings, num_hidden_layers=2, num_attention_heads=2, dropout=0.9, bos_token_id=1)
    OPTForCausalLM(opt).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    base = world._replace(base=str(tmp_path / "opt"))
    for name, again in ("a", True), ("b", False):
        out, log = tmp_path / f"{name}.safetensors", tmp_path / name
        run(base.base, config(base, out, gradient_checkpointing=again, log_dir=log, steps=2))
    assert scalars(tmp_path / "a", "loss") == scalars(tmp_path / "b", "loss")


def test_a_mask_that_has_settled_ends_the_run_early(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = {"prior_strength": 1000, "lr": 1e-12, "steps": 40, "eval_every": 3, "settled": 2}
    report = run(world.base, config(world, tmp_path / "a.safetensors", **still))
    assert report.steps == 6  # measured at 0, 3 and 6: two looks that found nothing new
    assert maskset.load(tmp_path / "a.safetensors").provenance["steps"] == 6
    assert "settled after 6 steps" in capsys.readouterr().err
    moving = {**still, "lr": 1e-1, "prior_strength": 0, "steps": 9}
    assert run(world.base, config(world, tmp_path / "b.safetensors", **moving)).steps == 9


def test_settled_is_neither_moving_nor_getting_better() -> None:
    def look(loss: float, flipped: float) -> Measured:
        return Measured(step=0, scores={"loss": loss}, changed=0, flipped=flipped, confidence={})

    still, better, moved = look(2, 0), look(1.9, 0), look(2, 0.1)
    assert _settled([moved, still, still], 2)
    assert not _settled([still, still], 2)  # too few looks
    assert not _settled([better, still, still], 2)
    assert not _settled([still, moved, still], 2)
    assert not _settled([still, still, still], 0)


def test_every_micro_batch_of_every_step_has_a_draw_of_its_own(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    draw = Sampling.draw
    monkeypatch.setattr(Sampling, "draw", lambda self, number: numbers.append(number) or draw(self, number))
    run(world.base, config(world, tmp_path / "a.safetensors", steps=3, batch=5, micro_batch=2))
    assert numbers == list(range(9))  # three steps of 2, 2 and 1 windows


def test_micro_batches_add_up_to_their_batch(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[torch.Tensor] = []

    def note(logits: list[torch.Tensor], _: float) -> None:
        gradients.append(torch.cat([tensor.grad.flatten() for tensor in logits if tensor.grad is not None]))

    monkeypatch.setattr("maskllm.learn.trainer.clip_grad_norm_", note)
    hot = {"tau": (1e5, 1e5), "steps": 1}  # so hot that every draw is the same: all patterns in equal parts
    for size in 4, 3, 1:
        run(world.base, config(world, tmp_path / f"{size}.safetensors", micro_batch=size, **hot))
    whole, *parts = gradients
    for part in parts:
        assert float((part - whole).norm() / whole.norm()) < 0.01


def test_the_reward_for_norm_draws_to_the_largest_weights(world: World, tmp_path: Path) -> None:
    model, _, base = load_base(world.base)
    share = {}
    for reward in 0, 1e4:
        settings = {"prior": "none", "steps": 30, "lr": 1e-1, "weight_reg": reward, "schedule": "exponential"}
        out = tmp_path / f"{reward}.safetensors"
        run(world.base, config(world, out, **settings))
        learned = maskset.load(out, base)
        kept = sum(layer.weight[learned.mask(n)].square().sum() for n, layer in maskable(model).items())
        best_kept = sum(
            layer.weight[best(layer.weight.abs())].square().sum() for layer in maskable(model).values()
        )
        share[reward] = float(kept / best_kept)
    assert share[0] < 0.8
    assert share[1e4] > 0.95


def test_to_distill_is_to_come_near_the_dense_base(world: World, tmp_path: Path) -> None:
    """Nothing learns here, so the loss of the only step can be computed from the prior's mask."""
    still = {"prior_strength": 1000, "lr": 1e-12, "steps": 1, "distill": 1, "micro_batch": 4}
    settings = config(world, tmp_path / "a.safetensors", log_dir=tmp_path / "log", **still)
    run(world.base, settings)
    task = tasks.load(world.base, settings, "cpu")
    batch = task.batch(0)
    with torch.no_grad():
        dense = task.logits(task.model, batch.inputs).log_softmax(-1)
        apply_masks(task.model, maskset.load(tmp_path / "a.safetensors").masks())
        masked = task.logits(task.model, batch.inputs).log_softmax(-1)
    expected = (dense.exp() * (dense - masked)).sum(-1).mean()
    assert expected > 0.01
    assert scalars(tmp_path / "log", "loss") == [(1, pytest.approx(float(expected), rel=1e-4))]


def test_settings_are_part_of_what_a_mask_says(world: World, tmp_path: Path) -> None:
    chosen = {"parameterisation": "per-item", "schedule": "exponential", "distill": 0.25, "stream": True}
    run(world.base, config(world, tmp_path / "a.safetensors", **chosen))
    made = maskset.load(tmp_path / "a.safetensors").provenance
    assert made["method"] == "maskllm-per-item"
    assert {name: made[name] for name in chosen} == chosen
    assert made["text"] == ""  # of a stream nobody sees the whole


def test_an_exponential_schedule_goes_by_the_same_factor(world: World, tmp_path: Path) -> None:
    chosen = {"schedule": "exponential", "tau": (4, 1), "scale": (100, 400), "anneal_share": 0.5}
    run(world.base, config(world, tmp_path / "a.safetensors", log_dir=tmp_path / "log", **chosen))
    # in the first half of six steps, then no further
    assert [tau for _, tau in scalars(tmp_path / "log", "tau")] == pytest.approx([4, 2, 1, 1, 1, 1])
    assert [s for _, s in scalars(tmp_path / "log", "scale")] == pytest.approx([100, 200, 400, 400, 400, 400])


@pytest.mark.parametrize("length", [16, 64])
def test_a_stream_is_read_in_its_own_order(world: World, tmp_path: Path, length: int) -> None:
    settings = config(world, tmp_path / "a.safetensors", stream=True, length=length)
    task = tasks.load(world.base, settings, "cpu")
    tokens = load_tokens(load_base(world.base).tokenizer, [world.text])
    task.calibration()  # which leaves it at its beginning
    read = torch.cat([task.batch(step).inputs.flatten() for step in range(3)])
    assert torch.equal(read, tokens[: 3 * 4 * length])


@needs_bitsandbytes
def test_learning_takes_at_most_12_bytes_a_maskable_weight(
    wide: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"parameterisation": "per-item", "optimizer": "adamw8bit", "steps": 1}
    run(wide.base, config(wide, tmp_path / "a.safetensors", **small))
    told = re.search(
        r"memory beyond the base: ([\d.]+) bytes a maskable weight "
        r"\(logits ([\d.]+), gradients ([\d.]+), optimizer ([\d.]+), codes ([\d.]+)\)",
        capsys.readouterr().err,
    )
    assert told
    total, *parts = map(float, told.groups())
    assert total <= 12
    # float32 logits and gradients; two moments of a byte, 8 bytes of scale for 256 of them and their tables;
    # two codes of a byte for four weights
    assert parts == pytest.approx([4, 4, 2.06, 0.5], abs=0.01)


def test_8_bits_without_bitsandbytes_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(CannotLearn, match=r"pip install 'maskllm\[8bit\]'"):
        run(world.base, config(world, tmp_path / "a.safetensors", optimizer="adamw8bit"))


def test_another_run_does_not_go_on_from_the_checkpoint(world: World, tmp_path: Path) -> None:
    resume = stop_early(world, tmp_path / "a.safetensors")
    with pytest.raises(CannotResume, match=r"lr was 0\.01, and is 0\.02"):
        run(world.base, resume.model_copy(update={"lr": 0.02}))
    with pytest.raises(CannotResume, match="text was"):
        run(world.base, resume.model_copy(update={"data": [world.other_text]}))
    with pytest.raises(CannotLearn, match="--resume, or delete it"):
        run(world.base, resume.model_copy(update={"resume": False}))
    assert (tmp_path / "a.checkpoint").exists()


def test_without_a_readable_checkpoint_there_is_nothing_to_resume(world: World, tmp_path: Path) -> None:
    resume = config(world, tmp_path / "a.safetensors", resume=True)
    with pytest.raises(CannotResume, match="start without --resume"):
        run(world.base, resume)
    (tmp_path / "a.checkpoint").write_text("half a file")
    with pytest.raises(CannotResume, match="damaged"):
        run(world.base, resume)


def test_a_seed_fixes_the_mask_and_another_seed_gives_another(world: World, tmp_path: Path) -> None:
    def report(name: str, seed: int) -> Report:
        return run(world.base, config(world, tmp_path / name, seed=seed))

    assert report("a.safetensors", 1).sha256 == report("b.safetensors", 1).sha256
    a, c = maskset.load(tmp_path / "a.safetensors"), report("c.safetensors", 2)
    assert maskset.diff(a, maskset.load(Path(c.out)))["total"].changed > 0


def test_the_reported_perplexity_is_that_of_the_saved_mask_on_the_base(world: World, tmp_path: Path) -> None:
    report = run(world.base, config(world, tmp_path / "a.safetensors"))
    model, tokenizer, base = load_base(world.base)
    heldout = windows(load_tokens(tokenizer, [world.other_text]), 16)
    assert report.dense["perplexity"] == perplexity(model, heldout)
    apply_masks(model, maskset.load(tmp_path / "a.safetensors", base).masks())
    assert report.scores["perplexity"] == perplexity(model, heldout)


def test_a_mask_says_how_it_was_made_and_names_no_folder_of_this_machine(
    world: World, tmp_path: Path
) -> None:
    report = run(world.base, config(world, tmp_path / "a.safetensors"))
    made = maskset.load(tmp_path / "a.safetensors")
    assert made.provenance["method"] == "maskllm-categorical"
    assert [Path(name).name for name in made.provenance["data"]] == ["words.txt"]
    assert {key: made.provenance[key] for key in ("steps", "batch", "length", "lr", "prior", "seed")} == {
        "steps": 6,
        "batch": 4,
        "length": 16,
        "lr": 0.01,
        "prior": "magnitude",
        "seed": 0,
    }
    assert made.scores["perplexity"] == report.scores["perplexity"]
    assert made.scores["dense"] == report.dense["perplexity"]
    assert made.scores["protocol"] == report.protocol
    assert str(tmp_path.parent) not in f"{made.provenance} {made.scores}"


def test_nothing_of_the_base_changes(world: World, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "a.safetensors")
    task = tasks.load(world.base, settings, "cpu")
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    learn(task, settings, distributed.World(0, 1, "cpu"), tmp_path / "a.checkpoint", {})
    after = task.model.state_dict()
    assert after.keys() - before.keys() == {
        f"{n}.{x}" for n in maskable_names(world) for x in ("logits", "prior", "seen")
    }
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def maskable_names(world: World) -> list[str]:
    return list(maskable(load_base(world.base).model))


@pytest.mark.parametrize("prior", NAMES)
def test_every_prior_is_a_place_to_start(world: World, tmp_path: Path, prior: str) -> None:
    report = run(world.base, config(world, tmp_path / "a.safetensors", prior=prior, steps=2))
    assert maskset.load(Path(report.out)).provenance["prior"] == prior


def test_a_strong_prior_is_kept_where_nothing_is_learned(world: World, tmp_path: Path) -> None:
    still = {"prior_strength": 1000, "lr": 1e-12, "steps": 1}
    report = run(world.base, config(world, tmp_path / "a.safetensors", **still))
    model, _, base = load_base(world.base)
    learned = maskset.load(tmp_path / "a.safetensors", base)
    assert report.changed == 0
    for name, layer in maskable(model).items():
        assert torch.equal(learned.mask(name), best(layer.weight.abs()))


@pytest.mark.parametrize("how", ["categorical", "per-item"])
def test_a_learned_mask_is_the_prior_of_the_next(world: World, tmp_path: Path, how: str) -> None:
    general = run(world.base, config(world, tmp_path / "general.safetensors"))
    still = {"prior_strength": 1000, "lr": 1e-12, "steps": 1, "parameterisation": how}
    run(world.base, config(world, tmp_path / "legal.safetensors", prior=general.out, **still))
    legal = maskset.load(tmp_path / "legal.safetensors")
    assert maskset.diff(legal, maskset.load(Path(general.out)))["total"].changed == 0
    assert legal.provenance["prior"] == f"general.safetensors@{general.sha256[:12]}"


def test_a_prior_that_does_not_fit_is_refused(world: World, tmp_path: Path) -> None:
    part = run(world.base, config(world, tmp_path / "part.safetensors", include=["*.mlp.*"], steps=1))
    with pytest.raises(NoPrior, match="--exclude"):
        run(world.base, config(world, tmp_path / "a.safetensors", prior=part.out))
    with pytest.raises(maskset.WrongPattern, match="2:4, not 4:8"):
        run(world.base, config(world, tmp_path / "a.safetensors", prior=part.out, n=4, m=8))
    with pytest.raises(NoPrior, match="give magnitude, wanda, sparsegpt, reconstruct, none, or a mask"):
        run(world.base, config(world, tmp_path / "a.safetensors", prior="magnitud"))


def test_a_run_can_be_had_in_a_thread(world: World, tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(world.base, config(world, tmp_path / "a.safetensors")))
    thread.start()
    thread.join()
    assert maskset.load(tmp_path / "a.safetensors").provenance["steps"] == 6


def test_other_patterns_and_fewer_layers_can_be_learned(world: World, tmp_path: Path) -> None:
    chosen = {"n": 4, "m": 8, "include": ["*.mlp.*"], "exclude": ["*.1.mlp.up_proj"], "dtype": "bfloat16"}
    run(world.base, config(world, tmp_path / "a.safetensors", **chosen))
    made = maskset.load(tmp_path / "a.safetensors")
    assert (made.n, made.m) == (4, 8)
    assert set(made.shapes) == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")} | {
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "down")
    }


def test_settings_that_cannot_work_are_met_at_the_door(world: World, tmp_path: Path) -> None:
    with pytest.raises(BadLength, match="--length 512"):
        run(world.base, config(world, tmp_path / "a.safetensors", length=513))
    with pytest.raises(NoSuchLayer, match="mpl"):
        run(world.base, config(world, tmp_path / "a.safetensors", include=["*.mpl.*"]))
    assert not (tmp_path / "a.safetensors").exists()


def test_what_cannot_work_together_is_met_before_anything_is_loaded(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="adamw8bit goes with --parallel ddp only"):
        config(world, tmp_path / "a.safetensors", optimizer="adamw8bit", parallel="fsdp")
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        config(world, tmp_path / "a.safetensors", distill=1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a missing GPU is only met where there is none")
def test_a_gpu_that_is_not_there_is_said_so(world: World, tmp_path: Path) -> None:
    with pytest.raises(BadDevice, match="there is no cuda here"):
        run(world.base, config(world, tmp_path / "a.safetensors", device="cuda"))


def test_tensorboard_shows_the_run_and_its_hard_mask(world: World, tmp_path: Path) -> None:
    run(world.base, config(world, tmp_path / "a.safetensors", log_dir=tmp_path / "log", eval_every=2))
    tags = EventAccumulator(str(tmp_path / "log")).Reload().Tags()["scalars"]
    of_hard = ["changed", "confidence", "flipped", "loss", "perplexity"]
    assert {tag for tag in tags if not tag.startswith("confidence/")} == {
        "loss",
        "lr",
        "scale",
        "tau",
        *(f"hard/{name}" for name in of_hard),
    }
    layers = {tag.removeprefix("confidence/") for tag in tags if tag.startswith("confidence/")}
    assert layers == set(maskable_names(world))
    assert [step for step, _ in scalars(tmp_path / "log", "loss")] == [1, 2, 3, 4, 5, 6]
    for name in "hard/perplexity", f"confidence/{maskable_names(world)[0]}":
        assert [step for step, _ in scalars(tmp_path / "log", name)] == [0, 2, 4, 6]
    assert scalars(tmp_path / "log", "tau")[-1][1] == pytest.approx(0.05)
    flipped, changed = (dict(scalars(tmp_path / "log", f"hard/{name}")) for name in ("flipped", "changed"))
    # what flipped from look to look bounds what changed over all of them
    assert 0 < changed[6] <= sum(flipped.values()) + 1e-6
    assert flipped[0] == changed[0]


def test_a_picture_of_the_run_is_put_beside_the_mask(world: World, tmp_path: Path) -> None:
    run(world.base, config(world, tmp_path / "a.safetensors", eval_every=2))
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1300, 420))
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100  # a scale of colours, lines, text


def test_a_few_steps_on_a_real_model_beat_its_magnitude_mask(tmp_path: Path) -> None:
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not part of this repository")
    stories = SHARED / "data/domains/tinystories"
    (tmp_path / "train.txt").write_text((stories / "train.txt").read_text()[:100_000])
    (tmp_path / "heldout.txt").write_text((stories / "valid.txt").read_text()[:20_000])
    model, tokenizer, _ = load_base(str(SHARED / "data/models/stories260K-hf"))
    heldout = windows(load_tokens(tokenizer, [str(tmp_path / "heldout.txt")]), 128)
    apply_masks(model, {name: best(layer.weight.abs()) for name, layer in maskable(model).items()})
    magnitude = perplexity(model, heldout)
    report = run(
        str(SHARED / "data/models/stories260K-hf"),
        LearnConfig(
            out=tmp_path / "a.safetensors",
            data=[str(tmp_path / "train.txt")],
            heldout=[str(tmp_path / "heldout.txt")],
            prior="magnitude",
            steps=16,
            batch=8,
            micro_batch=4,
            length=128,
            lr=1e-2,
        ),
    )
    assert report.dense["perplexity"] < report.scores["perplexity"] < magnitude / 2
