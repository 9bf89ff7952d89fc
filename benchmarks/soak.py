"""Half an hour of mixed traffic over more masks than slots, every answer checked token by token: make soak

    python benchmarks/soak.py                 # 30 minutes; writes benchmarks/soak.json
    python benchmarks/soak.py --minutes 5     # shorter; writes the same
    python benchmarks/soak.py --quick         # one minute and fewer masks, only printed

200 masks on 8 slots, each put together from the demo's, layer by layer. Requests are completions and chats,
whole and streamed, under masks drawn by Zipf's law, the dense base, an alias with weights, and one mask that
is republished every ten seconds, its two contents taking turns; some clients leave early. They come at
random times (Poisson) at 80 % of what the server answered before, when 64 clients asked without a pause: the
median of five half minutes, as some machines are faster in one than in the next.

References are what the same server answers when it is asked one thing at a time. An answer is right if its
tokens are those of the content that `X-Mask` names. The server computes in float32, yet its sums depend on
what else is in a batch: where the reference's two best logits are less than 1e-3 apart, the second best may
come instead (a *near tie*). After the soak the server, asked alone, must then continue from there as the
answer did, so that no answer of another mask passes for one. A wrong mask shows where two references
differ in their first 16 tokens, as nearly all do: how many do not is among the figures.

Turns are fair to masks and not to requests: one for a hot mask may come in its turn. What must hold is their
bound, that no first token takes longer than a round of all masks, ceil(masks / slots) turns, and its own: of
the steps that the engine made on average.

Fails (exit 1) if a figure misses its must.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from math import ceil, nan
from pathlib import Path

import aiohttp
from report import Row, write
from serving import BINARY, Server, Swaps, mixed_mask, serving

SLOTS, TURN_STEPS, MASKS, CLIENTS = 8, 32, 200, 64
LENGTHS = (16, 24, 32)
NEAR = 1e-3
REPUBLISH_S, SAMPLE_S = 10, 2
LOAD, LEAVING = 0.8, 0.05
TRIES = 5
"""Of what the server answers without a pause."""
WARM_UP = 1 / 6
"""Share of the soak after which memory must stay."""
LIVING, ALIAS = "living", "canary"
TEXTS = (
    "The Secretary of the Treasury shall",
    "Once upon a time, there was a little",
    "The court held that the rule applies to every person who files a claim under this title. " * 9,
)
CHAT = [{"role": "user", "content": "What are the symptoms of a cold?"}]


@dataclass(frozen=True)
class Ask:
    """A request to be made."""

    mask: str
    prompt: int
    """Of TEXTS; the one after them is CHAT."""
    tokens: int
    stream: bool
    leave_after_s: float | None
    """When its client goes away, if it does."""


@dataclass
class Answer:
    """What came of it."""

    ask: Ask
    sent: float
    error: str = ""
    label: str = ""
    tokens: list[int] = field(default_factory=list)
    headers_at: float = 0.0
    ttft_s: float | None = None
    e2e_s: float = 0.0
    left: bool = False


@dataclass(frozen=True)
class Reference:
    """An answer made alone: each token, the one that came second, and how far behind it was."""

    tokens: list[int]
    second: list[int]
    behind: list[float]


@dataclass
class Soak:
    """The state of one soak."""

    server: Server
    session: aiohttp.ClientSession
    contents: dict[str, bytes]
    """The two files of the mask that is republished, by label."""
    dice: random.Random
    names: list[str]
    prompts: list[list[int]] = field(default_factory=list)
    references: dict[tuple[str, int], Reference] = field(default_factory=dict)
    alike: float = 0.0
    """How likely the references of two masks to a prompt begin alike."""
    published: list[tuple[float, float, str]] = field(default_factory=list)
    """When each version of LIVING was sent and done, and its label."""
    answers: list[Answer] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    rss: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    def draw(self) -> Ask:
        """The next request of the traffic."""
        kind = self.dice.random()
        ranked = [1 / rank for rank in range(1, len(self.names) + 1)]
        if kind < 0.7:
            mask = self.dice.choices(self.names, ranked)[0]
        else:
            mask = "none" if kind < 0.8 else ALIAS if kind < 0.9 else LIVING
        leave = self.dice.expovariate(4) if self.dice.random() < LEAVING else None
        prompt, tokens = self.dice.randrange(len(TEXTS) + 1), self.dice.choice(LENGTHS)
        return Ask(mask, prompt, tokens, self.dice.random() < 0.5, leave)

    async def do(self, ask: Ask) -> None:
        answer = Answer(ask, time.monotonic())
        try:
            async with asyncio.timeout(ask.leave_after_s):
                await self._do(ask, answer)
        except TimeoutError:
            answer.left = ask.leave_after_s is not None
            answer.error = "" if answer.left else "timeout"
        except (aiohttp.ClientError, ValueError, KeyError) as error:
            answer.error = repr(error)
        answer.e2e_s = time.monotonic() - answer.sent
        if not (answer.left or answer.error) and len(answer.tokens) != ask.tokens:
            answer.error = f"{len(answer.tokens)} tokens instead of {ask.tokens}"
        self.answers.append(answer)

    async def _do(self, ask: Ask, answer: Answer) -> None:
        body = {"mask": ask.mask, "max_tokens": ask.tokens, "temperature": 0, "stream": ask.stream}
        body |= {"ignore_eos": True, "return_token_ids": True}
        chat = ask.prompt == len(TEXTS)
        body |= {"messages": CHAT} if chat else {"prompt": TEXTS[ask.prompt]}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        async with self.session.post(path, json=body) as response:
            answer.headers_at = time.monotonic()
            if response.status != 200:
                answer.error = f"{response.status} {(await response.text())[:200]}"
                return
            answer.label = response.headers["X-Mask"]
            if not ask.stream:
                answer.tokens = (await response.json())["choices"][0]["token_ids"]
                return
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                if tokens := chunk["choices"][0].get("token_ids"):
                    answer.ttft_s = answer.ttft_s or time.monotonic() - answer.sent
                    answer.tokens += tokens

    async def refer(self, mask: str, ids: list[int], tokens: int) -> Reference:
        """What the server answers to token ids, with the runner-up of each token."""
        body = {"mask": mask, "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "logprobs": 2, "return_tokens_as_token_ids": True}
        async with self.session.post("/v1/completions", json=body) as response:
            response.raise_for_status()
            choice = (await response.json())["choices"][0]
        second, behind = [], []
        for token, tops in zip(choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True):
            best = {int(key.removeprefix("token_id:")): value for key, value in tops.items()}
            other = max((each for each in best if each != token), key=lambda each: best[each])
            second.append(other)
            behind.append(best[token] - best[other])
        return Reference(choice["token_ids"], second, behind)

    async def publish(self, label: str) -> None:
        sent = time.monotonic()
        put = self.session.put(f"/v1/masks/{LIVING}", data=self.contents[label], headers=BINARY)
        async with put as response:
            if response.status not in (200, 201):
                self.failures[f"republish: {response.status} {(await response.text())[:200]}"] += 1
                return
        self.published.append((sent, time.monotonic(), label))

    def wrong(self, answer: Answer) -> str:
        """Why an answer is of another mask than it may be, or says so."""
        asked, name = answer.ask.mask, answer.label.rpartition("@")[0] or answer.label
        if asked == LIVING:
            later = [done for _, done, _ in self.published[1:]] + [float("inf")]
            allowed = {
                label
                for (sent, _, label), until in zip(self.published, later, strict=True)
                if sent <= answer.headers_at and until >= answer.sent
            }
            return "" if answer.label in allowed else f"{answer.label} was not published then"
        allowed = set(self.names[:2]) if asked == ALIAS else {asked}
        return "" if name in allowed else f"{asked} was asked, and {answer.label} answered"


async def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--quick", action="store_true", help="one minute and 24 masks, only printed")
    parser.add_argument("options", nargs="*", help="options of maskllm serve, after --")
    args = parser.parse_args()
    seconds, masks = (60.0, 24) if args.quick else (60 * args.minutes, MASKS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "masks"
        names, contents = make(folder, masks)
        options = ["--slots", SLOTS, "--turn-steps", TURN_STEPS, "--dtype", "float32", *args.options]
        with serving(folder, Path(temporary), *options) as server:
            async with server.session() as session:
                soak = Soak(server, session, contents, random.Random(0), names)
                rows = await run(soak, seconds, try_s=4 if args.quick else 30)
    note = (
        f"{masks} masks on {SLOTS} slots, {seconds / 60:.3g} minutes at {LOAD:.0%} of capacity, float32; "
        "hot: the 8 masks most asked for, cold: the less asked for half; "
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
        + (", real-time priority" if os.sched_getscheduler(0) == os.SCHED_RR else "")
    )
    command = f"make soak ARGS='--minutes {args.minutes:g}'" if args.minutes != 30 else "make soak"
    write("soak", command, rows, note, of="figure", keep=not args.quick)
    return int(any(row.misses for row in rows))


def make(folder: Path, masks: int) -> tuple[list[str], dict[str, bytes]]:
    """Masks in a folder, by their names, and the two contents of LIVING, by their labels."""
    say(f"making {masks} masks")
    names = [f"m{number:03d}" for number in range(masks)]
    for number, name in enumerate(names):
        mixed_mask(folder / f"{name}.safetensors", number)
    contents = {}
    for number in (masks, masks + 1):
        content = mixed_mask(folder / f"{LIVING}.safetensors", number)
        contents[f"{LIVING}@{sha12(content)}"] = content
    return names, contents


async def run(soak: Soak, seconds: float, try_s: float) -> list[Row]:
    """Make the references, measure capacity, soak, and judge."""
    await refer_all(soak)
    rates = [await closed(soak, try_s) for _ in range(TRIES)]
    capacity = statistics.median(rates)
    tally = Counter(judge(soak, soak.answers))
    tried = ", ".join(f"{rate:.1f}" for rate in rates)
    say(f"capacity: {capacity:.1f} requests/s of {tried}, {CLIENTS} at a time; {dict(tally)}")

    soak.answers = []
    before, steps, begin = soak.server.swaps(), soak.server.steps(), time.monotonic()
    await opened(soak, seconds, LOAD * capacity)
    took = time.monotonic() - begin
    host = soak.server.swaps()["host"].since(before.get("host"))
    turns_per_s = (soak.server.steps() - steps) / TURN_STEPS / took
    verdicts = judge(soak, soak.answers)
    await asyncio.sleep(2)  # those of clients that left
    left_behind = await asyncio.to_thread(soak.server.in_flight)
    unproved = await prove(
        soak, [a for a, verdict in zip(soak.answers, verdicts, strict=True) if verdict == TIE]
    )
    return figures(soak, verdicts, host, took, turns_per_s, left_behind, unproved)


async def refer_all(soak: Soak) -> None:
    """One request at a time: every content's answer to every prompt."""
    for ask in [*({"prompt": text} for text in TEXTS), {"messages": CHAT}]:
        async with soak.session.post("/tokenize", json=ask) as response:
            soak.prompts.append((await response.json())["tokens"])
    alias = {"masks": {soak.names[0]: 90, soak.names[1]: 10}}
    async with soak.session.put(f"/v1/aliases/{ALIAS}", json=alias) as response:
        response.raise_for_status()
    async with soak.session.get("/v1/masks") as response:
        shas = {mask["id"]: mask["sha256"][:12] for mask in (await response.json())["data"]}
    labels = {"none": "none"} | {name: f"{name}@{shas[name]}" for name in soak.names}
    say(f"references: {(len(labels) + len(soak.contents)) * len(soak.prompts)} answers, one at a time")
    for name, label in labels.items():
        await _refer(soak, name, label)
    for label in soak.contents:
        await soak.publish(label)
        await _refer(soak, LIVING, label)
    begin = Counter((prompt, tuple(r.tokens[: min(LENGTHS)])) for (_, prompt), r in soak.references.items())
    contents = begin.total() // len(soak.prompts)
    soak.alike = sum(n * (n - 1) for n in begin.values()) / (begin.total() * (contents - 1))
    say(f"two masks begin alike in {soak.alike:.2%} of cases")


