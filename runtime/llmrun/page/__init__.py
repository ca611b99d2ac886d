"""The chat page: one file without a build step or outside resources, and the policy that holds it to that.

Style and script stand in the page; the policy admits them by their digests, and connections to the page's own server,
and nothing else. So whatever a model writes, the browser runs no other code and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path


def read_page() -> tuple[bytes, str]:
    """Return the page, and the Content-Security-Policy to send with it."""
    page = Path(__file__).with_name("index.html").read_bytes()
    return page, content_security_policy(page)


def content_security_policy(page: bytes) -> str:
    """Return the policy of a page whose style and script elements have no attributes."""

    def digests(element: str) -> str:
        texts = re.findall(f"<{element}>(.*?)</{element}>".encode(), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
