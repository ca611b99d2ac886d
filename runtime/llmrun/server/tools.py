"""Tools: whether the model's template knows them, the form in which it calls them, and calls found in an answer.

Which form a model was trained on is read off its template:

    Llama 3       {"name": ..., "parameters": {...}}, several joined by ";"
    Hermes, Qwen  <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one after the other
    Qwen 3 Coder  <function=name> with arguments between tags, maybe in Hermes' (`spelled_calls.py`); if demanded, Hermes' form
    GLM 4.5       <tool_call>name with arguments between tags (there, too); if demanded, Hermes' form
    Mistral       [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]; later [TOOL_CALLS]name[ARGS]{...}, one after the other
    Functionary   <function=name>{...}</function>, one after the other
    Granite 3     <|tool_call|>[{"name": ..., "arguments": {...}}, ...]; what it writes may begin with <tool_call>[ instead
    Phi 4 mini    <|tool_call|>[...]<|/tool_call|>, or <|tool_call|>{...}<|/tool_call|>, one after the other
    gpt-oss       a message to the tool (`llmrun.harmony`)

Tags that are special tokens are part of the answer's text here (`ToolForm.shown_tokens`). What a model thinks before it
answers (`llmrun.thoughts`) makes no calls, whatever it says of them.
"""

from __future__ import annotations

import functools
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmrun.harmony import CONSTRAIN, MESSAGE, call_spelling, speaks_harmony
from llmrun.server.errors import bad
from llmrun.server.grammar import JSON_OPTIONS
from llmrun.server.json_body import parse_json
from llmrun.server.json_schema import changed_schema, check_size, checked_schema, closed_schema
from llmrun.server.limits import Limits
from llmrun.server.spelled_calls import ARGUMENT, FUNCTION, PARAMETER, VALUE, glm_call_at, spelled_calls_at
from llmrun.tokenizer_backends import alternation

if TYPE_CHECKING:
    from llmrun.tokenizer import Tokenizer

_HERMES, _MISTRAL, _FUNCTION, _GRANITE = "<tool_call>", "[TOOL_CALLS]", FUNCTION, "<|tool_call|>"
_CLOSINGS = {_HERMES: "</tool_call>", _MISTRAL: "", _FUNCTION: "</function>", _GRANITE: "<|/tool_call|>"}
_BETWEEN = re.compile(r"[ \t\r\n;,]*")
_LIST = re.compile(re.escape(_MISTRAL) + r"\s*\[(?=[\s\"'{]|\Z)")  # as a template has it, in a literal or ending one
_OBJECT = re.compile(re.escape(_GRANITE) + r"\s*\{\s*\\?\"")  # as llama.cpp's template for Phi 4 mini tells the model
_OF_MESSAGE = re.compile(r"""\bmessage(?:\.tools\b|\[['"]tools['"]\])""")  # as Phi 4 mini's own template has tools
# What stands between name and arguments, behind tags that a name may follow; with bounds, so that no text takes long.
_MIDDLES = {
    _MISTRAL: re.compile(r"\s{,8}(?:\[CALL_ID\]\s{,8}\w{,64}\s{,8})?(?:\[ARGS\]\s{,8})?(?=\{)"),
    _FUNCTION: re.compile(r"\s{,8}>\s{,8}(?=\{)"),
}
MAX_CALLS = 64


