"""Accuracies are those one computes by hand from the loglikelihood of each choice."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from maskllm.core import maskset
from maskllm.core.layers import apply_masks
from maskllm.evaluate.zeroshot import LOCAL, BadTask, _local, accuracies
from maskllm.models import Loaded, load_base

DEMO = Path(__file__).parents[3] / "examples/demo"
ITEMS = [
    ("Once upon a time", ["there was a little girl", "girl a was"], 0),
    ("The Secretary", ["shall prescribe regulations", "ate an apple"], 0),
    ("How do I open a file?", ["with open", "the doctor may give medicine to treat the pain"], 0),
    ("import", ["of the day", "numpy"], 1),
    ("He said", ["no", "that he would go to the park and play with his friends"], 1),
    ("Tim was happy because he found his", ["toy", "Administrator"], 0),
    ("What did Tom eat?", ["an apple", "a statute"], 0),
    ("Where did Lily go?", ["to the park", "under section 5"], 0),
    ("The ninth item is beyond the limit", ["yes", "no"], 0),
    ("And so is the tenth", ["yes", "no"], 1),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PIQA's file, in a folder of its own; what the harness makes of it stays beside it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"ctx": ctx, "choices": choices, "label": label} for ctx, choices, label in ITEMS]
    (tmp_path / "piqa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@torch.no_grad()
def by_hand(base: Loaded, count: int) -> dict[str, float]:
    """Shares of the first items whose labelled choice is the likeliest, as it is and per character."""
    right, right_per_character = 0, 0
    for ctx, choices, label in ITEMS[:count]:
        prompt = f"Question: {ctx}\nAnswer:"
        scores = []
        for choice in choices:
            tokens = base.tokenizer(f"{prompt} {choice}", return_tensors="pt").input_ids
            start = len(base.tokenizer(prompt).input_ids)
            logs = base.model(tokens).logits.log_softmax(-1)[0, start - 1 : -1]
            scores.append(logs.gather(1, tokens[0, start:, None]).sum().item())
        per_character = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right += scores.index(max(scores)) == label
        right_per_character += per_character.index(max(per_character)) == label
    return {"acc": right / count, "acc_norm": right_per_character / count}


def test_accuracy_is_how_often_the_labelled_choice_is_the_likeliest(folder: Path) -> None:
    base = load_base(str(DEMO / "base"))
    mask_set = maskset.load(DEMO / "masks/general.safetensors", base.base)
    told = accuracies(base, {"general": mask_set}, ["local_piqa"], folder, limit=8)
    everything = accuracies(base, {}, ["local_piqa"], folder)

    dense = by_hand(base, 8)
    assert everything.rows["dense"] == {"local_piqa": by_hand(base, 10)}
    apply_masks(base.model, mask_set.masks())
    sparse = by_hand(base, 8)
    assert told.rows == {"dense": {"local_piqa": dense}, "general": {"local_piqa": sparse}}
    assert dense != sparse  # the items tell models and measures apart
    assert any(figures["acc"] != figures["acc_norm"] for figures in (dense, sparse))
    assert told.protocol == (
        f"lm-eval {version('lm-eval')}, zero-shot, items: local_piqa 8, tokenizer base (4096 tokens), float32"
    )
    assert base.tokenizer.pad_token is None  # the harness had one of its own


PROMPTS = {
    "local_arc_challenge": "Question: Why?\nAnswer:",
    "local_arc_easy": "Question: Why?\nAnswer:",
    "local_hellaswag": "Why?",
    "local_openbookqa": "Why?",
    "local_piqa": "Question: Why?\nAnswer:",
}


def test_the_local_tasks_are_asked_as_the_harness_asks_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert LOCAL.keys() == PROMPTS.keys()
    manager = TaskManager(include_defaults=False)
    for name, prompt in PROMPTS.items():
        split = "val" if name in ("local_hellaswag", "local_piqa") else "test"
        file = tmp_path / f"{name.removeprefix('local_')}_{split}.jsonl"
        file.write_text('{"ctx": "Why?", "choices": ["Because.", "So.", "No."], "label": 1}\n')
        task: Any = manager.load([_local(name, tmp_path)])["tasks"][name]
        (item,) = task.eval_docs
        assert task.doc_to_text(item) == prompt
        assert task.doc_to_choice(item) == ["Because.", "So.", "No."]
        assert task.doc_to_target(item) == 1
        assert task.config.target_delimiter == " "


def test_a_task_that_cannot_be_run_says_why(folder: Path, base_folder: Path) -> None:
    base = load_base(str(base_folder))
    for task, data, message in [
        ("local_boolq", folder, "no task local_boolq; known: local_arc_challenge, .*, local_piqa, and the"),
        ("local_piqa", None, r"local_piqa needs the folder of piqa_val.jsonl: --tasks-data FOLDER"),
        ("local_hellaswag", folder, "local_hellaswag needs hellaswag_val.jsonl, which is not in"),
    ]:
        with pytest.raises(BadTask, match=message):
            accuracies(base, {}, [task], data)


def test_without_the_harness_its_extra_is_named(
    folder: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BadTask, match=r"pip install 'maskllm\[zeroshot\]'"):
        accuracies(load_base(str(base_folder)), {}, ["local_piqa"], folder)
