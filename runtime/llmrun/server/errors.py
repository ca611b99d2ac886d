"""Errors as OpenAI's clients expect them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

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
    """A request that is refused or failed; `param` names the field that is at fault, `allow` the methods that are not."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.allow = retry_after, allow

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


def as_api_error(error: BaseException) -> ApiError:
    """Return what an error of the engine or of ours means to a client; bugs keep their details to the server's log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        is_too_long = error.code == "E204"
        return bad(str(error), "messages" if is_too_long else None, "context_length_exceeded" if is_too_long else None)
    if isinstance(error, NumericError):
        return ApiError(500, str(error), code="numeric_error")
    if isinstance(error, PeerError):
        return ApiError(503, str(error), code="peer_lost")
    if isinstance(error, (ResourceError, MemoryError)):
        return ApiError(503, str(error) or "out of memory.", code="no_memory", retry_after=1)
    if isinstance(error, LlmpackError):
        return ApiError(500, str(error), code="internal_error")
    return ApiError(500, f"{type(error).__name__} (a bug of llmrun; its log says more).", code="internal_error")
