"""The page, in a real browser without a window; skipped where the machine has none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from jaxinfer.llm import LLM
from jaxinfer.types import SamplingParams
from serving.security import Tokens
from tests.serving.harness import Brake
from tests.serving.http.harness import threaded_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=15_000)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPT = "one small prompt"
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox does not run for root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which every mistake of its script, and every request to elsewhere, counts."""
    faults: list[str] = []
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfinished", lambda request: "//localhost:" in request.url or faults.append(request.url))
        yield page
    assert not faults


def _ask(page: Any, tokens: int) -> None:
    page.fill("#prompt", PROMPT)
    page.fill("#tokens", str(tokens))
    page.click("#send")


def test_it_streams_and_shows_gauges(llm: LLM, page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = llm.generate([PROMPT], SamplingParams(max_tokens=40, temperature=0))
    with threaded_server(llm.engine) as address, Brake(llm.engine, monkeypatch) as brake:
        page.goto(address)
        page.evaluate(
            """() => { window.seen = [];
                new MutationObserver(() => window.seen.push(document.getElementById("answer").textContent.length))
                    .observe(document.getElementById("answer"), {childList: true}); }"""
        )
        brake.let(8)
        _ask(page, 40)
        expect(page.locator("#answer")).not_to_be_empty()
        brake.release()
        expect(page.locator("#count")).to_have_text("40")
        expect(page.locator("#send")).to_be_enabled()
        assert page.text_content("#answer") == expected.outputs[0].text
        seen = page.evaluate("window.seen")
        assert len(set(seen)) > 1, "it began while the engine was held"
        for gauge in ("#ttft", "#itl", "#server-ttft", "#server-itl"):
            expect(page.locator(gauge)).to_contain_text(" ms")
        expect(page.locator("#running")).to_have_text("0")
        assert page.text_content("#cache").endswith(" %")
        assert page.text_content("#model") == "small"
        page.check("#chat")
        _ask(page, 5)
        expect(page.locator("#count")).to_have_text("5")
        expect(page.locator("#send")).to_be_enabled()
        assert page.text_content("#answer")
        assert page.text_content("#error") == ""


def test_it_sends_the_token_and_tells_what_is_refused(llm: LLM, page: Any) -> None:
    with threaded_server(llm.engine, tokens=Tokens([TOKEN])) as address:
        page.goto(address)
        _ask(page, 5)
        expect(page.locator("#error")).to_contain_text("tokens")
        assert page.text_content("#answer") == ""
        assert page.text_content("#running") == "-"
        page.fill("#token", TOKEN)
        _ask(page, 5)
        expect(page.locator("#count")).to_have_text("5")
        expect(page.locator("#running")).to_have_text("0")
        assert TOKEN not in page.url
        expect(page.locator("#send")).to_be_enabled()
        page.fill("#tokens", "5")
        page.fill("#prompt", "x" * 200)
        page.click("#send")
        expect(page.locator("#error")).to_contain_text("max_model_len=96")
