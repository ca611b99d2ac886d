"""What the server makes of a request's bytes, without a server: every input is a call or an error that a client can read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.server.errors import ApiError
from llmrun.server.json_body import parse_json
from llmrun.server.limits import Limits
from llmrun.server.openapi import document
from llmrun.server.schemas import ChatCall, CompletionCall, Schemas

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


def test_a_key_that_occurs_twice_among_many_is_found_at_once() -> None:
    body = json.dumps({f"k{i}": 0 for i in range(200_000)}).replace("k199999", "k199998").encode()
    started = time.monotonic()
    with pytest.raises(ApiError, match="'k199998' occurs twice"):
        parse_json(body, max_depth=64)
    assert time.monotonic() - started < 2  # a search for each key took minutes


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
    ("seed", 2.0**60),  # a float may have been another number in the request
    ("stop", ["a"] * 17),
    ("stop", "a" * 257),
    ("stop", [""]),
    ("stop", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"\u00b2": 1}),
    ("logit_bias", {"\u0661": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "text", "schema": {"type": "object"}}),
    ("structured_outputs", {"yaml": 1}),
    ("structured_outputs", {"regex": "a", "json": {}}),
    ("structured_outputs", {"choice": []}),
    ("structured_outputs", {"regex": "a" * (65 << 10)}),
    ("min_tokens", 1),
    ("min_tokens", False),
    ("use_beam_search", True),
    ("use_beam_search", 0),
    ("temperature", "1" * 10_000),
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
    assert len(caught.value.message) < 1000


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
        {"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"json_object": True}},
        {"tools": TOOLS, "tool_choice": NAMED, "guided_regex": "a"},
        {"guided_regex": "a", "structured_outputs": {"regex": "b"}},
        {"guided_regex": "a", "structured_outputs": {"grammar": "a"}},
        {"response_format": JSON_OBJECT, "structured_outputs": {"choice": ["a"]}},
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
    message = {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}], "mood": 1, "audio": None}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"foo": 1}, "returns": {}}}
    options = {"include_usage": True, "x": 1}
    body = {"messages": [message, message], "tools": [tool], "stream_options": options, "stop": ["a"], "n": {"a": 1}}
    assert SCHEMAS.ignored(SCHEMAS.chat, body) == [
        "messages.content.cache",
        "messages.mood",
        "tools.function.returns",
        "stream_options.x",
    ]
    assert SCHEMAS.ignored(SCHEMAS.chat, [body]) == []


def test_as_many_tools_as_openai_takes() -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(128)]
    assert SCHEMAS.chat_call({"messages": MESSAGES, "tools": tools}).tools == tools
    with pytest.raises(ApiError, match="a list of 129"):
        SCHEMAS.chat_call({"messages": MESSAGES, "tools": [*tools, tools[0]]})


def test_values_of_other_servers_mean_the_same() -> None:
    call = SCHEMAS.completion_call({"prompt": "a", "top_k": -1, "top_p": 0, "seed": -1, "repetition_penalty": 1.5})
    assert call.sampled.sampling == {"top_k": 0, "top_p": 1e-6, "repeat_penalty": 1.5}
    assert call.sampled.seed == 2**63 - 1


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}, "strict": True}}},
        {"response_format": {"type": "json_object", "schema": {"a": 1}}},
        {"structured_outputs": {"json": {"a": 1}}},
        {"guided_json": {"a": 1}},
        {
            "guided_json": {"a": 1},
            "structured_outputs": {"json": {"a": 1}},
        },  # to old servers and new ones, as guidance does
    ],
)
def test_the_names_of_a_schema(field: dict[str, Any]) -> None:
    assert SCHEMAS.chat_call({"messages": MESSAGES, **field}).sampled.grammar == ("json", {"a": 1})


def test_the_document_refers_only_to_itself() -> None:
    text = json.dumps(document(SCHEMAS))
    names = set(document(SCHEMAS)["components"]["schemas"])
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in names
