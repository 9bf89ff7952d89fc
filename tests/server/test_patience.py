"""What no client can do to the server: make it wait for ever."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvicorn

from server.bounds import SLOWEST, BoundedHttp

PATIENCE_S = 0.3
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


class Hasty(BoundedHttp):
    patience_s = PATIENCE_S


async def echo(scope, receive, send) -> None:
    """Answers once the body is here; GET gets more than any buffer takes."""
    assert scope["type"] == "http"
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] == "http.disconnect":
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    for _ in range(1 if scope["method"] == "POST" else 500):
        await send({"type": "http.response.body", "body": b"a" * 100_000, "more_body": True})
    await send({"type": "http.response.body"})


@asynccontextmanager
async def listening() -> AsyncIterator[Callable]:
    config = uvicorn.Config(echo, http=Hasty, port=0, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield lambda: asyncio.open_connection("127.0.0.1", port, limit=1000)
    await server.shutdown()


def seconds_until_closed(*parts: bytes, pause_s: float = 0.0) -> tuple[float, bytes]:
    """Send the parts, and wait for the server to close the connection; how long it took, and its answer."""

    async def talk() -> tuple[float, bytes]:
        async with listening() as connect:
            reader, writer = await connect()
            begin = time.monotonic()
            for part in parts:
                if reader.at_eof():
                    break
                writer.write(part)
                await asyncio.sleep(pause_s)
            answer = await asyncio.wait_for(reader.read(), 10)
            took = time.monotonic() - begin
            writer.close()
            return took, answer[:12]

    return asyncio.run(talk())


def test_a_client_that_sends_nothing_or_half_a_request_is_hung_up_on():
    for parts in ((), (b"POST / HTT",), (HEAD[:-2],), (HEAD,), (HEAD, b"ab")):
        took, answer = seconds_until_closed(*parts)
        assert answer == b""
        assert PATIENCE_S <= took < 3 * PATIENCE_S


def test_headers_that_trickle_in_get_no_more_time():
    took, answer = seconds_until_closed(*(bytes([byte]) for byte in HEAD[:-2]), pause_s=PATIENCE_S / 5)
    assert answer == b""
    assert took < 12 * PATIENCE_S


def test_a_body_that_comes_slowly_is_waited_for_and_one_that_trickles_in_is_not():
    pause_s, pieces = PATIENCE_S / 2, 12
    for size, said in ((int(1.5 * SLOWEST * pause_s), b"HTTP/1.1 200"), (int(0.5 * SLOWEST * pause_s), b"")):
        head = HEAD.replace(b"Length: 4", b"Length: %d" % (pieces * size))
        took, answer = seconds_until_closed(head, *[b"a" * size] * pieces, pause_s=pause_s)
        assert answer == said
        # half as fast as it may be: the time that each byte gives is half of what it takes
        assert took < 3 * PATIENCE_S if not said else took > pieces * pause_s


def test_a_client_that_does_not_read_its_answer_is_cut_off_and_one_that_reads_slowly_is_not():
    async def read(pause_s: float) -> int:
        async with listening() as connect:
            reader, writer = await connect()
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            got, nap = 0, pause_s
            try:
                while chunk := await asyncio.wait_for(reader.read(5_000_000), 10):
                    got += len(chunk)
                    await asyncio.sleep(nap)
                    nap = 0 if got > 1_000_000 else nap
            except ConnectionResetError:
                pass
            writer.close()
            return got

    assert asyncio.run(read(pause_s=10 * PATIENCE_S)) < 50_000_000
    assert asyncio.run(read(pause_s=PATIENCE_S / 10)) > 50_000_000
