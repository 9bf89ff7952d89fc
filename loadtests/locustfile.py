"""Users of a mask server, for locust: who asks for which masks, and when.

    locust --headless -f loadtests/locustfile.py -H http://localhost:8000 -u 1 -t 9s --rate 5 --out runs Zipf

A *user* is a source of requests, and its class says under which masks: OneMask, Uniform, Zipf, AllDistinct,
Chat (uniform, chat completions) and Swapper, which publishes a mask again and again and asks for it. Name the
classes that a run shall have; all are streamed. Sources do not wait for answers: they draw the times of their
requests beforehand (`--arrivals poisson`, the default: `--rate` a second, each source) or take them from a
trace of real ones (`--arrivals trace --trace FILE`, each source all of it), and a request's latency counts
from the time at which it was to be sent. With `--arrivals closed` each user asks as soon as it is answered.

Every request is a line of OUT/requests.jsonl, from which loadreport.py reckons. Locust's own page shows TTFT
in milliseconds and TPOT in microseconds, since locust rounds to two digits. Options are also taken from the
environment (LOAD_RATE=5). It needs no more than locust, numpy and this folder, and runs in one process.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from itertools import count, cycle, repeat
from pathlib import Path
from typing import Any, cast

import gevent
import numpy as np
import traffic
from gevent.pool import Group
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopTest
from traffic import Arrival, Request

logger = logging.getLogger("loadtests")

TIMEOUT_S = 120
"""How long an answer may be silent, and how long a stopped run waits for answers under way."""
CONNECTIONS = 10_000
"""More than there are ever requests in flight: with fewer, requests would wait for each other in here."""
TEMPLATE_TOKENS = 32
"""What a chat template may add to a prompt."""
TEXT = """
The Secretary of the Treasury shall prescribe such regulations as may be necessary to carry out the purposes
of this section. Once upon a time there was a little girl who loved to play outside in the park with her dog.
If you have any of these symptoms you should call your doctor, who will ask about your medical history and
order tests of your blood. def read(path): return open(path).read() # the file is closed later. It was a dark
evening in the old house, and nobody spoke until the carriage had gone down the long road to the village,
where two lights still burned in the inn.
"""
"""Prompts are made of its tokens, or for chats of its words, in random order, so that no two begin alike."""


@events.init_command_line_parser.add_listener
def options(parser: LocustArgumentParser) -> None:
    def add(name: str, **about: Any) -> None:
        parser.add_argument(f"--{name}", env_var=f"LOAD_{name.upper().replace('-', '_')}", **about)

    add("masks", default="", help="masks, by commas, most wanted first; without, all that the server lists")
    add("key", default="", is_secret=True, help="API key; Swapper needs an admin's")
    add("arrivals", default="poisson", choices=["poisson", "trace", "closed"], help="when requests are sent")
    add("rate", type=float, default=1.0, help="requests a second of each user (poisson)")
    add("trace", default="", help="CSV file of Azure's LLM inference traces (trace)")
    add("trace-speed", type=float, default=1.0, help="how many times as fast the trace is played")
    add("prompt-tokens", type=int, default=64, help="of each request, if no trace says it")
    add("output-tokens", type=int, default=32, help="of each request, if no trace says it")
    add("zipf", type=float, default=1.0, help="Zipf's exponent")
    add("swap-every", type=float, default=5.0, help="seconds between two publishes of Swapper")
    add("swap-name", default="loadtest", help="the mask that Swapper publishes, and deletes in the end")
    add("seed", type=int, default=0, help="of everything that is random")
    add("out", default="", help="folder for what loadreport.py reads; without, nothing is written")


class Run:
    """What the users of a run share: the server, what it has, and the record."""

    def __init__(self, environment: Environment) -> None:
        """Raises OSError, HTTPParseError, KeyError or ValueError where there is no run to be had."""
        self.environment = environment
        self.options = cast(Any, environment.parsed_options)
        self.trace = Path(self.options.trace)
        if self.options.arrivals == "trace" and not self.trace.is_file():
            raise ValueError(
                f"--arrivals trace needs --trace FILE, and there is no file {self.options.trace!r}"
            )
        self.client = HTTPClient.from_url(
            str(environment.host),
            concurrency=CONNECTIONS,
            network_timeout=TIMEOUT_S,
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self.options.key}"} if self.options.key else {}),
        )
        listed = {mask["id"]: mask["file"] for mask in self.read("/v1/masks")["data"]}
        listed.pop(self.options.swap_name, None)
        self.files = list(listed.values())
        self.masks = self.options.masks.split(",") if self.options.masks else list(listed)
        if not self.masks:
            raise ValueError("the server has no masks")
        model = self.read("/v1/models")["data"][0]
        self.context = model["max_model_len"]
        self.ids = self.read("/tokenize", {"model": model["id"], "prompt": TEXT})["tokens"]
        self.sources = count()
        self.flights = Group()
        """Requests under way. They are the run's, and outlive the user that sent them."""
        self.published = False
        self.out = Path(self.options.out) if self.options.out else None
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            self._snapshot("metrics-before.txt")
            self.log = (self.out / "requests.jsonl").open("w")
        self.seconds: float | None = None
        """For how long requests were sent."""
        self.began = datetime.now().isoformat(" ", "seconds")
        self.begin = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.begin

    def read(self, path: str, body: object = None) -> Any:
        answer = self.client.post(path, json.dumps(body)) if body else self.client.get(path)
        text = answer.read()
        if answer.status_code != 200:
            raise ValueError(f"{path}: {answer.status_code} {text[:300]!r}")
        return json.loads(text)

    def record(self, done: Request) -> None:
        """Write a request down, and show it on locust's page."""
        if self.out:
            self.log.write(json.dumps(asdict(done)) + "\n")
        fire = self.environment.events.request.fire
        e2e_s = (done.last_s or self.now()) - done.due_s
        exception = RuntimeError(done.error) if done.error else None
        about = {"name": done.mask, "response_length": done.output_tokens, "context": {}}
        fire(request_type=done.kind, response_time=1000 * e2e_s, exception=exception, **about)
        if done.first_s is not None and not done.error:
            fire(request_type="TTFT, ms", response_time=1000 * done.ttft_s, exception=None, **about)
            if done.tpot_s is not None:
                fire(request_type="TPOT, us", response_time=1e6 * done.tpot_s, exception=None, **about)

    def end(self) -> None:
        """Wait for the answers that are under way: leaving them out would leave out the slowest."""
        self.flights.join(TIMEOUT_S)
        self.flights.kill()
        if self.out:
            self.log.close()
            self._snapshot("metrics-after.txt")
            names = ("arrivals", "rate", "trace", "trace_speed", "prompt_tokens", "output_tokens", "seed")
            about = {name: getattr(self.options, name) for name in names} | {
                "host": self.environment.host,
                "users": [each.__name__ for each in self.environment.user_classes],
                "masks": self.masks,
                "began": self.began,
                "seconds": self.seconds,
            }
            (self.out / "run.json").write_text(json.dumps(about, indent=1, default=str) + "\n")
        if self.published:
            self.client.delete(f"/v1/masks/{self.options.swap_name}").read()
        self.client.close()

    def _snapshot(self, name: str) -> None:
        assert self.out
        (self.out / name).write_bytes(self.client.get("/metrics").read())


