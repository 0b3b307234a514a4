"""The chat page in a real browser, where there is one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gptcli.config.schema import SamplingParams
from tests.serve.clients import Served, before_each_step, make_engine, serving, wait_until

api = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        installed = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium here: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which any error of its script, or of its own policy, fails the test."""
    page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: complaints.append(m.text) if "Content Security" in m.text else None)
    yield page
    page.close()
    assert complaints == []


def say(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def answer_of(page: Any, turns: int) -> str:
    api.expect(page.locator(".turn")).to_have_count(turns)
    api.expect(page.locator("#send")).to_have_text("Send")
    return page.locator(".turn").nth(turns - 1).text_content()


def test_a_conversation(page: Any, served: Served) -> None:
    engine, params = (
        make_engine(),
        SamplingParams(max_new_tokens=12, seed=4, stop=["\nUser:"], temperature=0.5, top_k=40),
    )
    first = engine.generate(["User: Hi <b>\nAssistant:"], params)[0].text
    page.goto(served.url)
    api.expect(page.locator("#model")).to_have_text("tiny")
    for name, value in {"seed": "4", "max_tokens": "12", "temperature": "0.5", "top_k": "40"}.items():
        page.fill(f"#{name}", value)
    say(page, "Hi <b>")
    assert answer_of(page, 2) == first
    say(page, "Why?")
    prompt = f"User: Hi <b>\nAssistant: {first.strip()}\nUser: Why?\nAssistant:"
    assert answer_of(page, 4) == engine.generate([prompt], params)[0].text
    page.select_option("#mode", "complete")
    say(page, "once")
    assert answer_of(page, 6) == engine.generate(["once"], params)[0].text
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_tokens_show_as_they_come_and_stop_stops(page: Any) -> None:
    engine = make_engine(context_length=4096)
    engine.require_tokenizer().special.clear()  # so that no end-of-text ends it before its time
    before_each_step(engine, lambda: time.sleep(0.02))
    with serving(engine) as server:
        page.goto(server.url)
        say(page, "Hi")
        lengths = []
        for _ in range(3):
            wait_until(lambda: len(page.locator(".turn").nth(1).text_content()) > max(lengths, default=0))
            lengths.append(len(page.locator(".turn").nth(1).text_content()))
        page.click("#send")
        wait_until(lambda: server.rows_under_way == 0)
        assert page.inner_text("#send") == "Send"
        assert page.locator(".error").count() == 0


def test_a_new_conversation_knows_nothing_of_an_answer_that_it_ended(page: Any) -> None:
    engine = make_engine(context_length=4096)
    engine.require_tokenizer().special.clear()
    asked: list[Any] = []
    page.on("request", lambda r: asked.append(r.post_data_json["messages"]) if r.method == "POST" else None)
    with serving(engine) as server:
        page.goto(server.url)
        say(page, "first")
        wait_until(lambda: page.locator(".turn").nth(1).text_content())
        page.click("#clear")
        wait_until(lambda: server.rows_under_way == 0)
        say(page, "second")
        wait_until(lambda: len(asked) == 2)
        page.click("#send")
    assert asked[1] == [{"role": "user", "content": "second"}]


def test_mistakes_and_the_key_are_shown(page: Any) -> None:
    with serving(make_engine(), api_key="secret") as server:
        page.goto(server.url)
        page.fill("#key", "secret")
        page.dispatch_event("#key", "change")
        api.expect(page.locator("#model")).to_have_text("tiny")
        say(page, "x" * 500)
        page.wait_for_selector(".error")
        assert "context is 128" in page.inner_text(".error")


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    answer = httpx.get(served.url)
    assert "//" not in answer.text.replace("://127.0.0.1", "").split("<script>")[0]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