async def _refer(soak: Soak, name: str, label: str) -> None:
    for prompt, ids in enumerate(soak.prompts):
        soak.references[label, prompt] = await soak.refer(name, ids, max(LENGTHS))


async def closed(soak: Soak, seconds: float) -> float:
    """CLIENTS clients, each asking again as soon as it has its answer: how many have one in a second."""
    before, begin = len(soak.answers), time.monotonic()

    async def client() -> None:
        while time.monotonic() < begin + seconds:
            await soak.do(soak.draw())

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return (len(soak.answers) - before) / (time.monotonic() - begin)


async def opened(soak: Soak, seconds: float, rate: float) -> None:
    """Requests at random times, whoever else has been answered, beside republishing and sampling."""
    begin = time.monotonic()
    beside = [
        asyncio.create_task(every(REPUBLISH_S, lambda: republish(soak))),
        asyncio.create_task(every(SAMPLE_S, lambda: sample(soak))),
        asyncio.create_task(every(max(seconds / 20, 5), lambda: progress(soak, begin, seconds))),
    ]
    at, asked = begin, set[asyncio.Task[None]]()
    while (at := at + soak.dice.expovariate(rate)) < begin + seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        task = asyncio.create_task(soak.do(soak.draw()))
        asked.add(task)
        task.add_done_callback(asked.discard)
    await asyncio.gather(*asked)
    for each in beside:
        each.cancel()
    for result in await asyncio.gather(*beside, return_exceptions=True):
        if not isinstance(result, asyncio.CancelledError):
            raise RuntimeError("what ran beside the traffic failed") from result


