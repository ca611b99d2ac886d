"""Numbers in schemas: those that the grammar library cannot keep, or not at a bearable price, are refused beforehand.

Each schema is tried in a process of its own: some ended the server's by a signal, or took all memory.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Iterator
from decimal import Decimal
from multiprocessing.connection import Connection
from typing import Any

import pytest
from grammar_walk import walk

from llmrun.server.errors import ApiError
from llmrun.server.grammar import Grammars
from llmrun.server.json_schema import checked_schema
from llmrun.server.limits import Limits
from llmrun.server.tools import ToolForm, call_grammar
from llmrun.tokenizer import Tokenizer

BEARABLE_BYTES = 1 << 30  # of which the stack of a thread that compiles is 256 MB, twice while one follows another
BEARABLE_S = 20


def _answer(end: Connection, tokenizer: Tokenizer) -> None:
    """Answer (kind, source) with a status and values that the grammar lets through."""
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 61, sorted(tokenizer.eos_token_ids), Limits())
    grammars.constraint("choice", ["ready"])
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BEARABLE_BYTES, used + BEARABLE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        kind, source = end.recv()
        try:
            texts = [walk(grammars, tokenizer, kind, source, seed) for seed in range(25)]
        except ApiError as error:
            end.send((error.status, error.message))
        else:
            end.send((200, [text for text in texts if text is not None]))


class Tried:
    """A process that tries sources, and is replaced when it ends."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("fork")
        self._end, other = context.Pipe()
        self.process = context.Process(target=_answer, args=(other, self._tokenizer), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, kind: str, source: Any) -> tuple[int, Any]:
        outcome = (0, "takes too long")
        self._end.send((kind, source))
        try:
            if self._end.poll(BEARABLE_S):
                return self._end.recv()
        except EOFError:
            self.process.join()
            outcome = (0, f"the process ended with {self.process.exitcode}")
        self.process.kill()
        self._begin()
        return outcome


@pytest.fixture(scope="module")
def tried(tokenizer: Tokenizer) -> Iterator[Tried]:
    tried = Tried(tokenizer)
    yield tried
    tried.process.kill()


def bounds(**fields: Any) -> dict[str, Any]:
    return {"type": "integer", **fields}


KILLING = [
    bounds(minimum=-1e19, maximum=-1e19),
    bounds(minimum=-(10**25), exclusiveMaximum=-(2**63) + 1),
    {"const": -(2**63)},
    {"enum": [1, -(2**63)]},
    {"allOf": [bounds(), {"enum": [-1e300, 5]}]},
    {"$ref": "#/default", "default": bounds(minimum=-1e19, maximum=-1e19)},
    {"$ref": "#/$defs", "$defs": bounds(minimum=-1e19, maximum=-1e19)},
    {"$ref": "#/properties/const", "properties": {"const": bounds(minimum=-1e19, maximum=-1e19)}},
]
COSTLY = [
    bounds(multipleOf=99999989),
    {"type": "number", "multipleOf": 2147.483647},
    {"allOf": [bounds(multipleOf=9973), {"multipleOf": 9967}]},
    {"type": "integer", "multipleOf": 9973, "$ref": "#/$defs/a", "$defs": {"a": {"multipleOf": 9967}}},
    {"anyOf": [bounds(multipleOf=9973 - i) for i in range(300)]},
    {"anyOf": [bounds(multipleOf=factor) for factor in (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051)]},
    {
        "type": "object",
        "properties": {"a": bounds(multipleOf=4999)},
        "patternProperties": {"^a": bounds(multipleOf=4993)},
        "required": ["a"],
    },
]


@pytest.mark.parametrize("schema", KILLING + COSTLY)
def test_a_schema_that_ends_the_process_or_takes_its_memory_is_refused(schema: dict[str, Any], tried: Tried) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
    text = json.dumps(schema)
    for source in (("json", schema), ("json", text), ("grammar", f"start: %json \n{text}")):
        status, why = tried(*source)
        assert status == 400, why
    for form in (ToolForm("parameters"), ToolForm("arguments", "<tool_call>\n", "\n</tool_call>")):
        with pytest.raises(ApiError) as caught:
            call_grammar(form, [tool], "required", Limits())
        assert (caught.value.status, caught.value.param) == (400, "tools")


@pytest.mark.parametrize(
    "source",
    [
        'start: %json /* */ {"type": "integer"}',
        'start: %json {"minimum": NaN}',
        'start: %json {"a": 1, "a": 2}',
        "start: %json" + "[" * 5000,
        'start: %json {"$ref": "http://example.com"}',
    ],
)
def test_a_schema_in_a_grammar_has_the_bounds_of_others(source: str, tried: Tried) -> None:
    assert tried("grammar", source)[0] == 400


