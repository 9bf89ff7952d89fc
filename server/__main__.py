"""`maskllm serve`: read the settings, start the engine, find the masks, answer."""

import logging
import sys

import uvloop
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import CliApp

from maskllm.core.base import BadBase, find, read_base
from server.app import create_app
from server.engine.client import BadOptions, start
from server.engine.plugin import WrongVLLM
from server.masks import Masks
from server.metrics import Metrics
from server.names import BadState
from server.settings import Settings

logger = logging.getLogger("maskllm")


async def run(settings: Settings) -> None:
    """Serve until told to stop."""
    folder = find(settings.model)
    base, metrics = read_base(folder), Metrics()
    with start(settings, folder, metrics) as (engine, sock):
        limit = settings.packed or engine.capacity.most_packed(settings.slots)
        masks = Masks(settings.masks, settings.name, base, engine, settings.slots, limit)
        masks.scan()
        logger.info("memory: %s", engine.capacity.sum(settings.slots, limit))
        await create_app(engine, masks, metrics, lenient=settings.lenient)
        await masks.restore()
        await engine.serve(sock, masks.restore, settings.grace_s)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = CliApp.run(Settings)
    except ValidationError as error:
        sys.exit("\n".join(map(_explain, error.errors())))
    try:
        uvloop.run(run(settings))
    except (BadBase, BadOptions, BadState, WrongVLLM, OSError) as error:
        sys.exit(f"maskllm serve: {error}")


def _explain(error: ErrorDetails) -> str:
    """What is wrong with which option."""
    option = f"--{error['loc'][0]}: ".replace("_", "-") if error["loc"] else ""
    return f"maskllm serve: {option}{error['msg'].removeprefix('Value error, ')}"


if __name__ == "__main__":
    main()
