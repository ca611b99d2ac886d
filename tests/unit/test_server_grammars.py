"""Structured output without a server: what a grammar lets through, and what one may cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
from grammar_walk import walk
from llguidance.gbnf_to_lark import gbnf_to_lark

from llmrun.errors import UsageError
from llmrun.server.errors import ApiError
from llmrun.server.grammar import CACHE_ENTRIES, Grammars
from llmrun.server.limits import Limits
from llmrun.server.service import Service
from llmrun.tokenizer import Tokenizer

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
    "grammar",
    [
        'start: "a" rest\nrest: "b" | "c" rest',
        'start: "a" rest // rest ::= "::="\nrest: "b" | "c" rest',
        '# start: "x"\nroot ::= "a" rest\nrest::=\n  "b" | "c" rest # ::=',
    ],
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
    ("json", {"$ref": "#"}),  # no value is
    ("regex", r"a[^\s\S]"),
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


def test_a_format_that_is_not_known_is_an_annotation(grammars: Grammars, tokenizer: Tokenizer) -> None:
    text = {"type": "string", "maxLength": 2, "format": "path"}
    schema = {"type": "array", "items": text, "minItems": 1, "maxItems": 1}
    assert isinstance(json.loads(walk(grammars, tokenizer, "json", schema, 1) or ""), list)
    dates = {walk(grammars, tokenizer, "json", {"type": "string", "format": "date"}, seed) for seed in range(5)}
    assert all(re.fullmatch(r'"\d{4}-\d\d-\d\d"', date or "") for date in dates)
    named = {  # as a name, and as a value
        "type": "object",
        "properties": {"format": {"const": {"format": "path"}}},
        "required": ["format"],
        "additionalProperties": False,
    }
    assert json.loads(walk(grammars, tokenizer, "json", named, 1) or "") == {"format": {"format": "path"}}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (("json", {"type": "string", "pattern": "^(?!abc)x"}), "look-around"),
        (("regex", "(a"), "unclosed group"),
        (("json", {"type": "strange"}), "strange"),
        (("grammar", "start: nothing"), "nothing"),
    ],
)
def test_a_refusal_says_why(source: tuple[str, Any], why: str, grammars: Grammars) -> None:
    with pytest.raises(ApiError, match=why):
        grammars.constraint(*source)


COSTLY: list[tuple[str, Any]] = [
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


def test_a_grammar_is_converted_once_and_in_the_time_for_compiling(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(grammar_timeout=0.5)
    service = Service(limits, ["m"], "vllm", 8)
    service.grammars = Grammars(tokenizer, tokenizer.vocab_size, sorted(tokenizer.eos_token_ids), limits)
    service.grammars.constraint("choice", ["ready"])
    converted: list[str] = []

    def convert(text: str) -> str:
        converted.append(threading.current_thread().name)
        if "slow" in text:
            time.sleep(3)
        return gbnf_to_lark(text)

    monkeypatch.setattr("llguidance.gbnf_to_lark.gbnf_to_lark", convert)
    source = ("grammar", 'root ::= "a" rest\nrest ::= "b"')
    for _ in range(2):
        asyncio.run(service.compile(source))
        for _ in range(8):
            service.constraint(source)
    assert converted == ["grammar"]
    started = time.monotonic()
    with pytest.raises(ApiError, match="took longer"):
        asyncio.run(service.compile(("grammar", 'root ::= "slow"')))
    assert time.monotonic() - started < 2


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
