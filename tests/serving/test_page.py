"""The page, in a browser."""

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from running_server import RunningServer, start_server


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = resources.files("sheepop.serving").joinpath("web", "index.html").read_text(encoding="utf-8")
    addresses = re.findall(r"https?://[^\s'\"]+", page)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)", page)


@pytest.fixture
def server(browser: Any, checkpoint: Path) -> Iterator[RunningServer]:
    """A server, where there is a browser to look at its page."""
    running = start_server(checkpoint)
    yield running
    assert running.end() == 143


def test_a_text_is_continued_and_its_tokens_are_explained(browser: Any, server: RunningServer) -> None:
    page = browser.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    page.fill("#max_tokens", "30")
    page.fill("#seed", "3")
    page.fill("#input", "the sheep")
    page.click("#send")
    page.wait_for_selector(".facts")
    body = {"prompt": "the sheep", "max_tokens": 30, "seed": 3, "temperature": 0.8, "top_p": 0.95}
    expected = server.post("/v1/completions", body)["choices"][0]["text"]
    assert page.text_content(".page") == "the sheep" + expected
    page.locator(".token", has_text=re.compile(r"\w")).first.hover()
    assert page.locator("#tip .row").count() >= 6
    page.click("#tab-chat")
    page.fill("#input", "hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.assistant .facts")
    assert page.text_content(".turn.user .text") == "hello"
    assert not problems
    page.close()