async def every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    """At that pace, or without a pause where the work takes longer."""
    due = time.monotonic()
    while True:
        await work()
        due = max(due + seconds, time.monotonic())
        await asyncio.sleep(due - time.monotonic())


async def republish(soak: Soak) -> None:
    """The content that is not out now."""
    await soak.publish(next(label for label in soak.contents if label != soak.published[-1][2]))


async def sample(soak: Soak) -> None:
    soak.rss.append((time.monotonic(), await asyncio.to_thread(soak.server.rss)))


async def progress(soak: Soak, begin: float, seconds: float) -> None:
    memory = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in soak.server.rss().items())
    failed = sum(bool(answer.error) for answer in soak.answers)
    gone = time.monotonic() - begin
    say(f"{gone:.0f} of {seconds:.0f} s: {len(soak.answers)} answers, {failed} failed, {memory}")


RIGHT, TIE, WRONG, FAILED = "right", "near tie", "wrong", "failed"


def judge(soak: Soak, answers: list[Answer]) -> list[str]:
    """What each answer is; the first of those that are wrong or failed are printed."""
    verdicts = []
    for answer in answers:
        verdict, why = _judge(soak, answer)
        verdicts.append(verdict)
        if why:
            soak.failures[why] += 1
            if sum(soak.failures.values()) <= 20:
                say(f"{verdict}: {answer.ask}: {why}")
    return verdicts


