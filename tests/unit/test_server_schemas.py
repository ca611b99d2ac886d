"""What becomes of a schema before it is a grammar: objects are closed, names said otherwise, odd patterns left out."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from grammar_walk import walk

from llmrun.server.errors import ApiError
from llmrun.server.grammar import Grammars, lenient
from llmrun.server.json_schema import checked_schema
from llmrun.server.limits import Limits
from llmrun.server.schemas import Schemas
from llmrun.server.tools import ToolForm, call_grammar
from llmrun.tokenizer import Tokenizer


def listing(*names: str, **more: Any) -> dict[str, Any]:
    """An object of these properties, all of them required; of others it says nothing."""
    return {"type": "object", "properties": {name: {"enum": [1]} for name in names}, "required": [*names], **more}


A, B = listing("a"), listing("b")
CLOSED: list[tuple[Any, Any]] = [  # a schema, and the only value that is closed
    (A, {"a": 1}),
    (listing(), {}),
    (
        {**listing("properties", "$ref"), "properties": {"properties": A, "$ref": A}},
        {"properties": {"a": 1}, "$ref": {"a": 1}},
    ),
    ({"type": "array", "prefixItems": [A, B], "items": False, "minItems": 2}, [{"a": 1}, {"b": 1}]),
    ({"allOf": [{"$ref": "#/$defs/a"}], "description": "as libraries write it", "$defs": {"a": A}}, {"a": 1}),
    ({"anyOf": [{"oneOf": [A], "discriminator": {"propertyName": "a"}}]}, {"a": 1}),
]
OPEN: list[tuple[Any, set[str]]] = [  # a schema, and what any value of it must have
    ({**A, "additionalProperties": True}, {"a"}),
    ({"allOf": [A, B]}, {"a", "b"}),
    ({"$ref": "#/$defs/a", **B, "$defs": {"a": A}}, {"a", "b"}),
    ({**A, "anyOf": [B]}, {"a", "b"}),
    ({**A, "required": ["a", "c"]}, {"a", "c"}),
    ({**A, "patternProperties": {"^c": True}}, {"a"}),
]


@pytest.mark.parametrize(("schema", "value"), CLOSED)
def test_an_object_has_the_properties_that_its_schema_lists(
    schema: Any, value: Any, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    texts = [walk(grammars, tokenizer, "json", schema, seed) for seed in range(8)]
    assert [json.loads(text) for text in texts if text is not None] == [value] * 8


@pytest.mark.parametrize(("schema", "names"), OPEN)
def test_an_object_that_may_have_others_is_not_closed(
    schema: Any, names: set[str], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    texts = [walk(grammars, tokenizer, "json", schema, seed, 1000) for seed in range(12)]
    values = [json.loads(text) for text in texts if text is not None]
    assert values
    assert all(names <= value.keys() for value in values)
    assert any(names < value.keys() for value in values)


def test_alternatives_that_closing_would_tell_apart_are_refused_as_before(grammars: Grammars) -> None:
    either = {"oneOf": [A, {"properties": {"b": {}}}]}  # {"a": 1} is both
    with pytest.raises(ApiError, match="oneOf"):
        grammars.constraint("json", either)


@pytest.mark.parametrize("strict", [True, None, False])
def test_a_response_format_leaves_out_what_no_grammar_can_say_if_it_says_that_it_is_not_strict(
    strict: bool | None, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    items = {"type": "array", "items": {"type": "string", "pattern": "^(?!a)[ab]$"}, "uniqueItems": True, "maxItems": 2}
    form = {"name": "x", "strict": strict, "schema": listing("a") | {"properties": {"a": items}}}
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": form},
    }
    source = Schemas(Limits()).chat_call(body).sampled.grammar
    assert source is not None
    beside_tools = call_grammar(
        ToolForm("arguments"), [{"function": {"name": "f"}}], "auto", Limits(), answer=source[1]
    )
    for kind, grammar in (source, beside_tools):
        if strict is False:
            texts = [walk(grammars, tokenizer, kind, grammar, seed) for seed in range(8)]
            values = [json.loads(text) for text in texts if text is not None]
            assert any(isinstance(value.get("a"), list) for value in values)
        else:
            with pytest.raises(ApiError, match=r"look-around|uniqueItems"):
                grammars.constraint(kind, grammar)


@pytest.mark.parametrize(
    "pattern", [r"^a\b", r"^a\B", r"^a\Z", "^(?=a)a", "^(?<!b)a", "^(?>a)", r"^(a)\1", r"(?P<n>a)\k<n>"]
)
def test_patterns_that_no_automaton_follows_are_left_out(
    pattern: str, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    for schema in (
        {"type": "string", "pattern": pattern},
        {"type": "object", "patternProperties": {pattern: {}, "^b$": {"enum": [1]}}, "additionalProperties": False},
    ):
        with pytest.raises(ApiError):
            grammars.constraint("json", schema)
        texts = [walk(grammars, tokenizer, "json", lenient(schema), seed) for seed in range(20)]
        assert any(json.loads(text) for text in texts if text is not None)
    kept = {"properties": {"a": {"pattern": r"^\\b"}}, "patternProperties": {r"\\1": {}}, "additionalProperties": False}
    assert kept.items() <= lenient(kept).items()  # a backslash, and what is no escape behind it


ONE = {"type": "object", "additionalProperties": {"enum": [1]}}
KINDS = ["a.b", 'c "d" ö', "-\\e"]
NAMES: list[tuple[Any, str]] = [  # what names there may be, and of what form those are
    (True, ".*"),
    ({"type": "string", "title": "as libraries write it of a map"}, ".*"),
    ({"enum": KINDS}, "|".join(map(re.escape, KINDS))),
    ({"$ref": "#/$defs/kinds"}, "|".join(map(re.escape, KINDS))),
    ({"type": "string", "pattern": "^x_[a-z]$"}, "x_[a-z]"),
]


@pytest.mark.parametrize(
    ("names", "pattern", "required"),
    [(*case, []) for case in NAMES] + [(*case, KINDS) for case in NAMES if re.fullmatch(case[1], KINDS[0])],
)
def test_the_names_of_a_maps_properties_keep_their_form(
    names: Any, pattern: str, required: list[str], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    schema = {
        **ONE,
        "propertyNames": names,
        "$defs": {"kinds": {"type": "string", "enum": KINDS}},
        "required": required,
    }
    texts = [walk(grammars, tokenizer, "json", schema, seed, 1000) for seed in range(20)]
    values = [json.loads(text) for text in texts if text is not None]
    found = {name for value in values for name in value}
    assert found
    assert all(re.fullmatch(pattern, name, re.DOTALL) for name in found)
    assert {each for value in values for each in value.values()} == {1}
    assert all(value.keys() >= set(required) for value in values)


@pytest.mark.parametrize(
    "schema",
    [
        {**ONE, "propertyNames": {"minLength": 2}},
        {**ONE, "propertyNames": {"$ref": "#/nowhere"}},
        {"additionalProperties": {"const": "x" * 700}, "propertyNames": {"enum": [str(i) for i in range(100)]}},
        {**ONE, "propertyNames": {"enum": ["a"]}, "properties": {"b": {}}},
    ],
)
def test_names_of_other_forms_are_refused(schema: Any, grammars: Grammars) -> None:
    with pytest.raises(ApiError, match="propertyNames"):
        grammars.constraint("json", schema)


@pytest.mark.parametrize("names", [[f"{i:x}" for i in range(1000)], ["x" * 4000 + str(i) for i in range(9)]])
def test_names_are_copied_within_a_bound_however_many_objects_have_them(names: list[str]) -> None:
    """One reference stands for a list; 24,000 and 57,000 characters became millions, on the thread that serves all."""
    each = {"$ref": "#/$defs/each"}
    objects = {str(i): {"propertyNames": {"$ref": "#/$defs/names"}, "additionalProperties": each} for i in range(200)}
    schema = {"properties": objects, "$defs": {"names": {"enum": names}, "each": {"type": "null"}}}
    given = len(json.dumps(schema))
    assert given < len(json.dumps(checked_schema(schema, Limits()))) < given + (1 << 17)
