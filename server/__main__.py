"""`maskllm serve`: read the settings, start the engine, find the masks, answer."""

import logging
import sys
from pathlib import Path

import uvloop
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from pydantic_settings import CliApp

from maskllm.core.base import BadBase, read_base
from server.app import create_app
from server.engine.client import BadOptions, start
from server.engine.plugin import WrongVLLM
from server.masks import Masks
from server.metrics import Metrics
from server.settings import Settings


async def run(settings: Settings) -> None:
    """Serve until told to stop."""
    folder = Path(settings.model)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(settings.model, allow_patterns=["*.json", "*.safetensors", "*.model"])
        )
    base, metrics = read_base(folder), Metrics()
    async with start(settings, folder, metrics) as (engine, sock):
        masks = Masks(settings.masks, settings.name, base, engine)
        masks.scan()
        await engine.serve(await create_app(engine, masks, metrics), sock)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = CliApp.run(Settings)
    except ValidationError as error:
        sys.exit("\n".join(e["msg"].removeprefix("Value error, ") for e in error.errors()))
    try:
        uvloop.run(run(settings))
    except (BadBase, BadOptions, WrongVLLM, OSError) as error:
        sys.exit(f"maskllm serve: {error}")


if __name__ == "__main__":
    main()
