"""Tools: whether the model's template knows them, the form in which it calls them, and calls found in an answer.

Two forms occur among Llama models: Llama 3's `{"name": ..., "parameters": {...}}`, several joined by ";", and Hermes'
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Which one a model was trained on is read off its template.
"""

from __future__ import annotations

import functools
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrun.server.errors import bad

if TYPE_CHECKING:
    from llmrun.tokenizer import Tokenizer

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BLOCK = re.compile(rf"{_OPEN}\s*(.*?)\s*(?:{_CLOSE}|\Z)", re.DOTALL)
MAX_CALLS = 64


@dataclass(frozen=True)
class ToolForm:
    """How a model calls tools: the key of the arguments, and the tags around a call (empty: none)."""

    key: str
    opening: str = ""
    closing: str = ""


@functools.lru_cache(maxsize=4)
def _names_in(template: str) -> frozenset[str]:
    from jinja2 import Environment, TemplateError, meta

    try:
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # parsed, never rendered
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except (TemplateError, RecursionError):
        return frozenset()


def tool_form(tokenizer: Tokenizer | None) -> ToolForm | None:
    """Return how the model calls tools; None if its template does not know them."""
    template = None if tokenizer is None else tokenizer.chat_template
    if tokenizer is None or template is None or "tools" not in _names_in(template):
        return None
    if _OPEN in template:
        # As a special token the tag is not part of any text, so neither the grammar nor the answer's text has it.
        has_tags = _OPEN not in tokenizer.special_tokens
        return ToolForm("arguments", _OPEN + "\n", "\n" + _CLOSE) if has_tags else ToolForm("arguments")
    return ToolForm("parameters" if '"parameters"' in template or "'parameters'" in template else "arguments")


def call_grammar(form: ToolForm, tools: Sequence[Mapping[str, Any]], choice: str) -> tuple[str, Any]:
    """Return the grammar of exactly one call: of any tool, or of the one after "=" in `choice`."""
    schemas = []
    for tool in tools:
        function = tool["function"]
        if choice.startswith("=") and function["name"] != choice[1:]:
            continue
        properties = {
            "name": {"const": function["name"]},
            form.key: function.get("parameters") or {"type": "object"},
        }
        schemas.append(
            {"type": "object", "properties": properties, "required": ["name", form.key], "additionalProperties": False}
        )
    schema, definitions = _hoisted(schemas, form.key)
    if not form.opening:
        return "json", {**schema, **definitions}
    text = json.dumps({**schema, **definitions})
    return "grammar", f"start: {json.dumps(form.opening)} call {json.dumps(form.closing)}\ncall: %json {text}\n"


def _hoisted(schemas: list[dict[str, Any]], key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return one schema of many, and the definitions that the tools' own schemas refer to, at its root."""
    definitions: dict[str, dict[str, Any]] = {}
    for schema in schemas:
        parameters = schema["properties"][key]
        for name in ("$defs", "definitions"):
            if isinstance(parameters.get(name), dict):
                for item, value in parameters[name].items():
                    if definitions.setdefault(name, {}).setdefault(item, value) != value:
                        raise bad(f"two tools define {name}/{item[:60]} differently.", "tools")
    return (schemas[0] if len(schemas) == 1 else {"anyOf": schemas}), definitions


def may_be_call(form: ToolForm, text: str) -> bool:
    """Tell whether an answer that begins with `text` may still turn out to be a call."""
    start = text.lstrip()
    return not start or start.startswith("{") or _OPEN.startswith(start[: len(_OPEN)])


def find_calls(
    form: ToolForm, tools: Sequence[Mapping[str, Any]], text: str
) -> tuple[str | None, list[dict[str, Any]]]:
    """Return what an answer says beside its calls, and the calls, as OpenAI has them; no call: all of the text.

    Only calls of tools that the request offered count: anything else is text.
    """
    names = {tool["function"]["name"] for tool in tools}
    stripped = text.strip()
    calls: list[dict[str, Any]] = []
    rest = ""
    if _OPEN in stripped:
        for match in _BLOCK.finditer(stripped):
            found = _calls_in(match[1], names)
            if not found:
                return text, []
            calls += found
        rest = _BLOCK.sub("", stripped).strip()
    elif stripped.startswith("{"):
        calls = _calls_in(stripped, names)
    if not calls or len(calls) > MAX_CALLS:
        return text, []
    return rest or None, calls


def _calls_in(text: str, names: set[str]) -> list[dict[str, Any]]:
    """Return the calls of a text that holds nothing else: JSON objects, maybe with ";" or "," between them."""
    decoder = json.JSONDecoder()
    calls: list[dict[str, Any]] = []
    end = 0
    while end < len(text):
        try:
            value, end = decoder.raw_decode(text, end)
        except (ValueError, RecursionError):
            return []
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in names:
            return []
        arguments = value.get("parameters", value.get("arguments", {}))
        if isinstance(arguments, str):
            arguments_text = arguments
        elif isinstance(arguments, dict):
            arguments_text = json.dumps(arguments, ensure_ascii=False)
        else:
            return []
        function = {"name": name, "arguments": arguments_text}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        while end < len(text) and text[end] in " \t\r\n;,":
            end += 1
    return calls


class ToolStream:
    """The text of one answer as it comes, with calls held back until the end; see `find_calls`."""

    def __init__(self, form: ToolForm, tools: Sequence[Mapping[str, Any]]) -> None:
        self._form, self._tools = form, tools
        self._held = ""
        self._is_text = False  # the answer did not begin as a call

    def push(self, text: str) -> str:
        """Take more text; return what is certainly not part of a call."""
        self._held += text
        if not self._is_text and may_be_call(self._form, self._held):
            return ""
        self._is_text = True
        at = self._held.find(_OPEN)
        if at < 0:  # keep an end that may be the beginning of a tag
            at = next(
                (
                    i
                    for i in range(max(0, len(self._held) - len(_OPEN) + 1), len(self._held))
                    if _OPEN.startswith(self._held[i:])
                ),
                len(self._held),
            )
        piece, self._held = self._held[:at], self._held[at:]
        return piece

    def finish(self) -> tuple[str | None, list[dict[str, Any]]]:
        """Return the rest of the text and the calls."""
        held, self._held = self._held, ""
        return find_calls(self._form, self._tools, held)
