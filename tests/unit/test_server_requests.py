"""What the server makes of a request's bytes, without a server: every input is a call or an error that a client can read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, MutableMapping
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.requests import Event
from llmrun.server.errors import ApiError
from llmrun.server.guard import Access, ClientGoneError, Guard, read_body
from llmrun.server.json_body import parse_json
from llmrun.server.limits import Limits
from llmrun.server.openapi import document
from llmrun.server.responses import Json
from llmrun.server.schemas import ChatCall, CompletionCall, Schemas
from llmrun.server.service import Service
from llmrun.server.tasks import Answer, Choice
from llmrun.stats import Stats

LIMITS = Limits()
SCHEMAS = Schemas(LIMITS)
MESSAGES = [{"role": "user", "content": "a"}]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
near_misses = json_values | st.sampled_from(
    [-1, 0, 1, 2, 8, 9, 2**31, 1e308, "", "auto", [], {}, ["a"], [[1]], [1], {"1": 1}]
)


def attempt(work: Callable[[], Any]) -> ApiError | None:
    """Return the refusal, if it is one; nothing else may be raised, and what is returned keeps the bounds."""
    try:
        call = work()
    except ApiError as error:
        refusal = error
    else:
        if isinstance(call, (ChatCall, CompletionCall)):
            assert 1 <= call.sampled.n <= LIMITS.max_choices
            assert call.sampled.seed is None or 0 <= call.sampled.seed < 2**63
        return None
    assert (refusal.status, bool(refusal.message)) == (400, True)
    return refusal


@settings(max_examples=40)
@given(json_values)
def test_json_is_read_as_json_does(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), max_depth=64) == value


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_json_or_a_refusal(data: bytes) -> None:
    refusal = attempt(lambda: parse_json(data, max_depth=64))
    json.dumps(refusal and refusal.body(), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1, "a": 2}',
        b'{"b": [{"a": 1, "a": 1}]}',
        b'{"a": NaN}',
        b"[Infinity]",
        b"[-Infinity]",
        b"[1e999]",
        b"[" + b"9" * 65 + b"]",
        b'["\\ud800"]',
        b'{"\\udfff": 1}',
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b"[" * 65 + b"]" * 65,
        b"[" * 64 + b"{}" + b"]" * 64,
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b"{} {}",
        b"",
        b"'a'",
    ],
)
def test_what_json_allows_and_we_do_not(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(data, max_depth=64)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_the_deepest_json_that_is_allowed() -> None:
    parse_json(b"[" * 64 + b"1" + b"]" * 64, max_depth=64)


@given(st.dictionaries(st.sampled_from(sorted(SCHEMAS.chat.fields)), near_misses, max_size=6))
def test_any_fields_make_a_chat_call_or_a_refusal(fields: dict[str, Any]) -> None:
    attempt(lambda: SCHEMAS.chat_call({"messages": MESSAGES, **fields}))


@given(st.dictionaries(st.sampled_from(sorted(SCHEMAS.completion.fields)), near_misses, max_size=6))
def test_any_fields_make_a_completion_call_or_a_refusal(fields: dict[str, Any]) -> None:
    attempt(lambda: SCHEMAS.completion_call({"prompt": "a", **fields}))


REFUSED: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", "1"),
    ("temperature", True),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("n", 0),
    ("n", 9),
    ("seed", 2**64),
    ("stop", ["a"] * 17),
    ("stop", "a" * 257),
    ("stop", [""]),
    ("stop", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("structured_outputs", {"yaml": 1}),
    ("structured_outputs", {"regex": "a", "json": {}}),
    ("structured_outputs", {"choice": []}),
    ("structured_outputs", {"regex": "a" * (65 << 10)}),
    ("min_tokens", 1),
    ("use_beam_search", True),
    ("stop_token_ids", [1]),
]
REFUSED_CHAT = [
    ("messages", []),
    ("messages", MESSAGES * 1025),
    ("messages", [{"role": "god", "content": "a"}]),
    ("messages", [{"role": "user", "content": 1}]),
    ("messages", [{"content": "a"}]),
    ("messages", "a"),
    ("top_logprobs", 1),
    ("max_tokens", 0),
    ("max_completion_tokens", 0),
    ("tools", [{"type": "function", "function": {"name": ""}}]),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 2),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("modalities", ["text", "audio"]),
    ("functions", [{"name": "f"}]),
]
REFUSED_COMPLETION = [
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", ["a", 1]),
    ("prompt", [1, "a"]),
    ("prompt", [1.5]),
    ("prompt", [-1]),
    ("prompt", ["a"] * 65),
    ("prompt", {}),
    ("prompt", None),
    ("max_tokens", 0),
    ("logprobs", 21),
    ("logprobs", True),
    ("best_of", 2),
    ("suffix", "b"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED + REFUSED_CHAT)
def test_a_chat_out_of_bounds_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        SCHEMAS.chat_call({"messages": MESSAGES, name: value})
    assert caught.value.status == 400


@pytest.mark.parametrize(("name", "value"), REFUSED + REFUSED_COMPLETION)
def test_a_completion_out_of_bounds_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        SCHEMAS.completion_call({"prompt": "a", name: value})
    assert caught.value.status == 400


TOOLS = [{"type": "function", "function": {"name": "f"}}]
NAMED = {"type": "function", "function": {"name": "f"}}
JSON_OBJECT = {"type": "json_object"}


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False, "top_logprobs": 1},
        {"tools": TOOLS, "tool_choice": "required", "response_format": JSON_OBJECT},
        {"tools": TOOLS, "tool_choice": NAMED, "guided_regex": "a"},
        {"stream": False, "stream_options": {"include_usage": True}},
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        SCHEMAS.chat_call({"messages": MESSAGES, **fields})
    assert caught.value.status == 400


def test_what_fields_mean_together() -> None:
    def call(**fields: Any) -> ChatCall:
        return SCHEMAS.chat_call({"messages": MESSAGES, **fields})

    chosen = [call(tools=TOOLS, tool_choice=choice).tool_choice for choice in ("none", "auto", "required", NAMED)]
    assert (chosen, call(tools=TOOLS).tool_choice, call().tool_choice) == (
        ["none", "auto", "required", "=f"],
        "auto",
        "none",
    )
    assert call(tools=TOOLS, response_format=JSON_OBJECT).sampled.grammar == ("json", {"type": "object"})
    forms = [call(structured_outputs={"json_object": wanted}).sampled.grammar for wanted in (True, False)]
    assert forms == [("json", {"type": "object"}), None]
    assert [call(**fields).top_logprobs for fields in ({}, {"logprobs": True})] == [None, 0]
    assert call(logprobs=True, top_logprobs=3).top_logprobs == 3
    assert call(max_tokens=5, max_completion_tokens=6).sampled.max_tokens == 6
    assert [SCHEMAS.completion_call({"prompt": "a", "n": 2, "best_of": n}).sampled.n for n in (2, None)] == [2, 2]
    assert call(stream=True, stream_options={"include_usage": True}).sampled.include_usage
    assert SCHEMAS.completion_call({"prompt": "a", "max_tokens": 0, "echo": True}).sampled.max_tokens == 0


def test_the_forms_of_a_prompt() -> None:
    forms = {"a": ["a"], ("a", "b"): ["a", "b"], (1, 2): [[1, 2]], ((1,), (2, 3)): [[1], [2, 3]], "": [""]}
    for prompt, expected in forms.items():
        given = json.loads(json.dumps(prompt))
        assert SCHEMAS.completion_call({"prompt": given}).prompts == expected


def test_a_null_is_as_if_not_given() -> None:
    body = {"messages": MESSAGES, "temperature": None, "n": None, "stop": None, "tools": None, "response_format": None}
    call = SCHEMAS.chat_call(body)
    assert (call.sampled.n, call.sampled.stop, call.sampled.sampling, call.tools) == (1, [], {}, [])


def test_unknown_fields_are_named() -> None:
    assert SCHEMAS.ignored(SCHEMAS.chat, {"messages": [], "foo": 1, "user": "x"}) == ["foo"]


def test_values_of_other_servers_mean_the_same() -> None:
    call = SCHEMAS.completion_call({"prompt": "a", "top_k": -1, "top_p": 0, "seed": -1, "repetition_penalty": 1.5})
    assert call.sampled.sampling == {"top_k": 0, "top_p": 1e-6, "repeat_penalty": 1.5}
    assert call.sampled.seed == 2**63 - 1


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}, "strict": True}}},
        {"structured_outputs": {"json": {"a": 1}}},
        {"guided_json": {"a": 1}},
    ],
)
def test_three_names_of_a_schema(field: dict[str, Any]) -> None:
    assert SCHEMAS.chat_call({"messages": MESSAGES, **field}).sampled.grammar == ("json", {"a": 1})


def test_the_document_refers_only_to_itself() -> None:
    text = json.dumps(document(SCHEMAS))
    names = set(document(SCHEMAS)["components"]["schemas"])
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in names


# What a request must pass before a route sees it


class Exchange:
    """One request through a guard, without a network."""

    def __init__(self, access: Access, limits: Limits = LIMITS, fails: Exception | None = None) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if fails is not None:
                raise fails
            await Json({"ok": True})(scope, receive, send)

        self.statuses: list[int] = []
        self._guard = Guard(app, limits, access, self.statuses.append)

    def ask(self, method: str = "GET", path: str = "/v1/models", **headers: str) -> tuple[int, dict[str, str], bytes]:
        sent: list[Any] = []
        all_headers = {"host": "127.0.0.1:8000", **{name.replace("_", "-"): value for name, value in headers.items()}}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in all_headers.items()]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": raw,
        }

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self._guard(scope, None, send))  # type: ignore[arg-type]
        got = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], got, sent[1]["body"]


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "LOCALHOST.:80"])
def test_the_servers_own_hosts(host: str) -> None:
    assert Exchange(Access()).ask(host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost:8000@evil", "::1"]
)
def test_a_rebound_host_is_refused(host: str) -> None:
    assert Exchange(Access()).ask(host=host)[0] == 403
    assert Exchange(Access(hosts=None)).ask(host=host)[0] == 200


def test_pages_of_other_origins_are_refused_unless_allowed() -> None:
    assert Exchange(Access()).ask(origin="http://127.0.0.1:8000")[0] == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:8001"):
        assert Exchange(Access()).ask(origin=origin)[0] == 403
    status, headers, _ = Exchange(Access(origins=("https://good.example",))).ask(origin="https://good.example")
    assert (status, headers["access-control-allow-origin"]) == (200, "https://good.example")
    status, headers, _ = Exchange(Access(keys=("k",), origins=("*",))).ask("OPTIONS", origin="https://any.example")
    assert (status, "authorization" in headers["access-control-allow-headers"]) == (204, True)
    assert "access-control-allow-origin" not in Exchange(Access()).ask()[1]


@pytest.mark.parametrize("asked", ["authorization,content-type,x-stainless-os,x-stainless-retry-count", "x-a, X-B"])
def test_headers_of_client_libraries_are_allowed_by_name(asked: str) -> None:
    exchange = Exchange(Access(origins=("https://app.example",)))
    options: dict[str, str] = {"origin": "https://app.example", "access_control_request_headers": asked}
    status, headers, _ = exchange.ask("OPTIONS", **options)
    assert (status, headers["access-control-allow-headers"]) == (204, asked)
    _, headers, _ = exchange.ask("OPTIONS", **{**options, "access_control_request_headers": "x\u00e9, a b"})
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
    assert exchange.ask(path="/metrics", authorization=header)[0] == 401


@pytest.mark.parametrize("header", ["Bearer secret", "bearer other", "Bearer  secret "])
def test_a_right_key_opens(header: str) -> None:
    assert Exchange(Access(keys=("secret", "other"))).ask(authorization=header)[0] == 200


def test_a_body_must_be_json_and_as_it_is() -> None:
    exchange = Exchange(Access())
    assert exchange.ask("POST")[0] == 415
    assert exchange.ask("POST", content_type="text/plain")[0] == 415
    assert exchange.ask("POST", content_type="application/json", content_encoding="gzip")[0] == 415
    assert exchange.ask("POST", content_type="application/json; charset=utf-8")[0] == 200


def test_two_lengths_of_a_body_are_refused() -> None:
    json_body = {"content_type": "application/json", "content_length": "2"}
    assert Exchange(Access()).ask("POST", **json_body)[0] == 200
    assert Exchange(Access()).ask("POST", **json_body, transfer_encoding="chunked")[0] == 400


def test_too_many_headers() -> None:
    assert Exchange(Access()).ask(**{f"x{i}": "1" for i in range(64)})[0] == 431
    assert Exchange(Access()).ask(x="1" * (16 << 10))[0] == 431


def test_a_bug_is_an_error_object_without_details() -> None:
    exchange = Exchange(Access(), fails=ValueError("secret detail"))
    status, _, body = exchange.ask()
    assert (status, exchange.statuses) == (500, [500])
    assert b"secret detail" not in body


def test_a_body_is_bounded_in_size_and_time() -> None:
    def read(limits: Limits, *messages: Any, headers: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
        queue = list(messages)

        async def receive() -> Any:
            if not queue:
                await asyncio.sleep(60)
            return queue.pop(0)

        return asyncio.run(read_body({"headers": headers}, receive, limits))

    def part(data: bytes, more: bool = True) -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": more}

    small = Limits(max_body_bytes=4, body_timeout=0.05)
    assert read(small, part(b"ab"), part(b"cd", False)) == b"abcd"
    with pytest.raises(ApiError) as caught:
        read(small, part(b"ab"), part(b"cde", False))
    assert caught.value.status == 413
    with pytest.raises(ApiError) as caught:
        read(small, headers=((b"content-length", b"5"),))
    assert caught.value.status == 413
    with pytest.raises(ApiError) as caught:
        read(small, part(b"ab"))
    assert caught.value.status == 408
    with pytest.raises(ClientGoneError):
        read(small, part(b"ab"), {"type": "http.disconnect"})


# Health


class FakeLoop:
    """An engine's loop of which only the numbers matter."""

    def __init__(self) -> None:
        self.numbers = Stats()

    def stats(self) -> Stats:
        return self.numbers


