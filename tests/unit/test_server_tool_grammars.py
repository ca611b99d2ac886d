"""Grammars of calls: whatever they allow is a call, or an answer, that the request asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from grammar_walk import line_breaks_allowed, walk
from tool_forms import FORMS, HERMES, TOOLS, WEATHER, tool

from llmrun.server.errors import ApiError
from llmrun.server.grammar import Grammars
from llmrun.server.limits import Limits
from llmrun.server.tools import ToolForm, call_grammar, find_calls
from llmrun.tokenizer import Tokenizer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("choice", "names"), [("required", {"weather", "now"}), ("=weather", {"weather"})])
def test_a_constrained_call_is_a_call(
    form: ToolForm, choice: str, names: set[str], grammars: Grammars, tokenizer: Tokenizer
) -> None:
    kind, source = call_grammar(form, TOOLS, choice, Limits())
    found = set()
    for seed in range(12):
        text = walk(grammars, tokenizer, kind, source, seed, shown=form.shown_tokens)
        if text is not None:
            assert text.startswith(form.opening)
            rest, (call,) = find_calls(form, TOOLS, text)
            assert rest is None
            found.add(call["function"]["name"])
            if call["function"]["name"] == "weather":
                assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    assert found <= names
    assert "weather" in found


@pytest.mark.parametrize("form", FORMS)
def test_a_tool_may_have_any_name(form: ToolForm, grammars: Grammars, tokenizer: Tokenizer) -> None:
    for name in ("a.b", "\u00e9", 'x"y', "x{y", "[x", "x>y", "x\\y", " x", "%json"):
        tools = [*TOOLS, tool(name, WEATHER["function"]["parameters"]), tool("x", {})]
        grammar = call_grammar(form, tools, f"={name}", Limits())
        text = walk(grammars, tokenizer, *grammar, 1, shown=form.shown_tokens)
        assert text is not None
        _, (call,) = find_calls(form, tools, text)
        assert call["function"]["name"] == name


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


@pytest.mark.parametrize("form", FORMS)
def test_references_of_a_tools_schema_mean_the_schema(form: ToolForm, grammars: Grammars, tokenizer: Tokenizer) -> None:
    kind, source = call_grammar(form, RECURSIVE, "required", Limits())
    seen = set()
    for seed in range(30):
        text = walk(grammars, tokenizer, kind, source, seed, shown=form.shown_tokens)
        if text is None:
            continue
        _, (call,) = find_calls(form, RECURSIVE, text)
        name, value = call["function"]["name"], json.loads(call["function"]["arguments"])
        seen.add(name)
        if name == "tree":
            assert is_tree(value)
        elif name == "route":
            assert (value["to"]["city"], value["by"], value["$ref"]) == ("Rome", "car", {"$ref": "#"})
        else:
            assert value["by"] == 1
    assert seen == {"route", "tree", "other"}


ANSWER = {"properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"], "$defs": {"city": {"enum": ["Bonn"]}}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", [{"type": "object", **ANSWER}, json.dumps({"type": "object", **ANSWER}), True])
def test_a_model_calls_or_answers_by_the_schema(
    form: ToolForm, answer: Any, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    kind, source = call_grammar(form, TOOLS, "auto", Limits(), answer=answer)
    seen = set()
    for seed in range(60):
        text = walk(grammars, tokenizer, kind, source, seed, shown=form.shown_tokens)
        if text is None:
            continue
        rest, calls = find_calls(form, TOOLS, text)
        assert (rest is None) == (len(calls) == 1)
        if answer is not True and rest is not None:
            assert json.loads(rest) == {"city": "Bonn"}
        seen.add(bool(calls))
    assert seen == {False, True} or answer is True


@pytest.mark.parametrize("form", FORMS)
def test_arguments_are_those_that_the_tool_lists(form: ToolForm, grammars: Grammars, tokenizer: Tokenizer) -> None:
    joined = {"allOf": [{"properties": {"a": {"enum": [1]}}}, {"required": ["a"]}]}
    tools = [tool("open", {"properties": {"a": {"enum": [1]}}}), TOOLS[1], tool("empty", {}), tool("joined", joined)]
    kind, source = call_grammar(form, tools, "required", Limits())
    seen = set()
    for seed in range(40):
        text = walk(grammars, tokenizer, kind, source, seed, shown=form.shown_tokens)
        _, calls = find_calls(form, tools, text or "")
        for function in (call["function"] for call in calls):
            seen.add((function["name"], function["arguments"] if function["name"] != "joined" else ""))
    assert seen == {("open", "{}"), ("open", '{"a": 1}'), ("now", "{}"), ("empty", "{}"), ("joined", "")}


NOTES = {
    "properties": {
        "path": {"type": "string", "format": "path", "maxLength": 3, "pattern": "^(?!/)"},
        "ids": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 2},
    },
    "required": ["path", "ids"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_grammar_cannot_express_of_a_tool_is_left_out_unless_it_is_strict(
    form: ToolForm, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    tools = [tool("f", NOTES)]
    grammar = call_grammar(form, tools, "required", Limits())
    text = walk(grammars, tokenizer, *grammar, 3, shown=form.shown_tokens)
    assert text is not None
    _, (call,) = find_calls(form, tools, text)
    assert json.loads(call["function"]["arguments"]).keys() == {"path", "ids"}
    for name, refusal in (("ids", "uniqueItems"), ("path", "look-around")):
        strict = tool("f", {"properties": {name: NOTES["properties"][name]}})
        strict["function"]["strict"] = True
        with pytest.raises(ApiError, match=refusal):
            grammars.constraint(*call_grammar(form, [strict], "required", Limits()))


@pytest.mark.parametrize("form", FORMS)
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


def test_schemas_that_are_too_large_are_refused_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Any] = []  # 2 MB of them took 1.5 s, in which no client got a token
    monkeypatch.setattr("llmrun.server.tools.closed_schema", looked_at.append)
    with pytest.raises(ApiError, match="bytes: at most"):
        call_grammar(HERMES, [tool(f"f{i}", {"description": "x" * (33 << 10)}) for i in range(2)], "required", Limits())
    assert looked_at == []


@pytest.mark.parametrize("form", FORMS)
def test_white_space_in_a_call_is_bounded(form: ToolForm, grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.constraint(*call_grammar(form, TOOLS, "required", Limits()))
    begun = form.opening + ('{"name"' if form.key else f"now{form.middle}{{")
    assert line_breaks_allowed(constraint, tokenizer, begun, dict(form.tokens)) == 1