current: Run | None = None
"""The current run; None where it could not begin."""


@events.init.add_listener
def look_at_the_clock(**_: object) -> None:
    """Locust takes `--run-time` from gevent's clock, which has stood still since the imports began."""
    gevent.get_hub().loop.update_now()


@events.test_start.add_listener
def begin(environment: Environment, **_: object) -> None:
    global current
    try:
        current = Run(environment)
    except (OSError, HTTPParseError, KeyError, ValueError) as error:
        current = None
        logger.error("cannot load %s: %r", environment.host, error)
        environment.process_exit_code = 1


@events.test_stopping.add_listener
def stop(**_: object) -> None:
    if current:
        current.seconds = current.now()


@events.test_stop.add_listener
def end(**_: object) -> None:
    if current:
        current.end()


class Caller(User):
    """A source of requests; of itself, every one under the first mask."""

    abstract = True

    def draw(self) -> Iterator[str]:
        """Masks, one for each request."""
        return traffic.one(self.shared.masks)

    def on_start(self) -> None:
        if current is None:
            raise StopTest("the run could not begin")
        self.shared: Run = current
        self.options: Any = current.options
        self.source = next(current.sources)
        # Times have a generator of their own, so that a seed gives the same whatever is drawn for requests.
        times, self.rng = np.random.default_rng([self.options.seed, self.source]).spawn(2)
        self.masks = self.draw()
        self.schedule = self.arrivals(times)
        self.started_s = current.now()
        gevent.sleep(self.wait_time())

    def arrivals(self, rng: np.random.Generator) -> Iterator[Arrival]:
        """Requests to come; nothing in it depends on answers."""
        length = self.options.prompt_tokens, self.options.output_tokens
        if self.options.arrivals == "closed":
            return repeat(Arrival(0, *length))
        if self.options.arrivals == "poisson":
            return traffic.poisson(self.options.rate, length, rng)
        context = self.shared.context - TEMPLATE_TOKENS
        return iter(traffic.trace(self.shared.trace, context, self.options.trace_speed))

    def wait_time(self) -> float:
        """Seconds to the next request, of which there is none after a trace."""
        arrival = next(self.schedule, None)
        if arrival is None:
            return float("inf")
        self.arrival, now = arrival, self.shared.now()
        due_s = self.started_s + arrival.at_s
        self.due_s = max(now, due_s) if self.options.arrivals == "closed" else due_s
        return max(0.0, due_s - now)

    @task
    def send(self) -> None:
        """Send the request that is due, in a greenlet of its own."""
        flight = self.shared.flights.spawn(self.fly, self.arrival, self.due_s)
        if self.options.arrivals == "closed":
            flight.join()

    def fly(self, arrival: Arrival, due_s: float) -> None:
        self.ask(next(self.masks), arrival, due_s)

    def ask(self, mask: str, arrival: Arrival, due_s: float) -> None:
        """Send one request, read its answer and record both."""
        done = Request("completion", mask, due_s, self.shared.now())
        path, prompt = self.prompt(arrival.prompt_tokens)
        done.kind = "chat" if "messages" in prompt else "completion"
        body = {"model": mask, "max_tokens": arrival.output_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}} | prompt
        try:
            self.follow(path, body, done)
        except gevent.GreenletExit:
            done.error = "unfinished"
        except (OSError, HTTPParseError, ValueError) as error:
            done.error = repr(error)
        self.shared.record(done)

    def follow(self, path: str, body: dict[str, Any], done: Request) -> None:
        """Note when an answer's tokens come. The end is its last token, as vLLM has it, not the stream's."""
        answer = self.shared.client.post(path, json.dumps(body))
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code} {answer.read()[:300]!r}")
        while line := answer.readline(b"\n\n"):
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            if chunk["choices"]:
                done.last_s = self.shared.now()
                done.first_s = done.first_s or done.last_s
            elif usage := chunk.get("usage"):
                done.prompt_tokens, done.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if not done.output_tokens:
            raise ValueError("the stream ended early")

    def prompt(self, tokens: int) -> tuple[str, dict[str, Any]]:
        """A route, and a prompt for it of so many tokens."""
        return "/v1/completions", {"prompt": self.rng.choice(self.shared.ids, tokens).tolist()}