def test_health_is_stuck_when_there_is_work_and_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("llmrun.server.service.time.monotonic", lambda: now[0])
    service = Service(Limits(health_timeout=5), ["m"], "vllm", 8)
    assert service.health() == "loading"
    service.loop = loop = FakeLoop()  # type: ignore[assignment]
    service.state = "ready"

    def after(seconds: float, **numbers: int) -> str:
        now[0] += seconds
        loop.numbers = Stats(**numbers)
        service.watch()
        return service.health()

    assert after(60) == "ok"  # idle
    assert after(4, running=1, steps=1) == "ok"
    assert after(4, running=1, steps=2) == "ok"
    assert after(4, running=1, steps=2) == "ok"
    assert after(2, running=1, steps=2) == "stuck"
    assert after(1, running=1, steps=3) == "ok"
    assert after(6, waiting=1, steps=3) == "stuck"
    assert after(1, steps=3) == "ok"


def test_what_came_before_an_error_is_given_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(Limits(), ["m"], "vllm", 8)
    monkeypatch.setattr(service, "admit", lambda _: None)
    monkeypatch.setattr(service, "release", lambda _: None)

    async def forever() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def outcome() -> list[str]:
        async with Answer(service, forever, 1) as answer:
            choice = Choice(0, 0)
            on_event = answer._callback(choice)
            answer.choices.append(choice)
            for text in ("last", "words"):
                on_event(Event(cast("Any", None), None, text))
            await asyncio.sleep(0)
            answer.fail(ApiError(503, "a rank is lost"))
            seen = [event.text for _, event in await answer.events() or []]
            with pytest.raises(ApiError, match="a rank is lost"):
                await answer.events()
            return seen

    assert asyncio.run(outcome()) == ["last", "words"]
