"""One real server for the whole session: the demo base, its masks, and files it must refuse."""

import shutil
from collections.abc import Iterator

import pytest
from running import BASE, HOSTILE, MASKS, Server, random_mask, serving

from maskllm.core.base import Base, read_base


@pytest.fixture(scope="session")
def base() -> Base:
    return read_base(BASE)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("masks")
    for file in MASKS.glob("*.safetensors"):
        shutil.copy(file, folder)
    (folder / "broken.safetensors").write_bytes((MASKS / "legal.safetensors").read_bytes()[:100_000])
    shutil.copy(MASKS / "legal.safetensors", folder / f"{HOSTILE}.safetensors")
    random_mask(base, folder / "foreign.safetensors", seed=1, fingerprint="0" * 64)
    random_mask(base, folder / "victim.safetensors", seed=2)
    with serving(folder, tmp_path_factory.mktemp("log") / "server.log") as running:
        yield running
