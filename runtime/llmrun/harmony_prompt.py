"""Messages and tools of a chat as gpt-oss's template takes them: one call in each of the assistant's messages.

The template has thoughts as `thinking`, and those of a message with a call in place of its content. A result is that of the
call before it. Messages that clients send have several calls, of another model's answers, say, and text before a call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["template_messages", "template_tools"]


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with thoughts under the template's name, and with each call before its own result."""
    turns: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        turn = dict(messages[at])
        at += 1
        if turn["role"] != "assistant":
            turns.append(turn)
            continue
        thought, calls = turn.pop("reasoning_content", None), turn.pop("tool_calls", None) or []
        if thought:
            turn["thinking"] = thought
        if not calls:
            turns.append(turn)
            continue
        if thought and turn["content"]:
            turn |= {"thinking": f"{thought}\n\n{turn['content']}", "content": ""}
        results = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(dict(messages[at]))
            at += 1
        for call in calls:
            turns.append({**turn, "tool_calls": [call]})
            turn = {"role": "assistant", "content": ""}
            if len(calls) > 1 and results:
                turns.append(results.pop(_place(call, results)))
        turns += results
    return turns


def template_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools with a description and with defaults of choices as text: the template adds to them as such."""
    described = []
    for tool in tools:
        function: dict[str, Any] = {"description": "", **tool.get("function", {})}
        parameters = function.get("parameters")
        if isinstance(parameters, Mapping) and isinstance(properties := parameters.get("properties"), Mapping):
            written = {name: _with_written_default(schema) for name, schema in properties.items()}
            function["parameters"] = {**parameters, "properties": written}
        described.append({**tool, "function": function})
    return described


def _with_written_default(schema: Any) -> Any:
    if not isinstance(schema, Mapping) or not (schema.get("enum") or schema.get("oneOf")):
        return schema
    if isinstance(schema.get("default", ""), str):
        return schema
    return {**schema, "default": json.dumps(schema["default"], ensure_ascii=False)}


def _place(call: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> int:
    """Return which of the results is a call's: the one that names it, else the next."""
    name = call.get("id")
    return next((i for i, result in enumerate(results) if name and result.get("tool_call_id") == name), 0)
