"""The chat page as `llmrun serve` serves it, with the demo model behind it."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser.page import LAST, ask, wait, wait_until_done

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llmrun.commands.serve") is None or importlib.util.find_spec("uvicorn") is None,
    reason="no `llmrun serve` here, or not the packages that it needs",
)


@pytest.fixture
def url(packed_demo: Callable[..., Path], tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "llmrun", "serve", str(packed_demo(1, "q4")), "--port", str(port)]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(url + "health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_the_served_page_streams_stops_and_goes_on(tab: Any, url: str) -> None:
    tab.goto(url)
    wait(tab, "document.title !== 'llmrun'")  # the model's name has come
    tab.click("#open-settings")
    tab.fill("#temperature", "0")
    tab.fill("#max_tokens", "300")
    tab.click("#save")
    ask(tab, "Tell me of the king.")
    wait(tab, "document.querySelector('.assistant .body').textContent.length > 20")
    tab.press("#prompt", "Escape")
    wait_until_done(tab)
    tab.click("#open-settings")
    tab.fill("#max_tokens", "100")  # some tens come at once, and those have no speed
    tab.click("#save")
    ask(tab, "And the queen?")
    wait_until_done(tab)
    assert tab.inner_text(LAST)
    assert "tokens/s" in tab.inner_text(".assistant:last-child .tools")
    assert tab.is_hidden("#trouble")
