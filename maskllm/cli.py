"""The `maskllm` command. A subcommand is one typed model: its fields are the options, its docstring is
the help, and the example in it runs as printed in a checkout of the repository.

Torch and transformers are imported by the commands that need them, so that `--help` is quick.
"""

import hashlib
import json
import os
import re
import secrets
import sys
from argparse import _ActionsContainer
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSettingsSource,
    CliSubCommand,
    SettingsError,
    get_subcommand,
)

from maskllm.learn.config import LearnConfig

if TYPE_CHECKING:
    from maskllm.core.maskset import MaskSet
    from maskllm.models import Loaded


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The exit code is 1 where its input is no good, 2 where its command line is not."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["serve"]:  # the server has its own options, and maskllm does not know the server
        os.execv(sys.executable, [sys.executable, "-m", "server", *args[1:]])
    try:
        source = CliSettingsSource[Any](Cli, add_argument_method=_add_argument)
        command: Any = get_subcommand(CliApp.run(Cli, args, source), cli_exit_on_error=False)
        command.run()
    except (ValidationError, SettingsError) as error:
        return _complain(args, _wrong_options(error), 2) if _first() else 0
    except OSError as error:
        return _complain(args, f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except KeyboardInterrupt as stop:
        return _complain(args, str(stop) or "stopped", 130)
    except ValueError as error:
        if not type(error).__module__.startswith("maskllm."):  # one of our own is written for the user
            raise
        return _complain(args, str(error), 1)
    return 0


class Command(BaseModel, use_attribute_docstrings=True):
    """A subcommand that reports figures."""

    as_json: Annotated[bool, Field(alias="json")] = False
    """Print JSON."""


class OnBase(Command):
    """A subcommand that runs the base."""

    model: CliPositionalArg[str]
    """The base: a folder or a Hugging Face name."""
    data: list[str] = []
    """Text files, JSON lines, folders of *.txt and *.jsonl, or hf:NAME[:SPLIT[:CONFIG]]."""
    columns: Annotated[list[str], Field(min_length=1)] = ["text"]
    """Fields of a JSON line or dataset row that make a document, joined by a line break."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None = None
    """cpu, cuda or cuda:1; a GPU if there is one."""


class Prune(OnBase):
    """Make a mask in one shot, from the weights and some calibration text.

    maskllm prune examples/demo/base --method wanda --data README.md --samples 16 \\
      --out masks/wanda.safetensors
    """

    method: Literal["magnitude", "wanda", "sparsegpt", "reconstruct"] = "wanda"
    """How weights are chosen: magnitude needs no text, reconstruct is the best for weights that stay."""
    n: PositiveInt = 2
    """Weights kept in each group."""
    m: PositiveInt = 4
    """Weights in a group."""
    length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a window."""
    samples: PositiveInt = 128
    """Windows of text to calibrate on, drawn at random."""
    seed: NonNegativeInt = 0
    """Seed of that draw."""
    include: list[str] = []
    """Globs of the layers to mask; without any, all linear layers of the decoder blocks."""
    exclude: list[str] = []
    """Globs of the layers to leave dense."""
    out: Path | None = None
    """The mask file to write."""
    update_weights: Path | None = None
    """A folder for SparseGPT's sparse checkpoint, its weights updated: a baseline instead of a mask."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.out is None) == (self.update_weights is None):
            raise ValueError("give either --out FILE or --update-weights FOLDER")
        if self.update_weights and self.method != "sparsegpt":
            raise ValueError(f"--update-weights goes with --method sparsegpt, not {self.method}")
        if self.method != "magnitude" and not self.data:
            raise ValueError(f"--method {self.method} needs --data to calibrate on")
        return self

    def run(self) -> None:
        import torch

        from maskllm.core import maskset
        from maskllm.data import load_tokens, sample, source_names
        from maskllm.models import check_length
        from maskllm.prune.oneshot import prune

        base, calibration = _load(self), None
        rules = {"include": self.include, "exclude": self.exclude}
        how: dict[str, Any] = {"method": self.method, **{k: v for k, v in rules.items() if v}}
        if self.method != "magnitude":
            check_length(base.model, self.length)
            tokens = load_tokens(base.tokenizer, self.data, columns=self.columns)
            draw = torch.Generator().manual_seed(self.seed)
            calibration = sample(tokens, self.length, self.samples, draw)
            how |= {"data": source_names(self.data)}
            how |= {"samples": self.samples, "length": self.length, "seed": self.seed}
        update = self.update_weights is not None
        masks = prune(
            base.model, calibration, self.method, self.n, self.m, self.include, self.exclude, update
        )
        if self.update_weights:
            base.model.save_pretrained(self.update_weights)
            base.tokenizer.save_pretrained(self.update_weights)
            weights = sum(mask.numel() for mask in masks.values())
            _report({"folder": str(self.update_weights), "weights": weights, **how}, self.as_json)
        elif self.out:
            maskset.save(maskset.from_masks(masks, base.base, self.n, self.m, how), self.out)
            _report(_description(self.out, maskset.load(self.out)), self.as_json)


class Eval(OnBase):
    """Measure perplexity and zero-shot accuracy, dense and under masks, and print the protocol with them.

    maskllm eval examples/demo/base --data README.md --mask examples/demo/masks/general.safetensors
    """

    mask: list[str] = []
    """Mask files; each adds a row."""
    protocol: Annotated[str, Field(pattern=r"^(windows:|wikitext2-)\d+$")] = "windows:512"
    """windows:N, or wikitext2-N as papers have it (--data wiki.test.raw, or without --data from the hub)."""
    tasks: list[str] = []
    """Tasks of lm-evaluation-harness, and local_hellaswag, local_piqa, local_arc_easy, local_arc_challenge,
    local_openbookqa; each adds its accuracies."""
    tasks_data: Path | None = None
    """The folder of the local tasks' JSON lines."""
    limit: PositiveInt | None = None
    """Items of each task, from its first; all without it."""
    markdown: bool = False
    """Print a Markdown table."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if not self.data and not self.protocol.startswith("wikitext2-"):
            if not self.tasks:
                raise ValueError("--data is missing: text to measure on")
            if "protocol" in self.model_fields_set:
                raise ValueError(f"--protocol {self.protocol} needs --data to measure on")
        if not self.tasks and (self.tasks_data or self.limit):
            raise ValueError("--tasks-data and --limit go with --tasks")
        if self.markdown and self.as_json:
            raise ValueError("give either --json or --markdown")
        return self

    def run(self) -> None:
        from maskllm.core import maskset
        from maskllm.evaluate import protocols
        from maskllm.evaluate.perplexity import masked, perplexity

        base = _load(self)
        mask_sets = {file: maskset.load(Path(file), base.base) for file in self.mask}
        rows: dict[str, dict[str, Any]] = {name: {} for name in ("dense", *mask_sets)}
        text, how = None, {}
        if self.data or self.protocol.startswith("wikitext2-"):
            text, how["protocol"] = protocols.read(self.protocol, base, self.data, self.columns)
        if self.tasks:
            from maskllm.evaluate.zeroshot import accuracies

            accurate = accuracies(base, mask_sets, self.tasks, self.tasks_data, self.limit)
            how["tasks_protocol"] = accurate.protocol
            for name, tasks in accurate.rows.items():
                rows[name]["tasks"] = tasks
        if text is not None:
            rows["dense"]["perplexity"] = perplexity(base.model, text)
            for file, mask_set in mask_sets.items():
                with masked(base.model, mask_set.masks()):
                    rows[file]["perplexity"] = perplexity(base.model, text)
        if self.as_json:
            named = [{"mask": name, **figures} for name, figures in rows.items()]
            _report({"model": self.model, **how, "rows": named}, True)
        else:
            cells = [{"mask": name, **_columns(figures)} for name, figures in rows.items()]
            _table([list(cells[0]), *(list(row.values()) for row in cells)], self.markdown)
            print("\n".join(["", *how.values()] if self.markdown else how.values()))


class Inspect(Command):
    """Show what a mask file says of itself, which kernels would run masks here, or how many masks would fit.

    maskllm inspect examples/demo/masks/legal.safetensors
    maskllm inspect --capacity examples/demo/base --slots 8
    maskllm inspect --kernels
    """

    file: CliPositionalArg[Path | None] = None
    """The mask file."""
    kernels: bool = False
    """Show the kernels chosen here, and why not others. MASKLLM_BACKEND forces one of them."""

    capacity: str | None = None
    """A base, a folder or a Hugging Face name: show how many of its masks fit into this machine's memory."""
    slots: PositiveInt = 8
    """With --capacity: the server's slots."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """With --capacity: the server's --dtype; auto: what it takes on this CPU unless told."""
    mask_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """With --capacity: how slots hold kept weights."""
    head_dtype: Literal["auto", "int8"] = "auto"
    """With --capacity: the server's --head-dtype."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if sum([self.file is not None, self.kernels, self.capacity is not None]) != 1:
            raise ValueError("give a mask file, --kernels or --capacity MODEL")
        return self

    def run(self) -> None:
        from maskllm.core import maskset

        if self.kernels:
            import torch

            from maskllm.capacity import engine_threads
            from maskllm.kernels.masked_linear import chosen

            torch.set_num_threads(engine_threads())
            _report(chosen(), self.as_json)
        elif self.capacity:
            import torch

            from maskllm.capacity import measure
            from maskllm.core.base import find
            from maskllm.kernels.masked_linear import dtype_on_cpu

            folder = find(self.capacity)
            dtype = dtype_on_cpu(folder) if self.dtype == "auto" else getattr(torch, self.dtype)
            int8, int8_head = self.mask_dtype == "int8", self.head_dtype == "int8"
            fits = measure(folder, dtype, int8, int8_head=int8_head)
            most = {"most slots": fits.most_slots(), "most packed masks": fits.most_packed(self.slots)}
            _report({**most, "sum": fits.sum(self.slots, self.slots), **asdict(fits)}, self.as_json)
        elif self.file:
            _report(_description(self.file, maskset.load(self.file)), self.as_json)


class Verify(Command):
    """Check that a mask file is whole and, with --base, that it fits a base.

    maskllm verify examples/demo/masks/legal.safetensors --base examples/demo/base
    """

    file: CliPositionalArg[Path]
    """The mask file."""
    base: str | None = None
    """The base: a folder or a Hugging Face name."""

    def run(self) -> None:
        from maskllm.core import maskset
        from maskllm.core.base import find, read_base
        from maskllm.images import is_classifier, read_classifier

        try:
            mask_set = maskset.load(self.file)
            if self.base:
                base = read_classifier(self.base) if is_classifier(self.base) else read_base(find(self.base))
                maskset.verify(mask_set, base, self.file.name)
        except maskset.MaskError as error:
            if self.as_json:
                problem = {"problem": type(error).__name__, "message": str(error)}
                _report({"file": str(self.file), "ok": False, **problem}, True)
            raise
        _report({"file": str(self.file), "ok": True, "sha256": mask_set.sha256}, self.as_json)


class Diff(Command):
    """Compare two masks of one base, layer by layer: share of changed groups, and Jaccard of what is kept.

    maskllm diff examples/demo/masks/general.safetensors examples/demo/masks/legal.safetensors
    """

    a: CliPositionalArg[Path]
    """A mask file."""
    b: CliPositionalArg[Path]
    """Another."""

    def run(self) -> None:
        from maskllm.core import maskset

        differences = maskset.diff(maskset.load(self.a), maskset.load(self.b))
        if self.as_json:
            total = differences.pop("total")
            layers = {layer: asdict(difference) for layer, difference in differences.items()}
            _report({"total": asdict(total), "layers": layers}, True)
        else:
            rows = [
                (layer, f"{d.changed:.2%}", f"{d.jaccard:.4f}", str(d.groups))
                for layer, d in differences.items()
            ]
            _table([("layer", "changed", "jaccard", "groups"), *rows])


class Learn(LearnConfig, Command):
    """Learn a mask by gradient descent through Gumbel-softmax; the base stays frozen.

    maskllm learn examples/demo/base --data LICENSE --heldout README.md --prior magnitude \\
      --steps 3 --batch 1 --length 128 --out masks/mine.safetensors
    """

    model: CliPositionalArg[str]
    """The base: a folder or a Hugging Face name."""

    def run(self) -> None:
        from transformers.utils import logging

        from maskllm.learn.trainer import run

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        config = LearnConfig(**self.model_dump(include=set(LearnConfig.model_fields)))
        report = run(self.model, config)
        if _first():
            _report(asdict(report), self.as_json)


class Key(Command):
    """Make an API key for `maskllm serve --keys FILE`, and the entry that FILE, a JSON list, needs for it.

    maskllm key alice --masks legal medical --requests-per-minute 60

    The key is shown once and stored nowhere; its entry holds only a hash.
    """

    id: CliPositionalArg[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]]
    """Who the key is for: its name in logs and metrics."""
    role: Literal["use", "admin"] = "use"
    """use: ask for answers. admin: also add, replace and remove masks."""
    masks: list[str] = []
    """Masks and aliases that the key may use, "none" for the dense base; without any, all."""
    requests_per_minute: PositiveInt | None = None
    """Most requests a minute."""
    tokens_per_minute: PositiveInt | None = None
    """Most tokens a minute, of prompts and answers."""
    concurrency: PositiveInt | None = None
    """Most requests in flight at a time."""

    def run(self) -> None:
        key = f"mk-{secrets.token_urlsafe(32)}"
        options = self.model_dump(exclude={"as_json", "id"}, exclude_defaults=True)
        digest = hashlib.sha256(key.encode()).hexdigest()
        entry = {"id": self.id, "sha256": digest, "role": self.role, **options}
        if self.as_json:
            print(json.dumps({"key": key, "entry": entry}))
        else:
            print(f"key    {key}\nentry  {json.dumps(entry)}")


class Serve(BaseModel):
    """Serve a base and its masks behind an OpenAI-compatible endpoint."""


class Bench(Command):
    """How fast masked layers and swaps are on this CPU, against torch in the same run.

    maskllm bench swap --shape 768 768 --rounds 10
    """

    what: CliPositionalArg[Literal["layers", "masks", "swap"]]
    """layers: batches of several sizes, one mask. masks: 16 rows, several masks. swap: writing a slot."""
    shape: tuple[PositiveInt, PositiveInt] = (4096, 4096)
    """Outputs and inputs of the layer."""
    rounds: Annotated[int, Field(ge=2)] = 30
    """How often every contender takes its turn; a figure is the median."""
    threads: PositiveInt | None = None
    """Threads (default: torch's, a core each)."""

    def run(self) -> None:
        import torch

        from maskllm.evaluate import speed
        from maskllm.kernels import cpu

        if reason := cpu.why_not():
            raise speed.NoKernels(reason)
        torch.set_num_threads(self.threads or torch.get_num_threads())
        if self.what == "swap":
            layer = speed.Layer(self.shape)
            table = {"": speed.interleave(layer.swap(), self.rounds, layer.calls)}
        elif self.what == "masks":
            cpu.calibrate()  # as the server does at start
            table = {
                f"{masks} masks": speed.interleave(speed.many_masks(self.shape, 16, masks), self.rounds)
                for masks in speed.MASKS
            }
        else:
            layer = speed.Layer(self.shape)
            table = {
                f"{rows} rows": speed.interleave(layer.contenders(rows), self.rounds, layer.calls)
                for rows in speed.ROWS
            }
        if self.as_json:
            _report({name: {c: asdict(t) for c, t in times.items()} for name, times in table.items()}, True)
            return
        names = list(next(iter(table.values())))
        cells = [
            [name, *(f"{times[c].ms:.3f}" if c in times else "" for c in names)]
            for name, times in table.items()
        ]
        _table([[f"{self.shape[0]} x {self.shape[1]}, ms", *names], *cells])
        print(f"{cpu.using()}, {torch.get_num_threads()} threads, median of {self.rounds}")


class Cli(
    BaseSettings,
    cli_prog_name="maskllm",
    cli_kebab_case=True,
    cli_implicit_flags="toggle",
    cli_enforce_required=True,
    cli_hide_none_type=True,
    env_prefix="MASKLLM_CLI_",
    use_attribute_docstrings=True,
):
    """Learn N:M sparsity masks for a frozen language model, measure them, and serve them all at once."""

    prune: CliSubCommand[Prune]
    """make a mask in one shot: magnitude, Wanda, SparseGPT, reconstruct"""
    learn: CliSubCommand[Learn]
    """learn a mask"""
    eval: CliSubCommand[Eval]
    """measure perplexity or zero-shot accuracy, dense and under masks"""
    inspect: CliSubCommand[Inspect]
    """show what a mask file says of itself, this machine's kernels, or how many masks fit"""
    verify: CliSubCommand[Verify]
    """check a mask file, alone or against a base"""
    diff: CliSubCommand[Diff]
    """compare two masks"""
    bench: CliSubCommand[Bench]
    """measure the kernels on this machine"""
    key: CliSubCommand[Key]
    """make an API key for the server"""
    serve: CliSubCommand[Serve]
    """serve a base and its masks over HTTP"""


def _load(command: OnBase) -> "Loaded":
    """The base on its device."""
    from transformers.utils import logging

    from maskllm.models import choose_device, load_base

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return load_base(command.model, device=choose_device(command.device))


def _description(file: Path, mask_set: "MaskSet") -> dict[str, Any]:
    return {
        "file": str(file),
        "sha256": mask_set.sha256,
        "n": mask_set.n,
        "m": mask_set.m,
        "weights": mask_set.weights,
        "bits_per_weight": round(mask_set.bits_per_weight, 4),
        "base": mask_set.base,
        "provenance": mask_set.provenance,
        "scores": mask_set.scores,
        "layers": mask_set.shapes,
    }


def _first() -> bool:
    """Whether this process speaks for all that torchrun started; alone it does."""
    return os.environ.get("RANK", "0") == "0"


def _report(figures: Mapping[str, Any], as_json: bool) -> None:
    """Figures as JSON, or as a table of two columns."""
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        _table(list(_rows(figures)))


def _rows(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in figures.items():
        if key == "layers":
            yield key, str(len(value))
        elif isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + key, f"{value:.4g}" if isinstance(value, float) else text


def _columns(figures: Mapping[str, Any]) -> dict[str, str]:
    """A row of `eval` as cells: the perplexity, then `<task> acc` and `<task> acc_norm`."""
    cells = {"perplexity": f"{figures['perplexity']:.3f}"} if "perplexity" in figures else {}
    for task, accuracies in figures.get("tasks", {}).items():
        cells |= {f"{task} {name}": f"{value:.4f}" for name, value in accuracies.items()}
    return cells


def _table(rows: Sequence[Sequence[str]], markdown: bool = False) -> None:
    """Columns as wide as their widest cell; in Markdown all but the first to the right."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        print("\n".join([lines[0], f"|---|{'---:|' * (len(rows[0]) - 1)}", *lines[1:]]))
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _complain(args: Sequence[str], message: str, code: int) -> int:
    print(f"{' '.join(['maskllm', *args[:1]])}: {message}", file=sys.stderr)
    return code


def _wrong_options(error: ValidationError | SettingsError) -> str:
    """The first thing wrong with the options, as the user wrote them."""
    if isinstance(error, SettingsError):
        return str(error).removeprefix("Error: ")
    first = error.errors()[0]
    option = "--" + str(first["loc"][1]).replace("_", "-") + ": " if len(first["loc"]) > 1 else ""
    return option + first["msg"].removeprefix("Value error, ")


def _add_argument(parser: _ActionsContainer, *names: str, **options: Any) -> None:
    """Lists and pairs take their values after one flag, as in `--data a.txt b.txt`; one-letter names
    also work with two dashes; and defaults that say nothing are not shown."""
    if options.get("action") == "append":
        kind = re.findall(r"\w+", options["metavar"])[-1]
        options |= {"action": "extend", "nargs": "+", "metavar": kind}
    names = tuple(f"-{name}" if re.fullmatch(r"-\w", name) and name != "-h" else name for name in names)
    if "help" in options:
        options["help"] = re.sub(r" \(default: (null|\[\]|False)\)$", "", options["help"])
    parser.add_argument(*names, **options)


if __name__ == "__main__":
    sys.exit(main())
