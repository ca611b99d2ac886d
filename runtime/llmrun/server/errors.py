"""Errors as OpenAI's clients expect them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from llmrun.errors import LlmpackError, NumericError, PeerError, ResourceError, UsageError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that is refused or failed; `param` names the field that is at fault, `allow` the methods that are not.

    `may_retry`: False where a client should not ask again, though the status alone says that it might.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
        may_retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.allow, self.may_retry = retry_after, allow, may_retry

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the response, or of an event in a stream."""
        kind = _TYPES.get(self.status, _TYPES[400] if self.status < 500 else _TYPES[500])
        # A message may quote what the client sent: no lone surrogate, no novel.
        message = self.message.encode("utf-8", "backslashreplace").decode()[:1000]
        param = None if self.param is None else self.param.encode("utf-8", "backslashreplace").decode()[:200]
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that nobody could carry out."""
    return ApiError(400, message, param=param, code=code)


@contextlib.contextmanager
def naming_field(prompt: str, max_seq_len: int) -> Iterator[None]:
    """Make an error of what does not fit the context name the request's field: `prompt`, or max_tokens where that fits.

    It begins with OpenAI's words, by which clients know it and shorten their messages (LiteLLM, and what is built on it).

    Raises:
        ApiError: 400, in place of the engine's error.
    """
    try:
        yield
    except UsageError as error:
        if error.code not in ("E204", "E210"):
            raise
        message = f"This model's maximum context length is {max_seq_len} tokens: {error}"
        raise bad(message, prompt if error.code == "E204" else "max_tokens", "context_length_exceeded") from None


def as_api_error(error: BaseException) -> ApiError:
    """Return what an error of the engine or of ours means to a client; bugs keep their details to the server's log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return bad(str(error))
    if isinstance(error, NumericError):
        return ApiError(500, str(error), code="numeric_error")
    if isinstance(error, PeerError):
        return ApiError(503, str(error), code="peer_lost")
    if isinstance(error, (ResourceError, MemoryError)):
        return ApiError(503, str(error) or "out of memory.", code="no_memory", retry_after=1)
    if isinstance(error, LlmpackError):
        return ApiError(500, str(error), code="internal_error")
    return ApiError(500, f"{type(error).__name__} (a bug of llmrun; its log says more).", code="internal_error")