def _judge(soak: Soak, answer: Answer) -> tuple[str, str]:
    if answer.error:
        return FAILED, answer.error
    if not answer.label:  # its client left before it began
        return RIGHT, ""
    if why := soak.wrong(answer):
        return WRONG, why
    reference = soak.references[answer.label, answer.ask.prompt]
    at = departs(reference, answer.tokens)
    if at is None:
        return RIGHT, ""
    if near(reference, answer.tokens, at):
        return TIE, ""
    same = [
        label
        for (label, prompt), other in soak.references.items()
        if prompt == answer.ask.prompt and departs(other, answer.tokens) is None
    ]
    whose = f"these are {', '.join(same)}'s tokens" if same else "no mask answers so"
    return WRONG, f"{answer.label} departs at token {at}, {reference.behind[at]:.2g} apart; {whose}"


def departs(reference: Reference, tokens: list[int]) -> int | None:
    """Where tokens first are not the reference's."""
    pairs = zip(tokens, reference.tokens, strict=False)
    return next((at for at, (got, expected) in enumerate(pairs) if got != expected), None)


def near(reference: Reference, tokens: list[int], at: int) -> bool:
    """Whether the second best came where the best was no better."""
    return tokens[at] == reference.second[at] and reference.behind[at] < NEAR


async def prove(soak: Soak, ties: list[Answer]) -> int:
    """How many answers do not go on after a near tie as their mask does when it is asked alone."""
    say(f"{len(ties)} near ties to follow")
    unproved = 0
    for answer in sorted(ties, key=lambda answer: answer.label):
        if answer.ask.mask == LIVING and soak.published[-1][2] != answer.label:
            await soak.publish(answer.label)
        ids, rest = soak.prompts[answer.ask.prompt], answer.tokens
        reference = soak.references[answer.label, answer.ask.prompt]
        while (at := departs(reference, rest)) is not None and near(reference, rest, at):
            ids, rest = ids + rest[: at + 1], rest[at + 1 :]
            if not rest:
                break
            reference = await soak.refer(answer.label, ids, len(rest))
        if rest and departs(reference, rest) is not None:
            unproved += 1
            say(f"wrong: {answer.ask}: {answer.label} does not go on so after a near tie")
    return unproved