REFUSED = [
    {"enum": [1234567890123456789]},
    {"const": 18446744073709551615},
    {"const": {"a": [9007199254740993]}},
    bounds(minimum=9223372036854775808, maximum=18446744073709551615),
    bounds(minimum=9007199254740993),
    bounds(exclusiveMinimum=2**53, exclusiveMaximum=2**53 + 4),
    bounds(exclusiveMinimum=2**53),
    bounds(exclusiveMaximum=-(2**53)),
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-7},
    {"type": "number", "exclusiveMinimum": 1, "maximum": 1.5},
    {"type": "number", "minimum": -0.5, "exclusiveMaximum": 0},
]


@pytest.mark.parametrize("schema", REFUSED)
def test_a_number_that_would_become_another_is_refused(schema: dict[str, Any], tried: Tried) -> None:
    status, message = tried("json", schema)
    assert (status, "cannot keep" in message) == (400, True)


KEPT = [
    bounds(minimum=-(2**63), maximum=2**63 - 1),
    bounds(exclusiveMinimum=-1e19, exclusiveMaximum=1e19),
    bounds(minimum=0, maximum=2**64 - 1),
    bounds(minimum=2**53 - 5, maximum=2**53),
    bounds(minimum=2**62, maximum=2**62 + 2048),
    bounds(exclusiveMinimum=-3, exclusiveMaximum=-1),
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "exclusiveMinimum": 0.5, "exclusiveMaximum": 1},
]


@pytest.mark.parametrize("schema", KEPT)
def test_what_bounds_let_through_is_within_them(schema: dict[str, Any], tried: Tried) -> None:
    status, texts = tried("json", schema)
    assert (status, bool(texts)) == (200, True), texts
    for value in map(Decimal, texts):
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value)
        assert schema.get("exclusiveMinimum", value - 1) < value < schema.get("exclusiveMaximum", value + 1)


@pytest.mark.parametrize("value", [2**53, -(2**53), 10**18, 0.1, -0.0, 1e16])
def test_numbers_that_a_float_holds_are_kept(value: float, tried: Tried) -> None:
    status, texts = tried("json", {"enum": [value]})
    assert (status, {Decimal(text) for text in texts}) == (200, {Decimal(str(value))})


@pytest.mark.parametrize(
    "schema",
    [
        bounds(multipleOf=997),
        bounds(multipleOf=3600),
        {"type": "number", "multipleOf": 0.01},
        {"allOf": [{"type": "number", "multipleOf": 0.01}, {"multipleOf": 25}]},
        {"properties": {"a": bounds(multipleOf=86400), "b": {"multipleOf": 0.25}}, "additionalProperties": True},
        {"anyOf": [bounds(multipleOf=7), {"type": "number", "multipleOf": 1e-9}, bounds(multipleOf=1000)]},
    ],
)
def test_usual_multiples_are_served(schema: dict[str, Any], tried: Tried) -> None:
    assert tried("json", schema)[0] == 200


def test_a_property_may_be_named_as_a_keyword(tried: Tried) -> None:
    names = ("enum", "const", "minimum", "multipleOf", "default")
    schema = {
        "type": "object",
        "properties": {name: bounds(minimum=0, maximum=2**63 - 1) for name in names},
        "required": list(names),
        "additionalProperties": False,
    }
    status, texts = tried("json", schema)
    assert status == 200
    assert all(json.loads(text).keys() == set(names) for text in texts)


@pytest.mark.parametrize(
    ("limit", "fits", "too_much"),
    [
        ({"max_schema_bytes": 19}, {"type": "integer"}, {"type": "integer", "a": 1}),
        ({"max_schema_depth": 3}, {"anyOf": [{}]}, {"anyOf": [{"a": 1}]}),
        ({"max_enum": 3}, {"anyOf": [{"enum": [1, 2, 3]}]}, {"anyOf": [{"enum": [1, 2, 3, 4]}]}),
    ],
)
def test_a_schema_may_be_as_large_as_the_limits(limit: dict[str, int], fits: Any, too_much: Any) -> None:
    assert checked_schema(fits, Limits(**limit)) == fits
    with pytest.raises(ApiError):
        checked_schema(too_much, Limits(**limit))


def test_a_reference_to_elsewhere_is_refused_wherever_it_stands() -> None:
    with pytest.raises(ApiError, match="only references within the schema"):
        checked_schema({"anyOf": [{"properties": {"a": {"$ref": "other.json#/a"}}}]}, Limits())


@pytest.mark.parametrize(
    "schema",
    [
        {"multipleOf": True}, {"multipleOf": 0}, {"multipleOf": -3}, {"minimum": True}, {"format": {}}, {"format": 5},
        {"type": "integer", "default": 2**64 - 1}, {"examples": [-(2**63)]}, {"exclusiveMinimum": 0, "maximum": "5"},
        {"allOf": [{"multipleOf": 1e22}, {"multipleOf": 7}]}, {"const": 1.2345678901234568e18}, {"minimum": 2**63 - 1024},
        {"anyOf": [bounds(exclusiveMinimum=3, maximum=3.5), {"type": "string"}]},
    ],
)  # fmt: skip
def test_what_can_be_kept_or_has_no_meaning_is_left_to_the_library(schema: dict[str, Any]) -> None:
    assert checked_schema(schema, Limits()) == schema
