"""What a request must pass before a route sees it: size of its headers, Host, Origin, key, and the kind of its body.

A page of another origin that the user's browser has open may send requests to a server on loopback (and after DNS
rebinding read the answers). Hence Host is compared with the names that the server goes by, an Origin must be the
server's own or allowed, and a body must be application/json, which a browser sends across origins only after asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmrun import console
from llmrun.server.errors import ApiError, as_api_error
from llmrun.server.limits import Limits
from llmrun.server.responses import error_response

OPEN_PATHS = ("/", "/health")  # no key: a page without secrets, and whether the server lives
LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))
LINGER_S = 1.0  # closing with unread data in the socket resets the connection, and the client loses the response

_ABSOLUTE = re.compile(rb"https?://([^/]*)(/.*)?", re.IGNORECASE | re.DOTALL)
_FIELD_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(?:[ \t]*,[ \t]*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:@/\[\]]+)(?::[0-9]{1,5})?")


class ClientGoneError(Exception):
    """The client has left: there is nobody to answer."""


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        keys: any of these; none: everybody.
        hosts: names that a Host header may have, without a port; None: any.
        origins: other origins whose pages may ask, "*" for all.
    """

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = LOOPBACK
    origins: tuple[str, ...] = ()

    def has_key(self, header: str) -> bool:
        """Tell whether an Authorization header holds a key; takes the same time for every wrong one."""
        scheme, _, given = header.partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        found = False
        for key in self.keys:
            found |= hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest())
        return found and scheme.lower() == "bearer"


class _Incoming:
    """A request's body; what nobody reads before the response has ended is discarded."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        self._receive = receive
        self.is_read = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"

    async def receive(self) -> Message:
        """Return the next message from the client."""
        message = await self._receive()
        self.is_read = self.is_read or not message.get("more_body", False)  # a client that left sends no more
        return message

    async def discard(self) -> None:
        """Read what is left, for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self.is_read:
                    await self.receive()


class Guard:
    """ASGI middleware; turns every error into a response, and ends no process."""

    def __init__(self, app: ASGIApp, limits: Limits, access: Access, responded: Callable[[int], None]) -> None:
        """`responded` is told the status of each response."""
        self._app, self._limits, self._access, self._responded = app, limits, access, responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        target = _ABSOLUTE.fullmatch(scope["raw_path"])
        if target is not None:  # RFC 9112, 3.2.2: a proxy's form
            path = target[2] or b"/"
            scope = {**scope, "raw_path": path, "path": unquote(path.decode("ascii"))}
        has_started = False
        headers = Headers(scope=scope)
        cors = self._cors(headers)
        incoming = _Incoming(headers, receive)

        async def sending(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                self._responded(message["status"])
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff"), *cors]
            elif not incoming.is_read and not message.get("more_body", False):
                # All of the response is on its way; its end, with which uvicorn may close the connection, comes after.
                await send({**message, "more_body": True})
                await incoming.discard()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            self._check_headers(scope, headers, None if target is None else target[1].decode("ascii"))
            if scope["method"] == "OPTIONS" and cors:
                await Response(status_code=204, headers={"access-control-max-age": "600"})(
                    scope, incoming.receive, sending
                )
                return
            self._check_request(scope, headers)
            await self._app(scope, incoming.receive, sending)
        except ClientGoneError:
            return
        except Exception as error:
            known = as_api_error(error)
            if known.status == 500:
                console.show_traceback(error)
                console.say(console.error_line(error))
            if not has_started:
                await error_response(known)(scope, incoming.receive, sending)
            else:
                raise

    def _check_headers(self, scope: Scope, headers: Headers, authority: str | None) -> None:
        """Refuse headers that no route should see; `authority`: the host in the request's target, if it has one."""
        limits = self._limits
        size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["raw_path"])
        if len(scope["headers"]) > limits.max_headers or size + len(scope["query_string"]) > limits.max_header_bytes:
            raise ApiError(431, "too many headers, or too long ones.", code="headers_too_large")
        if "transfer-encoding" in headers and "content-length" in headers:  # two lengths: a proxy may believe the other
            raise ApiError(400, "the request has both Transfer-Encoding and Content-Length.", code="bad_framing")
        host = headers.get("host", "")
        if authority is not None:
            self._check_host(authority)
        if "host" in headers or scope["path"] != "/health":  # HAProxy's probe has none, a browser's request always
            self._check_host(host)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host and not self._is_allowed(origin):
            raise ApiError(403, f"pages of {origin[:100]!r} may not ask: --cors-origin allows them.", code="bad_origin")

    def _check_host(self, host: str) -> None:
        parts = _HOST.fullmatch(host)
        name = "" if parts is None else parts[1].lower().rstrip(".")
        if self._access.hosts is not None and name not in self._access.hosts:
            raise ApiError(
                403, f"the Host {host[:100]!r} is not this server's: --allowed-host adds a name.", code="bad_host"
            )

    def _check_request(self, scope: Scope, headers: Headers) -> None:
        access = self._access
        if access.keys and scope["path"] not in OPEN_PATHS and not access.has_key(headers.get("authorization", "")):
            raise ApiError(401, "no API key, or a wrong one: send `Authorization: Bearer KEY`.", code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(
                    415, f"the body is {kind[:60] or 'of no type'!r}: expected application/json.", code="bad_type"
                )
            if headers.get("content-encoding", "identity").lower() != "identity":
                raise ApiError(415, "the body is compressed: send it as it is.", code="bad_encoding")

    def _is_allowed(self, origin: str) -> bool:
        return "*" in self._access.origins or origin in self._access.origins

    def _cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        origin = headers.get("origin")
        if origin is None or not self._is_allowed(origin):
            return []
        # What a client library sends of its own (OpenAI's: x-stainless-*) must be allowed by name.
        asked = headers.get("access-control-request-headers", "").strip()
        allowed = asked if _FIELD_NAMES.fullmatch(asked) else "authorization, content-type"
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-headers", allowed.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-expose-headers", b"retry-after, x-should-retry, x-llmrun-ignored"),
            (b"vary", b"origin, access-control-request-headers"),
        ]


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """Return a request's body.

    Raises:
        ApiError: 413 or 408.
        ClientGoneError: the client left.
    """
    too_large = ApiError(413, f"the body is larger than {limits.max_body_bytes} bytes.", code="body_too_large")
    length = Headers(scope=scope).get("content-length", "")
    if length.isdigit() and int(length[:20]) > limits.max_body_bytes:
        raise too_large
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > limits.max_body_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {limits.body_timeout:g} s.", code="body_timeout") from None
