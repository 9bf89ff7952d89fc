"""A server that answers on a schedule that is known, to measure what a load generator makes of it.

    python loadtests/stub.py --port 8100 --ttft-ms 50 --tpot-ms 50

It speaks as much of the API as locustfile.py and `vllm bench serve` use, and streams as many tokens as it is
asked for: the first `--ttft-ms` after the request, each of the others `--tpot-ms` after the one before. With
`--one-at-a-time` a request waits until those before it are done. After its first token, the mask `broken`
hangs up and `cut` ends the stream.
"""

import argparse
import asyncio
import json

MASKS = ("alpha", "beta", "gamma")
ANSWERS = {
    "/v1/masks": {"data": [{"id": mask, "file": f"{mask}.safetensors"} for mask in MASKS]},
    "/v1/models": {"data": [{"id": "stub", "object": "model", "max_model_len": 512}]},
    "/tokenize": {"tokens": list(range(500))},
}
"""To everything but completions; empty where there is none."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(data: object) -> bytes:
    return chunk(b"data: " + json.dumps(data).encode() + b"\n\n")


TOKEN = event({"choices": [{"index": 0, "text": " a", "delta": {"content": " a"}}]})
END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Stub:
    """The server; times in seconds."""

    def __init__(self, ttft_s: float, tpot_s: float, one_at_a_time: bool) -> None:
        self.ttft_s = ttft_s
        self.tpot_s = tpot_s
        self.turn = asyncio.Semaphore(1) if one_at_a_time else None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept alive."""
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                path = head[0].split()[1]
                if path not in ("/v1/completions", "/v1/chat/completions"):
                    answer = json.dumps(ANSWERS[path]).encode() if path in ANSWERS else b""
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer))
                elif self.turn:
                    async with self.turn:
                        await self.complete(json.loads(body), writer)
                else:
                    await self.complete(json.loads(body), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def complete(self, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        """Stream the answer. Each token has its time from the start, so that delays do not add up."""
        loop, tokens = asyncio.get_running_loop(), int(str(body["max_tokens"]))
        begin = loop.time()
        writer.write(STREAM)
        for number in range(tokens):
            wait = begin + self.ttft_s + number * self.tpot_s - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            writer.write(TOKEN)
            if body["model"] == "broken":
                writer.close()
                return
            if body["model"] == "cut":
                writer.write(END)
                return
        usage = {"prompt_tokens": 1, "completion_tokens": tokens}
        writer.write(event({"choices": [], "usage": usage}) + END)


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--ttft-ms", type=float, default=50, help="from the request to its first token")
    parser.add_argument("--tpot-ms", type=float, default=50, help="from one token to the next")
    parser.add_argument("--one-at-a-time", action="store_true", help="answer one request after another")
    args = parser.parse_args()
    stub = Stub(args.ttft_ms / 1000, args.tpot_ms / 1000, args.one_at_a_time)
    async with await asyncio.start_server(stub.serve, "127.0.0.1", args.port, backlog=4096) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
