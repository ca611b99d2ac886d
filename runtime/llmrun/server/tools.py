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
from llmrun.server.grammar import JSON_OPTIONS
from llmrun.server.json_body import parse_json
from llmrun.server.json_schema import MAPS_OF_SCHEMAS, VALUES, checked_schema, closed_schema, without_odd_patterns
from llmrun.server.limits import Limits

if TYPE_CHECKING:
    from llmrun.tokenizer import Tokenizer

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BETWEEN = re.compile(r"[ \t\r\n;,]*")
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

    from llmrun.template_tags import template_extensions

    try:
        environment = Environment(extensions=template_extensions())  # parsed, never rendered
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


def call_grammar(
    form: ToolForm, tools: Sequence[Mapping[str, Any]], choice: str, limits: Limits, *, answer: Any = None
) -> tuple[str, Any]:
    """Return the grammar of exactly one call: of any tool, or of the one after "=" in `choice`.

    What the library does not know of a tool's schema is left out of the grammar, unless all of these tools are strict.

    Args:
        form: how the model calls tools.
        tools: the request's.
        choice: the request's, as `ChatCall` has it.
        limits: the server's.
        answer: a JSON schema, or its text; the model may answer with a value of it instead.
    Raises:
        ApiError: 400: a tool's parameters are beyond the limits, or are not those of an object.
    """
    calls, definitions = [], {}
    is_strict = True
    for i, tool in enumerate(tools):
        function = tool["function"]
        if choice.startswith("=") and function["name"] != choice[1:]:
            continue
        is_strict &= function.get("strict", False)
        parameters = function.get("parameters") or {"properties": {}}  # OpenAI: none are none at all
        if parameters.get("type", "object") != "object":
            raise bad(
                f"the parameters of {function['name']!r} are of type {str(parameters['type'])[:60]}: expected object.",
                "tools",
            )
        if not function.get("strict", False):
            parameters = without_odd_patterns(parameters)
        root = f"#/$defs/{i}"
        definitions[str(i)] = {**_moved(closed_schema(parameters), root), "type": "object"}
        properties = {"name": {"const": function["name"]}, form.key: {"$ref": root}}
        calls.append(
            {"type": "object", "properties": properties, "required": ["name", form.key], "additionalProperties": False}
        )
    schema = {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}
    schema = checked_schema(schema, limits, "tools")
    schema = {**schema, "x-guidance": JSON_OPTIONS | ({} if is_strict else {"lenient": True})}
    if not form.opening and answer is None:
        return "json", schema
    edges = [json.dumps(tag) for tag in (form.opening, form.closing) if tag]
    forms, rules = [" call ".join(edges) or "call"], [f"call: %json {json.dumps(schema)}"]
    if answer is not None:
        if isinstance(answer, str):
            answer = parse_json(answer.encode(), max_depth=limits.max_schema_depth)
        answer = {"x-guidance": JSON_OPTIONS, **(answer if isinstance(answer, dict) else {"anyOf": [answer]})}
        forms.append("answer")
        rules.append(f"answer: %json {json.dumps(answer)}")
    return "grammar", "\n".join([f"start: {' | '.join(forms)}", *rules, ""])


def _moved(schema: Any, root: str) -> Any:
    """Return a schema with its references, which are from its own root "#", made from `root`.

    A base of its own (`$id`) goes: llmrun reads no other documents, and within it "#" would mean something else.
    """
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[name] = root + value[1:]
        elif name in MAPS_OF_SCHEMAS and isinstance(value, dict):
            moved[name] = {key: _moved(item, root) for key, item in value.items()}
        elif name in VALUES:
            moved[name] = value
        elif name not in ("$id", "$schema"):
            moved[name] = _moved(value, root)
    return moved


def may_be_call(text: str) -> bool:
    """Tell whether an answer that begins with `text` may still turn out to be a call."""
    start = text.lstrip()
    return not start or start.startswith("{") or _OPEN.startswith(start[: len(_OPEN)])


def find_calls(tools: Sequence[Mapping[str, Any]], text: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Return what an answer says beside its calls, and the calls, as OpenAI has them; no call: all of the text.

    Only calls of tools that the request offered count: anything else is text. Both forms do, whichever the template shows.
    """
    names = {tool["function"]["name"] for tool in tools}
    stripped = text.strip()
    rest = ""
    calls, at = _calls_at(stripped, 0, names)  # first, because an argument may hold what looks like a tag
    if not calls or at < len(stripped):
        calls, at = [], 0
        while (start := stripped.find(_OPEN, at)) >= 0:
            rest += stripped[at:start]
            found, at = _calls_at(stripped, start + len(_OPEN), names)
            if not found or not (at == len(stripped) or stripped.startswith(_CLOSE, at)):
                return text, []
            calls += found
            at += len(_CLOSE)
        rest = (rest + stripped[at:]).strip()
    if not calls or len(calls) > MAX_CALLS:
        return text, []
    return rest or None, calls


def _calls_at(text: str, start: int, names: set[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the calls that begin at `start`, and where they end: JSON objects, maybe with ";" or "," between them.

    An object that calls none of the tools: no calls.
    """
    decoder = json.JSONDecoder()
    calls: list[dict[str, Any]] = []
    end = _after_space(text, start)
    while text.startswith("{", end):
        try:
            value, end = decoder.raw_decode(text, end)
        except (ValueError, RecursionError):
            return [], end
        name = value.get("name")
        if not isinstance(name, str) or name not in names:
            return [], end
        arguments = value.get("parameters", value.get("arguments", {}))
        if isinstance(arguments, str):
            if not _is_object(arguments):
                return [], end
            arguments_text = arguments
        elif isinstance(arguments, dict):
            try:
                arguments_text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            except (ValueError, RecursionError):  # NaN and 1e999 are Python's only, and nothing that a client can read
                return [], end
        else:
            return [], end
        function = {"name": name, "arguments": arguments_text}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        end = _after_space(text, end)
    return calls, end


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _after_space(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    return at if match is None else match.end()


class ToolStream:
    """The text of one answer as it comes, with calls held back until the end; see `find_calls`."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], *, has_grammar: bool = False) -> None:
        """`has_grammar`: a call is between tags and nothing beside it, and what begins otherwise has none."""
        self._tools = tools
        self._has_grammar = has_grammar
        self._held = ""
        self._is_text = False  # the answer did not begin as a call

    def push(self, text: str) -> str:
        """Take more text; return what is certainly not part of a call."""
        self._held += text
        if self._has_grammar:
            self._is_text |= not _OPEN.startswith(self._held[: len(_OPEN)])
            piece, self._held = (self._held, "") if self._is_text else ("", self._held)
            return piece
        if not self._is_text and may_be_call(self._held):
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
        return find_calls(self._tools, held)