@dataclass(frozen=True)
class ToolForm:
    """How a model calls tools.

    Attributes:
        key: of the arguments, in an object that has the tool's name as well; empty: the name stands before the arguments.
        opening, closing: what stands around a call, or around its name and arguments.
        middle: what stands between name and arguments.
        tag: what tells a call from text; empty: its first brace.
        tokens: those of its tags that are special tokens of the tokenizer, and their ids.
        tells_by_system: the template takes the tools as JSON in the system message, not as a variable.
        is_spelled: the model was taught to write calls as Qwen 3 Coder does.
        is_glm: the model was taught to write calls as GLM 4.5 does.
        answer: what stands before an answer that is no call.
    """

    key: str = ""
    opening: str = ""
    closing: str = ""
    middle: str = ""
    tag: str = ""
    tokens: tuple[tuple[str, int], ...] = ()
    tells_by_system: bool = False
    is_spelled: bool = False
    is_glm: bool = False
    answer: str = ""

    @property
    def shown_tokens(self) -> dict[int, str]:
        """The special tokens that are part of an answer's text here."""
        return {token_id: text for text, token_id in self.tokens}

    @property
    def tags(self) -> tuple[str, ...]:
        """What may begin a call: any model may have learnt Hermes' form, the commonest."""
        return tuple(dict.fromkeys((_HERMES, *filter(None, [self.tag]), *([_FUNCTION] * self.is_spelled))))

    def new_id(self) -> str:
        """Return an id for a call; Mistral's templates take none but of nine letters and digits."""
        return uuid.uuid4().hex[:9] if self.tag == _MISTRAL else f"call_{uuid.uuid4().hex[:24]}"

    def call(self, name: str, arguments: str) -> dict[str, Any]:
        """Return a call as OpenAI has it."""
        return {"id": self.new_id(), "type": "function", "function": {"name": name, "arguments": arguments}}


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
    if tokenizer is None or template is None:
        return None
    tells_by_system = "tools" not in (names := _names_in(template))
    if tells_by_system and not ("messages" in names and _OF_MESSAGE.search(template)):
        return None
    special = tokenizer.special_tokens
    is_spelled = _FUNCTION in template and PARAMETER in template

    def tokens(*tags: str) -> tuple[tuple[str, int], ...]:
        return tuple((tag, special[tag]) for tag in tags if tag in special)

    if speaks_harmony(tokenizer):
        return ToolForm(tokens=tokens(CONSTRAIN, MESSAGE), **call_spelling(tokenizer))
    if _HERMES in template:
        closing = _CLOSINGS[_HERMES]
        form = ToolForm("arguments", f"{_HERMES}\n", f"\n{closing}", tag=_HERMES, tokens=tokens(_HERMES, closing))
        if ARGUMENT[0] in template and VALUE[0] in template:
            return replace(form, tokens=tokens(_HERMES, closing, *ARGUMENT, *VALUE), is_glm=True)
        return replace(form, is_spelled=is_spelled)
    if _MISTRAL in template:
        if "[ARGS]" in template:
            known = tokens(_MISTRAL, "[CALL_ID]", "[ARGS]")
            return ToolForm(opening=_MISTRAL, middle="[ARGS]", tag=_MISTRAL, tokens=known)
        found = _LIST.search(template)
        opening = f"{_MISTRAL}[" if found is None else found[0]
        return ToolForm("arguments", opening, "]", tag=_MISTRAL, tokens=tokens(_MISTRAL))
    if _GRANITE in template or tells_by_system:
        opening, closing = (_GRANITE, "") if _OBJECT.search(template) else (f"{_GRANITE}[", "]")
        if _CLOSINGS[_GRANITE] in template or tells_by_system:
            closing += _CLOSINGS[_GRANITE]
        known = tokens(_GRANITE, _CLOSINGS[_GRANITE])
        return ToolForm("arguments", opening, closing, tag=_GRANITE, tokens=known, tells_by_system=tells_by_system)
    if _FUNCTION in template and not is_spelled:
        closing = _CLOSINGS[_FUNCTION]
        return ToolForm(opening=_FUNCTION, closing=closing, middle=">", tag=_FUNCTION, tokens=tokens(closing))
    key = "parameters" if '"parameters"' in template or "'parameters'" in template else "arguments"
    return ToolForm(key, is_spelled=is_spelled)


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
    names, definitions = [], {}
    is_strict = True
    functions = [tool["function"] for tool in tools]
    if choice.startswith("="):
        functions = [function for function in functions if function["name"] == choice[1:]]
    check_size([function.get("parameters") for function in functions], limits, "tools")
    for i, function in enumerate(functions):
        is_strict &= function.get("strict", False)
        parameters = function.get("parameters") or {"properties": {}}  # OpenAI: none are none at all
        if parameters.get("type", "object") != "object":
            raise bad(
                f"the parameters of {function['name']!r} are of type {str(parameters['type'])[:60]}: expected object.",
                "tools",
            )
        names.append((function["name"], f"#/$defs/{i}"))
        definitions[str(i)] = {**_moved(closed_schema(parameters), f"#/$defs/{i}"), "type": "object"}
    calls = [_call_schema(form, name, root) for name, root in names]
    schema = {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}
    schema["x-guidance"] = JSON_OPTIONS | ({} if is_strict else {"lenient": True})
    schema = checked_schema(schema, limits, "tools")
    if not form.opening and answer is None:
        return "json", schema
    opening, closing = _in_grammar(form, form.opening), _in_grammar(form, form.closing)
    if form.key:
        starts = [f"{opening} call {closing}"]
        rules = [f"call: %json {json.dumps(schema)}"]
    else:
        starts = [f"{opening} ({' | '.join(f'call_{i}' for i in range(len(names)))}) {closing}"]
        rules = []
        for i, (name, root) in enumerate(names):
            number = root.removeprefix("#/$defs/")
            own = {"$ref": root, "$defs": {number: schema["$defs"][number]}, "x-guidance": schema["x-guidance"]}
            rules.append(f"call_{i}: {_literal(name)} {_in_grammar(form, form.middle)} arguments_{i}")
            rules.append(f"arguments_{i}: %json {json.dumps(own)}")
    if answer is not None:
        if isinstance(answer, str):
            answer = parse_json(answer.encode(), max_depth=limits.max_schema_depth)
        answer = {"x-guidance": JSON_OPTIONS, **(answer if isinstance(answer, dict) else {"anyOf": [answer]})}
        starts.append(f"{_in_grammar(form, form.answer)} answer".strip())
        rules.append(f"answer: %json {json.dumps(answer)}")
    return "grammar", "\n".join([f"start: {' | '.join(starts)}", *rules, ""])


