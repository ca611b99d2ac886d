"""Calls as Qwen 3 Coder writes them: texts become the values that the tool's parameters speak of."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_forms import CODER, tool

from llmrun.server.tools import find_calls


def spelled(**values: str) -> str:
    arguments = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in values.items())
    return f"<tool_call>\n<function=f>\n{arguments}</function>\n</tool_call>"


def arguments_of(text: str, properties: dict[str, Any]) -> dict[str, Any] | None:
    rest, calls = find_calls(CODER, [tool("f", {"type": "object", "properties": properties})], text)
    assert rest == (None if calls else text)
    return json.loads(calls[0]["function"]["arguments"]) if calls else None


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "string"}, "", ""),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, "\n two\nlines \n", "\n two\nlines \n"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "None", None),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "3", "3"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "1"}, "1", "1"),
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, "three", "three"),
        ({"type": "number"}, " 1.5 ", 1.5),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "array"}, '["a", 1]', ["a", 1]),
        ({"type": "object"}, '{\n"a": {}\n}', {"a": {}}),
        ({"oneOf": [{"type": "object"}, {"type": "null"}]}, "null", None),
        ({}, "[1]", [1]),
        ({}, "words", "words"),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        (True, "1", 1),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
    ],
)
def test_a_text_is_the_value_that_its_schema_speaks_of(schema: Any, text: str, value: Any) -> None:
    assert arguments_of(spelled(x=text), {"x": schema}) == {"x": value}


def test_several_arguments_none_and_those_that_no_schema_lists() -> None:
    properties = {"a": {"type": "string"}, "b": {"type": "integer"}}
    assert arguments_of(spelled(b="1", a="x", c="2"), properties) == {"b": 1, "a": "x", "c": 2}
    assert arguments_of(spelled(), properties) == {}
    assert arguments_of("<tool_call><function=f></function></tool_call>", properties) == {}
    assert find_calls(CODER, [{"function": {"name": "f"}}], spelled(a="1"))[1][0]["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize("text", [spelled(x="NaN"), spelled(x="1")[:-30], spelled(x="1").replace(">\n1", "\n1")])
def test_a_call_that_no_client_could_read_is_text(text: str) -> None:
    assert arguments_of(text, {}) is None


@given(st.lists(st.sampled_from(["</parameter>", "</function>", "</tool_call>", "<tool_call>", "<", "x", "\n"])))
def test_a_value_may_hold_tags(pieces: list[str]) -> None:
    text = "".join(pieces).replace("</parameter></function>", "").replace("</parameter>\n", "")
    value = f"if x:\n{text}!"
    assert arguments_of(spelled(x=value, y="2"), {"x": {"type": "string"}}) == {"x": value, "y": 2}
