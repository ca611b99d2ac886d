"""Grammars, tools and numbers of the server, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.artifact import open_artifact
from llmrun.constraint import allowed_tokens
from llmrun.errors import UsageError
from llmrun.requests import Event
from llmrun.server.chats import _Writer as ChatWriter
from llmrun.server.errors import ApiError
from llmrun.server.grammar import CACHE_ENTRIES, Grammars
from llmrun.server.limits import Limits
from llmrun.server.metrics import Metrics
from llmrun.server.prompts import chat_ids
from llmrun.server.schemas import Schemas
from llmrun.server.service import Service
from llmrun.server.tasks import Choice
from llmrun.server.tools import ToolForm, ToolStream, call_grammar, find_calls, tool_form
from llmrun.tokenizer import Tokenizer, load_tokenizer

Packed = Callable[..., Path]
LLAMA = ToolForm("parameters")
HERMES = ToolForm("arguments", "<tool_call>\n", "\n</tool_call>")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TOOLS = [WEATHER, {"type": "function", "function": {"name": "now"}}]


@pytest.fixture(scope="module")
def tokenizer(packed_demo: Packed) -> Tokenizer:
    loaded = load_tokenizer(open_artifact(packed_demo(2, "q4")))
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    # As many ids more as a padded embedding has: ids that stand for nothing are never allowed.
    return Grammars(tokenizer, tokenizer.vocab_size + 61, sorted(tokenizer.eos_token_ids), Limits())


def walk(grammars: Grammars, tokenizer: Tokenizer, kind: str, source: Any, seed: int, most: int = 400) -> str | None:
    """Return the text of random allowed tokens, of which the shorter are the likelier; None: it did not end."""
    constraint = grammars.constraint(kind, source)
    rng = random.Random(seed)
    ids: list[int] = []
    vocab_size = tokenizer.vocab_size + 61
    while len(ids) < most and not constraint.is_done:
        allowed = np.flatnonzero(allowed_tokens(constraint.mask(ids), vocab_size)).tolist()
        assert allowed
        assert max(allowed) < tokenizer.vocab_size
        token_id = rng.choice(allowed)
        if token_id in tokenizer.eos_token_ids:
            return tokenizer.decode(ids)
        ids.append(token_id)
        constraint.accept(token_id)
    return tokenizer.decode(ids) if constraint.is_done else None


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Anna", 'Bernd "the" ö']},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_any_way_through_a_schema_is_a_value_of_it(grammars: Grammars, tokenizer: Tokenizer) -> None:
    ends = 0
    for seed in range(25):
        text = walk(grammars, tokenizer, "json", SCHEMA, seed)
        if text is not None:
            value = json.loads(text)
            assert value["name"] in SCHEMA["properties"]["name"]["enum"]
            assert 1 <= value["age"] <= 99
            assert all(isinstance(tag, bool) for tag in value["tags"])
            assert set(value) == {"name", "age", "tags"}
            ends += 1
    assert ends > 20


@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[a-z]{2}", r"(ab|c)+d", r"é{2}!?"])
def test_any_way_through_a_regex_matches_it(pattern: str, grammars: Grammars, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        text = walk(grammars, tokenizer, "regex", pattern, seed)
        if text is not None:
            assert re.fullmatch(pattern, text)


def test_choices_are_taken_literally(grammars: Grammars, tokenizer: Tokenizer) -> None:
    choices = ["yes", "no.*", "a|b", "(", "\\d", "x y", "{1}", "ü", "<b>", ">=", "->"]
    assert {walk(grammars, tokenizer, "choice", choices, seed) for seed in range(99)} == set(choices)


@pytest.mark.parametrize(
    "grammar", ['start: "a" rest\nrest: "b" | "c" rest', 'root ::= "a" rest\nrest ::= "b" | "c" rest']
)
def test_lark_and_gbnf(grammar: str, grammars: Grammars, tokenizer: Tokenizer) -> None:
    for seed in range(5):
        assert re.fullmatch("ac*b", walk(grammars, tokenizer, "grammar", grammar, seed) or "")


HOSTILE: list[tuple[str, Any]] = [
    ("json", {"type": "strange"}),
    ("json", False),
    ("json", "{"),
    ("json", {"$ref": "http://example.com/x"}),
    ("json", {"$ref": "file:///etc/passwd"}),
    ("json", {"$ref": "#/nowhere"}),
    ("json", {"enum": list(range(1001))}),
    ("json", {"a": "x" * (65 << 10)}),
    ("json", json.loads('{"items":' * 33 + "{}" + "}" * 33)),
    ("json", {"type": "string", "pattern": "("}),
    ("regex", "("),
    ("regex", r"(?=a)b"),
    ("grammar", "start: nothing"),
    ("grammar", "x" * 1000),
    ("grammar", 'root ::= "a'),
    ("choice", ["a" * 300] * 300),
]


@pytest.mark.parametrize(("kind", "source"), HOSTILE)
def test_a_bad_source_is_refused(kind: str, source: Any, grammars: Grammars) -> None:
    with pytest.raises(ApiError) as caught:
        grammars.constraint(kind, source)
    assert caught.value.status == 400
    assert len(caught.value.message) < 500


COSTLY: list[tuple[str, Any]] = [
    ("json", {"$ref": "#"}),
    ("json", {"type": "object", "properties": {"a": {"$ref": "#"}}}),
    ("json", {"type": "string", "pattern": "(a+)+$"}),
    ("json", {"type": "string", "pattern": "(.*a){200}b{1,10000}"}),
    ("json", {"type": "array", "items": {"type": "integer"}, "minItems": 10**7}),
    ("json", {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {} for j in range(20)}} for i in range(60)]}),
    ("json", {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]} for i in range(14)]}),
    ("regex", "(a|b|ab)*c" * 200),
    ("regex", "(x{1,100}){1,100}" * 5),
    ("grammar", 'start: a\na: a a | "x" | ""'),
]


@pytest.mark.parametrize(("kind", "source"), COSTLY)
def test_a_costly_source_is_bounded(kind: str, source: Any, grammars: Grammars, tokenizer: Tokenizer) -> None:
    started = time.monotonic()
    with contextlib.suppress(ApiError, UsageError):
        walk(grammars, tokenizer, kind, source, 0, most=20)
    assert time.monotonic() - started < 20  # a bomb takes minutes or all memory


LINKS = range(1400)
CHAINS: dict[str, tuple[str, Any]] = {
    "rules": ("grammar", "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(4600)) + 'a4600: "x"\n'),
    "terminals": ("grammar", "start: A0\n" + "".join(f"A{i}: A{i + 1}\n" for i in range(4600)) + 'A4600: "x"\n'),
    "references": (
        "json",
        {
            "$ref": "#/$defs/0",
            "$defs": {
                **{str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in LINKS},
                str(len(LINKS)): {"type": "null"},
            },
        },
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_longest_chain_of_references_has_stack(chain: str, grammars: Grammars) -> None:
    kind, source = CHAINS[chain]
    assert len(json.dumps(source)) > 0.9 * Limits().max_schema_bytes  # a stack of 8 MB held half of it
    constraint = grammars.constraint(kind, source)
    assert np.any(constraint.mask([]))


def test_a_small_limit_leaves_stack_enough(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, tokenizer.vocab_size, sorted(tokenizer.eos_token_ids), Limits(max_schema_bytes=4))
    assert np.any(grammars.constraint("choice", ["yes"]).mask([]))


def test_the_cache_of_grammars_is_bounded(grammars: Grammars) -> None:
    for i in range(CACHE_ENTRIES + 10):
        grammars.constraint("choice", [str(i)])
    assert len(grammars._compiled) == CACHE_ENTRIES


def test_a_slow_source_is_its_own_request_s_fault(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(grammar_timeout=0.2)
    service = Service(limits, ["m"], "vllm", 8)
    service.grammars = Grammars(tokenizer, tokenizer.vocab_size, sorted(tokenizer.eos_token_ids), limits)
    service.grammars.constraint("choice", ["known"])
    compile_now, is_over = service.grammars._compile, threading.Event()

    def compile_slowly(grammar: str) -> Any:
        if "slow" in grammar:
            is_over.wait(20)
        return compile_now(grammar)

    monkeypatch.setattr(service.grammars, "_compile", compile_slowly)

    async def outcome(choice: str) -> int:
        try:
            await service.compile(("choice", [choice]))
        except ApiError as error:
            return error.status
        return 200

    async def outcomes() -> list[int]:
        slow = asyncio.ensure_future(outcome("slow"))
        await asyncio.sleep(0.05)
        return [await outcome("known"), await outcome("new"), await slow]

    try:
        assert asyncio.run(outcomes()) == [200, 503, 400]
    finally:
        is_over.set()


# Tools

LLAMA_TEMPLATE = (
    '{% if tools %}{{ tools | tojson }}{{ \' {"name": ..., "parameters": ...}\' }}{% endif %}{% for m in messages %}'
    "{{ m.role }}:{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.city }})"
    "{% endfor %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
)


def with_template(tokenizer: Tokenizer, template: str, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


def test_the_form_of_calls_is_read_off_the_template(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tool_form(tokenizer) is None  # the demo's template has no tools
    assert tool_form(with_template(tokenizer, LLAMA_TEMPLATE, monkeypatch)) == LLAMA
    hermes = "{% for t in tools %}{{ t }}{% endfor %}<tool_call>"
    assert tool_form(with_template(tokenizer, hermes, monkeypatch)) == HERMES
    with monkeypatch.context() as patch:  # special tokens are in no text, neither the grammar's nor the answer's
        patch.setattr(tokenizer, "special_tokens", {**tokenizer.special_tokens, "<tool_call>": 5})
        assert tool_form(tokenizer) == ToolForm("arguments")
    assert tool_form(with_template(tokenizer, "tools {{ broken", monkeypatch)) is None


def test_tools_and_calls_reach_the_template_as_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with_template(tokenizer, LLAMA_TEMPLATE, monkeypatch)
    tools = [{"type": "function", "function": {"name": "weather", "description": "</s>"}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome</s>"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": " you"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    ids = chat_ids(tokenizer, messages, tools, max_depth=64)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    text = tokenizer.decode(ids)
    assert '"description": "</s>"' in text
    assert "user:hi you;assistant:weather(Rome</s>);tool:sunny;" in text


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": [{"type": "image_url", "text": "x"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": '{"a":' * 600 + "1" + "}" * 600}}],
        },
    ],
)
def test_messages_that_no_template_gets(message: dict[str, Any], tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError) as caught:
        chat_ids(tokenizer, [message], max_depth=64)
    assert caught.value.status == 400


@pytest.mark.parametrize("form", [LLAMA, HERMES])
@pytest.mark.parametrize(("choice", "names"), [("required", {"weather", "now"}), ("=weather", {"weather"})])
def test_a_constrained_call_is_a_call(
    form: ToolForm, choice: str, names: set[str], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    kind, source = call_grammar(form, TOOLS, choice, Limits())
    found = set()
    for seed in range(12):
        text = walk(grammars, tokenizer, kind, source, seed)
        if text is not None:
            rest, (call,) = find_calls(TOOLS, text)
            assert rest is None
            found.add(call["function"]["name"])
            if call["function"]["name"] == "weather":
                assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    assert found <= names
    assert "weather" in found


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ROUTE = {  # as libraries write types that occur twice
    "$id": "https://example.com/route",
    "type": "object",
    "properties": {
        "from": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "to": {"$ref": "#/properties/from"},
        "by": {"$ref": "#/definitions/by"},
        "$ref": {"const": {"$ref": "#"}},  # a name and a value, no reference
    },
    "required": ["from", "to", "by", "$ref"],
    "additionalProperties": False,
    "definitions": {"by": {"enum": ["car"]}},
}
TREE = {
    "type": "object",
    "properties": {"label": {"enum": ["a"]}, "kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}},
    "required": ["label", "kids"],
    "additionalProperties": False,
}
OTHER = {"properties": {"by": {"$ref": "#/definitions/by"}}, "definitions": {"by": {"enum": [1]}}, "required": ["by"]}
RECURSIVE = [tool("route", ROUTE), tool("tree", TREE), tool("other", OTHER)]


def is_tree(value: Any) -> bool:
    return value.keys() == {"label", "kids"} and value["label"] == "a" and all(map(is_tree, value["kids"]))


@pytest.mark.parametrize("form", [LLAMA, HERMES])
def test_references_of_a_tools_schema_mean_the_schema(form: ToolForm, grammars: Grammars, tokenizer: Tokenizer) -> None:
    kind, source = call_grammar(form, RECURSIVE, "required", Limits())
    seen = set()
    for seed in range(30):
        text = walk(grammars, tokenizer, kind, source, seed)
        if text is None:
            continue
        _, (call,) = find_calls(RECURSIVE, text)
        name, value = call["function"]["name"], json.loads(call["function"]["arguments"])
        seen.add(name)
        if name == "tree":
            assert is_tree(value)
        elif name == "route":
            assert (value["to"]["city"], value["by"], value["$ref"]) == ("Rome", "car", {"$ref": "#"})
        else:
            assert value["by"] == 1
    assert seen == {"route", "tree", "other"}


@pytest.mark.parametrize("form", [LLAMA, HERMES])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "string"}, "'f' are of type string: expected object"),
        ({"properties": {"a": {"enum": list(range(1001))}}}, "an enum of 1001"),
        ({"properties": {"a": {"const": "x" * (65 << 10)}}}, "bytes: at most"),
        ({"properties": {"a": {"$ref": "http://example.com"}}}, "only references within the schema"),
    ],
)
def test_a_tools_schema_has_the_bounds_of_others(form: ToolForm, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        call_grammar(form, [tool("f", parameters)], "required", Limits())
    assert caught.value.param == "tools"


@pytest.mark.parametrize("form", [LLAMA, HERMES])
def test_white_space_in_a_call_is_bounded(form: ToolForm, grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.constraint(*call_grammar(form, TOOLS, "required", Limits()))
    assert tokenizer.bos_token_id is not None
    newline = tokenizer.encode_segments([tokenizer.bos_token_id, "{\n"])[-1]
    ids: list[int] = []
    for token_id in tokenizer.encode_segments([tokenizer.bos_token_id, form.opening + '{"name"'])[1:]:
        constraint.accept(token_id)
        ids.append(token_id)
    for is_allowed in (True, False):
        allowed = allowed_tokens(constraint.mask(ids), tokenizer.vocab_size + 61)
        assert bool(allowed[newline]) is is_allowed
        if is_allowed:
            constraint.accept(newline)
            ids.append(newline)


CALL = '{"name": "weather", "parameters": {"city": "Rome"}}'
ANSWERS: list[tuple[str, str | None, int]] = [
    (CALL, None, 1),
    (f" {CALL}; {CALL}\n", None, 2),
    ("It is sunny.", "It is sunny.", 0),
    ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', 0),
    (CALL[:-1], CALL[:-1], 0),
    ("{ is a brace", "{ is a brace", 0),
    ('{"name": ["weather"]}', '{"name": ["weather"]}', 0),
    ('{"name": "weather", "parameters": {"city": "Rome"}, "x": "<tool_call>"}', None, 1),
    (f"<tool_call>\n{CALL}\n</tool_call>", None, 1),
    (f"Let me see. <tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", "Let me see. ", 2),
    (f"<tool_call>{CALL}", None, 1),
    ('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}, "x": "</tool_call>"}</tool_call>', None, 1),
    (f"<tool_call>{CALL} and more</tool_call>", f"<tool_call>{CALL} and more</tool_call>", 0),
    (f"<tool_call>{CALL}</tool_call> more", "more", 1),
    ("a < b <tool", "a < b <tool", 0),
    ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", 0),
]


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 120), max_size=12))
def test_calls_are_found_however_the_text_is_cut(case: tuple[str, str | None, int], cuts: list[int]) -> None:
    text, expected, num_calls = case
    stream = ToolStream(TOOLS)
    places = [0, *sorted(cuts), len(text)]
    said = "".join(stream.push(text[a:b]) for a, b in itertools.pairwise(places))
    rest, calls = stream.finish()
    assert said + (rest or "") == (expected or "")
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Rome"}] * num_calls


@pytest.mark.parametrize(("field", "expected"), [({}, 2), ({"parallel_tool_calls": False}, 1)])
def test_one_call_where_several_are_not_wanted(field: dict[str, bool], expected: int) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **field}
    service: Any = SimpleNamespace(engine=SimpleNamespace(tokenizer=None), model_name="m", fingerprint="f")
    writer = ChatWriter(service, Schemas(Limits()).chat_call(body), LLAMA)
    request: Any = None
    _, calls, _, reason = writer.take(Choice(0, 0), Event(request, None, f"{CALL};{CALL}", None, "stop"))
    assert (len(calls), reason) == (expected, "tool_calls")


@given(st.text(alphabet='{}"<tol_ca>/;: \n', max_size=60))
def test_no_text_is_lost_or_breaks_the_parser(text: str) -> None:
    stream = ToolStream(TOOLS)
    said = "".join(map(stream.push, text))
    rest, calls = stream.finish()
    assert calls == []
    assert said + (rest or "") == text


# Numbers


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics('a"b\\c\nd', "vllm")
    for seconds in (0.0005, 0.02, 700.0):
        metrics.observe("time_to_first_token_seconds", seconds)
    metrics.finished("stop")
    metrics.responded(200)
    text = metrics.text({"num_requests_running": (2, "x")}, {"prompt_tokens_total": (7, "y")})
    line = re.compile(r'[a-zA-Z_:][\w:]*(\{([a-z_]+="(\\.|[^"\\\n])*",?)*\})? [-+\d.e]+')
    families: set[str] = set()
    for row in text.splitlines():
        if row.startswith("# TYPE "):
            name = row.split()[2]
            assert name not in families
            families.add(name)
        elif not row.startswith("# HELP "):
            assert line.fullmatch(row), row
    label = 'model_name="a\\"b\\\\c\\nd"'
    assert f"vllm:num_requests_running{{{label}}} 2" in text
    assert f'vllm:time_to_first_token_seconds_bucket{{le="0.02",{label}}} 2' in text
    assert f'vllm:time_to_first_token_seconds_bucket{{le="+Inf",{label}}} 3' in text
    assert f'vllm:request_success_total{{finished_reason="stop",{label}}} 1' in text
    assert 'llmrun:http_responses_total{status="200"} 1' in text


def test_limits_bound_something() -> None:
    for name, value in (("max_queue", 0), ("body_timeout", -1.0), ("max_stops", 17), ("max_body_bytes", 1 << 41)):
        with pytest.raises(UsageError):
            Limits(**{name: value})
