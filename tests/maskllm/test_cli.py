"""The `maskllm` command: what it prints is true, and what it is given wrong it says in one line."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from maskllm import cli
from maskllm.core import maskset
from maskllm.core.layers import maskable
from maskllm.core.patterns import best
from maskllm.data import load_tokens, windows
from maskllm.evaluate import protocols
from maskllm.evaluate.perplexity import perplexity
from maskllm.kernels import cpu
from maskllm.models import load_base

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as stop:  # argparse's own, for --help and unknown options
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def figures(run: Run) -> Callable[..., Any]:
    """Run a command that succeeds with --json, and read its figures."""

    def figures(*args: object) -> Any:
        code, out, err = run(*args, "--json")
        assert code == 0, err
        return json.loads(out)

    return figures


@pytest.fixture
def mask(tmp_path: Path, base_folder: Path, run: Run) -> Path:
    file = tmp_path / "masks" / "magnitude.safetensors"
    assert run("prune", base_folder, "--method", "magnitude", "--out", file)[0] == 0
    return file


def test_prune_writes_the_mask_that_its_method_makes(mask: Path, base_folder: Path) -> None:
    base = load_base(str(base_folder))
    saved = maskset.load(mask, base.base)
    for name, layer in maskable(base.model).items():
        assert torch.equal(saved.mask(name), best(layer.weight.abs()))
    assert saved.provenance == {"method": "magnitude"}


def test_the_same_seed_draws_the_same_text_and_makes_the_same_file(
    tmp_path: Path, base_folder: Path, text: Path, figures: Callable[..., Any]
) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file, seed in zip(files, [0, 0, 1], strict=True):
        draw = ("--samples", 4, "--length", 16, "--seed", seed, "--out", file)
        figures("prune", base_folder, "--method", "wanda", "--data", text, *draw)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert figures("diff", files[0], files[2])["total"]["changed"] > 0


def test_a_mask_tells_how_it_was_made_and_nothing_of_the_machine(
    tmp_path: Path, base_folder: Path, text: Path, figures: Callable[..., Any]
) -> None:
    out = tmp_path / "mask.safetensors"
    options = shlex.split("--n 4 --m 8 --samples 4 --length 16 --seed 3 --exclude *.down_proj")
    made = figures(
        "prune", base_folder, "--method", "sparsegpt", "--data", text, text.parent, *options, "--out", out
    )
    assert (made["n"], made["m"]) == (4, 8)
    assert made["provenance"] == {
        "method": "sparsegpt",
        "data": [f"{text.parent.name}/words.txt", f"{text.parent.parent.name}/{text.parent.name}"],
        "samples": 4,
        "length": 16,
        "seed": 3,
        "exclude": ["*.down_proj"],
    }
    assert str(text.parents[1]).encode() not in out.read_bytes()


def test_updated_weights_are_a_sparse_checkpoint(
    tmp_path: Path, base_folder: Path, text: Path, run: Run
) -> None:
    options = f"--method sparsegpt --samples 4 --length 16 --update-weights {tmp_path / 'sparse'}".split()
    assert run("prune", base_folder, "--data", text, *options)[0] == 0
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for layer in maskable(sparse).values():
        assert ((layer.weight != 0).view(layer.out_features, -1, 4).sum(-1) == 2).all()
    assert load_base(str(tmp_path / "sparse")).tokenizer.bos_token == "<s>"


def test_inspect_tells_what_the_file_holds(
    mask: Path, base_folder: Path, figures: Callable[..., Any]
) -> None:
    told = figures("inspect", mask)
    assert told["sha256"] == hashlib.sha256(mask.read_bytes()).hexdigest()
    assert told["base"] == load_base(str(base_folder)).base.fingerprint
    assert (told["n"], told["m"]) == (2, 4)
    # a block: q and o 16 x 16, k and v 8 x 16, gate and up 24 x 16, down 16 x 24
    assert told["weights"] == 2 * (2 * 256 + 2 * 128 + 3 * 384)
    # rows of 16 weights are 4 groups in 2 bytes, rows of 24 are 6 groups in 2 bytes
    assert told["bits_per_weight"] == round(8 * 2 * 2 * (16 + 16 + 8 + 8 + 24 + 24 + 16) / 3840, 4)
    assert told["layers"]["model.layers.1.mlp.down_proj"] == [16, 24]
    assert len(told["layers"]) == 14


def test_eval_measures_dense_and_each_mask_under_a_protocol(
    mask: Path, base_folder: Path, text: Path, run: Run, figures: Callable[..., Any]
) -> None:
    base = load_base(str(base_folder))
    stretch = windows(load_tokens(base.tokenizer, [str(text)]), 32)
    dense = perplexity(base.model, stretch)
    for name, layer in maskable(base.model).items():
        layer.weight.masked_fill_(~maskset.load(mask).mask(name), 0)
    sparse = perplexity(base.model, stretch)

    command = ("eval", base_folder, "--data", text, "--protocol", "windows:32", "--mask", mask)
    told = figures(*command)
    assert [row["mask"] for row in told["rows"]] == ["dense", str(mask)]
    assert [row["perplexity"] for row in told["rows"]] == pytest.approx([dense, sparse])
    # forty documents of one <s> and fifty words: 2040 tokens
    assert "63 windows of 32" in told["protocol"]

    _, out, _ = run(*command)
    assert [line.split() for line in out.splitlines()[:3]] == [
        ["mask", "perplexity"],
        ["dense", f"{dense:.3f}"],
        [str(mask), f"{sparse:.3f}"],
    ]
    assert out.splitlines()[3] == told["protocol"]


def test_several_files_follow_one_flag_or_each_have_their_own(
    base_folder: Path, text: Path, figures: Callable[..., Any]
) -> None:
    twice = figures("eval", base_folder, "--protocol", "windows:32", "--data", text, text)
    assert "127 windows" in twice["protocol"]
    again = figures("eval", base_folder, "--protocol", "windows:32", "--data", text, "--data", text)
    assert again == twice


def test_eval_follows_the_protocol_it_is_given(
    base_folder: Path, text: Path, figures: Callable[..., Any]
) -> None:
    base = load_base(str(base_folder))
    told = figures("eval", base_folder, "--data", text, "--protocol", "wikitext2-32")
    measured = protocols.read("wikitext2-32", base, [str(text)])
    assert told["protocol"] == measured.protocol
    assert told["rows"] == [{"mask": "dense", "perplexity": perplexity(base.model, measured.windows)}]
    assert "windows:512" in figures("eval", base_folder, "--data", text)["protocol"]


def test_columns_of_json_lines_are_the_text(
    tmp_path: Path, base_folder: Path, run: Run, figures: Callable[..., Any]
) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"question": "the cat sees", "answer": "a dog ."}\n' * 9)
    measure = ("eval", base_folder, "--data", lines, "--protocol", "windows:6")
    # a <s> and six words, nine times: 63 tokens, of which one is no target
    assert "10 windows of 6" in figures(*measure, "--columns", "question", "answer")["protocol"]
    code, _, err = run(*measure)
    assert code == 1
    assert "a.jsonl, line 1 has no text in field `text`; its fields: question, answer" in err
    out = tmp_path / "mask.safetensors"
    calibrate = ("--data", lines, "--samples", 2, "--length", 6, "--out", out)
    assert figures("prune", base_folder, *calibrate, "--columns", "answer")["provenance"]["length"] == 6
    assert run("prune", base_folder, *calibrate)[0] == 1


def test_eval_adds_accuracies_and_prints_them_as_text_markdown_or_json(
    mask: Path,
    tmp_path: Path,
    base_folder: Path,
    text: Path,
    run: Run,
    figures: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"ctx": f"the {word}", "choices": ["sees a dog", "likes"], "label": 0} for word in ("cat", "sun")]
    (tmp_path / "piqa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = ("eval", base_folder, "--mask", mask, "--tasks", "local_piqa", "--tasks-data", tmp_path)
    told = figures(*tasks, "--data", text, "--protocol", "windows:32")
    dense, sparse = told["rows"]
    assert sparse["mask"] == str(mask)
    assert set(dense["tasks"]["local_piqa"]) == {"acc", "acc_norm"}
    assert "items: local_piqa 2" in told["tasks_protocol"]
    assert set(figures(*tasks, "--limit", 1)["rows"][0]) == {"mask", "tasks"}  # no text, no perplexity

    cells = [
        (row["mask"], f"{row['perplexity']:.3f}", *(f"{x:.4f}" for x in row["tasks"]["local_piqa"].values()))
        for row in told["rows"]
    ]
    _, out, _ = run(*tasks, "--data", text, "--protocol", "windows:32", "--markdown")
    assert out.splitlines() == [
        "| mask | perplexity | local_piqa acc | local_piqa acc_norm |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
        told["protocol"],
        told["tasks_protocol"],
    ]
    _, out, _ = run(*tasks, "--data", text, "--protocol", "windows:32")
    assert [tuple(line.split()) for line in out.splitlines()[1:3]] == cells
    assert out.splitlines()[3:] == [told["protocol"], told["tasks_protocol"]]


def test_diff_finds_nothing_between_a_mask_and_itself(
    mask: Path, run: Run, figures: Callable[..., Any]
) -> None:
    told = figures("diff", mask, mask)
    assert told["total"] == {"changed": 0, "jaccard": 1, "groups": 3840 // 4}
    assert len(told["layers"]) == 14
    last = run("diff", mask, mask)[1].splitlines()[-1]
    assert last.split() == ["total", "0.00%", "1.0000", "960"]


def test_verify_knows_a_whole_mask_of_this_base_from_any_other(
    mask: Path, tmp_path: Path, base_folder: Path, run: Run
) -> None:
    code, out, _ = run("verify", mask, "--base", base_folder, "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)

    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.norm.weight.data += 1
    model.save_pretrained(other)
    code, out, err = run("verify", mask, "--base", other, "--json")
    assert (code, json.loads(out)["problem"]) == (1, "WrongBase")
    assert "was made for base" in err

    mask.write_bytes(mask.read_bytes()[:-1])
    code, out, err = run("verify", mask)
    assert (code, out, len(err.splitlines())) == (1, "", 1)


def test_wrong_input_is_one_clear_line_and_exit_code_1(
    tmp_path: Path, base_folder: Path, text: Path, run: Run
) -> None:
    out = tmp_path / "out.safetensors"
    prune = ("prune", base_folder, "--out", out, "--data", text)
    for command, message in [
        (("inspect", tmp_path / "nope"), "No such file"),
        (("inspect", tmp_path), "Is a directory"),
        (("inspect", text), "is not a mask file"),
        (("eval", tmp_path, "--data", text), "no model.safetensors in"),
        (("learn", tmp_path, "--data", text, "--heldout", text, "--out", out), "no model.safetensors in"),
        (("eval", base_folder, "--data", tmp_path / "nope.txt"), "no such text"),
        (("eval", base_folder, "--data", f"hf:{tmp_path}/nope"), "cannot be read"),
        (
            ("eval", base_folder, "--data", text, "--protocol", "windows:513"),
            "longer than the base's context: --protocol windows:512",
        ),
        ((*prune, "--length", 513), "longer than the base's context: --length 512"),
        (("eval", base_folder, "--data", text, "--protocol", "wikitext2-1"), "no protocol 'wikitext2-1'"),
        (("eval", base_folder, "--tasks", "local_piqa"), "local_piqa needs the folder of piqa_val.jsonl"),
        (("eval", base_folder, "--data", text, "--mask", text), "is not a mask file"),
        ((*prune, "--n", 4), "no pattern 4:4"),
        ((*prune, "--m", 5), "no multiple of 5"),
        ((*prune, "--include", "*.nope"), "matches no layer"),
    ]:
        code, printed, err = run(*command)
        assert (code, printed, len(err.splitlines())) == (1, "", 1), err
        assert message in err
        assert err.startswith(f"maskllm {command[0]}: ")
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a missing GPU is only met where there is none")
def test_a_gpu_that_is_not_there_is_said_so(base_folder: Path, text: Path, run: Run) -> None:
    code, _, err = run("eval", base_folder, "--data", text, "--device", "cuda:1")
    assert (code, err) == (1, "maskllm eval: there is no cuda:1 here: leave --device out, or say cpu\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "subcommand is required"),
        ("shrink", "invalid choice: 'shrink'"),
        ("prune base --out a --data b --colour red", "unrecognized arguments: --colour"),
        ("prune base --out a --data b --method best", "--method: Input should be 'magnitude'"),
        ("prune base --out a --data b --samples 0", "--samples: Input should be greater than 0"),
        ("prune base --data b", "give either --out FILE or --update-weights FOLDER"),
        ("prune base --out a", "--method wanda needs --data"),
        (
            "prune base --data b --update-weights c",
            "--update-weights goes with --method sparsegpt, not wanda",
        ),
        ("eval base", "--data is missing"),
        ("eval base --data b --length 32", "unrecognized arguments: --length"),
        ("eval base --data b --protocol c4", "--protocol: String should match pattern"),
        ("eval base --tasks c --protocol windows:32", "--protocol windows:32 needs --data"),
        ("eval base --data b --limit 3", "--tasks-data and --limit go with --tasks"),
        ("eval base --data b --json --markdown", "give either --json or --markdown"),
        ("eval base --data b --device tpu", "--device: String should match"),
        (
            "learn base --data b --heldout c --out d --distill 2",
            "--distill: Input should be less than or equal",
        ),
        (
            "learn base --data b --heldout c --out d --parameterisation best",
            "--parameterisation: Input should",
        ),
        (
            "learn base --data b --heldout c --out d --optimizer adamw8bit --parallel fsdp",
            "--optimizer adamw8bit goes with --parallel ddp only",
        ),
        ("verify", "the following arguments are required: FILE"),
        ("inspect", "give a mask file, --kernels or --capacity MODEL"),
        ("inspect mask.safetensors --kernels", "give a mask file, --kernels or --capacity MODEL"),
        ("bench swap --rounds 1", "--rounds: Input should be greater than or equal to 2"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(command: str, message: str, run: Run) -> None:
    code, out, err = run(*command.split())
    assert (code, out) == (2, "")
    assert message in err


COMMANDS: dict[str, type[BaseModel]] = {
    "prune": cli.Prune,
    "learn": cli.Learn,
    "eval": cli.Eval,
    "inspect": cli.Inspect,
    "verify": cli.Verify,
    "diff": cli.Diff,
    "key": cli.Key,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_in_the_help_run_as_printed(
    name: str,
    run: Run,
    tmp_path: Path,
    base_folder: Path,
    text: Path,
    mask: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(base_folder, tmp_path / "examples/demo/base")
    for known in "general", "legal":
        (tmp_path / "examples/demo/masks").mkdir(exist_ok=True)
        shutil.copy(mask, tmp_path / f"examples/demo/masks/{known}.safetensors")
    for file in "README.md", "LICENSE":
        shutil.copy(text, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASKLLM_BACKEND", "reference")  # or `inspect --kernels` measures, and costs stay so
    code, help_, _ = run(name, "--help")
    assert code == 0
    examples = re.findall(rf"maskllm ({name} (?:\w|--)(?:.*\\\n)*.*)", help_)
    assert len(examples) == (3 if name == "inspect" else 1)
    for example in examples:
        code, out, err = run(*shlex.split(example.replace("\\\n", "")), "--json")
        assert code == 0, err
        assert json.loads(out)


def test_inspect_says_with_which_kernels_masks_would_run_and_why(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKLLM_BACKEND", "reference")
    code, out, _ = run("inspect", "--kernels", "--json")
    assert code == 0
    assert json.loads(out)["cpu"] == "reference: MASKLLM_BACKEND=reference"
    monkeypatch.setenv("MASKLLM_BACKEND", "abacus")
    code, _, err = run("inspect", "--kernels")
    assert code == 1
    assert "MASKLLM_BACKEND=abacus is not on this machine, which has reference" in err


def test_inspect_says_what_a_processor_lacks_for_the_kernels_that_it_cannot_run(
    run: Run, figures: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "fpu avx2 fma avx512bw avx512dq avx512vl avx512_vbmi2"
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu, "available", lambda: ["avx2", "portable"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MASKLLM_BACKEND", "reference")
    assert figures("inspect", "--kernels")["cpu could not use"] == (
        "avx512-bf16: this processor has no avx512_bf16, avx512_vnni; "
        "avx512: this processor has no avx512_vnni"
    )
    monkeypatch.setenv("MASKLLM_BACKEND", "avx512")
    code, _, err = run("inspect", "--kernels")
    assert code == 1
    assert "MASKLLM_BACKEND=avx512 is not on this machine, which has reference, avx2, portable: " in err
    assert err.endswith(": this processor has no avx512_vnni\n")


@pytest.mark.skipif(not cpu.available(), reason=str(cpu.why_not()))
def test_bench_measures_every_contender_and_prints_milliseconds(run: Run) -> None:
    code, out, err = run("bench", "swap", "--shape", "256", "512", "--rounds", "3", "--json")
    assert code == 0, err
    times = json.loads(out)[""]
    assert list(times) == ["memcpy of the dense weight", "swap bf16", "swap int8"]
    assert all(0 < time["low"] <= time["ms"] <= time["high"] for time in times.values())


def test_help_is_quick_because_torch_is_not_imported() -> None:
    script = """if True:
        import sys
        from maskllm.cli import main
        try:
            main(["--help"])
        finally:
            print("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for command in [*COMMANDS, "serve"]:
        assert command in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_serve_hands_every_argument_to_the_server(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server/__init__.py").touch()
    (tmp_path / "server/__main__.py").write_text("import sys; print(sys.argv[1:])")
    command = [sys.executable, "-m", "maskllm.cli", "serve", "--port", "9000", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "['--port', '9000', '--help']\n"
