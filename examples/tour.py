"""The whole product in one go, on the demo base: make tour

Prune, learn a few steps, inspect, evaluate, serve, ask, swap, stop. Each step prints the command that
you would type. Masks made here are poor, as their text is this repository's README and licence.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

DEMO = "examples/demo"


def main() -> None:
    os.chdir(Path(__file__).parents[1])
    masks = Path(tempfile.mkdtemp(prefix="maskllm-tour-"))
    try:
        tour(masks)
    finally:
        shutil.rmtree(masks)


def tour(masks: Path) -> None:
    for name in ("legal", "medical"):
        shutil.copy(f"{DEMO}/masks/{name}.safetensors", masks)

    text, base = "--data README.md", f"{DEMO}/base"
    maskllm(f"prune {base} --method wanda {text} --length 128 --samples 16 --out {masks}/wanda.safetensors")
    maskllm(
        f"learn {base} --data LICENSE --heldout README.md --prior {masks}/wanda.safetensors "
        f"--steps 5 --batch 4 --micro-batch 4 --length 128 --lr 2e-3 --out {masks}/mine.safetensors"
    )
    maskllm(f"inspect {masks}/mine.safetensors")
    maskllm(f"diff {masks}/wanda.safetensors {masks}/mine.safetensors")
    maskllm(f"eval {base} {text} --mask {masks}/wanda.safetensors --mask {masks}/mine.safetensors")
    (masks / "mine.safetensors").rename(masks / "mine.later")  # so that the server starts without it

    port = free_port()
    command = f"maskllm serve --model {base} --masks {masks} --host 127.0.0.1 --port {port}"
    print(f"\n$ {command} &   (its log: {masks}/log)")
    with (masks / "log").open("w") as log:
        server = subprocess.Popen(python(command), stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait(url, server, masks / "log")
        for name in ("none", "legal", "medical"):
            ask(f"{url}/v1/completions?mask={name}", "POST", prompt="The Secretary", max_tokens=24, seed=0)
        (masks / "mine.later").rename(masks / "mine.safetensors")
        ask(f"{url}/v1/masks/mine", "PUT")
        ask(f"{url}/v1/completions?mask=mine", "POST", prompt="The Secretary", max_tokens=24, seed=0)
        ask(f"{url}/v1/masks/mine", "DELETE")
        ask(f"{url}/v1/completions?mask=mine", "POST", prompt="The Secretary", max_tokens=24)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    print("\nstopped; that was the tour")


def maskllm(arguments: str) -> None:
    print(f"\n$ maskllm {arguments}", flush=True)
    subprocess.run(python(f"maskllm {arguments}"), check=True)


def python(command: str) -> list[str]:
    """A `maskllm` command line for this interpreter."""
    return [sys.executable, "-m", "maskllm.cli", *shlex.split(command)[1:]]


def ask(url: str, method: str, **body: Any) -> None:
    """Send one request, and print it as curl and its answer in short."""
    data = json.dumps(body).encode() if body else None
    print(f"\n$ curl -X {method} '{url}'" + (f" -d '{data.decode()}'" if data else ""))
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, headers, content = answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        status, headers, content = error.code, error.headers, error.read()
    reply = json.loads(content) if content else {}
    said = reply["choices"][0]["text"] if "choices" in reply else reply.get("error", {}).get("message", "")
    print(status, headers.get("X-Mask", ""), repr(said or reply.get("id", "")))


def wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server is healthy; its log is the reason where it never is."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    sys.exit(log.read_text()[-3000:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
