import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp

from server.settings import Settings


def parse(*args: str) -> Settings:
    return CliApp.run(Settings, cli_args=list(args))


def test_options_of_vllm_pass_through_unchanged(tmp_path):
    settings = parse("--model", "some/base", "--masks", str(tmp_path), "--max-model-len", "64", "--port=9000")
    assert settings.engine == ["--max-model-len", "64"]
    assert settings.port == 9000


def test_the_base_is_named_after_its_folder_unless_told_otherwise(tmp_path):
    assert parse("--model", "some/base", "--masks", str(tmp_path)).name == "base"
    assert parse("--model", "some/base", "--masks", str(tmp_path), "--name", "llama").name == "llama"


def test_a_server_listens_to_its_own_machine_unless_told_otherwise(tmp_path):
    assert parse("--model", "some/base", "--masks", str(tmp_path)).host == "127.0.0.1"


def test_every_option_can_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKLLM_MODEL", "some/base")
    monkeypatch.setenv("MASKLLM_MASKS", str(tmp_path))
    monkeypatch.setenv("MASKLLM_SLOTS", "3")
    assert (parse().model, parse().slots) == ("some/base", 3)
    assert parse("--slots", "5").slots == 5


def test_requests_are_read_strictly_unless_told_otherwise(tmp_path):
    needed = ["--model", "some/base", "--masks", str(tmp_path)]
    assert (parse(*needed).lenient, parse(*needed, "--lenient").lenient) == (False, True)


@pytest.mark.parametrize("option", ["--enable-lora", "--lora-modules=a=b", "--max-loras"])
def test_lora_options_are_refused_in_so_many_words(tmp_path, option):
    with pytest.raises(ValidationError, match="LoRA adapters and masks cannot be used together yet"):
        parse("--model", "base", "--masks", str(tmp_path), option)


def test_a_value_that_has_lora_in_it_is_nobodys_business(tmp_path):
    settings = parse("--model", "base", "--masks", str(tmp_path), "--api-key", "floral7")
    assert settings.engine == ["--api-key", "floral7"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--served-model-name", "prod"],
            "--served-model-name ['prod'] does not work with masks yet: use --name",
        ),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2 does not work with masks yet"),
        (["--distributed-executor-backend", "ray"], "vLLM has none on cpu: leave the option out"),
        (["--api-key", "secret"], "make a key with `maskllm key ID`, and use --keys FILE"),
        (["--keys", "gone.json"], "--keys gone.json: No such file or directory"),
    ],
)
def test_options_that_masks_cannot_keep_are_refused(tmp_path, options, message):
    base = Path(__file__).parents[2] / "examples/demo/base"
    command = [sys.executable, "-m", "server", "--model", str(base), "--masks", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_model_that_cannot_be_compiled_is_not_compiled_by_force(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    base = Path(__file__).parents[2] / "examples/demo/base"
    command = [sys.executable, "-m", "server", "--model", str(base), "--masks", str(tmp_path)]
    done = subprocess.run([*command, "--no-enforce-eager"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--enforce-eager False does not work with masks yet: leave the option out" in done.stderr


def test_what_is_missing_is_named():
    done = subprocess.run([sys.executable, "-m", "server"], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-2:] == [
        "maskllm serve: --model: Field required",
        "maskllm serve: --masks: Field required",
    ]


def test_a_masks_folder_that_is_not_there_is_refused_before_anything_starts(tmp_path):
    command = [sys.executable, "-m", "server", "--model", "base", "--masks", str(tmp_path / "gone")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("gone is not a folder")
    assert "Traceback" not in done.stderr
