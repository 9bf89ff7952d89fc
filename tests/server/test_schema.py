r"""The OpenAPI schema is true, and no input it allows or forbids is a 5xx: schemathesis with every check.

A few examples of each operation run with the other tests, ten thousand by `make chaos ARGS=fuzz-api`. For a
server of your own:

    schemathesis --config-file tests/server/schemathesis.toml run http://localhost:8000/openapi.json \
        -n 1000 -H "Authorization: Bearer KEY"
"""

import subprocess
import sysconfig
from pathlib import Path

import httpx
from running import Server

CONFIG = Path(__file__).with_name("schemathesis.toml")
SCHEMATHESIS = Path(sysconfig.get_path("scripts")) / "schemathesis"


def test_no_input_makes_the_server_fail_or_its_schema_lie(server: Server, tmp_path: Path):
    options = ["--config-file", CONFIG, "run", f"{server.url}/openapi.json", "--no-color"]
    bounds = [
        "--max-examples",
        "10",
        "--seed",
        "1",
        "--generation-database",
        "none",
        "--request-timeout",
        "120",
        "--header",
        "Authorization: Bearer boss",
    ]
    done = subprocess.run(
        [str(word) for word in [SCHEMATHESIS, *options, *bounds]],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def test_the_schema_names_both_places_of_a_mask_beside_the_body(server: Server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        parameters = paths[path]["post"]["parameters"]
        assert {(each["name"], each["in"]) for each in parameters} == {
            ("mask", "query"),
            ("X-Mask", "header"),
        }