def _call_schema(form: ToolForm, name: str, root: str) -> dict[str, Any]:
    if not form.key:
        return {"$ref": root}
    properties = {"name": {"const": name}, form.key: {"$ref": root}}
    return {"type": "object", "properties": properties, "required": ["name", form.key], "additionalProperties": False}


def _in_grammar(form: ToolForm, text: str) -> str:
    """Return a text as a grammar has it: literals, and special tokens by their ids."""
    tokens = dict(form.tokens)
    pieces = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]
    return " ".join(f"<[{tokens[piece]}]>" if piece in tokens else _literal(piece) for piece in pieces if piece)


def _literal(text: str) -> str:
    return json.dumps(text).replace("%", r"\u0025")  # a name may not look like %json


def _moved(schema: Any, root: str) -> Any:
    """Return a schema with its references, which are from its own root "#", made from `root`.

    A base of its own (`$id`) goes: llmrun reads no other documents, and within it "#" would mean something else.
    """

    def move(inner: dict[str, Any]) -> None:
        target = inner.get("$ref")
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            inner["$ref"] = root + target[1:]
        for name in ("$id", "$schema"):
            inner.pop(name, None)

    return changed_schema(schema, move)


def find_calls(
    form: ToolForm, tools: Sequence[Mapping[str, Any]], text: str
) -> tuple[str | None, list[dict[str, Any]]]:
    """Return what an answer says beside its calls, and the calls, as OpenAI has them; no call: all of the text.

    Only calls of tools that the request offered count: anything else is text. Bare objects and Hermes' form do, whichever
    the template shows.
    """
    parameters = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    names = set(parameters)
    stripped = text.strip()
    rest = ""
    calls, at = _objects_at(stripped, 0, names)  # first, because an argument may hold what looks like a tag
    if not calls or at < len(stripped):
        calls, at = [], 0
        while (found := first_tag(form, stripped, at)) is not None:
            start, tag = found
            rest += stripped[at:start]
            closing = _CLOSINGS[tag]
            find = glm_call_at if form.is_glm else spelled_calls_at
            some, at = find(stripped, start + (tag != _FUNCTION) * len(tag), parameters)
            if some:
                closing = _CLOSINGS[_HERMES]
            else:
                some, at = _tagged_at(stripped, start + len(tag), tag, names)
            is_closed = stripped.startswith(closing, at)
            # Granite closes nothing, and a spelled call ends by itself.
            if not some or not (is_closed or at == len(stripped) or tag == _GRANITE or closing != _CLOSINGS[tag]):
                return text, []
            calls += some
            at += len(closing) if is_closed else 0
            if len(calls) > MAX_CALLS:
                break
        rest = (rest + stripped[at:]).strip()
    if not calls or len(calls) > MAX_CALLS:
        return text, []
    return rest or None, [form.call(name, arguments) for name, arguments in calls]


