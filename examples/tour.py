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
    admin, entry = new_key()
    (masks / "keys.json").write_text(json.dumps([entry]))
    command = f"maskllm serve --model {base} --masks {masks} --keys {masks}/keys.json --port {port}"
    print(f"\n$ {command} &   (its log: {masks}/log)")
    with (masks / "log").open("w") as log:
        server = subprocess.Popen(python(command), stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait(url, server, masks / "log")
        for name in ("none", "legal", "medical"):
            ask(
                f"{url}/v1/completions?mask={name}",
                "POST",
                admin,
                prompt="The Secretary",
                max_tokens=24,
                seed=0,
            )
        (masks / "mine.later").rename(masks / "mine.safetensors")
        ask(f"{url}/v1/masks/mine", "PUT", admin)
        ask(f"{url}/v1/completions?mask=mine", "POST", admin, prompt="The Secretary", max_tokens=24, seed=0)
        ask(f"{url}/v1/masks/mine", "DELETE", admin)
        ask(f"{url}/v1/completions?mask=mine", "POST", admin, prompt="The Secretary", max_tokens=24)
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


def new_key() -> tuple[str, dict[str, Any]]:
    """An API key that may change masks, and its entry for the server."""
    command = "maskllm key tour --role admin --json"
    print(f"\n$ {command}", flush=True)
    made = json.loads(subprocess.run(python(command), check=True, capture_output=True).stdout)
    return made["key"], made["entry"]


def ask(url: str, method: str, key: str, **body: Any) -> None:
    """Send one request, and print it as curl and its answer in short."""
    data = json.dumps(body).encode() if body else None
    said = f" -H 'Authorization: Bearer {key}'" + (f" -d '{data.decode()}'" if data else "")
    print(f"\n$ curl -X {method} '{url}'{said}")
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, data, headers, method=method)
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
