"""Messages of a chat to the ids of a prompt."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmrun.chat import encode_chat
from llmrun.errors import UsageError
from llmrun.server.errors import ApiError, bad
from llmrun.server.json_body import parse_json
from llmrun.server.tools import ToolForm, tool_form
from llmrun.tokenizer import Tokenizer

# Roles of results in a template.
_TOOL_RESPONSE, _TOOL = re.compile(r"""==\s*['"]tool_response['"]"""), re.compile(r"""['"]tool['"]""")


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    *,
    max_depth: int,
    add_generation_prompt: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the prompt's ids.

    The arguments of calls, which are JSON in a text, reach the template as an object, unless they are none or nested
    more than `max_depth` deep: then as the text. To a template that knows tools and has no place for calls (Granite 3's)
    they are text, as the model wrote them. Results are of the role `tool_response` where it knows that one alone.

    Raises:
        ApiError: 400: a message holds something else than text, or arguments as text, which the template does not take.
        UsageError: the template refuses the messages.
    """
    flat = [_flat(message, f"messages[{i}]", max_depth) for i, message in enumerate(messages)]
    broken = _broken_arguments(flat)
    template = tokenizer.chat_template or ""
    if _TOOL_RESPONSE.search(template) and not _TOOL.search(template):
        for message in flat:
            message["role"] = "tool_response" if message["role"] == "tool" else message["role"]
    form = tool_form(tokenizer) if tools or any("tool_calls" in message for message in flat) else None
    if tools and form is not None and form.tells_by_system:
        flat = _told_by_system(flat, tools)
    has_place = "tool_calls" in template
    try:
        return encode_chat(
            tokenizer,
            flat,
            add_generation_prompt=add_generation_prompt,
            tools=tools or None,
            chat_template_kwargs=chat_template_kwargs,
            written_calls=None if form is None or has_place else functools.partial(_written, form),
        )
    except UsageError as error:
        if broken is None:
            raise
        raise bad(f"{broken} is not the text of a JSON object, which may be why: {error}", broken) from error


def _flat(message: dict[str, Any], where: str, max_depth: int) -> dict[str, Any]:
    """Return a message as templates expect it: content as text, arguments of calls as objects where they are."""
    content = message.get("content")
    if isinstance(content, list):
        texts = []
        for i, part in enumerate(content):
            if part["type"] != "text" or "text" not in part:
                raise bad(
                    f"{where}.content[{i}] is of type {part['type'][:40]!r}: this model only reads text.",
                    f"{where}.content",
                )
            texts.append(part["text"])
        content = "".join(texts)
    calls = message.get("tool_calls", [])
    # Of a stream that had no text a client makes null, and sends it back with the next turn.
    if content is None and message["role"] != "assistant":
        raise bad(f"{where}.content is missing.", f"{where}.content", "missing_required_parameter")
    role = "system" if message["role"] == "developer" else message["role"]
    flat: dict[str, Any] = {"role": role, "content": content or ""}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in message:
            flat[name] = message[name]
    if calls:
        flat["tool_calls"] = [_call(call, max_depth) for call in calls]
    return flat


def _told_by_system(messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages of which the first, a system message, has the tools as Phi 4 mini was taught them."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant with some tools."}, *messages]
    described = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return [{**messages[0], "tools": described}, *messages[1:]]


def _call(call: dict[str, Any], max_depth: int) -> dict[str, Any]:
    function = call["function"]
    text = function["arguments"]
    try:
        arguments = parse_json((text or "{}").encode(), max_depth=max_depth)
    except ApiError:
        arguments = text
    if not isinstance(arguments, dict):  # what a model has written, which it may be told
        arguments = text
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _broken_arguments(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return where the first arguments stand that are no object; None if all are."""
    for i, message in enumerate(messages):
        for j, call in enumerate(message.get("tool_calls", ())):
            if isinstance(call["function"]["arguments"], str):
                return f"messages[{i}].tool_calls[{j}].function.arguments"
    return None


def _written(form: ToolForm, calls: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """Return calls as the model writes them: texts, and whether special tokens in each are tokens."""
    if not calls:
        return []
    between = [(", ", False)] if form.opening.endswith("[") else [(form.closing or "; ", True), (form.opening, True)]
    pieces = [(form.opening, True)]
    for i, function in enumerate(call["function"] for call in calls):
        name, arguments = function["name"], function["arguments"]
        pieces += between if i else []
        if form.key:
            pieces.append((json.dumps({"name": name, form.key: arguments}, ensure_ascii=False), False))
        else:
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            pieces += [(name, False), (form.middle, True), (written, False)]
    return [*pieces, (form.closing, True)]
