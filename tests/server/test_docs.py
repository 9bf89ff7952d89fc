"""Every command that docs/api.md and docs/operations.md print against a server runs as printed."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from running import MASKS, Server

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["api.md", "operations.md"])
def test_commands_run_as_printed(server: Server, tmp_path: Path, page: str):
    commands = "\n".join(
        block
        for block in BLOCK.findall((DOCS / page).read_text())
        if "$URL" in block or "maskllm key" in block
    )
    shutil.copy(MASKS / "legal.safetensors", tmp_path / "tax-1.safetensors")
    shutil.copy(MASKS / "code.safetensors", tmp_path / "tax-2.safetensors")
    scripts = sysconfig.get_path("scripts")
    done = subprocess.run(
        ["bash", "-euxc", f'curl() {{ command curl --max-time 60 --fail-with-body -sS "$@"; }}\n{commands}'],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "URL": server.url,
            "ADMIN": "boss",
            "KEY": "boss",
            "PATH": f"{scripts}:{os.environ['PATH']}",
        },
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
