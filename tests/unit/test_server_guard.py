"""What a request must pass before a route sees it, without a network."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llmrun.server import guard
from llmrun.server.errors import ApiError
from llmrun.server.guard import Access, ClientGoneError, Guard, read_body
from llmrun.server.limits import Limits
from llmrun.server.responses import Json


def part(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


class Exchange:
    """One request through a guard, without a network."""

    def __init__(self, access: Access, fails: Exception | None = None, *, begins: bool = False) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            self.path = scope["path"]
            if scope["method"] == "POST":
                await receive()
            if begins:
                await send({"type": "http.response.start", "status": 200})
            if fails is not None:
                raise fails
            await Json({"ok": True})(scope, receive, send)

        self.statuses: list[int] = []
        self.path = ""  # that the application saw
        self.sent: list[Any] = []
        self.body: list[dict[str, Any]] = [part(b"{}", False)]  # that the client sends
        self._guard = Guard(app, Limits(), access, self.statuses.append)

    def ask(
        self, method: str = "GET", path: str = "/v1/models", **headers: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        self.sent = sent = []
        coming = list(self.body)
        raw_path, _, query = path.partition("?")
        all_headers = {"host": "127.0.0.1:8000", **{name.replace("_", "-"): value for name, value in headers.items()}}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in all_headers.items() if value is not None]
        scope = {
            "type": "http",
            "method": method,
            "path": raw_path,
            "raw_path": raw_path.encode(),
            "query_string": query.encode(),
            "headers": raw,
        }

        async def send(message: Any) -> None:
            sent.append({**message, "left": len(coming)})

        async def receive() -> Any:
            if not coming:
                await asyncio.sleep(60)
            return coming.pop(0)

        asyncio.run(self._guard(scope, receive, send))  # type: ignore[arg-type]
        got = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], got, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "LOCALHOST.:80"])
def test_the_servers_own_hosts(host: str) -> None:
    assert Exchange(Access()).ask(host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost:8000@evil", "::1"]
)
def test_a_rebound_host_is_refused(host: str) -> None:
    assert Exchange(Access()).ask(host=host)[0] == 403
    assert Exchange(Access(hosts=None)).ask(host=host)[0] == 200


def test_a_probe_of_health_needs_no_host() -> None:
    assert Exchange(Access()).ask(path="/health", host=None)[0] == 200
    assert Exchange(Access()).ask(path="/health", host="evil.example")[0] == 403
    assert Exchange(Access()).ask(path="/health", host=None, origin="http://evil.example")[0] == 403
    assert Exchange(Access()).ask(path="/v1/models", host=None)[0] == 403


def test_a_target_with_a_host_is_its_path() -> None:
    exchange = Exchange(Access(keys=("secret",)))
    assert exchange.ask(path="http://localhost:8000/health")[0] == 200
    assert exchange.ask(path="HTTP://localhost")[0] == 200
    assert exchange.path == "/"
    assert exchange.ask(path="http://localhost/v1/models/a%20b", authorization="Bearer secret")[0] == 200
    assert exchange.path == "/v1/models/a b"
    assert exchange.ask(path="http://localhost/v1/models")[0] == 401
    for target in ("http://evil.example/health", "http://localhost@evil.example/health", "http:///health"):
        assert exchange.ask(path=target)[0] == 403
    assert exchange.ask(path="http://localhost/health", host="evil.example")[0] == 403


def test_pages_of_other_origins_are_refused_unless_allowed() -> None:
    assert Exchange(Access()).ask(origin="http://127.0.0.1:8000")[0] == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:8001"):
        status, headers, _ = Exchange(Access()).ask(origin=origin)
        assert (status, "access-control-allow-origin" in headers) == (403, False)
    status, headers, _ = Exchange(Access(origins=("https://good.example",))).ask(origin="https://good.example")
    assert (status, headers["access-control-allow-origin"]) == (200, "https://good.example")
    assert "origin" in headers["vary"]  # a cache must not give one page what was said to another
    exposed = headers["access-control-expose-headers"]  # a page cannot read others
    assert exposed == "retry-after, x-should-retry, x-llmrun-ignored"
    status, headers, _ = Exchange(Access(keys=("k",), origins=("*",))).ask("OPTIONS", origin="https://any.example")
    assert (status, "authorization" in headers["access-control-allow-headers"]) == (204, True)
    assert "access-control-allow-origin" not in Exchange(Access()).ask()[1]
    assert Exchange(Access(keys=("k",))).ask("OPTIONS")[0] == 401


@pytest.mark.parametrize("asked", ["authorization,content-type,x-stainless-os,x-stainless-retry-count", "x-a, X-B"])
def test_headers_of_client_libraries_are_allowed_by_name(asked: str) -> None:
    exchange = Exchange(Access(origins=("https://app.example",)))
    options: dict[str, str] = {"origin": "https://app.example", "access_control_request_headers": asked}
    status, headers, _ = exchange.ask("OPTIONS", **options)
    assert (status, headers["access-control-allow-headers"]) == (204, asked)
    for wrong in ("x\u00e9", "a b"):
        _, headers, _ = exchange.ask("OPTIONS", **{**options, "access_control_request_headers": wrong})
        assert headers["access-control-allow-headers"] == "authorization, content-type"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer secretx", "Bearer ß"]
)
def test_a_wrong_key_opens_nothing_but_health_and_the_page(header: str) -> None:
    exchange = Exchange(Access(keys=("secret", "other")))
    status, headers, body = exchange.ask(authorization=header)
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert exchange.ask(path="/health", authorization=header)[0] == 200
    for path in ("/metrics", "/version", "/openapi.json"):
        assert exchange.ask(path=path, authorization=header)[0] == 401


@pytest.mark.parametrize("header", ["Bearer secret", "bearer other", "Bearer  secret "])
def test_a_right_key_opens(header: str) -> None:
    assert Exchange(Access(keys=("secret", "other"))).ask(authorization=header)[0] == 200


def test_a_body_must_be_json_and_as_it_is() -> None:
    exchange = Exchange(Access())
    assert exchange.ask("POST")[0] == 415
    assert exchange.ask("POST", content_type="text/plain")[0] == 415
    assert exchange.ask("POST", content_type="application/json", content_encoding="gzip")[0] == 415
    for kind in ("application/json; charset=utf-8", "Application/JSON ; charset=utf-8"):
        assert exchange.ask("POST", content_type=kind, content_encoding="Identity")[0] == 200


def test_two_lengths_of_a_body_are_refused() -> None:
    json_body: dict[str, str] = {"content_type": "application/json", "content_length": "2"}
    assert Exchange(Access()).ask("POST", **json_body)[0] == 200
    assert Exchange(Access()).ask("POST", **json_body, transfer_encoding="chunked")[0] == 400


def test_headers_are_bounded_in_number_and_size() -> None:
    exchange, host = Exchange(Access()), len("host127.0.0.1:8000")
    assert exchange.ask(**{f"x{i}": "1" for i in range(63)})[0] == 200
    assert exchange.ask(**{f"x{i}": "1" for i in range(64)})[0] == 431
    most = (16 << 10) - host - len("/health")
    for fills in (
        lambda size: {"path": "/health", "x": "1" * (size - 1)},
        lambda size: {"path": "/health", "x" * (size - 1): "1"},
        lambda size: {"path": "/health?" + "x" * size},
        lambda size: {"path": "/health" + "x" * size},
    ):
        assert [exchange.ask(**fills(size))[0] for size in (most, most + 1)] == [200, 431]


def test_a_bug_is_an_error_object_without_details(capfd: pytest.CaptureFixture[str]) -> None:
    exchange = Exchange(Access(), fails=ValueError("secret detail"))
    status, headers, body = exchange.ask()
    assert (status, exchange.statuses, headers["x-content-type-options"]) == (500, [500], "nosniff")
    assert b"secret detail" not in body
    assert "secret detail" in capfd.readouterr().err  # who runs the server gets to know


def test_a_bug_in_the_midst_of_a_response_does_not_begin_another(capfd: pytest.CaptureFixture[str]) -> None:
    exchange = Exchange(Access(), fails=ValueError("detail"), begins=True)
    with pytest.raises(
        ValueError, match="detail"
    ):  # uvicorn then closes the connection, so the client sees that it is not all
        exchange.ask()
    assert [message["type"] for message in exchange.sent] == ["http.response.start"]
    assert "detail" in capfd.readouterr().err


def test_a_client_that_left_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    exchange = Exchange(Access(), fails=ClientGoneError(), begins=True)
    assert exchange.ask()[2] == b""
    assert (len(exchange.sent), capfd.readouterr().err) == (1, "")


def test_a_body_is_bounded_in_size_and_time() -> None:
    def read(limits: Limits, *messages: Any, headers: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
        queue = list(messages)

        async def receive() -> Any:
            if not queue:
                await asyncio.sleep(60)
            return queue.pop(0)

        return asyncio.run(read_body({"headers": headers}, receive, limits))

    small = Limits(max_body_bytes=4, body_timeout=0.05)
    assert read(small, part(b"ab"), part(b"cd", False)) == b"abcd"
    with pytest.raises(ApiError) as caught:
        read(small, part(b"ab"), part(b"cde", False))
    assert caught.value.status == 413
    assert read(small, part(b"abcd", False), headers=((b"content-length", b"4"),)) == b"abcd"
    for length in (b"5", b"1" * 20):
        with pytest.raises(ApiError) as caught:  # before any of it comes
            read(small, headers=((b"content-length", length),))
        assert caught.value.status == 413
    with pytest.raises(ApiError) as caught:
        read(small, part(b"ab"))
    assert caught.value.status == 408
    with pytest.raises(ClientGoneError):
        read(small, part(b"ab"), {"type": "http.disconnect"})


@pytest.mark.parametrize("length", [{"content_length": "4"}, {"transfer_encoding": "chunked"}])
@pytest.mark.parametrize("last", [part(b"cd", False), {"type": "http.disconnect"}])
def test_a_refusal_is_sent_before_the_rest_of_the_body_and_ends_after_it(length: Any, last: Any) -> None:
    exchange = Exchange(Access(keys=("secret",)))
    exchange.body = [part(b"ab"), last]
    assert exchange.ask("POST", **length)[0] == 401
    seen = [(bool(message.get("body")), message.get("more_body", False), message["left"]) for message in exchange.sent]
    assert seen == [(False, False, 2), (True, True, 2), (False, False, 0)]


def test_a_response_does_not_wait_long_for_a_body_nor_at_all_for_none_or_one_that_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exchange = Exchange(Access(keys=("secret",)))
    exchange.body = []
    for length in (None, "0"):
        assert exchange.ask("POST", content_length=length)[0] == 401
        assert len(exchange.sent) == 2
    json_body: dict[str, str] = {"content_type": "application/json", "content_length": "2"}
    whole = Exchange(Access())
    assert whole.ask("POST", **json_body)[0] == 200
    assert len(whole.sent) == 2
    monkeypatch.setattr(guard, "LINGER_S", 0.01)
    exchange.body = [part(b"ab")]
    assert exchange.ask("POST", content_length="4")[0] == 401
    assert len(exchange.sent) == 3
