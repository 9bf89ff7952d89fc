"""Fetch the masks of masks.txt (name, URL, sha256) into a folder: fetch.py MASKS_TXT FOLDER"""

import sys
from hashlib import sha256
from pathlib import Path

import fsspec

wanted, folder = map(Path, sys.argv[1:])
for line in wanted.read_text().splitlines():
    name, url, digest = line.split()
    with fsspec.open(url, "rb") as source:
        content = source.read()
    if sha256(content).hexdigest() != digest:
        sys.exit(f"{url} has sha256 {sha256(content).hexdigest()}, not {digest}")
    (folder / f"{name}.safetensors").write_bytes(content)
