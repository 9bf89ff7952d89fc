"""Zero-shot accuracy on multiple-choice tasks, with lm-evaluation-harness as the runner.

`local_*` tasks are ours: the harness's own prompts over JSON lines of `{"ctx", "choices", "label"}`, so they
need no network. Every other name is the harness's own task.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskllm.core.maskset import MaskSet
from maskllm.evaluate.perplexity import masked
from maskllm.models import Loaded

QUESTION = "Question: {{ctx}}\nAnswer:"
LOCAL = {
    "local_arc_challenge": ("arc_challenge_test.jsonl", QUESTION),
    "local_arc_easy": ("arc_easy_test.jsonl", QUESTION),
    "local_hellaswag": ("hellaswag_val.jsonl", "{{ctx}}"),
    "local_openbookqa": ("openbookqa_test.jsonl", "{{ctx}}"),
    "local_piqa": ("piqa_val.jsonl", QUESTION),
}
"""Our tasks: the file of each, and its prompt."""


class BadTask(ValueError):
    """A task that cannot be run: unknown, without its data, or without an accuracy."""


@dataclass(frozen=True)
class Accuracies:
    """Per row (`dense`, then each mask) and task: `acc`, and `acc_norm` where the task has it."""

    rows: dict[str, dict[str, dict[str, float]]]
    protocol: str


def accuracies(
    base: Loaded,
    mask_sets: Mapping[str, MaskSet],
    tasks: Sequence[str],
    data: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> Accuracies:
    """Accuracies of the base, dense and under each mask.

    `data` is the folder of the local tasks' files; `limit` takes the first items of each task. Contexts
    longer than the base's are cut from the left, as the harness does. Raises BadTask.
    """
    specs = [_local(task, data) if task.startswith("local_") else task for task in tasks]
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise BadTask("--tasks needs lm-evaluation-harness: pip install 'maskllm[zeroshot]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what we do on purpose
    # The harness's own thousands of tasks take ten seconds to index.
    manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
    unknown = [spec for spec in specs if isinstance(spec, str) and spec not in manager.all_tasks]
    if unknown:
        raise BadTask(f"no task {', '.join(unknown)}; known: {', '.join(LOCAL)}, and the harness's own")
    # It gives a tokenizer without a padding token one, and a model's tied weights stay tied.
    lm = HFLM(pretrained=base.model, tokenizer=copy.deepcopy(base.tokenizer), batch_size=batch)

    def run() -> dict[str, Any]:
        try:
            return lm_eval.simple_evaluate(  # type: ignore[no-any-return]
                model=lm,
                tasks=copy.deepcopy(specs),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        except OSError as error:  # no network, no such dataset
            raise BadTask(f"a task's data cannot be read: {error}") from None

    results = {"dense": run()}
    for name, mask_set in mask_sets.items():
        with masked(base.model, mask_set.masks()):
            results[name] = run()
    return Accuracies(
        {name: _accuracies(result["results"]) for name, result in results.items()},
        _protocol(base, results["dense"]),
    )


def _local(task: str, data: Path | None) -> dict[str, Any]:
    """One of our tasks as the harness wants it, with the folder of its data."""
    if task not in LOCAL:
        raise BadTask(f"no task {task}; known: {', '.join(LOCAL)}, and the harness's own")
    file, prompt = LOCAL[task]
    if data is None:
        raise BadTask(f"{task} needs the folder of {file}: --tasks-data FOLDER")
    if not (data / file).is_file():
        raise BadTask(f"{task} needs {file}, which is not in {data}")
    measures = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file}, "data_dir": str(data)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": prompt,
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": measures,
        "metadata": {"version": 1.0},
    }


def _accuracies(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """`acc` and `acc_norm` out of the harness's figures, where one is called `acc,none`."""
    found = {
        task: {name: figures[f"{name},none"] for name in ("acc", "acc_norm") if f"{name},none" in figures}
        for task, figures in results.items()
    }
    if bare := [task for task, figures in found.items() if not figures]:
        raise BadTask(f"no accuracy in {', '.join(bare)}: give tasks that measure one")
    return found


def _protocol(base: Loaded, result: Mapping[str, Any]) -> str:
    import lm_eval

    items = ", ".join(f"{task} {count['effective']}" for task, count in result["n-samples"].items())
    shots = ", ".join(f"{task} {count}" for task, count in result["n-shot"].items() if count)
    return (
        f"lm-eval {lm_eval.__version__}, {f'shots: {shots}' if shots else 'zero-shot'}, items: {items}, "
        f"tokenizer {Path(base.tokenizer.name_or_path).name} ({len(base.tokenizer)} tokens), "
        f"{str(base.model.dtype).removeprefix('torch.')}"
    )