class OneMask(Caller):
    """Every request under the first mask."""


class Uniform(Caller):
    """Every mask as often as the others."""

    def draw(self) -> Iterator[str]:
        return traffic.uniform(self.shared.masks, self.rng)


class Zipf(Caller):
    """A few masks are wanted most, as users' interests are."""

    def draw(self) -> Iterator[str]:
        return traffic.zipf(self.shared.masks, self.options.zipf, self.rng)


class AllDistinct(Caller):
    """Every request under another mask than those before it: the worst for slots and batches."""

    def draw(self) -> Iterator[str]:
        return traffic.distinct(self.shared.masks, self.source)


class Chat(Uniform):
    """Chat completions; a prompt is about as long as it should be, since only words are known."""

    def prompt(self, tokens: int) -> tuple[str, dict[str, Any]]:
        words = TEXT.split()
        number = max(1, tokens * len(words) // len(self.shared.ids))
        content = " ".join(self.rng.choice(words, number))
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}


class Swapper(Caller):
    """Publishes one name with the files of all masks in turn, and asks for it each time."""

    fixed_count = 1

    def draw(self) -> Iterator[str]:
        return repeat(self.options.swap_name)

    def arrivals(self, _rng: np.random.Generator) -> Iterator[Arrival]:
        self.files = cycle(self.shared.files)
        return traffic.regular(
            self.options.swap_every, (self.options.prompt_tokens, self.options.output_tokens)
        )

    def fly(self, arrival: Arrival, due_s: float) -> None:
        done = Request("publish", self.options.swap_name, due_s, self.shared.now())
        try:
            body = json.dumps({"file": next(self.files)})
            answer = self.shared.client.put(f"/v1/masks/{self.options.swap_name}", body)
            text = answer.read()
            if answer.status_code not in (200, 201):
                done.error = f"{answer.status_code} {text[:300]!r}"
            else:
                self.shared.published = True
        except (OSError, HTTPParseError) as error:
            done.error = repr(error)
        done.last_s = self.shared.now()
        self.shared.record(done)
        if not done.error:
            super().fly(arrival, done.last_s)