def first_tag(form: ToolForm, text: str, start: int) -> tuple[int, str] | None:
    """Return where the first tag that may begin a call stands, and the tag; None: there is none."""
    match = alternation(form.tags).search(text, start)
    return None if match is None else (match.start(), match[0])


def _tagged_at(text: str, start: int, tag: str, names: set[str]) -> tuple[list[tuple[str, str]], int]:
    """Return the calls behind a tag, name and arguments, and where they end; no calls: `_objects_at`."""
    if (named := _name_at(text, start, tag, names)) is not None:
        name, start = named
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            return [], start
        arguments = _arguments(value)
        return ([], end) if arguments is None else ([(name, arguments)], _after_space(text, end))
    start = _after_space(text, start)
    if tag == _GRANITE and text.startswith(_HERMES, start):
        start = _after_space(text, start + len(_HERMES))
    if not text.startswith("[", start):
        return _objects_at(text, start, names)
    calls, end = _objects_at(text, start + 1, names)
    return calls, _after_space(text, end + text.startswith("]", end))


def _name_at(text: str, start: int, tag: str, names: set[str]) -> tuple[str, int] | None:
    """Return the tool's name that stands behind a tag, and where its arguments begin; None if none does."""
    if tag not in _MIDDLES:
        return None
    for at in (start, _after_space(text, start)):
        for name in sorted(names, key=len, reverse=True):  # of names that begin alike, the whole one
            if text.startswith(name, at) and (match := _MIDDLES[tag].match(text, at + len(name))):
                return name, match.end()
    return None


def _objects_at(text: str, start: int, names: set[str]) -> tuple[list[tuple[str, str]], int]:
    """Return the calls that begin at `start`, and where they end: JSON objects, maybe with ";" or "," between them.

    An object that calls none of the tools: no calls.
    """
    decoder = json.JSONDecoder()
    calls: list[tuple[str, str]] = []
    end = _after_space(text, start)
    while text.startswith("{", end):
        try:
            value, end = decoder.raw_decode(text, end)
        except (ValueError, RecursionError):
            return [], end
        name = value.get("name")
        arguments = _arguments(value.get("parameters", value.get("arguments", {})))
        if not isinstance(name, str) or name not in names or arguments is None:
            return [], end
        calls.append((name, arguments))
        end = _after_space(text, end)
    return calls, end


def _arguments(value: Any) -> str | None:
    """Return the arguments of a call, an object or its text, as text; None if they are neither."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        written = json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):  # NaN and 1e999 are Python's only, and nothing that a client can read
        return None
    if not isinstance(found, dict):
        return None
    return value if isinstance(value, str) else written


def _after_space(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    return at if match is None else match.end()
