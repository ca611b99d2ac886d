"""Calls as Qwen 3 Coder and GLM 4.5 write them: texts become the values that the tool's parameters speak of."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_forms import CODER, GLM, TOOLS, tool

from llmrun.server.tools import ToolForm, find_calls


def spelled(**values: str) -> str:
    arguments = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in values.items())
    return f"<tool_call>\n<function=f>\n{arguments}</function>\n</tool_call>"


def keyed(**values: str) -> str:
    arguments = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n" for key, text in values.items())
    return f"<tool_call>f\n{arguments}</tool_call>"


def arguments_of(text: str, properties: dict[str, Any], form: ToolForm = CODER) -> dict[str, Any] | None:
    rest, calls = find_calls(form, [tool("f", {"type": "object", "properties": properties})], text)
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
    assert arguments_of(keyed(x=text), {"x": schema}, GLM) == {"x": value}


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


GLM_CALLS = [
    keyed(a="1", b="[2]"),
    keyed(a="1", b="[2]").replace("\n", ""),  # GLM 4.7
    keyed(a="1", b="[2]").replace("\n", "\n    "),
    keyed(a="1", b=" [2] ").replace("<arg_key>", " <arg_key> ").replace("</arg_key>", " </arg_key> "),
    "\n<tool_call>\nf\n" + keyed(a="1", b="[\n2]").partition("\n")[2],
]


@pytest.mark.parametrize("text", GLM_CALLS)
def test_white_space_between_tags_is_none_of_a_call(text: str) -> None:
    assert arguments_of(text, {"a": {"type": "string"}}, GLM) == {"a": "1", "b": [2]}


@pytest.mark.parametrize(
    "text", ["<tool_call>f\n</tool_call>", "<tool_call>f</tool_call>", "<tool_call> f \n\n</tool_call>"]
)
def test_a_call_without_arguments(text: str) -> None:
    assert arguments_of(text, {}, GLM) == {}


@pytest.mark.parametrize(
    "text",
    [
        keyed(x="NaN"),
        keyed(x="1").removesuffix("</tool_call>"),  # there may have been more arguments
        keyed(x="1").replace("</arg_value>", ""),
        keyed(x="1").replace("</arg_key>", ""),
        keyed(x="1").replace("<arg_value>", ""),
        keyed(x="1").replace("f\n", "f of\n"),
        keyed(x="1") + keyed(x="1")[:-20],
        "<tool_call>f more</tool_call>",
        "<tool_call>",
    ],
)
def test_what_is_no_whole_call_of_glm_is_text(text: str) -> None:
    assert arguments_of(text, {}, GLM) is None


TAGS_OF_GLM = ["</arg_value>!", "<arg_value>", "<arg_key>", "</tool_call>", "<tool_call>", "<", "x", "\n"]


@given(st.lists(st.sampled_from(TAGS_OF_GLM)))
def test_a_value_of_glm_may_hold_tags(pieces: list[str]) -> None:
    value = f"\nif x:\n{''.join(pieces)}! \n"
    assert arguments_of(keyed(x=value, y="2"), {"x": {"type": "string"}}, GLM) == {"x": value, "y": 2}


def test_calls_in_a_form_that_the_model_was_not_taught_are_text() -> None:
    for form, text in ((CODER, keyed(x="1")), (GLM, spelled(x="1"))):
        assert arguments_of(text, {}, form) is None


BEGUN = "<tool_call>now\n<arg_key>x</arg_key>\n<arg_value>"


@pytest.mark.parametrize(
    "text",
    [
        f"{BEGUN}{'</arg_value>' * 40_000}",
        f"{BEGUN}{'</arg_value><arg_key>x</arg_key><arg_value>' * 12_000}",
        f"{BEGUN}</arg_value></tool_call>." * 9_000,
        "<tool_call>now\n" * 30_000,
        f"<tool_call>now{' ' * 500_000}",
    ],
)
def test_no_answer_takes_long(text: str) -> None:
    begin = time.thread_time()
    assert find_calls(GLM, TOOLS, text) == (text, [])
    assert time.thread_time() - begin < 2  # quadratic: minutes
