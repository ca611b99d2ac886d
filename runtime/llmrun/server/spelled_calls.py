"""Calls as Qwen 3 Coder and GLM 4.5 write them, found in an answer: each argument stands between tags, as text.

    <tool_call>                     <tool_call>name
    <function=name>                 <arg_key>key</arg_key>
    <parameter=key>                 <arg_value>value</arg_value>
    value                           </tool_call>
    </parameter>
    </function>
    </tool_call>

GLM 4.7 and 5 leave out the line breaks. Text has no types: a value is what the tool's parameters say of it, and a string
where they allow one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

FUNCTION, PARAMETER, END = "<function=", "<parameter=", "</function>"
ARGUMENT, VALUE = ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>")
_END_OF_CALL = "</tool_call>"
_SPACE = re.compile(r"\s*")
_KEY = re.compile(r"([^>\n]{1,256})>")
# A value may be code that has such tags; the last one is followed by what may follow an argument.
_END_OF_VALUE = re.compile(rf"</parameter>(?=\s{{,64}}(?:{PARAMETER}|{END}))")
_GLM_NAME = re.compile(rf"\s{{,64}}([^<\n]{{1,256}})(?:\n\s{{,64}})?(?={ARGUMENT[0]}|{_END_OF_CALL})")
_GLM_KEY = re.compile(rf"{ARGUMENT[0]}([^<\n]{{1,256}}){ARGUMENT[1]}\s{{,64}}{VALUE[0]}")
_END_OF_GLM_VALUE = re.compile(rf"{VALUE[1]}\s{{,64}}(?={ARGUMENT[0]}|{_END_OF_CALL})")
_PYTHON = {"True": "true", "False": "false", "None": "null"}  # as the model's template writes them


def spelled_calls_at(text: str, start: int, parameters: Mapping[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """Return the calls that begin at `start`, name and arguments (JSON), and where they end; one is not whole: no calls.

    Args:
        text: an answer.
        start: where the calls begin, or the space before them.
        parameters: of each tool by its name, a JSON schema.
    """
    calls = []
    end = _after_space(text, start)
    while text.startswith(FUNCTION, end):
        call = _call_at(text, end + len(FUNCTION), parameters)
        if call is None:
            return [], start
        calls.append(call[:2])
        end = _after_space(text, call[2])
    return calls, end


def glm_call_at(text: str, start: int, parameters: Mapping[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """Return the call whose name begins at `start`, and where its closing tag stands; as `spelled_calls_at` otherwise."""
    match = _GLM_NAME.match(text, start)
    name = "" if match is None else match[1].strip()
    if match is None or name not in parameters:
        return [], start
    arguments, of_keys, at = {}, _properties(parameters[name]), match.end()
    while text.startswith(ARGUMENT[0], at):
        match = _GLM_KEY.match(text, at)
        end = None if match is None else _END_OF_GLM_VALUE.search(text, match.end())
        if match is None or end is None:
            return [], start
        key = match[1].strip()
        arguments[key] = _value(text[match.end() : end.start()], of_keys.get(key))
        at = end.end()
    written = _written(arguments)
    return ([], start) if written is None else ([(name, written)], at)


def _call_at(text: str, at: int, parameters: Mapping[str, Any]) -> tuple[str, str, int] | None:
    """Return name, arguments (JSON) and end of the call whose name begins at `at`; None if it is of no tool, or cut off."""
    match = _KEY.match(text, at)
    if match is None or match[1] not in parameters:
        return None
    name, arguments, of_keys = match[1], {}, _properties(parameters[match[1]])
    at = _after_space(text, match.end())
    while text.startswith(PARAMETER, at):
        match = _KEY.match(text, at + len(PARAMETER))
        end = None if match is None else _END_OF_VALUE.search(text, match.end())
        if match is None or end is None:
            return None
        value = text[match.end() : end.start()].removeprefix("\n").removesuffix("\n")
        arguments[match[1]] = _value(value, of_keys.get(match[1]))
        at = _after_space(text, end.end())
    if not text.startswith(END, at):
        return None
    written = _written(arguments)
    return None if written is None else (name, written, at + len(END))


def _written(arguments: dict[str, Any]) -> str | None:
    """Return arguments as JSON; None if they have no such form."""
    try:
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):  # NaN and 1e999 are Python's only
        return None


def _properties(schema: Any) -> dict[str, Any]:
    """Return the schemas of a tool's parameters by their names, as far as its own lists them."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else {}


def _value(text: str, schema: Any) -> Any:
    """Return the value that a text stands for."""
    types = _types(schema)
    word = _PYTHON.get(text.strip(), text)
    if "string" in types and not ("null" in types and word.strip() == "null"):
        return text
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        return text


def _types(schema: Any) -> set[str]:
    """Return the types that a schema speaks of."""
    if not isinstance(schema, dict):
        return set()
    kind, listed = schema.get("type"), schema.get("enum")
    types = {name for name in (kind if isinstance(kind, list) else [kind]) if isinstance(name, str)}
    if any(isinstance(value, str) for value in (listed if isinstance(listed, list) else [schema.get("const")])):
        types.add("string")
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        types = types.union(*map(_types, parts if isinstance(parts, list) else []))
    return types


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()
