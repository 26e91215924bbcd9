"""The page at `/` in headless Chromium."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from accel.serve.protocol import Finished, FinishReason, Tokens
from tests.serve.http.browser import CHROMIUM, Browser, browser
from tests.serve.servers import Running, byte_tokenizer

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"), pytest.mark.xdist_group("browser")]
PHONE = 390  # pixels


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def value(page: Browser, name: str) -> str:
    """Return the text of an element."""
    return str(page.run(f"document.getElementById({name!r}).textContent"))


def submit(page: Browser, text: str) -> None:
    """Type a text and press the button."""
    page.run(f"document.getElementById('text').value = {json.dumps(text)}; document.getElementById('run').click()")


def test_text_is_streamed_and_stopped(page: Browser, play: Callable[..., Any]) -> None:
    """Text appears as it arrives, markup in it is text, and Stop cancels the request."""
    server, scheduler = play()
    ids = byte_tokenizer()("<b>€</b> & so on")["input_ids"]
    page.open(server.address, width=PHONE)
    page.wait("!document.getElementById('run').disabled")
    assert page.run("document.documentElement.scrollWidth") <= PHONE
    submit(page, "first")
    assert scheduler.submitted.wait(10)
    assert scheduler.requests[0].generation["max_new_tokens"] == 128
    scheduler.listeners[0](Tokens(tuple(ids[:5])))
    page.wait("document.getElementById('output').textContent === '<b>'")
    scheduler.listeners[0](Tokens(tuple(ids[5:])))
    scheduler.listeners[0](Finished(FinishReason.LENGTH))
    page.wait("document.getElementById('status').textContent.includes('limit of new tokens')")
    assert value(page, "output") == "<b>€</b> & so on"
    scheduler.submitted.clear()
    submit(page, "second")
    assert scheduler.submitted.wait(10)
    page.run("document.getElementById('stop').click()")
    page.wait("document.getElementById('status').textContent === 'stopped'")
    assert scheduler.cancelled.wait(10)
    scheduler.room = 0
    submit(page, "third")
    page.wait("document.getElementById('status').className === 'error'")
    assert "try again later" in value(page, "status")
    assert "not verified" in value(page, "figures")


def test_api_key(page: Browser, play: Callable[..., Any]) -> None:
    """The page asks for the key where the server does."""
    server, _ = play(api_key="sesame")
    page.open(server.address)
    page.wait("!document.getElementById('key-row').hidden")
    for key, shown in (("wrong", "doesn't accept"), ("sesame", "")):
        page.run(f"document.getElementById('key').value = {key!r}; document.getElementById('connect').click()")
        page.wait(f"document.getElementById('status').textContent.includes({json.dumps(shown)})")
    page.wait("document.getElementById('model').value === 'played'")


def test_nothing_is_loaded_from_elsewhere(page: Browser, real: Running, tmp_path: Path) -> None:
    """A real model answers, the page reports no error to the console, and its picture isn't blank."""
    page.messages.clear()
    page.open(real.address)
    page.wait("!document.getElementById('run').disabled")
    page.run("document.getElementById('model').value = 'g2p'")
    page.run("document.getElementById('model').dispatchEvent(new Event('change'))")
    page.run("document.getElementById('temperature').value = '0'")
    submit(page, "photosynthesis")
    page.wait("document.getElementById('status').textContent.startsWith('13 tokens in')")
    assert value(page, "output") == "F OW2 T OW0 S IH1 N TH AH0 S IH0 S"
    assert page.messages == []
    sources = page.run("performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)")
    assert set(sources) == {real.address}
    page.screenshot(tmp_path / "page.png")
    assert len((tmp_path / "page.png").read_bytes()) > 10_000