def figures(
    soak: Soak,
    verdicts: list[str],
    host: Swaps,
    took: float,
    turns_per_s: float,
    left_behind: int,
    unproved: int,
) -> list[Row]:
    """Everything that is published of a soak."""
    count = Counter(verdicts)
    republishing = sum(n for why, n in soak.failures.items() if why.startswith("republish"))
    streams = [answer for answer in soak.answers if answer.ttft_s is not None]
    ttft = percentiles([float(answer.ttft_s or 0) for answer in streams])
    e2e = percentiles([a.e2e_s for a in soak.answers if not a.left])
    by_mask = defaultdict(list)
    for answer in streams:
        by_mask[answer.ask.mask].append(float(answer.ttft_s or 0))
    hot, cold = set(soak.names[:SLOTS]), set(soak.names[len(soak.names) // 2 :])
    of_hot, of_cold = (
        statistics.median([s for mask, times in by_mask.items() if mask in which for s in times] or [nan])
        for which in (hot, cold)
    )
    medians = {mask: statistics.median(times) for mask, times in by_mask.items()}
    longest = max(map(max, by_mask.values()))
    bound = ceil((len(soak.names) + 2) / SLOTS) + 1  # LIVING may be there twice

    def row(name: str, value: float, unit: str = "", must: float | None = None, better: str = "lower") -> Row:
        return Row(f"{name} | value", value, unit, must, better=better)

    return [
        row("requests", len(soak.answers)),
        row("failed requests", count[FAILED] + republishing, must=0),
        row("wrong answers", count[WRONG] + unproved, must=0),
        row("pairs of references that begin alike, %", 100 * soak.alike, "%", must=1),
        row("near ties, %", 100 * count[TIE] / len(verdicts), "%", must=2),
        row("clients that left early", sum(answer.left for answer in soak.answers)),
        row("requests left behind", left_behind, must=0),
        *(row(f"RSS drift of the {name}, %", drift, "%", must=2) for name, drift in drifts(soak)),
        row("requests/s", len(soak.answers) / took, "requests/s", better="higher"),
        row("swaps into slots/s", host.count / took, "swaps/s", must=1, better="higher"),
        row("time that swaps took, %", 100 * host.seconds / took, "%"),
        row("versions published", len(soak.published), must=0.9 * took / REPUBLISH_S, better="higher"),
        *(row(f"TTFT {q}, ms", 1000 * s, "ms") for q, s in ttft.items()),
        *(row(f"latency {q}, ms", 1000 * s, "ms") for q, s in e2e.items()),
        row("TTFT p50 of hot masks, ms", 1000 * of_hot, "ms"),
        row("TTFT p50 of cold masks, ms", 1000 * of_cold, "ms"),
        row("TTFT p50, cold beside hot", of_cold / of_hot, "x"),
        row("highest TTFT p50 of a mask, ms", 1000 * max(medians.values()), "ms"),
        row("longest TTFT, ms", 1000 * longest, "ms"),
        row("longest TTFT, turns", longest * turns_per_s, "turns", must=bound),
    ]


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


def drifts(soak: Soak) -> Iterator[tuple[str, float]]:
    """By how many percent each process was at most larger or smaller than just after the warm-up.

    That is of the medians of tenths: a sample may meet a large answer.
    """
    steady = soak.rss[int(len(soak.rss) * WARM_UP) :]
    tenth = max(1, len(steady) // 10)
    for name in steady[0][1]:
        sizes = [sizes[name] for _, sizes in steady]
        medians = [
            statistics.median(sizes[at : at + tenth]) for at in range(0, len(sizes) - tenth + 1, tenth)
        ]
        yield f"{name} process", 100 * max(abs(size - medians[0]) for size in medians) / medians[0]


def sha12(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
