"""The browser tests: Debian's chromium, driven by playwright. `make test-browser` installs both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from browser.openai_server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for one module of tests: while playwright runs, its event loop is the thread's, and asyncio.run refuses."""
    api: Any = pytest.importorskip("playwright.sync_api", reason="no playwright: make test-browser")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on PATH: make test-browser")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Page]:
    """A page that fails the test for anything it complains about; `tab.allowed` lists what it may complain about."""
    context = browser.new_context(viewport={"width": 900, "height": 700}, color_scheme="light")
    context.set_default_timeout(10_000)
    page: Any = context.new_page()
    page.complaints, page.allowed = [], []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    context.close()
    assert [text for text in page.complaints if not any(part in text for part in page.allowed)] == []


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the protocol that plays parts."""
    server = Server()
    yield server
    server.shutdown()
    server.server_close()
