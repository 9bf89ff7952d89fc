"""The status page: who sees what, what its figures are, and how it works in a browser."""

import re
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from prometheus_client import CollectorRegistry
from running import HOSTILE, Server

from server.metrics import WINDOW_S, Finished, Metrics
from server.page import ms, quantiles, span, totals, traffic, traffic_by_mask

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "The patient was"


def finished(mask: str, tokens: int, ttft_s: float | None) -> Finished:
    return Finished(mask, "length", 5, tokens, 1.0, ttft_s=ttft_s)


# Figures.


def test_p50_and_p95_are_values_that_were_measured():
    assert quantiles([0.02 * n for n in range(1, 101)]) == (0.02 * 50, 0.02 * 95)
    assert quantiles([3.0, 1.0]) == (1.0, 3.0)
    assert quantiles([]) is None


def test_traffic_is_of_the_last_minute_and_totals_are_of_all():
    now = 0.0
    metrics = Metrics(CollectorRegistry(), clock=lambda: now)
    metrics.finish(finished("legal", 600, 0.5))
    now = WINDOW_S / 2
    metrics.finish(finished("legal", 120, None))
    assert traffic(list(metrics.recent())).tokens_per_s == 720 / WINDOW_S
    assert traffic(list(metrics.recent())).ttft_s == (0.5, 0.5)
    now = WINDOW_S + 1
    assert [request.generation_tokens for request in metrics.recent()] == [120]
    assert traffic(list(metrics.recent())).ttft_s is None
    assert totals(metrics) == {"legal": 2}


def test_each_request_is_looked_at_once_however_many_masks_there_are():
    """A busy minute of 5,000 masks has 50,000 of them."""
    of_legal, of_code = finished("legal", 60, 0.5), finished("code", 60, 0.25)
    assert traffic_by_mask(["legal", "medical", "code"], iter([of_legal, of_code, of_legal])) == {
        "legal": traffic([of_legal] * 2),
        "medical": traffic([]),
        "code": traffic([of_code]),
    }


def test_times_are_written_as_people_say_them():
    assert [span(s) for s in (0.4, 61, 3_600, 90_061)] == ["0 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]
    assert [ms(s) for s in (0.00123, 0.0123, 1.5)] == ["1.2", "12", "1,500"]


# Who sees what.


def test_without_a_key_the_page_says_only_that_the_server_is_up(server: Server):
    answer = httpx.get(server.url)
    assert answer.status_code == 200
    assert ">up<" in answer.text
    for secret in ("legal", "broken", "slots in use"):
        assert secret not in answer.text.replace('"slots in use"', "")
    refused = httpx.get(server.url, headers={"Authorization": "Bearer stranger"})
    assert "this API key is not one of the server&#39;s" in refused.text
    assert "legal" not in refused.text


def test_a_key_for_some_masks_sees_only_these(server: Server):
    with server.client("acme") as acme, server.client("boss") as boss:
        seen, all_of_it = acme.get("/").text, boss.get("/").text
    for other in ("medical", "broken", "the dense base", "<option>none"):
        assert other not in seen
    assert "<td>legal" in seen
    assert "<td>medical" in all_of_it
    assert "<td>broken</td>" in all_of_it


def test_nothing_from_outside_becomes_markup_or_could_run(server: Server):
    with server.client() as http:
        answer = http.get("/")
    assert HOSTILE not in answer.text
    assert "&lt;img src=x onerror=alert(1)&gt;" in answer.text
    policy = dict(rule.split(" ") for rule in answer.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    for rule in ("script-src", "style-src"):
        assert policy[rule].startswith("'sha256-")


# In a browser.


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page that fails the test for any word on its console, any script error and any foreign request."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser.new_page(viewport={"width": 1160, "height": 1200})
        browser.close()


def test_a_person_sees_the_masks_and_asks_two_of_them_the_same(page: Page, server: Server):
    trouble: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: trouble.append(dialog.message))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(server.url)
    expect(page.get_by_text("up", exact=True)).to_be_visible()
    expect(page.get_by_role("table")).to_have_count(0)

    page.get_by_label("API key").fill("boss")
    page.get_by_role("button", name="Show").click()
    row = page.get_by_role("row").filter(has=page.get_by_role("cell", name="legal", exact=True))
    expect(row).to_contain_text(re.compile("known|packed|resident"))
    expect(page.get_by_role("cell", name=HOSTILE, exact=True)).to_be_visible()

    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Mask", exact=True).select_option("legal")
    page.get_by_label("Other mask").select_option("medical")
    page.get_by_label("Tokens").fill("12")
    page.get_by_role("button", name="Ask both").click()
    texts = []
    for side, mask in (("a", "legal"), ("b", "medical")):
        expect(page.locator(f"#times-{side}")).to_contain_text("all 12 tokens", timeout=60_000)
        with server.client() as http:
            body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            answer = http.post("/v1/completions", params={"mask": mask}, json=body)
        assert page.locator(f"#who-{side}").text_content() == f"X-Mask: {answer.headers['x-mask']}"
        texts.append(page.locator(f"#answer-{side}").text_content())
        assert texts[-1] == answer.json()["choices"][0]["text"]
    assert texts[0] != texts[1]
    expect(row).to_contain_text("resident")  # by itself, as the page asks again
    expect(page.get_by_label("Prompt")).to_have_value(PROMPT)
    expect(page.get_by_label("Mask", exact=True)).to_have_value("legal")

    with server.client() as http:
        cards = http.get("/v1/masks").json()["data"]
    held = sum(card["packed_bytes"] for card in cards if card["state"] != "known") / 1e6
    resident = sum(card["state"] == "resident" for card in cards)
    for what, says in {
        "slots in use": f"{resident} of {server.slots}",
        "masks in host memory": re.compile(rf"^{held:.1f} MB of \d"),
        "requests in flight": re.compile("^0 of "),
        "tokens a second": re.compile(r"^(?!0\.0)"),  # 48 of these four answers in the last minute
        "first token": re.compile(r"^\d.* / \d"),
    }.items():
        tile = page.locator("#tiles div").filter(has=page.locator("dt", has_text=what))
        expect(tile.locator("dd")).to_have_text(says)

    page.get_by_label("Tokens").fill("501")
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_role("alert").first).to_contain_text("this server gives at most 500")
    assert hosts == {urlsplit(server.url).netloc}
    assert [text for text in trouble if "400 (Bad Request)" not in text] == []  # Chromium tells of our 400s


def test_the_page_fits_a_phone(page: Page, server: Server):
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto(server.url)
    page.get_by_label("API key").fill("boss")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("cell", name="legal", exact=True)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 400
