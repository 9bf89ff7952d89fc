"""`maskllm serve`: read the settings, start the engine, find the masks, answer."""

import logging
import signal
import socket
import sys
from contextlib import nullcontext
from dataclasses import replace

import uvloop
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import CliApp

from maskllm.capacity import memory
from maskllm.core.base import BadBase, find, read_base
from server import logs
from server.access import Access, BadKeys, read_keys
from server.app import create_app, monitor
from server.engine.client import BadOptions, start
from server.engine.plugin import WrongVLLM
from server.masks import Masks
from server.metrics import Metrics
from server.names import BadState
from server.settings import Settings

logger = logging.getLogger("maskllm")


async def run(settings: Settings) -> None:
    """Serve until told to stop."""
    keys = read_keys(settings.keys) if settings.keys else []
    folder = find(settings.model)
    base, metrics = read_base(folder), Metrics()
    logs.write_to(settings.log_requests)
    # Bound before the engine starts, as the other port is.
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    door = (settings.host, settings.metrics_port)
    both = settings.host == "::" and socket.has_dualstack_ipv6()  # as vLLM's own port is
    aside = socket.create_server(door, family=family, dualstack_ipv6=both) if settings.metrics_port else None
    with aside or nullcontext(), start(settings, folder, metrics) as (engine, sock):
        slots, capacity = settings.slots, engine.capacity
        room = settings.packed * capacity.packed if settings.packed else capacity.room(slots)
        masks = Masks(settings.masks, settings.name, base, engine, slots, room, capacity.packed, metrics)
        masks.scan()
        packed = min(masks.limit, len(masks.known))
        held = replace(capacity, packed=masks.place)
        logger.info("memory: %s", memory(held, engine.gpu, slots, packed))
        access = Access(keys, settings.max_waiting or 2 * engine.batch)
        app = await create_app(engine, masks, metrics, access, settings)
        await masks.restore()
        doors = [(app, sock)]
        if aside:
            doors.append((monitor(engine, metrics), aside))
        await engine.serve(doors, masks, settings.grace_s)


def main() -> None:
    # Until the doors are open: as process 1 of a container Python would ignore it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = CliApp.run(Settings)
    except ValidationError as error:
        sys.exit("\n".join(map(_explain, error.errors())))
    try:
        uvloop.run(run(settings))
    except (BadBase, BadKeys, BadOptions, BadState, WrongVLLM, OSError) as error:
        sys.exit(f"maskllm serve: {error}")


def _explain(error: ErrorDetails) -> str:
    """What is wrong with which option."""
    option = f"--{error['loc'][0]}: ".replace("_", "-") if error["loc"] else ""
    return f"maskllm serve: {option}{error['msg'].removeprefix('Value error, ')}"


if __name__ == "__main__":
    main()
