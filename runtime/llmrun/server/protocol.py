"""Connections: uvicorn's HTTP/1.1 protocol with the deadlines and bounds that it lacks (measured: none for slow clients).

    from the connection, and from the end of a response, to the end of a request's headers    header_timeout
    a response that the client does not read                                                  write_timeout
    connections beyond max_connections                                                        503, closed after LINGER_S
    and beyond as many that are told so                                                       503, closed at once
    a request's body that is not there when the response has ended                            closed

The time and size of a body are the application's business, as is what comes of it behind a refusal (`guard.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llmrun.server.errors import ApiError
from llmrun.server.guard import LINGER_S
from llmrun.server.limits import Limits


class BoundedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, limits: Limits, refused: set[BoundedProtocol], **arguments: Any) -> None:
        """`refused`: of all connections, those that are told so."""
        super().__init__(**arguments)
        self._limits, self._refused = limits, refused
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it."""
        if len(self.connections) >= self._limits.max_connections:
            self.transport = transport
            error = ApiError(
                503, f"{self._limits.max_connections} connections are open already.", code="too_many_connections"
            )
            body = json.dumps(error.body()).encode()
            head = (
                f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            )
            transport.write(head.encode() + b"retry-after: 1\r\nconnection: close\r\n\r\n" + body)
            if len(self._refused) < self._limits.max_connections:
                self._refused.add(self)
                with contextlib.suppress(OSError):  # reset already
                    transport.write_eof()
                self.loop.call_later(LINGER_S, self._end)
            else:
                self._end()
            return
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes of requests."""
        if self.flow is None or self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # which it is again when the response has ended
            self._stop_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._stop_header_timer()
        self._stop_write_timer()
        self._refused.discard(self)
        if self.flow is not None:
            super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for the next request, or leave if the rest of this one is not wanted."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(self._limits.write_timeout, self.transport.abort)
        elif self.conn.their_state is h11.SEND_BODY:
            self._end()
        elif self.cycle is None or self.cycle.response_complete:
            self._expect_headers()

    def pause_writing(self) -> None:
        """Begin to lose patience: the client does not read."""
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self._limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client reads again."""
        self._stop_write_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection."""
        super().timeout_keep_alive_handler()
        self._end()

    def _expect_headers(self) -> None:
        self._stop_header_timer()
        self._header_timer = self.loop.call_later(self._limits.header_timeout, self._end)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _end(self) -> None:
        """Close, and do not wait for ever for the client to read what is left."""
        self.transport.close()
        self.loop.call_later(self._limits.write_timeout, self.transport.abort)


def protocol_class(limits: Limits) -> Any:
    """Return what uvicorn calls to make a connection's protocol."""
    return functools.partial(BoundedProtocol, limits, set())
