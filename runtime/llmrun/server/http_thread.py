"""The listening socket and the thread that serves it: from before the model is loaded to the end of the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from llmrun.errors import ResourceError, UsageError
from llmrun.server.protocol import protocol_class
from llmrun.server.service import Service

_SEND_BUFFER = 64 << 10  # a client that does not read is noticed after this and the transport's own 64 KiB


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UsageError: there is no such address.
        ResourceError: the port is taken, or not ours to take.
    """
    try:
        ((family, _, _, _, address), *_) = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}.") from None
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        sock.bind(address)
        sock.listen(512)
    except OSError as error:
        sock.close()
        raise ResourceError(f"{host}, port {port}: {error.strerror}. Choose another --port.", code="E505") from None
    return sock


class _Server(uvicorn.Server):
    """uvicorn, without its own idea of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to llmrun."""
        yield


class HttpThread:
    """Serves an application on a thread of its own."""

    def __init__(self, app: ASGIApp, service: Service, sock: socket.socket) -> None:
        """Start."""
        limits = service.limits
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL + 1)  # what matters is said by the guard
        config = uvicorn.Config(
            app,
            http=protocol_class(limits),
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=int(limits.max_header_bytes),
            timeout_keep_alive=limits.header_timeout,  # type: ignore[arg-type] - seconds, of any kind
            timeout_graceful_shutdown=limits.drain_timeout + 2,  # type: ignore[arg-type]
        )
        self._service, self._server, self._sock = service, _Server(config), sock
        self.address: tuple[str, int] = sock.getsockname()[:2]
        self._thread = threading.Thread(target=self._main, name="http", daemon=True)
        is_running = threading.Event()
        self._is_running = is_running
        self._thread.start()
        is_running.wait()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _main(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._service.started(asyncio.get_running_loop())
        self._service.on_over = lambda: setattr(self._server, "should_exit", True)
        self._is_running.set()
        watch = asyncio.create_task(self._watch())
        await self._server.serve(sockets=[self._sock])
        watch.cancel()

    async def _watch(self) -> None:
        while True:
            self._service.watch()
            await asyncio.sleep(1)
