"""A whole run: what it saves is what it measured, and stopping it changes nothing."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskllm.core import maskset
from maskllm.core.layers import NoSuchLayer, apply_masks, maskable
from maskllm.core.patterns import best
from maskllm.data import load_tokens, windows
from maskllm.evaluate.perplexity import perplexity
from maskllm.learn.checkpoint import CannotResume
from maskllm.learn.priors import NoPrior
from maskllm.learn.trainer import CannotLearn, LearnConfig, Report, learn, run
from maskllm.models import BadLength, load_base

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


def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_file(world: World, tmp_path: Path) -> None:
    resumed = run(world.base, stop_early(world, tmp_path / "a.safetensors"))
    at_once = run(world.base, config(world, tmp_path / "b.safetensors", steps=40))
    assert resumed.changed > 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert resumed.sha256 == at_once.sha256
    assert not (tmp_path / "a.checkpoint").exists()


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
    assert report.dense == perplexity(model, heldout)
    apply_masks(model, maskset.load(tmp_path / "a.safetensors", base).masks())
    assert report.perplexity == perplexity(model, heldout)


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
    assert made.scores["perplexity"] == report.perplexity
    assert made.scores["protocol"] == report.protocol
    assert str(tmp_path.parent) not in f"{made.provenance} {made.scores}"


def test_nothing_of_the_base_changes(world: World, tmp_path: Path) -> None:
    base = load_base(world.base)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    text = load_tokens(base.tokenizer, [world.text])
    learn(base, text, windows(text, 16), config(world, tmp_path / "a"), tmp_path / "a.checkpoint", {})
    after = base.model.state_dict()
    assert after.keys() - before.keys() == {
        f"{n}.{x}" for n in maskable_names(world) for x in ("logits", "prior")
    }
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def maskable_names(world: World) -> list[str]:
    return list(maskable(load_base(world.base).model))


@pytest.mark.parametrize("prior", ["magnitude", "wanda", "sparsegpt", "none"])
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


def test_a_learned_mask_is_the_prior_of_the_next(world: World, tmp_path: Path) -> None:
    general = run(world.base, config(world, tmp_path / "general.safetensors"))
    still = {"prior_strength": 1000, "lr": 1e-12, "steps": 1}
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
    with pytest.raises(NoPrior, match="give magnitude, wanda, sparsegpt, none, or a mask file"):
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


def test_tensorboard_shows_the_run_and_its_hard_mask(world: World, tmp_path: Path) -> None:
    run(world.base, config(world, tmp_path / "a.safetensors", log_dir=tmp_path / "log", eval_every=2))
    board = EventAccumulator(str(tmp_path / "log")).Reload()
    every_step, every_second = ["loss", "lr", "scale", "tau"], ["changed", "confidence", "perplexity"]
    assert sorted(board.Tags()["scalars"]) == [*(f"hard/{name}" for name in every_second), *every_step]
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("hard/perplexity")] == [0, 2, 4, 6]
    assert board.Scalars("tau")[-1].value == pytest.approx(0.05)


def test_a_few_steps_on_a_real_model_beat_its_magnitude_mask(tmp_path: Path) -> None:
    if not SHARED.exists():
        pytest.skip(f"needs the trained model in {SHARED.name}/ beside the repository")
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
    assert report.dense < report.perplexity < magnitude / 2
