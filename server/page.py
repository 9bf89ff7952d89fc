"""The status page at `/`: what the server does now, and a box that asks two masks the same.

The page renders all that its caller may see, and its script asks for it again every two seconds. Where there
are keys, a browser gets the bare page, and the script sends the key that is typed into it.
"""

import math
import re
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, StrictUndefined

from server.access import Access, Caller, key_of
from server.engine.client import Engine
from server.errors import InvalidKey
from server.masks import Masks
from server.metrics import WINDOW_S, Finished, Metrics
from server.names import DENSE

Quantiles = tuple[float, float]
"""p50 and p95."""


@dataclass(frozen=True)
class Traffic:
    """What requests that ended lately were like; None where no time was measured."""

    tokens_per_s: float
    ttft_s: Quantiles | None
    inter_token_s: Quantiles | None


def routes(engine: Engine, masks: Masks, metrics: Metrics, access: Access) -> APIRouter:
    """The page of one engine and its masks."""
    router = APIRouter()
    begin = time.monotonic()
    source = Path(__file__).with_name("page.html").read_text()
    pages = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters.update(span=span, ms=ms, mb=mb)
    template = pages.from_string(source)
    headers = {
        "Content-Security-Policy": policy(source),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }

    async def seen_by(caller: Caller) -> dict[str, Any]:
        """What a caller sees."""
        every = await masks.describe(list(masks.known.values()), caller.may_use)
        listed = [mask for mask in every if caller.may_use(mask.id)]
        names = [DENSE] * caller.may_use(DENSE) + [mask.id for mask in listed]
        shown = set(names)
        lately = [request for request in metrics.recent() if request.mask in shown]
        aliases = {name: each for name, each in masks.names.aliases.items() if caller.may_use(name)}
        return {
            "base": masks.base_name,
            "names": names,
            "masks": listed,
            "aliases": aliases,
            "refused": {name: why for name, why in masks.refused.items() if caller.may_use(name)},
            "requests": totals(metrics),
            "traffic": traffic_by_mask(names, lately),
            "all_traffic": traffic(lately),
            "slots": {
                "used": sum(mask.state == "resident" for mask in every),
                "total": masks.slots,
            },
            "packed": {
                "bytes": sum(mask.packed_bytes for mask in masks.packed.values()),
                "most_bytes": masks.limit * masks.place,
            },
            "in_flight": {"used": access.waiting, "limit": access.max_waiting},
            "now": time.time(),
        }

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(request: Request) -> HTMLResponse:
        key, seen, why = key_of(request), None, ""
        if key or access.anyone:
            try:
                seen = await seen_by(access.who(key))
            except InvalidKey as error:
                why = str(error)
        text = template.render(
            seen=seen,
            why=why,
            up=engine.healthy,
            up_s=time.monotonic() - begin,
            keys=access.anyone is None,
            window_s=WINDOW_S,
        )
        return HTMLResponse(text, headers=headers)

    return router


def policy(source: str) -> str:
    """Content security: the page's own style and script, requests to this server, and nothing else.

    By hash, as the script parses pages that came later than its own, where a nonce would be another.
    """

    def own(tag: str) -> str:
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {own('style')}; script-src {own('script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def totals(metrics: Metrics) -> Counter[str]:
    """Finished requests since the start, by mask."""
    counts = Counter[str]()
    for family in metrics.requests.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                counts[sample.labels["mask"]] += int(sample.value)
    return counts


def traffic(requests: Sequence[Finished]) -> Traffic:
    """Of the requests that ended in the last WINDOW_S seconds."""
    return Traffic(
        sum(request.generation_tokens for request in requests) / WINDOW_S,
        quantiles([request.ttft_s for request in requests if request.ttft_s is not None]),
        quantiles([request.inter_token_s for request in requests if request.inter_token_s is not None]),
    )


def traffic_by_mask(names: Sequence[str], requests: Iterable[Finished]) -> dict[str, Traffic]:
    """The traffic of each mask, also of those without any, in one pass over the requests."""
    of = defaultdict[str, list[Finished]](list)
    for request in requests:
        of[request.mask].append(request)
    return {name: traffic(of[name]) for name in names}


def quantiles(values: Sequence[float]) -> Quantiles | None:
    """The least value that half, and that 95 %, of the values do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    p50, p95 = (ordered[math.ceil(part * len(ordered) / 100) - 1] for part in (50, 95))
    return p50, p95


def span(seconds: float) -> str:
    """A time in its two largest units: 3 h 12 min."""
    left = max(0, round(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def ms(seconds: float) -> str:
    """Milliseconds, with a decimal below ten."""
    return f"{1000 * seconds:,.{int(seconds < 0.01)}f}"


def mb(size: float) -> str:
    """Megabytes, with a decimal below ten, or gigabytes."""
    if size >= 1e9:
        return f"{size / 1e9:,.1f} GB"
    return f"{size / 1e6:,.{int(size < 1e7)}f} MB"
