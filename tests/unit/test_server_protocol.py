"""Bounds of connections, with an application that needs no model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from llmrun.server.guard import Access, Guard
from llmrun.server.limits import Limits
from llmrun.server.protocol import protocol_class
from llmrun.server.responses import Json

HEAD = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLOW_S, LONG_S = 0.3, 30.0  # of an answer; of what must not be waited for
LARGE = 16 << 20  # more than sockets hold
FAST = Limits(header_timeout=0.1, write_timeout=0.5, max_connections=2)

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/slow":
        await asyncio.sleep(SLOW_S)
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200})
        for _ in range(LARGE >> 16):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await send({"type": "http.response.body"})
        return
    await Json({"path": scope["path"]})(scope, receive, send)


def factory(limits: Limits) -> tuple[Callable[[], Any], ServerState]:
    """Return what makes the protocol of a connection to `app`, and what counts them."""
    guard = Guard(app, limits, Access(), lambda _: None)
    make, state = protocol_class(limits), ServerState()
    config = uvicorn.Config(
        guard, http=make, ws="none", lifespan="off", log_config=None, timeout_keep_alive=int(LONG_S)
    )
    config.load()
    return lambda: make(config=config, server_state=state, app_state={}), state


class StuckTransport(asyncio.Transport):
    """A connection whose client takes nothing: what was written never leaves, so closing it does not end it."""

    def __init__(self, protocol: Any) -> None:
        super().__init__()
        self.written, self.has_ended, self._is_closing, self.protocol = b"", False, False, protocol
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        self.written += data

    def write_eof(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True

    def abort(self) -> None:
        self.has_ended = self._is_closing = True
        self.protocol.connection_lost(None)

    def resume_reading(self) -> None:
        pass


@contextlib.asynccontextmanager
async def listening(limits: Limits) -> AsyncIterator[tuple[Connect, ServerState]]:
    """Serve `app`; gives what connects to it."""
    make, state = factory(limits)
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield lambda: asyncio.open_connection("127.0.0.1", port, limit=4096), state
    finally:
        server.close()


def run(limits: Limits, work: Callable[[Connect, ServerState], Awaitable[None]]) -> None:
    async def serve() -> None:
        async with listening(limits) as (connect, state), asyncio.timeout(LONG_S / 2):
            await work(connect, state)

    asyncio.run(serve())


async def answers(reader: asyncio.StreamReader) -> list[bytes]:
    """Return the bodies of all answers, once the server has closed the connection."""
    with contextlib.suppress(ConnectionResetError):
        return [part.rpartition(b"\r\n\r\n")[2] for part in (await reader.read(-1)).split(b"HTTP/1.1 ")[1:]]
    return []


@pytest.mark.parametrize("start", [b"", b"GET / HT", HEAD % b"/", HEAD % b"/" + b"GET / HT"])
def test_a_connection_without_a_whole_request_is_closed(start: bytes) -> None:
    async def work(connect: Connect, state: ServerState) -> None:
        reader, writer = await connect()
        writer.write(start)
        assert await answers(reader) == [b'{"path": "/"}'] * start.startswith(HEAD % b"/")
        writer.close()
        while state.connections:
            await asyncio.sleep(0.01)

    run(FAST, work)


@pytest.mark.parametrize("paths", [[b"/slow"], [b"/", b"/slow"], [b"/slow", b"/slow", b"/"]], ids=repr)
@pytest.mark.parametrize("together", [True, False])
def test_an_answer_may_take_longer_than_headers(paths: list[bytes], together: bool) -> None:
    async def work(connect: Connect, _state: ServerState) -> None:
        reader, writer = await connect()
        if together:
            writer.write(b"".join(HEAD % path for path in paths))
        else:
            for path in paths:
                writer.write(HEAD % path)
                await asyncio.sleep(0.02)
        assert await answers(reader) == [b'{"path": "%s"}' % path for path in paths]

    run(FAST, work)


def test_a_client_that_reads_slowly_gets_all_and_one_that_does_not_is_cut_off() -> None:
    async def work(connect: Connect, state: ServerState) -> None:
        reader, writer = await connect()
        writer.write(HEAD % b"/large")
        received = 0
        while piece := await reader.read(1 << 16):
            received += len(piece)
            await asyncio.sleep(0.005)  # all in all longer than write_timeout
        assert received > LARGE
        reader, writer = await connect()
        writer.write(HEAD % b"/large")
        await asyncio.sleep(0.05)
        assert state.connections
        while state.connections:
            await asyncio.sleep(0.01)

    run(FAST, work)


def test_a_client_that_reads_again_is_not_cut_off_for_what_it_did_before() -> None:
    async def work() -> None:
        protocol = factory(Limits(write_timeout=0.05))[0]()
        transport = StuckTransport(protocol)
        protocol.pause_writing()
        protocol.resume_writing()
        await asyncio.sleep(0.1)
        assert not transport.has_ended
        protocol.pause_writing()
        await asyncio.sleep(0.1)
        assert transport.has_ended

    asyncio.run(work())


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        HEAD % b"/",
        HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") % b"/",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n",
    ],
    ids=["silent", "keep-alive", "close", "body"],
)
def test_a_connection_ends_though_its_client_takes_nothing(request_: bytes) -> None:
    async def work() -> None:
        make, state = factory(FAST)
        protocol = make()
        transport = StuckTransport(protocol)
        if request_:
            protocol.data_received(request_)
        async with asyncio.timeout(LONG_S):
            while not transport.has_ended:
                await asyncio.sleep(0.01)
                if b"POST" in request_ and not transport.is_closing():
                    protocol.data_received(b"x")
        assert (b"HTTP/1.1 " in transport.written) == bool(request_)
        assert not state.connections

    asyncio.run(work())


def test_connections_beyond_the_most_are_refused_and_so_many_of_them_may_still_send() -> None:
    async def work() -> None:
        make, _ = factory(FAST)
        transports = [StuckTransport(make()) for _ in range(6)]
        refused = [b" 503 " in transport.written for transport in transports]
        assert refused == [False] * 2 + [True] * 4
        assert [transport.is_closing() for transport in transports] == [False] * 4 + [True] * 2
        transports[2].protocol.data_received(HEAD % b"/")
        assert transports[2].protocol.cycle is None, "a refused request is answered"
        transports[3].abort()
        transports += [StuckTransport(make()) for _ in range(2)]
        assert [transport.is_closing() for transport in transports[6:]] == [False, True]
        async with asyncio.timeout(LONG_S):
            while not all(transport.has_ended for transport in transports):
                await asyncio.sleep(0.01)

    asyncio.run(work())
