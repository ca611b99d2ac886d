"""The chat page under the hands of a test."""

from __future__ import annotations

import time
from typing import Any

LAST = ".assistant:last-child .body"


def ask(tab: Any, text: str) -> None:
    tab.fill("#prompt", text)
    tab.press("#prompt", "Enter")


def wait(tab: Any, condition: str) -> None:
    """Wait until an expression holds; playwright's own way evaluates inside the page, which its policy forbids."""
    until = time.monotonic() + 10
    while not tab.evaluate(condition):
        assert time.monotonic() < until, condition
        time.sleep(0.02)


def wait_until_done(tab: Any) -> None:
    wait(tab, "document.querySelector('#send').textContent === 'Send'")
