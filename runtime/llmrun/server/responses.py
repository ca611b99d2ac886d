"""Whole responses: JSON, and errors."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

from llmrun.server.errors import ApiError


class Json(JSONResponse):
    """A JSON response; half of a surrogate pair, which a model may write, becomes a question mark."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


def error_response(error: ApiError) -> Json:
    """Return an error's response."""
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if not error.may_retry:
        headers["x-should-retry"] = "false"  # OpenAI's clients ask twice more after a 408
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.allow is not None:
        headers["allow"] = error.allow
    return Json(error.body(), error.status, headers)
